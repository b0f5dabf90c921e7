"""`rtresnet.Batcher`: many threads ask for one image each, the device computes batches.

    with rtresnet.load("engines/resnet50.plan") as session, rtresnet.Batcher(session) as batcher:
        logits = batcher.submit(image).result()      # from as many threads as there are requests

A batch starts when it is full or when its first image has waited long enough, whichever is first.
While one is computed the next one gathers, and is put together as soon as it is full; results are
handed out while the next one is computed. So under load batches are full, one follows the other at
once, and nobody waits for the clock. For a plan the images are gathered in pinned memory, which the
GPU reads without another copy on the host. Deliberately unaware of where images come from and of
what the rows mean.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError, QueueFullError
from rtresnet.runtime.session import Session

log = logging.getLogger(__name__)

SWITCH_SECONDS = 1e-4
"""Python's default of 5 ms is ten times the latency of a small net on a GPU."""


class Answer(Future[Any]):
    """The future of one image, with what it spent its time on once it is done.

    Attributes:
        queue_seconds: From `submit` to the start of its batch.
        compute_seconds: The session's call for its batch.
        batch_size: Images in its batch.
    """

    queue_seconds = 0.0
    compute_seconds = 0.0
    batch_size = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    image: np.ndarray
    future: Answer
    arrived: float  # by time.monotonic


