"""The batcher, synchronized by events: no test depends on timing."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtresnet
from rtresnet import Batcher
from rtresnet.core.errors import InputError, QueueFullError

NEVER = 1e9  # milliseconds: only full batches start
LONG = 30  # seconds after which a test has failed, not passed late


def image(value: float) -> np.ndarray:
    return np.full((3, 2, 2), value, np.float32)


class Gate:
    """A session that stands still until it is let go, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.lock = threading.Lock()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self.lock:
            self.batches.append([float(value) for value in images[:, 0, 0, 0]])
        self.entered.release()
        assert self.go.acquire(timeout=LONG)
        return images[:, 0, :, 0] * 2

    def wait(self) -> None:
        assert self.entered.acquire(timeout=LONG)

    def let_go(self, times: int = 1) -> None:
        self.go.release(times)


def first(future: Future[Any]) -> float:
    return float(np.ravel(future.result(LONG))[0])


def test_batcher_full_batch_starts_at_once() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=3, max_wait_ms=NEVER) as batcher:
        futures = [batcher.submit(image(value)) for value in range(3)]
        gate.wait()
        gate.let_go()
        assert [first(future) for future in futures] == [0, 2, 4]
    assert gate.batches == [[0, 1, 2]]


def test_batcher_single_call_waits_for_the_clock_only() -> None:
    with Batcher(lambda images: images, max_batch=1000, max_wait_ms=1) as batcher:
        assert first(batcher.submit(image(7))) == 7


