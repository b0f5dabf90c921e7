"""The Open Inference Protocol with Triton's extensions: requests, tensors, status codes.

https://github.com/kserve/open-inference-protocol. HTTP and gRPC share this module, which imports
neither.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
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


GRPC_STATUS = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED",
    413: "INVALID_ARGUMENT", 499: "CANCELLED", 500: "INTERNAL", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip


class RequestError(RtresnetError):
    """A rejected request, with its HTTP status."""

    def __init__(self, status: int, message: str, *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.status = status


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error; GRPC_STATUS has the name of gRPC's."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, RtresnetError) else 500


def authorize(token: str | None, header: str) -> None:
    """Check the value of an Authorization header.

    Raises:
        RequestError: It does not contain the token.
    """
    if token is not None and not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise RequestError(401, "a bearer token is needed")


class Parameters(msgspec.Struct, frozen=True, omit_defaults=True):
    """Parameters of the extensions, of a request or a tensor; unknown ones are ignored.

    Attributes:
        timeout: Microseconds in which the request must be answered; 0: the server's limit.
        binary_data_size: Length of the tensor's data, which follow the JSON.
        binary_data: Whether an output is sent as binary data; default: `binary_data_output`.
        binary_data_output: Whether all outputs are.
        classification: Number of classes to return for an output; 0 returns its values.
    """

    timeout: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    binary_data_size: Annotated[int, msgspec.Meta(ge=0)] | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    classification: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class InferTensor(msgspec.Struct, omit_defaults=True):
    """An input or output of a model, a request or a response.

    Attributes:
        shape: -1 is the batch.
        data: Numbers, flat or nested, an array, or the bytes of a binary tensor.
    """

    name: str
    datatype: str = ""
    shape: list[Annotated[int, msgspec.Meta(ge=-1, le=2**31)]] = []
    data: Any = None
    parameters: Parameters = Parameters()


class InferRequest(msgspec.Struct):
    """An inference request, in the protocol's fields."""

    inputs: list[InferTensor]
    id: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    outputs: Annotated[list[InferTensor], msgspec.Meta(max_length=8)] = []
    parameters: Parameters = Parameters()


class InferResponse(msgspec.Struct, omit_defaults=True):
    """An inference response, in the protocol's fields."""

    model_name: str
    model_version: str
    outputs: list[InferTensor]
    id: str = ""


def validated(name: str, decode: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a decoder of msgspec.

    Raises:
        InputError: The data are not valid; the message starts with `name`.
    """
    try:
        return decode(*arguments, **options)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{name} is not valid: {error}") from None


def inputs(request: InferRequest, expected: list[InferTensor], max_batch: int) -> list[np.ndarray]:
    """Return the checked inputs of a request in the model's order, [N, ...] with N <= `max_batch`.

    Raises:
        InputError: They do not match the model's inputs.
    """
    tensors = {tensor.name: tensor for tensor in request.inputs}
    names = [tensor.name for tensor in expected]
    if len(request.inputs) != len(names) or len(tensors) != len(names):
        raise InputError(f"{len(request.inputs)} inputs; the model has {', '.join(names)}")
    for name in tensors:
        if name not in names:
            raise InputError(f"unknown input {name[:80]!r}", fix=f"known: {', '.join(names)}")
    return [_input(tensors[tensor.name], tensor, max_batch) for tensor in expected]


def _input(tensor: InferTensor, expected: InferTensor, max_batch: int) -> np.ndarray:
    name, shape, data = tensor.name[:80], tensor.shape, tensor.data
    if tensor.datatype != expected.datatype:
        raise InputError(
            f"input {name} is {tensor.datatype[:20]}; the model takes {expected.datatype}"
        )
    if len(shape) != len(expected.shape) or shape[1:] != expected.shape[1:] or shape[0] < 1:
        raise InputError(f"input {name} has shape {shape[:8]}; the model takes {expected.shape}")
    if shape[0] > max_batch:
        raise InputError(
            f"{shape[0]} images; at most {max_batch} per request", fix="send several requests"
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
        raise InputError(f"input {name}: {count} values expected")
    if dtype.kind == "u" and (values.dtype.kind == "f" or values.min() < 0 or values.max() > 255):
        raise InputError(f"input {name}: expected integers from 0 to 255")
    return values.astype(dtype).reshape(shape)


def requested(request: InferRequest, outputs: list[InferTensor]) -> dict[str, int]:
    """Return the requested outputs, or all, each with its number of classes (0: values).

    Raises:
        InputError: The model does not have an output, or does not return logits.
    """
    names = [output.name for output in outputs]
    counts = {}
    for output in request.outputs:
        if output.name not in names:
            raise InputError(f"unknown output {output.name[:80]!r}", fix=f"known: {names}")
        counts[output.name] = output.parameters.classification
        if counts[output.name] and len(names) > 1:
            raise InputError("classification needs logits, which this model does not return")
    return counts or dict.fromkeys(names, 0)


def classified(logits: np.ndarray, classes: tuple[str, ...], count: int) -> np.ndarray:
    """Return bytes [N, count], "value:index:label", largest first: Triton's classification."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    rows = [
        [f"{row[index]:f}:{index}:{classes[index]}".encode() for index in best]
        for row, best in zip(logits, order.tolist(), strict=True)
    ]
    return np.array(rows, dtype=object)


def raw(values: np.ndarray) -> bytes:
    """Return values in the binary extension's format: text is preceded by its length."""
    if values.dtype != object:
        return values.tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in values.ravel())


def flat(values: np.ndarray) -> list[Any]:
    """Return values as a flat list for JSON."""
    numbers: list[Any] = values.ravel().tolist()
    return [text.decode() for text in numbers] if values.dtype == object else numbers


def server() -> dict[str, object]:
    """Return the metadata of this server."""
    return {"name": "rtresnet", "version": __version__, "extensions": list(EXTENSIONS)}
