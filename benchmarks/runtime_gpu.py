"""Plans on a GPU: what the runtime adds to the engine, graphs, pixels, overlap, leaks.

    python benchmarks/runtime_gpu.py [--model resnet50] [--batch 32] [--seconds 3] [--calls 10000]
    python benchmarks/runtime_gpu.py --probe

The engine's own rate is that of bare `execute_async_v3` calls, one after another, waited for once
at the end. It alternates with `infer` on images and results that lie on the GPU, on numpy images,
and without CUDA graphs. `--probe` finds out whether plans of TensorRT-RTX run on this GPU at all,
for each target they can be built for, each in a process of its own; it is how sm_90 is asked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown, rtresnet, save

from rtresnet.core import artifacts, hardware
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.execution import Span
from rtresnet.runtime.io_spec import split_batch
from rtresnet.runtime.trt import TrtBackend

PARTS = 16  # of a long call: its first and last copies weigh little
ROUNDS = 5
RATE, LEAK = 0.98, 1 << 20  # of the engine's own, and bytes in all calls


class OnGpu:
    """Memory of the GPU as an array of another library's."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.cuda, size = cuda, int(np.prod(shape)) * dtype.itemsize
        with cuda.active():
            self.address = cuda.allocate(size)
            stream = cuda.stream()
            cuda.zero(self.address, size, stream)
            cuda.synchronize(stream)
            cuda.destroy_stream(stream)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": dtype.str, "data": (self.address, False),
            "version": 3, "strides": None, "stream": None,
        }  # fmt: skip

    def free(self) -> None:
        with self.cuda.active():
            self.cuda.free(self.address)


def rate(call: Callable[[], object], images: int, seconds: float) -> float:
    """Return images/s of calls one after another."""
    call()
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or not done:
        call()
        done += 1
    return done * images / (time.perf_counter() - begin)


def bare(backend: TrtBackend, batch: int) -> Callable[[], object]:
    """Run the bare engine PARTS times, wait once, on the backend's own buffers."""
    stream, cuda = backend._streams[0], backend._cuda
    profile = split_batch(batch, backend.profiles)[0].profile
    with cuda.active():
        context = stream._context(profile, owned=False)
        context.bind(batch, stream.buffers[0].addresses)

    def call() -> None:
        with cuda.active():
            for _ in range(PARTS):
                context.execute(stream.compute)
            cuda.synchronize(stream.compute)

    return call


def compare(calls: dict[str, Callable[[], object]], images: int, seconds: float) -> dict[str, Any]:
    """Measure rates alternately, ROUNDS times; the ratio to the first is the rounds' median."""
    rounds = [
        {n: rate(c, images, seconds / ROUNDS) for n, c in calls.items()} for _ in range(ROUNDS)
    ]
    first = next(iter(calls))
    return {
        name: {
            "images_per_second": statistics.median(entry[name] for entry in rounds),
            "of_the_first": statistics.median(entry[name] / entry[first] for entry in rounds),
        }
        for name in calls
    }


def overlap(timeline: Sequence[dict[str, Span]]) -> dict[str, float]:
    """Return the share of the copying that ran while another part was computed."""
    copies = [(i, part[kind]) for i, part in enumerate(timeline) for kind in ("h2d", "d2h")]
    covered = whole = 0.0
    for index, (begin, end) in copies:
        whole += end - begin
        for other, part in enumerate(timeline):
            if other != index:
                low, high = part["compute"]
                covered += max(0.0, min(end, high) - max(begin, low))
    return {"copy_ms": whole, "overlapped": covered / whole if whole else 0.0}