def test_batcher_wait_ends_early_by_the_wake_up_time() -> None:
    with Batcher(lambda images: images, max_batch=1000, max_wait_ms=1000 * 2 * LONG) as batcher:
        for _ in range(100):
            batcher._learn(1e6)  # later than can be made up for
        assert LONG * 0.99 < batcher._early <= LONG  # half of the wait at most
        batcher._early = 2 * LONG
        assert first(batcher.submit(image(7))) == 7  # else it would take a minute
    with Batcher(lambda images: images, max_batch=1000, max_wait_ms=5) as batcher:
        for value in range(50):
            assert first(batcher.submit(image(value))) == value
        assert 0 < batcher._early <= 0.0025  # learned of real waits


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, ValueError])
def test_batcher_raising_callback_stops_no_other(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def callback(future: Future[Any]) -> None:
        raise kind("from a callback")

    with Batcher(lambda images: images, max_batch=2, max_wait_ms=NEVER) as batcher:
        gone = batcher.submit(image(1))
        gone.add_done_callback(callback)
        neighbours = batcher.submit(image(2))
        assert (first(gone), first(neighbours)) == (1, 2)
        later = [batcher.submit(image(value)) for value in (3, 4)]
        assert [first(future) for future in later] == [3, 4]
    assert "from a callback" in caplog.text


@pytest.mark.parametrize("kind", [SystemExit, ValueError])
def test_batcher_raising_on_batch_is_logged_and_stops_no_call(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def on_batch(size: int, seconds: float, failure: BaseException | None) -> None:
        raise kind("from on_batch")

    batcher = Batcher(lambda images: images, max_batch=1, on_batch=on_batch)
    futures = [batcher.submit(image(value)) for value in range(4)]
    assert [first(future) for future in futures] == [0, 1, 2, 3]
    closing = threading.Thread(target=batcher.close, daemon=True)
    closing.start()
    closing.join(LONG)
    assert not closing.is_alive()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == (
        ["from on_batch"] * 4
    )


def test_batcher_full_batches_do_not_change_the_wake_up_time() -> None:
    with Batcher(lambda images: images, max_batch=1, max_wait_ms=5) as batcher:
        for value in range(20):
            assert first(batcher.submit(image(value))) == value
        assert batcher._early == 0


def test_batcher_arrivals_during_a_batch_form_the_next() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=4, max_wait_ms=0) as batcher:
        futures = [batcher.submit(image(0))]
        gate.wait()
        futures += [batcher.submit(image(value)) for value in range(1, 7)]
        gate.let_go(3)
        assert [first(future) for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_batcher_gathers_a_batch_while_another_is_computed() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=2, max_wait_ms=NEVER, queue_limit=2) as batcher:
        futures = [batcher.submit(image(value)) for value in (0, 1)]
        gate.wait()
        futures += [batcher.submit(image(value)) for value in (2, 3)]
        while not futures[3].running():  # taken out of the queue, which has room for two again
            pass
        futures += [batcher.submit(image(value)) for value in (4, 5)]
        gate.let_go(3)
        assert [first(future) for future in futures] == [0, 2, 4, 6, 8, 10]
    assert gate.batches == [[0, 1], [2, 3], [4, 5]]


def test_batcher_failure_fails_its_batch_only() -> None:
    gate = Gate()

    def fails_on_odd(images: np.ndarray) -> np.ndarray:
        result = gate(images)
        if images[0, 0, 0, 0] % 2:
            raise RuntimeError(f"batch of {images[0, 0, 0, 0]:.0f}")
        return result

    gate.let_go(3)
    with Batcher(fails_on_odd, max_batch=2, max_wait_ms=NEVER) as batcher:
        futures = [batcher.submit(image(value)) for value in (0, 0, 1, 1, 2, 2)]
        assert [first(futures[index]) for index in (0, 1, 4, 5)] == [0, 0, 4, 4]
        for index in (2, 3):
            with pytest.raises(RuntimeError, match="batch of 1"):
                futures[index].result(LONG)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_batcher_worker_survives_any_failure(error: type[BaseException]) -> None:
    def session(images: np.ndarray) -> np.ndarray:
        if images[0, 0, 0, 0] == 0:
            raise error
        return images

    with Batcher(session, max_batch=1) as batcher:
        with pytest.raises(error):
            batcher.submit(image(0)).result(LONG)
        assert first(batcher.submit(image(3))) == 3


def test_batcher_missing_rows_fail_the_batch() -> None:
    with Batcher(lambda images: images[:1], max_batch=2, max_wait_ms=NEVER) as batcher:
        futures = [batcher.submit(image(value)) for value in range(2)]
        for future in futures:
            with pytest.raises(InputError, match="1 rows for 2 images"):
                future.result(LONG)


def test_batcher_different_images_never_share_a_batch() -> None:
    gate = Gate()
    gate.let_go(4)
    with Batcher(gate, max_batch=2, max_wait_ms=NEVER) as batcher:
        other = np.full((3, 5, 5), 9, np.float32)
        futures = [batcher.submit(x) for x in (image(1), other, image(2), image(3))]
    assert gate.batches == [[1], [9], [2, 3]]
    assert [len(future.result(0)) for future in futures] == [2, 5, 2, 2]


def test_batcher_tuple_of_outputs_is_split_by_row() -> None:
    def best(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = images[:, :2, 0, 0]
        return value.astype(np.int64), value / 10

    with Batcher(best, max_batch=2, max_wait_ms=NEVER) as batcher:
        futures = [batcher.submit(image(value)) for value in (4, 5)]
        indices, probabilities = futures[1].result(LONG)
    assert indices.dtype == np.int64 and indices.tolist() == [5, 5]
    np.testing.assert_allclose(probabilities, [0.5, 0.5])


def test_batcher_rows_are_copies() -> None:
    memory = np.empty((2, 3), np.float32)

    def session(images: np.ndarray) -> np.ndarray:
        memory[: len(images)] = images[:, :, 0, 0]
        return memory[: len(images)]

    with Batcher(session, max_batch=2, max_wait_ms=NEVER) as batcher:
        futures = [batcher.submit(image(value)) for value in range(4)]
        assert [first(future) for future in futures] == [0, 1, 2, 3]


def test_submit_above_the_limit_is_refused() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=4, max_wait_ms=0, queue_limit=2) as batcher:
        futures = [batcher.submit(image(0))]
        gate.wait()  # that one is being computed, and waits no more
        futures += [batcher.submit(image(value)) for value in (1, 2)]
        with pytest.raises(QueueFullError, match=r"2 images .*waiting .*try again later"):
            batcher.submit(image(3))
        gate.let_go(4)
        assert [first(future) for future in futures] == [0, 2, 4]
        assert first(batcher.submit(image(5))) == 10


def test_batcher_cancelled_call_is_left_out() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=8, max_wait_ms=0) as batcher:
        running = batcher.submit(image(0))
        gate.wait()
        futures = [batcher.submit(image(value)) for value in (1, 2, 3)]
        assert futures[0].cancel() and not running.cancel()
        gate.let_go(2)
        assert [first(running), first(futures[1]), first(futures[2])] == [0, 4, 6]
        with pytest.raises(CancelledError):
            futures[0].result(LONG)
    assert gate.batches == [[0], [2, 3]]


def test_batcher_batch_of_cancelled_calls_is_not_computed() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=8, max_wait_ms=NEVER) as batcher:
        assert all(batcher.submit(image(value)).cancel() for value in range(3))
    assert gate.batches == []


