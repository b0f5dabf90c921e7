"""One version of a model in a server: loading, self-check, batching, answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from rtresnet.core import artifacts, detector_preprocess
from rtresnet.core.errors import (
    CheckFailedError,
    InputError,
    QueueFullError,
    RtresnetError,
    UnavailableError,
)
from rtresnet.runtime.backend import TOPK
from rtresnet.runtime.batcher import Answer, Batcher
from rtresnet.runtime.detector_rows import DetectorRows
from rtresnet.runtime.session import Session
from rtresnet.serving import protocol
from rtresnet.serving.config import ServeConfig
from rtresnet.serving.prometheus import Metrics
from rtresnet.serving.protocol import DATATYPES, InferRequest, InferTensor, RequestError

log = logging.getLogger("rtresnet.serve")

FAILURES_IN_A_ROW = 3  # batches that fail before a device counts as lost


class Connection(Protocol):
    """A client's connection; `on_lost` is called once it is closed."""

    on_lost: Callable[[], None] | None


class Answered(NamedTuple):
    """The answer of a model to a batch.

    Attributes:
        values: An array [N, ...] for each output of the model.
        queue_seconds: The longest wait of an image.
        compute_seconds: The longest call of a batch with one of the images.
    """

    values: tuple[np.ndarray, ...]
    queue_seconds: float
    compute_seconds: float


class ServedModel:
    """One version of a model, loaded, checked and warm.

    Args:
        name: Its name in requests.
        version: Its number, as text.
        path: An ONNX file or a plan.
        load: Opens an artifact and verifies its sidecar.
        config: Batching and queue.
        metrics: Receives every batch.

    Attributes:
        healthy: False after several batches in a row failed: the device is lost.
        detector: Converts images and results of a detector; None for a classifier.
        inputs, outputs: Names, types and shapes, with -1 for the batch.

    Raises:
        CheckFailedError: An answer is not finite, or depends on its batch.
    """

    def __init__(
        self,
        name: str,
        version: str,
        path: Path,
        load: Callable[[Path], Session],
        config: ServeConfig,
        metrics: Metrics,
    ) -> None:
        self.name, self.version, self.max_batch = name, version, config.max_batch
        self.stamp = stamp(path)
        self.healthy, self._failed_in_a_row, self._metrics = True, 0, metrics
        self._closing = False
        self.session = load(path)
        try:
            self.detector = DetectorRows(self.session) if self.session.detection else None
            self.batcher = Batcher(
                self.detector or self.session,
                max_batch=self._check(),
                max_wait_ms=config.max_wait_ms,
                queue_limit=config.queue_limit,
                on_batch=self._on_batch,
            )
        except BaseException:
            self.session.close()
            raise

    def _check(self) -> int:
        """Warm the session up and check its answers; returns the largest batch it computes."""
        session, detector, backend = self.session, self.detector, self.session.backend
        check = f"find the cause with: rtresnet check {session.path}"
        if detector is not None:  # takes one image at a time
            noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            images = detector.prepare(noise)
            values = detector(images)
            shapes = dict(zip(detector_preprocess.INPUTS, (detector.shape, (2,)), strict=True))
            names: Sequence[str] = detector_preprocess.OUTPUTS
        else:
            fixed = session.batch
            images = session.example(fixed if fixed is not None and fixed > 1 else self.max_batch)
            first, values = _arrays(session(images[:1])), _arrays(session(images))
            spread = max(float(np.ptp(values[-1])), 1e-6)
            if float(np.abs(first[-1][0] - values[-1][0]).max()) > 0.05 * spread:
                problem = "an image's answer depends on its batch"
                raise CheckFailedError(f"{session.path}: {problem}", fix=check)
            shapes = {getattr(backend, "input_name", "images"): session.image_shape}
            names = TOPK if len(values) > 1 else getattr(backend, "output_names", ["logits"])
        if not all(np.isfinite(value).all() for value in values):
            raise CheckFailedError(f"{session.path}: outputs are not finite", fix=check)
        datatype = DATATYPES[backend.input_dtype.name]
        self.inputs = [InferTensor(name, datatype, [-1, *shape]) for name, shape in shapes.items()]
        self.outputs = [
            InferTensor(name, DATATYPES[value.dtype.name], [-1, *value.shape[1:]])
            for name, value in zip(names, values, strict=True)
        ]
        return len(images)

    @property
    def task(self) -> str:
        """The operation for encoded images: "classify" or "detect"."""
        return "classify" if self.detector is None else "detect"

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return the input [1, ...] for an image uint8 RGB [H, W, 3] of any size."""
        if self.detector is not None:
            return self.detector.prepare(image)
        return self.session.prepare([image])

    async def infer(
        self, request: InferRequest, limit: float, connection: Connection | None = None
    ) -> dict[str, np.ndarray]:
        """Answer a request.

        Args:
            request: Inputs, names of outputs, and the client's time limit.
            limit: Longest time to answer, in seconds.
            connection: When it is lost, the images are removed from the queue.

        Returns:
            The requested outputs by name; text for those requested as classes.

        Raises:
            InputError: The inputs or outputs do not match the model's, or are too large.
            RequestError: The queue is full, the time is over, the client is gone, or an output is
                not finite.
            UnavailableError: The device failed.
        """
        counts = protocol.requested(request, self.outputs)
        images, *extent = protocol.inputs(request, self.inputs, self.max_batch)
        if self.detector is not None:
            images = self.detector.pack(images, *extent)
        if microseconds := request.parameters.timeout:
            limit = min(limit, microseconds / 1e6)
        answered = await self.run(images, limit, connection)
        values = dict(zip((output.name for output in self.outputs), answered.values, strict=True))
        return {
            name: protocol.classified(values[name], self.session.classes, classes)
            if classes
            else values[name]
            for name, classes in counts.items()
        }

    async def run(
        self, images: np.ndarray, limit: float, connection: Connection | None = None
    ) -> Answered:
        """Run a batch of inputs [N, ...]; arguments and errors are those of `infer`."""
        began = time.monotonic()
        answers: list[Answer] = []
        queue = None
        try:
            for image in images:
                answers.append(self.batcher.submit(image))
            await _done(answers[-1], limit, connection)  # answers come in their order
            rows = [_arrays(_result(answer)) for answer in answers]
            values = tuple(np.stack(column) for column in zip(*rows, strict=True))
            self._require_finite(images, values)
            queue = max(answer.queue_seconds for answer in answers)
        except QueueFullError as error:
            raise RequestError(503, f"{self.name}: {error.message}") from None
        except InputError:
            if not self._closing:
                raise
            message = f"{self.name}: its file was reloaded during the request"
            raise RequestError(503, message, fix="send it again") from None
        finally:
            for answer in answers:
                answer.cancel()  # does nothing to those that are done
            self._metrics.run(self.name, self.version, time.monotonic() - began, queue)
        return Answered(values, queue, max(answer.compute_seconds for answer in answers))

    def _require_finite(self, images: np.ndarray, values: tuple[np.ndarray, ...]) -> None:
        """Raise if an output is not finite: JSON has no such numbers, and no client expects them.

        Raises:
            InputError: Neither are the inputs.
            RequestError: The model computes it from finite inputs.
        """
        for output, array in zip(self.outputs, values, strict=True):
            if not np.isfinite(array).all():
                if not np.isfinite(images).all():
                    names = ", ".join(tensor.name for tensor in self.inputs)
                    raise InputError(f"{self.name}: NaN or infinity in {names}")
                raise RequestError(
                    500,
                    f"{self.name}: NaN or infinity in output {output.name}",
                    fix="find the cause with: rtresnet check",
                )

    def _on_batch(self, size: int, seconds: float, failure: BaseException | None) -> None:
        self._metrics.batch(self.name, self.version, size, seconds)
        lost = failure is not None and not isinstance(failure, InputError)
        self._failed_in_a_row = self._failed_in_a_row + 1 if lost else 0
        if self._failed_in_a_row >= FAILURES_IN_A_ROW and self.healthy:
            self.healthy = False
            log.error("model %s fails: %s", self.name, failure)

    def close(self) -> None:
        """Finish queued requests and free the memory."""
        self._closing = True
        try:
            self.batcher.close()
        finally:
            self.session.close()

    @property
    def platform(self) -> str:
        """Triton's name for the runtime."""
        plan = self.session.path.suffix.lower() == ".plan"
        return "tensorrt_plan" if plan else "onnxruntime_onnx"

    def metadata(self, versions: list[str]) -> dict[str, object]:
        """Return its metadata in the protocol's format."""
        return {"name": self.name, "versions": versions, "platform": self.platform,
                "inputs": msgspec.to_builtins(self.inputs),
                "outputs": msgspec.to_builtins(self.outputs)}  # fmt: skip

    def config(self) -> dict[str, object]:
        """Return its configuration in Triton's format."""
        layouts = {"UINT8": {"format": "FORMAT_NHWC"}, "FP32": {"format": "FORMAT_NCHW"}}

        def entry(tensor: InferTensor) -> dict[str, object]:
            datatype = f"TYPE_{tensor.datatype}"
            return {"name": tensor.name, "data_type": datatype, "dims": tensor.shape[1:]}

        return {"name": self.name, "platform": self.platform, "max_batch_size": self.max_batch,
                "input": [
                    entry(tensor) | (layouts[tensor.datatype] if len(tensor.shape) == 4 else {})
                    for tensor in self.inputs
                ],
                "output": list(map(entry, self.outputs))}  # fmt: skip

    def statistics(self) -> dict[str, object]:
        """Return its statistics in Triton's format."""
        return self._metrics.statistics(self.name, self.version)


