"""Keep several batches in flight on a plan: `TrtBackend.pipeline`."""

from __future__ import annotations

from collections import deque
from typing import Any

from rtresnet.core.errors import InputError
from rtresnet.runtime.arrays import check_images, make_results
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.error_log import ErrorLog
from rtresnet.runtime.execution import ExecutionStream
from rtresnet.runtime.io_spec import IoSpec


class Pipeline:
    """Keeps batches in flight: while the GPU computes one, the next one is enqueued.

    `TrtBackend.pipeline` creates it. Results come in the order of the batches. It is for one
    thread. If a call of CUDA or TensorRT fails, every batch in flight is lost.

    Attributes:
        depth: Number of batches in flight from which on `put` waits: two for each stream.
    """

    def __init__(
        self, cuda: Cuda, io: IoSpec, streams: list[ExecutionStream], errors: ErrorLog
    ) -> None:
        self.depth = 2 * len(streams)
        self._cuda, self._io, self._errors = cuda, io, errors
        self._streams = deque(streams)
        self._busy: deque[ExecutionStream] = deque()
        self._last: ExecutionStream | None = None

    def put(self, images: Any) -> None:
        """Enqueues a batch.

        Args:
            images: As for `TrtBackend.infer`. In pinned memory or on the GPU, they must not
                change before `get` has returned their result.

        Raises:
            InputError: Wrong type or shape.
            UnavailableError: A call of CUDA or TensorRT failed.
        """
        stream = self._streams[0]
        with self._cuda.active():
            self._errors.clear()
            batch = check_images(self._io, images, stream.compute)
            results = make_results(self._io, None, len(batch), stream.compute)
            try:
                stream.enqueue(batch, results)
            except BaseException:
                self._discard()
                raise
        self._streams.rotate(-1)
        self._busy.append(stream)

    def get(self) -> Any:
        """Waits for the oldest batch in flight and returns its result, as `infer` does.

        Raises:
            InputError: No batch is in flight.
            UnavailableError: A call of CUDA failed.
        """
        if not self._busy:
            raise InputError("no batch is in flight", fix="call put before get")
        self._last = self._busy.popleft()
        with self._cuda.active():
            try:
                results = self._last.finish()
            except BaseException:
                self._discard()
                raise
        return results[0] if len(results) == 1 else tuple(results)

    def _discard(self) -> None:
        """Waits for every batch in flight and drops the results."""
        self._busy.clear()
        for stream in self._streams:
            stream.discard()

    def timings(self) -> dict[str, float]:
        """Returns the milliseconds of the last result's parts. See `TrtBackend.timings`.

        Also empty if more than `depth` batches were in flight.
        """
        if self._last is None:
            return {}
        with self._cuda.active():
            return self._last.timings()
