"""Check, run and answer a request of the Open Inference Protocol.

https://github.com/kserve/open-inference-protocol. Knows neither HTTP nor gRPC.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError, RtresnetError, UnavailableError
from rtresnet.core.metrics import softmax
from rtresnet.runtime.batcher import Answer
from rtresnet.serving.metrics import Metrics
from rtresnet.serving.repository import Model, Repository, Tensor

NUMPY: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT64": np.dtype("<i8")
}  # fmt: skip
MAX_TENSORS = 8


class DeadlineError(RtresnetError):
    """The request's time was over before its answer was there."""


class ClientGoneError(RtresnetError):
    """The client closed the connection; nobody waits for the answer."""


@dataclass(frozen=True, kw_only=True)
class RequestedOutput:
    """An output that a request names.

    Attributes:
        classification: Return the K most probable classes as "value:index:label".
        binary: Send it as bytes after the JSON header.

    The name "*" stands for every output.
    """

    name: str
    classification: int = 0
    binary: bool = False


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request.

    Attributes:
        data: Values of each input, in the order of `inputs`: raw bytes, or an array or list.
        timeout: Seconds from its arrival within which the answer must be there; None: no limit.
    """

    id: str
    inputs: Sequence[Tensor]
    data: Sequence[Any]
    outputs: Sequence[RequestedOutput] = ()
    timeout: float | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output of the answer; `values` is an array, or for BYTES a list of lists of bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Any
    binary: bool

    def raw(self) -> bytes:
        """The values as the protocol's binary extension sends them."""
        if self.datatype != "BYTES":
            return bytes(np.ascontiguousarray(self.values).data)
        flat = itertools.chain.from_iterable(self.values)
        return b"".join(len(text).to_bytes(4, "little") + text for text in flat)

    def flat(self) -> list[Any]:
        """The values as JSON has them."""
        if self.datatype != "BYTES":
            values: list[Any] = self.values.ravel().tolist()
            return values
        return [text.decode() for row in self.values for text in row]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a model answered for a batch.

    Attributes:
        values: Logits [N, classes], or indices and probabilities [N, K].
        queue_seconds: The longest wait of its images.
        compute_seconds: The longest call of their batches.
        batch_size: Images in the largest of these batches.
    """

    values: np.ndarray | tuple[np.ndarray, np.ndarray]
    queue_seconds: float
    compute_seconds: float
    batch_size: int


class Engine:
    """Runs requests on a repository's models."""

    def __init__(self, repository: Repository, metrics: Metrics) -> None:
        self.repository = repository
        self.metrics = metrics

    async def infer(
        self, model: Model, request: InferRequest, gone: Callable[[], Awaitable[Any]] | None = None
    ) -> tuple[list[Output], Answered]:
        """Answers a request.

        Args:
            model: What answers.
            request: What it asks for.
            gone: Returns once the client is gone; its images are then dropped from the queue.

        Raises:
            InputError: Inputs or outputs are not the model's, or too large.
            ServerBusyError: The queue is full.
            DeadlineError: Its time is over.
            ClientGoneError: Nobody waits for the answer.
            UnavailableError: The device failed.
        """
        wanted = _requested(model, request.outputs)
        images = _images(model, request)
        answered = await self.run(model, images, request.timeout, gone)
        return _outputs(model, answered.values, wanted), answered

    async def run(
        self,
        model: Model,
        images: np.ndarray,
        timeout: float | None = None,
        gone: Callable[[], Awaitable[Any]] | None = None,
    ) -> Answered:
        """Runs a batch of inputs [N, ...]; arguments and errors are those of `infer`."""
        began = time.monotonic()
        ok = False
        answers: list[Answer] = []
        try:
            answers = model.submit(images)
            await _all_done(answers, timeout, gone)
            rows = [_result(answer) for answer in answers]
            ok = True
        finally:
            if not ok:
                for answer in answers:
                    answer.cancel()
            now = time.monotonic()
            self.repository.finished(model, now - began, answers, ok=ok)
        answered = Answered(
            values=_stacked(rows),
            queue_seconds=max(answer.queue_seconds for answer in answers),
            compute_seconds=max(answer.compute_seconds for answer in answers),
            batch_size=max(answer.batch_size for answer in answers),
        )
        self.metrics.split(model.name, now, now - began, answered.queue_seconds)
        return answered


def _result(answer: Answer) -> Any:
    try:
        return answer.result()
    except concurrent.futures.CancelledError:
        raise UnavailableError("the server is shutting down") from None
    except (RtresnetError, MemoryError):
        raise
    except Exception as error:
        raise UnavailableError(f"the device failed: {error}") from error