class Batcher:
    """Forms batches of what many threads submit.

    Futures are settled in the order of the calls, whatever the number of workers. A batch that
    fails fails its own calls, all of them: an image that does not fit is refused at `submit`, or
    never shares a batch with others, so what is left is the device's or the session's own failure.

    For a plan on a GPU:

    - Load it with `contexts=2`. Two batches are then under way, so that the GPU computes one while
      the other is copied; with one context it is idle during copies.
    - Send uint8 images (`rtresnet export --input uint8-nhwc`): a quarter of the bytes to gather and
      to copy. See `rtresnet.pinned`.
    - Python threads that compute (decoding, preprocessing) hold the GIL for 5 ms at a time, and the
      batcher waits for it after every call of the GPU. Where the process is yours, set
      `sys.setswitchinterval(1e-4)`, or use `rtresnet.runtime.batcher.short_switch_interval`. With a
      device of 0.5 ms next to one such thread, a call takes 6.25 ms (median; p99 15.7) by default
      and 0.99 ms with 1e-4; alone it takes 0.82 ms.
    - `load(blocking=True)` has threads that wait for the GPU sleep instead of spinning.

    Args:
        session: What `rtresnet.load` returns, or any function of images [N, ...] that returns an
            array [N, ...] or a tuple of them. It may use the images during the call only: their
            memory is used again.
        max_batch: Images a batch at most.
        max_wait_ms: How long the first image of a batch may wait for others, in milliseconds. What
            waking up costs on this machine is measured and counted in.
        queue_limit: Images that may wait; one more is refused.
        workers: Batches computed at the same time, for a session that takes calls from several
            threads at once. Default: the contexts of a plan, else 1.
        on_batch: Called after every batch with its size, the seconds that its call took, and the
            exception that it raised or None; from a thread of the batcher.

    Raises:
        InputError: A limit that makes no sense.
        UnavailableError: Not enough pinned memory for `workers` + 1 batches.
    """

    def __init__(
        self,
        session: Callable[[np.ndarray], Any],
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        queue_limit: int = 1024,
        *,
        workers: int | None = None,
        on_batch: Callable[[int, float, BaseException | None], None] | None = None,
    ) -> None:
        self._on_batch = on_batch
        backend = session.backend if isinstance(session, Session) else None
        if workers is None:
            workers = getattr(backend, "contexts", 1)
        if max_batch < 1 or workers < 1 or queue_limit < 1 or not max_wait_ms >= 0:
            raise InputError(
                f"max_batch {max_batch}, max_wait_ms {max_wait_ms}, queue_limit {queue_limit}, "
                f"workers {workers}: each must be at least 1, the wait at least 0"
            )
        self._session, self._max_batch, self._limit = session, max_batch, queue_limit
        self._wait = max_wait_ms / 1000
        self._early = 0.0  # seconds by which a wait ends before its time, for what comes after it
        self._expected = _expected(session)
        self._queue: deque[_Call] = deque()
        lock = threading.Lock()
        self._changed, self._turn = threading.Condition(lock), threading.Condition(lock)
        self._closed = False
        self._workers = workers
        # Batches are numbered as they are formed; they start, and are settled, by number.
        self._formed = self._started = self._computed = self._settled = 0
        self._finished: dict[int, tuple[list[_Call], list[Any] | BaseException]] = {}
        self._settling = False
        # One more than turns: it prepares a batch ahead, and hands out the results of the last.
        # Each has memory of its own, pinned where a plan can read it there.
        pinned = getattr(backend, "pinned", None)
        rooms = [pinned(max_batch) if pinned else np.empty(0) for _ in range(workers + 1)]
        # Daemons, or a forgotten close() would keep the interpreter from ending; atexit drains.
        self._threads = [
            threading.Thread(target=self._work, args=(room,), name=f"batcher-{n}", daemon=True)
            for n, room in enumerate(rooms)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, image: np.ndarray) -> Answer:
        """Asks for one image.

        Args:
            image: As the session takes it, without N: float32 [3, S, S], or uint8 [S, S, 3] for a
                file that takes pixels. It must not be changed before the future is done.

        Returns:
            A future of this image's row of what the session returns, or of the tuple of its rows.
            Cancelling it before its batch has started leaves it out.

        Raises:
            QueueFullError: `queue_limit` images are waiting.
            InputError: The image is not what the session takes, or the batcher is closed.
        """
        arrived = time.monotonic()
        image = np.asarray(image)
        if self._expected is not None and (image.shape, image.dtype) != self._expected:
            shape, dtype = self._expected
            raise InputError(
                f"an image of {image.dtype} {list(image.shape)}; the session takes "
                f"{dtype} {list(shape)}"
            )
        call = _Call(image=image, future=Answer(), arrived=arrived)
        with self._changed:
            if self._closed:
                raise InputError("submit after close: the batcher takes no more images")
            if len(self._queue) >= self._limit:  # cancelled calls need no room
                kept = [entry for entry in self._queue if not entry.future.cancelled()]
                self._queue.clear()
                self._queue.extend(kept)
            waiting = len(self._queue)
            if waiting >= self._limit:
                raise QueueFullError(
                    f"{waiting} images are waiting already (queue_limit {self._limit})",
                    fix="try again later",
                )
            self._queue.append(call)
            # Only what a worker can be waiting for: a first image, or a full batch.
            if waiting == 0 or waiting + 1 == self._max_batch:
                self._changed.notify()
        return call.future

    def close(self) -> None:
        """Takes no more images, finishes those it has, ends. Calling it twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # a future's callback may close
                thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self, room: np.ndarray) -> None:
        while (taken := self._take()) is not None:
            number, calls, planned = taken
            woken = time.monotonic()
            outcome: list[Any] | BaseException = []
            try:
                room = self._together(calls, room)
            except BaseException as error:  # no memory
                outcome = error
            with self._changed:
                while number != self._started or number - self._computed >= self._workers:
                    self._turn.wait()
                self._started += 1
                self._turn.notify_all()
            called = returned = time.monotonic()
            try:
                if calls and not isinstance(outcome, BaseException):
                    result = self._session(room[: len(calls)])
                    returned = time.monotonic()
                    outcome = _rows(result, len(calls))
                    del result  # or an idle thread would hold on to it
            except BaseException as error:  # whatever it is, it is its callers' to know
                outcome, returned = error, time.monotonic()
            for call in calls:
                call.future.queue_seconds = called - call.arrived
                call.future.compute_seconds = returned - called
                call.future.batch_size = len(calls)
            if self._on_batch is not None and calls:
                failure = outcome if isinstance(outcome, BaseException) else None
                self._on_batch(len(calls), returned - called, failure)
            with self._changed:
                self._computed += 1
                self._turn.notify_all()
                if self._queue:
                    self._changed.notify()
                if planned is not None and not isinstance(outcome, BaseException):
                    # Late to start, late to hand out; its callers will wake as late as this did.
                    self._learn(called - planned + time.monotonic() - returned + woken - planned)
            self._settle(number, calls, outcome)
            del taken, calls, outcome  # or an idle thread would hold on to the last images

    def _together(self, calls: list[_Call], room: np.ndarray) -> np.ndarray:
        """The images at the head of `room`, or of another where they do not fit."""
        if calls:
            image = calls[0].image
            if (room.shape[1:], room.dtype) != (image.shape, image.dtype):
                room = np.empty((self._max_batch, *image.shape), image.dtype)
            np.stack([call.image for call in calls], out=room[: len(calls)])
        return room

    def _learn(self, late: float) -> None:
        """Ends waits as much earlier as batches that waited for the clock came late, in seconds.

        More at once than less again: most are in time then, not half of them.
        """
        late = min(late, self._wait / 2)
        self._early += (late - self._early) / (8 if late > self._early else 32)

    def _take(self) -> tuple[int, list[_Call], float | None] | None:
        """The next batch, its number, and when it was to start if only the clock made it start.

        None at the end.
        """
        waited = False
        with self._changed:
            while True:
                if not self._queue:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                planned = None
                if len(self._queue) >= self._max_batch or self._closed:
                    break
                # One that is not full keeps gathering for as long as it could not start anyway.
                end = self._queue[0].arrived + self._wait - self._early
                left = end - time.monotonic()
                free = self._formed - self._computed < self._workers
                if left <= 0 and free:
                    planned = end if waited else None
                    break
                waited = free
                self._changed.wait(min(left, 3600) if free else None)  # no lock waits for ever
            calls: list[_Call] = []
            while self._queue and len(calls) < self._max_batch and _alike(calls, self._queue[0]):
                call = self._queue.popleft()
                if call.future.set_running_or_notify_cancel():
                    calls.append(call)
            if self._queue:
                self._changed.notify()  # another thread may be asleep, and this one is now busy
            number, self._formed = self._formed, self._formed + 1
            return number, calls, planned

    def _settle(self, number: int, calls: list[_Call], outcome: list[Any] | BaseException) -> None:
        """Hands results out in the order of the batches; one thread at a time, without the lock.

        A future's callbacks run in here, and may submit.
        """
        with self._changed:
            self._finished[number] = calls, outcome
            if self._settling:
                return
            self._settling = True
        while True:
            with self._changed:
                if self._settled not in self._finished:
                    self._settling = False
                    return
                calls, outcome = self._finished.pop(self._settled)
                self._settled += 1
            for index, call in enumerate(calls):
                try:
                    if isinstance(outcome, BaseException):
                        call.future.set_exception(outcome)
                    else:
                        call.future.set_result(outcome[index])
                except BaseException:  # SystemExit in a callback; others, futures log themselves
                    log.exception("a future's callback raised")


def _expected(session: object) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Shape and type of one image, where the session says; None where anything may fit."""
    if not isinstance(session, Session) or session.backend.size is None:
        return None
    side, backend = session.backend.size, session.backend
    shape = (side, side, 3) if backend.layout == "nhwc" else (3, side, side)
    return shape, np.dtype(backend.input_dtype)


def _alike(calls: list[_Call], call: _Call) -> bool:
    if not calls:
        return True
    first = calls[0].image
    return (first.shape, first.dtype) == (call.image.shape, call.image.dtype)


def _rows(result: Any, count: int) -> list[Any]:
    """A row of its own for each image: backends may use the memory of their outputs again."""
    if isinstance(result, tuple):
        return list(zip(*(_rows(part, count) for part in result), strict=True))
    if len(result) != count:
        raise InputError(f"the session returned {len(result)} rows for {count} images")
    return [np.array(row) for row in result]


@contextlib.contextmanager
def short_switch_interval(seconds: float = SWITCH_SECONDS) -> Iterator[None]:
    """Makes threads release the GIL sooner, for the whole process, until the `with` block ends.

    A thread that waited for the GPU needs the GIL to continue. Next to a thread that computes in
    Python, it gets the GIL after `sys.getswitchinterval()`.

    Args:
        seconds: The longest time that a thread keeps the GIL while others wait. A shorter interval
            that is already set stays.
    """
    previous = sys.getswitchinterval()
    sys.setswitchinterval(min(seconds, previous))
    try:
        yield
    finally:
        sys.setswitchinterval(previous)
