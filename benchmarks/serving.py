"""`rtresnet serve` next to LitServe, Ray Serve and the bare `Batcher`, on the same ONNX file.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install -c constraints.txt litserve 'ray[serve]' onnx '.[cpu]'
    python benchmarks/serving.py --peers /tmp/peers/bin/python [--seconds 8] [--rounds 3]

All run the session with one thread of ONNX Runtime on this machine, form batches of at most 8, and
wait at most 2 ms for the first image's batch. Requests and answers are binary where the server
allows it (LitServe takes JSON, so its images come in base64). The client sends over kept-alive
connections on loopback and compares every answer. `Batcher` gets the same arrivals in the client's
own process. LitServe and Ray Serve are configured as their documentation recommends for throughput.

- ResNet-18, 224 px, INT8: the highest rate of Poisson arrivals whose p99 is at most 50 ms, counted
  from the intended arrival, by bisection in steps of 5 % of `Batcher`'s throughput. Goals: 0.9 of
  `Batcher`'s rate, 1.3 times the better peer's. A machine with other work cannot hold 50 ms at any
  rate: `--p99` sets another limit.
- ResNet-20, 32 px, FP32: requests a second with 32 requests in flight. Goal: 3 times LitServe. CPU
  per request is the time of all of the server's processes (of the client and the session for
  `Batcher`): other work on the machine changes it less than it changes the rate.

The servers are measured alternately, round after round; the table has medians of the rounds.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import markdown, rtresnet, save
from load_generator import Client, LoadResult, binary_request, post

from rtresnet import Batcher, load
from rtresnet.core import hardware

PEERS = Path(__file__).parent / "peers"
MAX_BATCH, MAX_WAIT_MS, CALLERS = 8, 2.0, 32
STEP = 0.05
NAMES = ("Batcher, no server", "rtresnet serve", "LitServe", "Ray Serve")


class InProcess:
    """`Batcher` with the interface of `Client`."""

    def __init__(self, model: Path, images: np.ndarray, expected: np.ndarray) -> None:
        self._session = load(model, provider="cpu", threads=1)
        self._batcher = Batcher(
            self._session, max_batch=MAX_BATCH, max_wait_ms=MAX_WAIT_MS, queue_limit=100_000
        )
        self._images, self._expected, self._next = images, expected, 0

    def _submit(self, intended: float, result: LoadResult, done: Callable[[], None]) -> None:
        index = self._next = (self._next + 1) % len(self._images)

        def answered(answer: Any) -> None:
            logits = answer.result()
            result.latencies.append(time.perf_counter() - intended)
            if np.abs(logits - self._expected[index]).max() > 1e-3:
                result.failed["wrong logits"] = result.failed.get("wrong logits", 0) + 1
            done()

        result.late.append(time.perf_counter() - intended)
        self._batcher.submit(self._images[index]).add_done_callback(answered)

    def open_loop(self, rate: float, seconds: float, seed: int) -> LoadResult:
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
        result, begin = LoadResult(), time.perf_counter() + 0.05
        for intended in begin + np.cumsum(gaps):
            if (left := intended - time.perf_counter()) > 0:
                time.sleep(left)
            self._submit(intended, result, lambda: None)
        while len(result.latencies) < len(gaps):
            time.sleep(0.001)
        result.seconds = time.perf_counter() - begin
        return result

    def closed_loop(self, callers: int, seconds: float) -> LoadResult:
        result, free = LoadResult(), queue.SimpleQueue[None]()
        for _ in range(callers):
            free.put(None)
        begin = time.perf_counter()
        while (now := time.perf_counter()) < begin + seconds:
            free.get()
            self._submit(now, result, lambda: free.put(None))
        for _ in range(callers):
            free.get()
        result.seconds = time.perf_counter() - begin
        return result

    def close(self) -> None:
        self._batcher.close()
        self._session.close()


@contextlib.contextmanager
def server(
    name: str, model: Path, images: np.ndarray, expected: np.ndarray, peers: str, log: Path
) -> Iterator[Any]:
    """Start one of NAMES and yield its client once it answers."""
    if name == NAMES[0]:
        client = InProcess(model, images, expected)
        yield client
        client.close()
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(PEERS.parents[1]), "OMP_NUM_THREADS": "1"}
    options = [str(model), str(port), str(MAX_BATCH), str(MAX_WAIT_MS)]
    if name == "rtresnet serve":
        command = [sys.executable, "-m", "rtresnet", "serve", str(model), "--provider", "cpu",
                   "--threads", "1", "--max-batch", str(MAX_BATCH), "--max-wait",
                   f"{MAX_WAIT_MS}ms", "--port", str(port), "--no-grpc"]  # fmt: skip
        requests = [binary_request(f"/v2/models/{model.stem}/infer", image) for image in images]
    elif name == "LitServe":
        command = [peers, str(PEERS / "litserve_app.py"), *options]
        bodies = [{"image": base64.b64encode(image.tobytes()).decode()} for image in images]
        kind = "Content-Type: application/json\r\n"
        requests = [post("/predict", json.dumps(body).encode(), kind) for body in bodies]
    else:
        command = [peers, str(PEERS / "ray_app.py"), *options]
        environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
        requests = [post("/predict", image.tobytes()) for image in images]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        client = Client(port, requests, list(expected))
        client.pid = process.pid
        end = time.monotonic() + 180
        while not _answers(client):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cpu_seconds(client: Any) -> float:
    """Return CPU seconds of a server and its processes; of this process if there is no server."""
    if isinstance(client, InProcess):
        return time.process_time()
    total = 0.0
    root = psutil.Process(client.pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _answers(client: Any) -> bool:
    result = client.closed_loop(1, 0.05)
    return bool(result.latencies) and not result.failed


def highest_rate(
    client: Any, capacity: float, limit_ms: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Return the highest rate that holds a p99 of `limit_ms`, by bisection in steps of STEP."""
    low, high, probes = 0, round(1.2 / STEP), []
    while high - low > 1:
        middle = (low + high) // 2
        result = client.open_loop(middle * STEP * capacity, seconds, seed + middle)
        p99 = result.quantile_ms(0.99)
        holds = p99 <= limit_ms and not result.failed
        probes.append({
            "rate": middle * STEP * capacity, "p50_ms": result.quantile_ms(0.5), "p99_ms": p99,
            "n": len(result.latencies), "failed": result.failed, "load": os.getloadavg()[0],
            "late_p99_ms": 1000 * float(np.quantile(result.late, 0.99)),
        })  # fmt: skip
        low, high = (middle, high) if holds else (low, middle)
    return {"rate": low * STEP * capacity, "probes": probes}


