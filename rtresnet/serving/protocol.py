"""The Open Inference Protocol with Triton's extensions: what a request means and its answer.

https://github.com/kserve/open-inference-protocol. HTTP and gRPC share this; it knows neither.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
import numpy as np

from rtresnet import __version__
from rtresnet.core.errors import InputError, RtresnetError

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository",
              "statistics")  # fmt: skip
NUMPY: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT64": np.dtype("<i8")
}  # fmt: skip
DATATYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64", "object": "BYTES"}
MAX_OUTPUTS = 8


GRPC_STATUS = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED",
    413: "INVALID_ARGUMENT", 499: "CANCELLED", 500: "INTERNAL", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip


class RequestError(RtresnetError):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str, *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.status = status


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; GRPC_STATUS has the name of gRPC's."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, RtresnetError) else 500


def authorize(token: str | None, header: str) -> None:
    """Checks the value of an Authorization header.

    Raises:
        RequestError: It does not carry the token.
    """
    if token is not None and not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise RequestError(401, "a bearer token is needed")


class Tensor(msgspec.Struct):
    """An input, an output, or an output that a request names.

    Attributes:
        shape: -1 is the batch.
        data: Of an input: numbers, flat or nested, an array, or the bytes of a binary tensor.
    """

    name: str
    datatype: str = ""
    shape: list[Annotated[int, msgspec.Meta(ge=-1, le=2**31)]] = []
    data: Any = None
    parameters: dict[str, object] = {}


class InferRequest(msgspec.Struct):
    """A request to infer, in the protocol's fields; `parameters["timeout"]` is in microseconds."""

    inputs: list[Tensor]
    id: str = ""
    outputs: list[Tensor] = []
    parameters: dict[str, object] = {}


def timeout(request: InferRequest, limit: float) -> float:
    """Seconds within which a request is answered: what it states, `limit` at most."""
    stated = request.parameters.get("timeout")
    return min(limit, stated / 1e6) if type(stated) is int and stated > 0 else limit


def inputs(request: InferRequest, expected: list[Tensor], max_batch: int) -> list[np.ndarray]:
    """The checked inputs of a request, in the model's order: [N, ...], N from 1 to `max_batch`.

    Raises:
        InputError: Not what the model takes.
    """
    given = {tensor.name: tensor for tensor in request.inputs}
    names = [tensor.name for tensor in expected]
    if len(request.inputs) != len(names) or len(given) != len(names):
        raise InputError(f"{len(request.inputs)} inputs; the model has {', '.join(names)}")
    for name in given:
        if name not in names:
            raise InputError(f"unknown input {name[:80]!r}", fix=f"known: {', '.join(names)}")
    return [_input(given[tensor.name], tensor, max_batch) for tensor in expected]


def _input(given: Tensor, expected: Tensor, max_batch: int) -> np.ndarray:
    name, shape, data = given.name[:80], given.shape, given.data
    if given.datatype != expected.datatype:
        raise InputError(
            f"input {name} is {given.datatype[:20]}; the model takes {expected.datatype}"
        )
    if len(shape) != len(expected.shape) or shape[1:] != expected.shape[1:] or shape[0] < 1:
        raise InputError(f"input {name} has shape {shape[:8]}; the model takes {expected.shape}")
    if shape[0] > max_batch:
        raise InputError(
            f"{shape[0]} images; a request may have {max_batch}", fix="send several requests"
        )
    count, dtype = int(np.prod(shape)), NUMPY[expected.datatype]
    if isinstance(data, bytes | memoryview):
        if len(data) != count * dtype.itemsize:
            raise InputError(
                f"input {name} has {len(data)} bytes; {count * dtype.itemsize} are needed"
            )
        return np.frombuffer(data, dtype).reshape(shape)
    try:
        values = np.asarray(data)
    except (ValueError, TypeError, OverflowError):
        values = np.empty(0)
    if values.size != count or values.dtype.kind not in "iuf":
        raise InputError(f"input {name}: {count} numbers are needed")
    if dtype.kind == "u" and (values.dtype.kind == "f" or values.min() < 0 or values.max() > 255):
        raise InputError(f"input {name}: whole numbers from 0 to 255 are needed")
    return values.astype(dtype).reshape(shape)


def requested(request: InferRequest, known: Iterable[Tensor]) -> dict[str, int]:
    """The outputs that a request names, or all, and how many classes each shall be (0: values).

    Raises:
        InputError: An output that the model does not have, or does not have as classes.
    """
    names = [output.name for output in known]
    if len(request.outputs) > MAX_OUTPUTS:
        raise InputError(f"{len(request.outputs)} outputs; at most {MAX_OUTPUTS} are possible")
    wanted = {}
    for output in request.outputs:
        if output.name not in names:
            raise InputError(f"unknown output {output.name[:80]!r}", fix=f"known: {names}")
        count = output.parameters.get("classification", 0)
        if type(count) is not int or not 0 <= count <= 1_000_000:
            raise InputError(f"classification {str(count)[:20]}: a whole number is needed")
        if count and output.name != names[0]:
            raise InputError(f"{output.name}: classification needs logits")
        wanted[output.name] = count
    return wanted or dict.fromkeys(names, 0)


def classified(logits: np.ndarray, classes: tuple[str, ...], count: int) -> np.ndarray:
    """Triton's classification extension: bytes [N, count], "value:index:label", largest first."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    rows = [
        [f"{row[index]:f}:{index}:{classes[index]}".encode() for index in best]
        for row, best in zip(logits, order.tolist(), strict=True)
    ]
    return np.array(rows, dtype=object)


def raw(values: np.ndarray) -> bytes:
    """Values as the binary extension sends them; text with its length before it."""
    if values.dtype != object:
        return values.tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in values.ravel())


def flat(values: np.ndarray) -> list[Any]:
    """Values as JSON has them."""
    numbers: list[Any] = values.ravel().tolist()
    return [text.decode() for text in numbers] if values.dtype == object else numbers


def server() -> dict[str, object]:
    """Metadata of this server."""
    return {"name": "rtresnet", "version": __version__, "extensions": list(EXTENSIONS)}