def _arrays(answer: Any) -> tuple[np.ndarray, ...]:
    """Return logits, or indices and probabilities, as a tuple."""
    return answer if isinstance(answer, tuple) else (np.asarray(answer),)


def _result(answer: Answer) -> Any:
    try:
        return answer.result()
    except (RtresnetError, MemoryError):
        raise
    except Exception as error:
        raise UnavailableError(f"the device failed: {error}") from error


async def _done(answer: Answer, limit: float, connection: Connection | None) -> None:
    """Wait for an answer, or until the client is gone."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def finish(answered: bool) -> None:
        if not done.done():
            done.set_result(answered)

    def wake(answer: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, True)

    answer.add_done_callback(wake)
    if connection is not None:
        connection.on_lost = lambda: finish(False)
    try:
        if not await asyncio.wait_for(done, limit):
            raise RequestError(499, "the client closed the connection")
    except asyncio.TimeoutError:
        raise RequestError(
            504, f"no answer within {limit:g} s", fix="send a longer timeout"
        ) from None
    finally:
        if connection is not None:
            connection.on_lost = None


def stamp(path: Path) -> list[Any]:
    """Return a value that changes when a file or its sidecar is replaced."""
    stamps = []
    for file in (path, artifacts.sidecar_path(path)):
        with contextlib.suppress(OSError):
            status = file.stat()
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return stamps
