"""`Batcher` next to full batches of the same session, and a lone caller next to the clock.

    python benchmarks/batcher.py [--seconds 3] [--rounds 5]

Under load several threads keep twice a batch under way; the ideal is the same session called with
ready batches, one after another. Both are measured alternately, round after round; the
ratio is the median of the rounds'. A lone caller asks for one image at a time; what it waits beyond
its own service time must not exceed the maximum wait, as a median; p90 says what the machine adds.
The first two sessions sleep, so that their service time is known; the third is ResNet-18 in FP32,
untrained, on the CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown, rtresnet, save

from rtresnet import Batcher, load
from rtresnet.core import hardware

Session = Callable[[np.ndarray], Any]
THREADS = 8
WAIT_MS = 5.0


def fixed(milliseconds: float) -> Session:
    """Sleep for this long whatever the batch, without a processor, as a GPU would."""

    def session(images: np.ndarray) -> np.ndarray:
        time.sleep(milliseconds / 1000)
        return images[:, :, 0, 0]

    return session


def ideal(session: Session, image: np.ndarray, batch: int, batches: int) -> float:
    """Return images/s in full batches."""
    images = np.stack([image] * batch)
    begin = time.perf_counter()
    for _ in range(batches):
        session(images)
    return batches * batch / (time.perf_counter() - begin)


def batched(session: Session, image: np.ndarray, batch: int, batches: int) -> float:
    """Return images/s by THREADS threads that keep two batches in flight between them."""

    def caller() -> None:
        mine: deque[Future[Any]] = deque()
        for _ in range(batches * batch // THREADS):
            if len(mine) == 2 * batch // THREADS:
                mine.popleft().result()
            mine.append(batcher.submit(image))
        for future in mine:
            future.result()

    with Batcher(session, batch, WAIT_MS) as batcher:
        threads = [threading.Thread(target=caller) for _ in range(THREADS)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return batches * batch / (time.perf_counter() - begin)


def lone(session: Session, image: np.ndarray, batch: int, calls: int) -> tuple[list[float], float]:
    """Return the milliseconds of a lone caller's calls, and the median without a batcher."""
    took, alone = [], []
    with Batcher(session, batch, WAIT_MS) as batcher:
        for _ in range(calls):
            begin = time.perf_counter()
            session(image[None])
            middle = time.perf_counter()
            batcher.submit(image).result()
            took.append(1000 * (time.perf_counter() - middle))
            alone.append(1000 * (middle - begin))
    return took, statistics.median(alone)


def measure(
    name: str, session: Session, side: int, batch: int, seconds: float, rounds: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((3, side, side)).astype(np.float32)
    with Batcher(session, batch, WAIT_MS) as batcher:  # the same result before any time is taken
        futures = [batcher.submit(image * (1 + n)) for n in range(batch)]
        rows = np.stack([future.result() for future in futures])
    direct = session(np.stack([image * (1 + n) for n in range(batch)]))
    np.testing.assert_allclose(rows, direct, rtol=1e-3, atol=1e-3)
    batches = max(4, round(seconds * ideal(session, image, batch, 2) / batch))
    pairs = []
    for _ in range(rounds):
        full = ideal(session, image, batch, batches)
        pairs.append((full, batched(session, image, batch, batches)))
    took, service = lone(session, image, batch, 200 if side < 224 else 50)
    return {
        "session": name,
        "side": side,
        "batch": batch,
        "ideal": statistics.median(full for full, _ in pairs),
        "batched": statistics.median(ours for _, ours in pairs),
        "share": statistics.median(ours / full for full, ours in pairs),
        "shares": [ours / full for full, ours in pairs],
        "service_ms": service,
        "lone_ms": statistics.median(took),
        "waited_ms": statistics.median(took) - service,
        "waited_p90_ms": float(np.quantile(took, 0.9)) - service,
        "took_ms": took,
        "max_wait_ms": WAIT_MS,
        "n": len(took),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    results = [
        measure("sleeps 10 ms", fixed(10), 32, 32, options.seconds, options.rounds),
        measure("sleeps 20 ms", fixed(20), 224, 32, options.seconds, options.rounds),
    ]
    with tempfile.TemporaryDirectory() as folder:
        rtresnet(
            "export",
            "--model",
            "resnet18",
            "--weights",
            "untrained",
            "--fp32",
            "--no-plan",
            cwd=Path(folder),
        )
        (path,) = Path(folder).rglob("resnet18*.onnx")
        with load(path, provider="cpu") as session:
            results.append(
                measure("resnet18 fp32", session, 224, 8, options.seconds, options.rounds)
            )
            where: dict[str, Any] = session.describe()
    headings = (
        "session", "pixels", "batch", "full batches, images/s", "Batcher, images/s", "share",
        "of rounds", "single call, ms", "compute, ms", "wait, ms", "p90",
        "maximum wait, ms",
    )  # fmt: skip
    rows = [
        (
            e["session"], e["side"], e["batch"], f"{e['ideal']:,.1f}", f"{e['batched']:,.1f}",
            f"{e['share']:.3f}", f"{min(e['shares']):.3f} to {max(e['shares']):.3f}",
            f"{e['lone_ms']:.2f}", f"{e['service_ms']:.2f}", f"{e['waited_ms']:.2f}",
            f"{e['waited_p90_ms']:.2f}",
            f"{e['max_wait_ms']:g}",
        )
        for e in results
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    caption = (
        f"{THREADS} threads on {hardware.cpu()}, {where['provider']}, {versions}; {options.rounds} "
        f"rounds of {options.seconds:g} s each, alternately; single-call figures are medians of "
        f"{results[0]['n']} and {results[-1]['n']} calls. The machine was shared: load "
        f"{load_before:.1f} before the start."
    )
    record = {"results": results, "load_before": load_before} | where
    save("batcher", record, markdown(headings, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
