"""`rtresnet.Batcher` forms batches of single images that many threads submit.

    with rtresnet.load("engines/resnet50.plan") as session, rtresnet.Batcher(session) as batcher:
        logits = batcher.submit(image).result()      # from as many threads as there are requests

A batch starts when it is full, or when its first image has waited `max_wait_ms`. While one batch is
computed, the next one is gathered, and the results of the previous one are delivered. Under load,
batches are full and follow each other immediately. For a plan, images are gathered in pinned
memory, which the GPU reads without another copy on the host. The batcher does not interpret images
or results.
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
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError, QueueFullError
from rtresnet.runtime.session import Session

log = logging.getLogger(__name__)

SWITCH_SECONDS = 1e-4
"""Python's default of 5 ms is ten times the latency of a small net on a GPU."""


class Answer(Future[Any]):
    """The future of one image. Once it is done, it has the times of its request.

    Attributes:
        queue_seconds: Time from `submit` to the start of its batch.
        compute_seconds: Time of the session's call for its batch.
        batch_size: Number of images in its batch.
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
    """Forms batches of the images that many threads submit.

    Futures are completed in the order of the calls, with any number of workers. If a batch fails,
    all its calls fail. An image of the wrong shape is rejected by `submit`, or never shares a batch
    with others, so a batch fails only if the device or the session fails.

    For a plan on a GPU:

    - Load it with `contexts=2`. The GPU then computes one batch while the other is copied. With
      one context it is idle during copies.
    - Send uint8 images (`rtresnet export --input uint8-nhwc`): a quarter of the bytes to gather and
      to copy. See `rtresnet.pinned`.
    - Python threads that compute (decoding, preprocessing) hold the GIL for 5 ms at a time, and the
      batcher waits for it after every call of the GPU. If you control the process, set
      `sys.setswitchinterval(1e-4)`, or use `rtresnet.runtime.batcher.short_switch_interval`. With a
      device of 0.5 ms next to one such thread, a call takes 6.25 ms (median; p99 15.7) by default
      and 0.99 ms with 1e-4; alone it takes 0.82 ms.
    - `load(blocking=True)` makes threads that wait for the GPU sleep instead of spinning.

    Args:
        session: A session of `rtresnet.load`, or any function of images [N, ...] that returns an
            array [N, ...] or a tuple of them. It may use the images only during the call, because
            their memory is reused.
        max_batch: Largest number of images in a batch.
        max_wait_ms: Longest time that the first image of a batch waits for others, in
            milliseconds, including the time to wake a thread, which is measured.
        queue_limit: Largest number of waiting images; `submit` rejects more.
        workers: Number of batches computed at the same time, for a session that several threads
            may call at once. Default: the contexts of a plan, else 1.
        on_batch: Called after every batch, from a thread of the batcher, with its size, the
            seconds of its call, and the exception that it raised or None. What `on_batch`
            itself raises is logged.

    Raises:
        InputError: A limit is out of range.
        UnavailableError: There is not enough pinned memory for `workers` + 1 batches.
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
        self._early = 0.0  # seconds by which waits end early, because threads wake up late
        self._expected = _expected(session)
        self._queue: deque[_Call] = deque()
        lock = threading.Lock()
        self._changed, self._turn = threading.Condition(lock), threading.Condition(lock)
        self._closed = False
        self._workers = workers
        # Batches are numbered when they are formed. They start and are settled in this order.
        self._formed = self._started = self._computed = self._settled = 0
        self._finished: dict[int, tuple[list[_Call], list[Any] | BaseException]] = {}
        self._settling = False
        # One thread more than workers prepares the next batch and delivers the last results.
        # Each thread has its own memory, which is pinned for a plan.
        pinned = getattr(backend, "pinned", None)
        staging = [pinned(max_batch) if pinned else np.empty(0) for _ in range(workers + 1)]
        # Daemons, so that a forgotten close() does not block the interpreter's exit; atexit drains.
        self._threads = [
            threading.Thread(target=self._work, args=(memory,), name=f"batcher-{n}", daemon=True)
            for n, memory in enumerate(staging)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, image: np.ndarray) -> Answer:
        """Submit one image.

        Args:
            image: An input of the session without N: float32 [3, S, S], or uint8 [S, S, 3] for a
                file that takes pixels. It must not change before the future is done.

        Returns:
            A future of this image's row of the session's result, or of a tuple of its rows.
            Cancelling it before its batch starts removes it from the batch.

        Raises:
            QueueFullError: `queue_limit` images are waiting.
            InputError: The image has the wrong type or shape, or the batcher is closed.
        """
        arrived = time.monotonic()
        image = np.asarray(image)
        if self._expected is not None and (image.shape, image.dtype) != self._expected:
            shape, dtype = self._expected
            raise InputError(
                f"an image of {image.dtype} {list(image.shape)}; the session expects "
                f"{dtype} {list(shape)}"
            )
        call = _Call(image=image, future=Answer(), arrived=arrived)
        with self._changed:
            if self._closed:
                raise InputError("the batcher is closed")
            if len(self._queue) >= self._limit:  # cancelled calls do not count
                waiting_calls = [entry for entry in self._queue if not entry.future.cancelled()]
                self._queue.clear()
                self._queue.extend(waiting_calls)
            waiting = len(self._queue)
            if waiting >= self._limit:
                raise QueueFullError(
                    f"{waiting} images are already waiting (queue_limit {self._limit})",
                    fix="try again later",
                )
            self._queue.append(call)
            # Workers wait only for a first image or a full batch.
            if waiting == 0 or waiting + 1 == self._max_batch:
                self._changed.notify()
        return call.future

    def close(self) -> None:
        """Reject further images and wait for the submitted ones. Can be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # a future's callback may close
                thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self, memory: np.ndarray) -> None:
        while (batch := self._take()) is not None:
            number, calls, planned = batch
            woken = time.monotonic()
            outcome: list[Any] | BaseException = []
            try:
                memory = self._gathered(calls, memory)
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
                    result = self._session(memory[: len(calls)])
                    returned = time.monotonic()
                    outcome = _rows(result, len(calls))
                    del result  # an idle thread must not keep it alive
            except BaseException as error:  # any exception goes to the callers
                outcome, returned = error, time.monotonic()
            for call in calls:
                call.future.queue_seconds = called - call.arrived
                call.future.compute_seconds = returned - called
                call.future.batch_size = len(calls)
            if self._on_batch is not None and calls:
                failure = outcome if isinstance(outcome, BaseException) else None
                try:
                    self._on_batch(len(calls), returned - called, failure)
                except BaseException:  # the batch must be counted and its calls answered
                    log.exception("on_batch raised")
            with self._changed:
                self._computed += 1
                self._turn.notify_all()
                if self._queue:
                    self._changed.notify()
                if planned is not None and not isinstance(outcome, BaseException):
                    # The batch started and ended late; its callers also wake up late.
                    self._learn(called - planned + time.monotonic() - returned + woken - planned)
            self._settle(number, calls, outcome)
            del batch, calls, outcome  # an idle thread must not keep the last images alive

    def _gathered(self, calls: list[_Call], memory: np.ndarray) -> np.ndarray:
        """Copy the images to the start of `memory`, or of new memory if they do not fit."""
        if calls:
            image = calls[0].image
            if (memory.shape[1:], memory.dtype) != (image.shape, image.dtype):
                memory = np.empty((self._max_batch, *image.shape), image.dtype)
            np.stack([call.image for call in calls], out=memory[: len(calls)])
        return memory

    def _learn(self, late: float) -> None:
        """Make waits end earlier by the seconds that batches which waited for the clock are late.

        Increases faster than it decreases, so that most batches are in time instead of half.
        """
        late = min(late, self._wait / 2)
        self._early += (late - self._early) / (8 if late > self._early else 32)

    def _take(self) -> tuple[int, list[_Call], float | None] | None:
        """Return the next batch: its number, its calls, and its planned start.

        The planned start is None unless the batch waited for the clock. Returns None at the end.
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
                # A batch that is not full keeps gathering while no worker is free.
                end = self._queue[0].arrived + self._wait - self._early
                left = end - time.monotonic()
                free = self._formed - self._computed < self._workers
                if left <= 0 and free:
                    planned = end if waited else None
                    break
                waited = free
                self._changed.wait(min(left, 3600) if free else None)  # a lock's timeout is limited
            calls: list[_Call] = []
            while self._queue and len(calls) < self._max_batch and _alike(calls, self._queue[0]):
                call = self._queue.popleft()
                if call.future.set_running_or_notify_cancel():
                    calls.append(call)
            if self._queue:
                self._changed.notify()  # this thread is busy now, and another may be asleep
            number, self._formed = self._formed, self._formed + 1
            return number, calls, planned

    def _settle(self, number: int, calls: list[_Call], outcome: list[Any] | BaseException) -> None:
        """Deliver results in the order of the batches; one thread at a time, without the lock.

        The futures' callbacks run inside and may call `submit`.
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
                except BaseException:  # SystemExit in a callback; futures log others themselves
                    log.exception("a future's callback raised")


def _expected(session: object) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Return shape and type of one image if the session has them; None if anything may fit."""
    if not isinstance(session, Session) or session.backend.size is None:
        return None
    side, backend = session.backend.size, session.backend
    shape = (side, side, 3) if backend.layout == "nhwc" else (3, side, side)
    return shape, np.dtype(backend.input_dtype)


def _alike(calls: list[_Call], call: _Call) -> bool:
    """Return whether a call's image has the shape and type of the others."""
    if not calls:
        return True
    first = calls[0].image
    return (first.shape, first.dtype) == (call.image.shape, call.image.dtype)


def _rows(result: Any, count: int) -> list[Any]:
    """Copy the row of each image, because backends may reuse the memory of their outputs."""
    if isinstance(result, tuple):
        return list(zip(*(_rows(part, count) for part in result), strict=True))
    if len(result) != count:
        raise InputError(f"the session returned {len(result)} rows for {count} images")
    return [np.array(row) for row in result]


@contextlib.contextmanager
def short_switch_interval() -> Iterator[None]:
    """Make threads release the GIL sooner, for the whole process, until the `with` block ends.

    A thread that waited for the GPU needs the GIL to continue. Next to a thread that computes in
    Python, it gets the GIL after `sys.getswitchinterval()`, here SWITCH_SECONDS at most.
    """
    previous = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH_SECONDS, previous))
    try:
        yield
    finally:
        sys.setswitchinterval(previous)