async def _all_done(
    answers: Sequence[Answer],
    timeout: float | None,
    gone: Callable[[], Awaitable[Any]] | None,
) -> None:
    """Waits for all answers with one wake-up of the event loop."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    lock, left = threading.Lock(), len(answers)

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def one_done(answer: Any) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last and not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    for answer in answers:
        answer.add_done_callback(one_done)
    watch = asyncio.ensure_future(gone()) if gone is not None else None
    try:
        waiting = {done} if watch is None else {done, watch}
        finished, _ = await asyncio.wait(
            waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        if watch is not None:
            watch.cancel()
    if done in finished:
        return
    if finished:
        raise ClientGoneError("the client closed the connection")
    raise DeadlineError(f"no answer within {timeout:g} s", fix="wait longer")


def _stacked(rows: Sequence[Any]) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    if isinstance(rows[0], tuple):
        indices, probabilities = zip(*rows, strict=True)
        return np.stack(indices), np.stack(probabilities)
    return np.stack(rows)


def _requested(model: Model, outputs: Sequence[RequestedOutput]) -> list[RequestedOutput]:
    known = {output.name for output in model.outputs}
    if [output.name for output in outputs] == ["*"]:
        return [RequestedOutput(name=output.name, binary=True) for output in model.outputs]
    if len(outputs) > MAX_TENSORS:
        raise InputError(f"{len(outputs)} outputs; at most {MAX_TENSORS} are possible")
    for output in outputs:
        if output.name not in known:
            raise InputError(
                f"unknown output {output.name[:80]!r}", fix=f"known: {', '.join(sorted(known))}"
            )
        if not 0 <= output.classification <= 1_000_000:
            raise InputError(f"classification {output.classification} is out of range")
        if output.classification and output.name != model.outputs[0].name:
            raise InputError(f"{output.name}: classification needs logits")
    return list(outputs)


def _images(model: Model, request: InferRequest) -> np.ndarray:
    """The checked input: [N, ...], N from 1 to the largest batch."""
    (expected,) = model.inputs
    if len(request.inputs) != 1:
        raise InputError(f"{len(request.inputs)} inputs; the model has one, {expected.name}")
    given, data = request.inputs[0], request.data[0]
    if given.name != expected.name:
        raise InputError(f"unknown input {given.name[:80]!r}", fix=f"known: {expected.name}")
    if given.datatype != expected.datatype:
        raise InputError(
            f"input {given.name} is {given.datatype[:20]}; the model takes {expected.datatype}"
        )
    shape = given.shape
    if len(shape) != len(expected.shape) or shape[1:] != expected.shape[1:] or shape[0] < 1:
        raise InputError(
            f"input {given.name} has shape {list(shape)[:8]}; the model takes "
            f"{list(expected.shape)}"
        )
    if shape[0] > model.max_batch:
        raise InputError(
            f"{shape[0]} images; a request may have {model.max_batch}", fix="send several requests"
        )
    count, dtype = int(np.prod(shape)), NUMPY[expected.datatype]
    if isinstance(data, bytes | bytearray | memoryview):
        if len(data) != count * dtype.itemsize:
            raise InputError(
                f"input {given.name} has {len(data)} bytes; {count * dtype.itemsize} are needed"
            )
        return np.frombuffer(data, dtype).reshape(shape)
    return _from_numbers(given.name, data, shape, dtype, count)


def _from_numbers(
    name: str, data: Any, shape: tuple[int, ...], dtype: np.dtype[Any], count: int
) -> np.ndarray:
    """JSON's numbers, flat or nested."""
    try:
        values = np.asarray(data)
    except (ValueError, TypeError, OverflowError):
        values = np.empty(0)
    if values.size != count or values.dtype.kind not in "iuf":
        raise InputError(f"input {name}: {count} numbers are needed")
    if dtype.kind == "u" and (values.dtype.kind == "f" or values.min() < 0 or values.max() > 255):
        raise InputError(f"input {name}: whole numbers from 0 to 255 are needed")
    return values.astype(dtype).reshape(shape)


def _outputs(
    model: Model,
    values: np.ndarray | tuple[np.ndarray, np.ndarray],
    wanted: Sequence[RequestedOutput],
) -> list[Output]:
    arrays = values if isinstance(values, tuple) else (values,)
    by_name = dict(zip((output.name for output in model.outputs), arrays, strict=True))
    datatypes = {output.name: output.datatype for output in model.outputs}
    chosen = wanted or [RequestedOutput(name=output.name) for output in model.outputs]
    outputs = []
    for request in chosen:
        array = by_name[request.name]
        if request.classification:
            rows = _classified(model, array, request.classification)
            outputs.append(
                Output(name=request.name, datatype="BYTES", shape=(len(rows), len(rows[0])),
                       values=rows, binary=request.binary)
            )  # fmt: skip
            continue
        outputs.append(
            Output(name=request.name, datatype=datatypes[request.name], shape=array.shape,
                   values=array, binary=request.binary)
        )  # fmt: skip
    return outputs


def _classified(model: Model, logits: np.ndarray, count: int) -> list[list[bytes]]:
    """Triton's classification extension: "value:index:label", the largest first."""
    classes = model.session.classes
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return [
        [f"{row[index]:f}:{index}:{classes[index]}".encode() for index in best]
        for row, best in zip(logits, order.tolist(), strict=True)
    ]


def most_probable(model: Model, answered: Answered, count: int) -> list[list[tuple[str, float]]]:
    """The `count` most probable classes of each image with their probabilities."""
    classes = model.session.classes
    if isinstance(answered.values, tuple):
        indices, probabilities = (part[:, :count] for part in answered.values)
    else:
        scores = softmax(answered.values)
        indices = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        probabilities = np.take_along_axis(scores, indices, axis=1)
    return [
        [
            (classes[index] if index < len(classes) else str(index), float(value))
            for index, value in zip(row, values, strict=True)
        ]
        for row, values in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]
