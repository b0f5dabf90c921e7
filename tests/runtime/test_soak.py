"""`load` and `Batcher` with 64 threads: correct results, and no growth of memory or threads.

RTRESNET_SOAK_SECONDS=600 pytest tests/runtime/test_soak.py    # 10 seconds by default
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

import rtresnet
from rtresnet import Batcher
from rtresnet.core.errors import InputError, QueueFullError

THREADS = 64
SECONDS = float(os.environ.get("RTRESNET_SOAK_SECONDS", "10"))
ROUND = 1.0  # seconds from opening a session and a batcher to closing both under load
GROWTH = 48 * 2**20  # bytes of resident memory that allocators may take after warm-up


class Clients:
    """Threads that use whichever batcher is open, and what became of their requests."""

    def __init__(self, images: np.ndarray, expected: np.ndarray) -> None:
        self.images, self.expected = images, expected
        self.batcher: Batcher | None = None
        self.count: Counter[str] = Counter()
        self.faults: list[str] = []
        self.ended = threading.Event()
        self.lock = threading.Lock()

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.ended.is_set():
            try:
                done = self.ask(rng)
            except Exception as error:
                done = "fault"
                self.faults.append(repr(error))
            with self.lock:
                self.count[done] += 1

    def ask(self, rng: random.Random) -> str:
        batcher, index = self.batcher, rng.randrange(len(self.images))
        if batcher is None:
            time.sleep(0.01)
            return "closed"
        image, kind = self.images[index], rng.random()
        if kind < 0.1:
            wrong = (image[:2], image.astype(np.float64), image[None], image[:, :5], np.array(1))
            with pytest.raises(InputError):
                batcher.submit(rng.choice(wrong))
            return "refused"
        try:
            future = batcher.submit(image)
        except QueueFullError:
            time.sleep(0.001)
            return "overloaded"
        except InputError:  # closed in between
            time.sleep(0.01)
            return "closed"
        if kind < 0.2 and future.cancel():
            with pytest.raises(CancelledError):
                future.result(30)
            return "cancelled"
        row = future.result(30)
        if not np.allclose(row, self.expected[index], rtol=1e-4, atol=1e-4):
            self.faults.append(f"image {index}: {row} instead of {self.expected[index]}")
        return "answered"


def usage() -> tuple[int, int, int]:
    """Return resident bytes, threads and open files of this process."""
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what 64 threads freed
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads, files = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), threads, files


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_load_and_batcher_under_load_answer_right_and_do_not_grow(
    onnx_file: Callable[..., Path], images: Callable[..., np.ndarray]
) -> None:
    path = onnx_file("resnet8", "fp32")
    samples = images(32)
    with rtresnet.load(path, provider="cpu", threads=1) as session:
        expected = np.concatenate([session.logits(sample[None]) for sample in samples])
    clients = Clients(samples, expected)
    threads = [threading.Thread(target=clients.run, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    observed: list[tuple[int, int, int]] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with rtresnet.load(path, provider="cpu", threads=1) as session:
            workers = 1 + len(observed) % 2
            with Batcher(session, 16, 1.0, queue_limit=48, workers=workers) as batcher:
                clients.batcher = batcher
                time.sleep(ROUND)
            clients.batcher = None
        observed.append(usage())
    clients.ended.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a request was never answered"
    assert not clients.faults, clients.faults[:5]
    assert all(clients.count[kind] for kind in ("answered", "refused", "cancelled", "closed"))
    print(dict(clients.count), observed)
    third = max(1, len(observed) // 3)
    early, late = (np.min(part, axis=0) for part in (observed[:third], observed[-third:]))
    assert late[0] - early[0] < GROWTH, f"{(late[0] - early[0]) / 2**20:.0f} MiB more: {observed}"
    assert (late[1:] <= early[1:]).all(), f"more threads or files: {observed}"