def export(folder: Path, net: str, *options: str) -> Path:
    """Return an ONNX file of untrained weights."""
    rtresnet("export", "--model", net, "--weights", "untrained", *options, "--no-plan", cwd=folder)
    (path,) = folder.glob(
        f"engines/{net}-int8.onnx" if "--int8" in options else f"engines/{net}.onnx"
    )
    return path


def answers(model: Path, side: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return 16 images, their logits, and what ran them."""
    images = np.random.default_rng(0).standard_normal((16, 3, side, side), dtype=np.float32)
    with load(model, provider="cpu", threads=1) as session:
        return (
            images,
            np.stack([session.logits(image[None])[0] for image in images]),
            (session.describe()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--p99", type=float, default=50.0, metavar="MS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="serving")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    rates: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    busy: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    capacities = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log = folder / "servers.log"
        large = export(folder, "resnet18", "--int8", "--calibrator", "max", "--calib-images", "8")
        small = export(folder, "resnet20", "--fp32")
        large_images, large_logits, where = answers(large, 224)
        small_images, small_logits, _ = answers(small, 32)
        for number in range(options.rounds):
            client = InProcess(large, large_images, large_logits)
            capacities.append(client.closed_loop(CALLERS, options.seconds).rate)
            client.close()
            for name in NAMES:
                with server(name, large, large_images, large_logits, options.peers, log) as client:
                    highest = highest_rate(
                        client, capacities[0], options.p99, options.seconds, 1000 * number
                    )
                    highest["throughput"] = client.closed_loop(CALLERS, options.seconds).rate
                rates[name].append(highest)
                with server(name, small, small_images, small_logits, options.peers, log) as client:
                    client.closed_loop(CALLERS, 1)
                    before = cpu_seconds(client)
                    result = client.closed_loop(CALLERS, options.seconds)
                    used = cpu_seconds(client) - before
                busy[name].append({
                    "cpu_us": 1e6 * used / len(result.latencies),
                    "rate": result.rate, "p50_ms": result.quantile_ms(0.5), "failed": result.failed,
                    "n": len(result.latencies),
                })  # fmt: skip
                print(name, round(highest["rate"], 1), round(result.rate), file=sys.stderr)
    best_rates = {name: statistics.median(entry["rate"] for entry in rates[name]) for name in NAMES}
    reached = {name: statistics.median(entry["rate"] for entry in busy[name]) for name in NAMES}
    most = {name: statistics.median(entry["throughput"] for entry in rates[name]) for name in NAMES}
    cpu = {name: statistics.median(entry["cpu_us"] for entry in busy[name]) for name in NAMES}
    best = max(best_rates[name] for name in NAMES[2:])
    bare, ours, lit, _ = NAMES
    goals = {
        "of_batcher": best_rates[ours] / best_rates[bare] if best_rates[bare] else None,
        "of_better_peer": best_rates[ours] / best if best else None,
        "throughput_of_batcher": most[ours] / most[bare],
        "throughput_of_better_peer": most[ours] / max(most[name] for name in NAMES[2:]),
        "of_litserve": reached[ours] / reached[lit],
        "cpu_of_litserve": cpu[lit] / cpu[ours],
        "overhead_us": {name: cpu[name] - cpu[bare] for name in NAMES[1:]},
    }
    headings = (
        "", f"ResNet-18 INT8, 224 px: requests/s at p99 of {options.p99:g} ms", "of Batcher",
        f"requests/s with {CALLERS} under way", "of Batcher",
        "ResNet-20 FP32, 32 px: requests/s", "of LitServe", "CPU per request, µs",
    )  # fmt: skip
    rows = [
        (
            name, f"{best_rates[name]:.1f}",
            f"{best_rates[name] / best_rates[bare]:.2f}" if best_rates[bare] else "-",
            f"{most[name]:.1f}", f"{most[name] / most[bare]:.2f}",
            f"{reached[name]:,.0f}", f"{reached[name] / reached[lit]:.2f}",
            f"{cpu[name]:,.0f}",
        )
        for name in NAMES
    ]  # fmt: skip
    command = [
        options.peers,
        "-c",
        "import litserve, ray; print(litserve.__version__, ray.__version__)",
    ]
    peer_versions = subprocess.run(command, capture_output=True, text=True, check=True)
    litserve, ray = peer_versions.stdout.split()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    caption = (
        f"{hardware.cpu()}, {where['provider']}, 1 thread, {versions}, LitServe {litserve}, Ray "
        f"{ray}; batches to {MAX_BATCH}, wait {MAX_WAIT_MS:g} ms; medians of {options.rounds} "
        f"rounds alternately, {options.seconds:g} s each; {CALLERS} requests in flight at 32 px. "
        "Client and server share the machine's cores, with other processes: load "
        f"{load_before:.1f} before the start."
    )
    record = {
        "rates": rates, "busy": busy, "capacities": capacities, "goals": goals,
        "load_before": load_before, "p99_ms": options.p99,
        "peers": {"litserve": litserve, "ray": ray},
    } | where  # fmt: skip
    save(options.name, record, markdown(headings, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