def leak(backend: TrtBackend, images: np.ndarray, calls: int) -> int:
    """Return the bytes of GPU memory that calls of changing sizes did not free."""
    sizes = sorted({1, max(1, len(images) // 2), len(images)})
    for _ in range(3):
        for size in sizes:
            backend.infer(images[:size])
    with backend._cuda.active():
        before = backend._cuda.memory()[0]
    for index in range(calls):
        backend.infer(images[: sizes[index % len(sizes)]])
    with backend._cuda.active():
        return before - backend._cuda.memory()[0]


def example(backend: TrtBackend, count: int) -> np.ndarray:
    rng, shape = np.random.default_rng(0), (count, *backend.io.input.row)
    if backend.input_dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape).astype(backend.input_dtype)


def measure(path: Path, batch: int, seconds: float, calls: int) -> dict[str, Any]:
    """Return everything that is known of one plan."""
    sidecar = artifacts.verify(path)
    backend = TrtBackend(path, sidecar)
    plain = TrtBackend(path, sidecar, graphs=False)
    timed = TrtBackend(path, sidecar, timings=True)
    row, images = backend.io.input.row, example(backend, PARTS * batch)
    on_device = OnGpu(backend._cuda, (PARTS * batch, *row), backend.input_dtype)
    results = [OnGpu(backend._cuda, (PARTS * batch, *o.row), o.dtype) for o in backend.io.outputs]
    out = results[0] if len(results) == 1 else tuple(results)
    small = images[:1]
    try:
        return {
            "device": backend.device,
            "provider": backend.provider,
            "graphs": backend.graphs,
            "input": str(backend.input_dtype),
            "rates": compare(
                {
                    "bare engine": bare(plain, batch),
                    "infer, on the GPU": lambda: backend.infer(on_device, out=out),
                    "infer, numpy": lambda: backend.infer(images),
                    "infer, numpy, no graphs": lambda: plain.infer(images),
                },
                PARTS * batch,
                seconds,
            ),
            "batch 1": compare(
                {
                    "graphs": lambda: backend.infer(small),
                    "no graphs": lambda: plain.infer(small),
                },
                1,
                seconds,
            ),
            "overlap": overlap(timed.timeline(images)),
            "leaked_bytes": leak(backend, images[:batch], calls),
            "calls": calls,
        }
    finally:
        for each in (backend, plain, timed):
            each.close()
        for array in (on_device, *results):
            array.free()


def probe(model: str) -> dict[str, Any]:
    """Whether TensorRT-RTX's plans run on this GPU, by what they were built for."""
    results: dict[str, Any] = {}
    gpu = hardware.gpus()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        arguments = ("export", "--model", model, "--weights", "untrained", "--fp16", "--no-plan")
        exported = rtresnet(*arguments, cwd=place)
        source = place / exported["onnx"][0]["file"]
        for name in ("default", "all", "CURRENT"):
            # A process of its own: what is not supported may end it.
            done = subprocess.run(
                [sys.executable, __file__, "--probe-one", name, str(source)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            output = done.stdout.strip().splitlines()
            results[name] = json.loads(output[-1]) if done.returncode == 0 and output else {
                "ended_with": done.returncode, "said": done.stderr.strip()[-2000:],
            }  # fmt: skip
    return {"device": gpu.name, "target": gpu.target, "found": results,
            "versions": hardware.versions(("tensorrt-rtx-cu13", "cuda-bindings"))}  # fmt: skip


def probe_one(target: str, source: Path) -> dict[str, Any]:
    """Build for a target, ask TensorRT-RTX whether it runs here, and run it."""
    import tensorrt_rtx as trt

    output: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                output.append(message.strip())

    record: dict[str, Any] = {"target": target, "said": output}
    log = Log()
    builder = trt.Builder(log)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, log)
    record["parsed"] = bool(parser.parse(source.read_bytes()))
    if target != "default":
        members = trt.ComputeCapability.__members__
        names = ["CURRENT"] if target == "CURRENT" else [n for n in members if n.startswith("SM")]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            record[name] = bool(config.set_compute_capability(members[name], index))
    tensor, profile = network.get_input(0), builder.create_optimization_profile()
    profile.set_shape(tensor.name, *((n, *tuple(tensor.shape)[1:]) for n in (1, 8, 8)))
    config.add_optimization_profile(profile)
    blob = builder.build_serialized_network(network, config)
    record["built"] = blob is not None
    if blob is None:
        return record
    plan = source.with_suffix(f".{target}.plan")
    plan.write_bytes(memoryview(blob))
    checked = trt.Runtime(log)
    head = plan.read_bytes()[: checked.engine_header_size]
    validity, bits = checked.get_engine_validity(head)
    record["validity"], record["diagnostics"] = validity.name, int(bits)
    try:
        backend = TrtBackend(plan, None)
        logits = backend.infer(example(backend, 8))
        record["ran"], record["finite"] = True, bool(np.isfinite(logits).all())
        backend.close()
    except Exception as error:  # whatever it is, it is the finding
        record["ran"], record["error"] = False, f"{type(error).__name__}: {error}"
    return record


def holds(results: dict[str, Any]) -> bool:
    """Return the promised properties of the runtime."""
    rate = results["rates"]["infer, on the GPU"]["of_the_first"]
    return rate >= RATE and results["overlap"]["overlapped"] > 0 and results["leaked_bytes"] < LEAK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--probe-one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not hardware.gpus():
        sys.exit("this needs a GPU")
    if options.probe_one:
        print(json.dumps(probe_one(options.probe_one[0], Path(options.probe_one[1]))))
        return
    if options.probe:
        record = probe("resnet18")
        rows = [
            (name, *(entry.get(key, "") for key in ("built", "validity", "diagnostics", "ran")))
            for name, entry in record["found"].items()
        ]
        table = markdown(("built for", "built", "validity", "diagnostics", "ran"), rows)
        save(f"rtx-on-{record['target']}", record, f"{table}\n\n{record['device']}")
        return
    records, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        exported = rtresnet(
            "export", "--model", options.model, "--weights", "untrained", "--fp32", "--fp16",
            "--int8", "--no-plan", cwd=place,
        )  # fmt: skip
        for entry in exported["onnx"]:
            for takes in ("float32-nchw", "uint8-nhwc"):
                name = f"{entry['precision']}, {takes}"
                plan = place / f"{entry['precision']}-{takes}.plan"
                rtresnet(
                    "build", entry["file"], "--batch", f"1:{options.batch}:{options.batch}",
                    "--input", takes, "--target", "current", "--out", str(plan), cwd=place,
                )  # fmt: skip
                measured = measure(plan, options.batch, options.seconds, options.calls)
                records[name] = measured
                rates = measured["rates"]
                rows.append(
                    (
                        name, *(f"{entry['images_per_second']:,.0f}" for entry in rates.values()),
                        f"{rates['infer, on the GPU']['of_the_first']:.3f}",
                        f"{1 / measured['batch 1']['no graphs']['of_the_first']:.2f}",
                        f"{measured['overlap']['overlapped']:.2f}", measured["leaked_bytes"],
                        "yes" if holds(measured) else "NO",
                    )
                )  # fmt: skip
    headings = (
        "plan", "bare engine, images/s", "infer on the GPU", "infer numpy", "without graphs",
        "of the engine's rate", "graphs, batch 1", "copies overlapped", "bytes leaked",
        "held",
    )  # fmt: skip
    first = next(iter(records.values()))
    caption = f"{options.model}, batch {options.batch}, {first['device']}, {first['provider']}"
    caption += f"; held: at least {RATE} of the engine's rate, copies overlap, nothing leaks"
    save("runtime-gpu", records, markdown(headings, rows) + "\n\n" + caption)
    sys.exit(0 if all(map(holds, records.values())) else 1)


if __name__ == "__main__":
    main()