def test_close_computes_waiting_calls_and_refuses_new_ones() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=2, max_wait_ms=NEVER, queue_limit=5)
    futures = [batcher.submit(image(value)) for value in range(2)]
    gate.wait()
    futures += [batcher.submit(image(value)) for value in range(2, 7)]  # full to the limit
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.let_go(4)
    closing.join(LONG)
    assert not closing.is_alive()
    assert [future.result(0)[0] for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert gate.batches == [[0, 1], [2, 3], [4, 5], [6]]  # the rest does not wait to be full
    with pytest.raises(InputError, match="closed"):
        batcher.submit(image(0))
    batcher.close()


def test_batcher_callback_may_submit_and_close() -> None:
    chained: list[Future[Any]] = []
    done = threading.Event()
    batcher = Batcher(lambda images: images, max_batch=1)

    def again(future: Future[Any]) -> None:
        chained.append(batcher.submit(image(future.result()[0, 0, 0] + 1)))
        batcher.close()
        done.set()

    batcher.submit(image(1)).add_done_callback(again)
    assert done.wait(LONG)
    batcher.close()
    assert chained[0].result(0)[0, 0, 0] == 2


def test_batcher_several_workers_settle_in_order() -> None:
    gates = {0.0: threading.Event(), 1.0: threading.Event()}
    inside = threading.Semaphore(0)

    def session(images: np.ndarray) -> np.ndarray:
        value = float(images[0, 0, 0, 0])
        inside.release()
        assert gates[value].wait(LONG)
        computed.release()
        return images

    computed = threading.Semaphore(0)
    order: list[float] = []
    with Batcher(session, max_batch=1, max_wait_ms=0, workers=2) as batcher:
        futures = [batcher.submit(image(value)) for value in (0, 1)]
        for future in futures:
            future.add_done_callback(lambda f: order.append(float(f.result()[0, 0, 0])))
        for _ in futures:
            assert inside.acquire(timeout=LONG)  # both are being computed
        gates[1.0].set()
        assert computed.acquire(timeout=LONG)
        assert not futures[1].done()  # computed, and yet not before the one asked for earlier
        gates[0.0].set()
        assert first(futures[1]) == 1
    assert order == [0, 1]


@pytest.mark.parametrize("workers", [1, 3])
def test_batcher_many_threads_get_their_own_results(workers: int) -> None:
    threads, each = 16, 200
    sizes: list[int] = []

    def session(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        if (images[:, 0, 0, 0] == 777).any():
            raise RuntimeError("the one with 777")
        return images[:, 0, 0, 0]

    wrong: list[str] = []
    failures: list[int] = []

    def caller(number: int, batcher: Batcher) -> None:
        settled: list[int] = []
        futures = []
        for index in range(each):
            future = batcher.submit(image(number * each + index))
            future.add_done_callback(lambda _, index=index: settled.append(index))  # type: ignore[misc]
            futures.append(future)
        for index, future in enumerate(futures):
            try:
                value = float(future.result(LONG))
            except RuntimeError:
                failures.append(number * each + index)
                continue
            if value != number * each + index:
                wrong.append(f"{value} is not {number * each + index}")
        if settled != sorted(settled):
            wrong.append(f"{settled[:9]} are not in order")

    with Batcher(session, max_batch=8, max_wait_ms=0.1, workers=workers, queue_limit=10**6) as all_:
        callers = [threading.Thread(target=caller, args=(n, all_)) for n in range(threads)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
    assert not wrong
    assert 777 in failures and len(failures) <= 8
    assert sum(sizes) == threads * each and max(sizes) <= 8


def test_close_ends_every_thread() -> None:
    before = threading.active_count()
    with Batcher(lambda images: images, workers=4) as batcher:
        batcher.submit(image(0))
        assert threading.active_count() == before + 5  # one prepares ahead
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch": 0},
        {"max_wait_ms": -1},
        {"max_wait_ms": float("nan")},
        {"queue_limit": 0},
        {"workers": 0},
    ],
)
def test_batcher_limits_out_of_range_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least"):
        Batcher(lambda images: images, **limits)


ENDING = """
import threading
import numpy as np
from rtresnet import Batcher

batcher = Batcher(lambda images: images.sum(axis=1), max_batch=64, max_wait_ms=1e9)
for value in range(3):
    future = batcher.submit(np.full(2, value))
    future.add_done_callback(lambda f: print(int(f.result()), flush=True))
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise SystemExit(5)", 5), ("1 / 0", 1)])
def test_batcher_at_exit_serves_waiting_calls(end: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(end=end)],
        capture_output=True, text=True, check=False, timeout=LONG,
    )  # fmt: skip
    assert done.stdout.split() == ["0", "2", "4"]
    assert done.returncode == code


def test_submit_wrong_image_for_the_session_is_refused(onnx_file: Callable[..., Path]) -> None:
    with rtresnet.load(onnx_file("resnet8", "fp32"), provider="cpu") as session:
        one = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
        with Batcher(session, max_batch=4, max_wait_ms=1) as batcher:
            for wrong in (one[:2], one.astype(np.float64), one[None], (one * 255).astype(np.uint8)):
                with pytest.raises(InputError, match=r"the session expects float32 \[3, 32, 32\]"):
                    batcher.submit(wrong)
            row = batcher.submit(one).result(LONG)
        np.testing.assert_allclose(row, session(one[None])[0], rtol=1e-5, atol=1e-5)
