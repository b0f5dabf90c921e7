"""The HTTP interface: the Open Inference Protocol, encoded images, page and metrics."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Annotated, Any

import msgspec
import numpy as np
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rtresnet import __version__
from rtresnet.core.errors import InputError, RtresnetError
from rtresnet.core.metrics import most_probable
from rtresnet.serving import protocol
from rtresnet.serving.model import Answered, ServedModel
from rtresnet.serving.protocol import InferRequest, InferTensor, RequestError
from rtresnet.serving.repository import Repository, chain

log = logging.getLogger("rtresnet.serve")

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_FILES = 32  # in one request to classify
PUBLIC = ("/v2/health/live", "/v2/health/ready")  # answered without a token: probes have none
OPERATIONS = {
    "/v2": "ServerMetadata", "/v2/health/live": "ServerLive", "/v2/health/ready": "ServerReady",
    "model": "ModelMetadata", "model/ready": "ModelReady", "model/config": "ModelConfig",
    "model/stats": "ModelStatistics",
}  # fmt: skip
MODEL_PATH = re.compile(
    r"/v2/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?(?P<action>(/\w+)?)"
)
SAFE_ID = re.compile(r"[\w.:-]{1,128}")
HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline'; img-src 'self' blob: data:",
    "x-content-type-options": "nosniff",
}
DECODER = msgspec.json.Decoder(InferRequest)


class Query(msgspec.Struct):
    """The query of a request with encoded images."""

    top: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    least_score: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5


QUERY_VALUES = {"top": "a whole number from 1 to 1000", "least_score": "a number from 0 to 1"}


class _Request(Request):
    """A request whose body has a largest size."""

    limit = 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        size = 0
        try:
            async for chunk in super().stream():
                size += len(chunk)
                if size > self.limit:
                    raise RequestError(413, f"more than {self.limit} bytes")
                yield chunk
        except ClientDisconnect:
            raise RequestError(499, "the client closed the connection") from None


class Api:
    """An ASGI application: the interface of a server.

    Args:
        repository: The models.
        decode: Turns an encoded image into uint8 RGB [H, W, 3].
        token: The bearer token of every request; None if none is needed.
    """

    def __init__(
        self, repository: Repository, decode: Callable[[bytes], np.ndarray], token: str | None
    ) -> None:
        self._repository, self._config, self._decode = repository, repository.config, decode
        self._token = token
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
        page = resources.files("rtresnet.serving").joinpath("page.html").read_text()
        self._started = time.time()
        metrics = repository.metrics
        reads: dict[str, Callable[[Request], Any]] = {
            "/": lambda request: HTMLResponse(page, headers=PAGE_HEADERS),
            "/metrics": lambda request: Response(metrics.text(), media_type="text/plain"),
            "/v1/status": lambda request: self._status(),
        }
        reads |= {path: self._operation(name) for path, name in OPERATIONS.items()}
        actions: dict[str, Callable[[Request], Any]] = {
            "/v1/classify": self._images,
            "/v1/detect": self._images,
            "/v2/repository/index": self._index,
            "model/infer": self._infer,
        }
        self._routes = {"GET": reads, "HEAD": reads, "POST": actions}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the result or error of an action; count and log POST requests."""
        began, request = time.monotonic(), _Request(scope, receive)
        request.limit = self._config.max_body
        identity = request.headers.get("x-request-id", "")
        if not SAFE_ID.fullmatch(identity):
            identity = uuid.uuid4().hex[:16]
        try:
            answer = self._action(request)(request)
            answer = await answer if inspect.isawaitable(answer) else answer
            response = answer if isinstance(answer, Response) else JSONResponse(answer)
        except Exception as error:
            status = protocol.status_of(error)
            if status == 500:
                log.exception("request %s failed", identity)
            text = str(error) if isinstance(error, RtresnetError) else "internal error"
            response = JSONResponse({"error": text}, status, headers=HEADERS.get(status))
        response.headers["x-request-id"] = identity
        if not self._repository.ready:  # stopping: the client's next request goes elsewhere
            response.headers["connection"] = "close"
        if request.method == "POST":
            seconds, model = time.monotonic() - began, getattr(request.state, "model", "")
            self._repository.metrics.request(model, response.status_code, seconds)
            log.info("request", extra={"fields": {
                "id": identity, "path": scope["path"][:200], "model": model,
                "status": response.status_code, "ms": round(1000 * seconds, 3),
            }})  # fmt: skip
        await response(scope, receive, send)

    def _action(self, request: Request) -> Callable[[Request], Any]:
        """Return the function that answers a request; reject it if its head is not valid."""
        path, name = request.scope["path"], request.scope["path"]
        if path not in PUBLIC:
            protocol.authorize(self._token, request.headers.get("authorization", ""))
        if match := MODEL_PATH.fullmatch(path):
            request.scope["path_params"] = match.groupdict("")
            name = "model" + match["action"]
        actions = self._routes.get(request.method, {})
        if name not in actions:
            if any(name in actions for actions in self._routes.values()):
                raise RequestError(405, f"{path} does not support {request.method[:20]}")
            raise RequestError(404, f"{path[:80]}: no such path", fix="see /v2")
        length, limit = request.headers.get("content-length", "0"), self._config.max_body
        if length.isdecimal() and int(length) > limit:
            raise RequestError(413, f"{length[:20]} bytes; at most {limit} are possible")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise InputError(
                "compressed requests are not supported", fix="send them without Content-Encoding"
            )
        return actions[name]

    def _operation(self, name: str) -> Callable[[Request], Response]:
        operation = self._repository.operations[name]

        def answer(request: Request) -> Response:
            model = request.path_params
            fields = operation(model.get("model"), model.get("version", ""))
            failed = any(value is False for value in fields.values())
            return JSONResponse(fields.get("config", fields), 503 if failed else 200)

        return answer

    async def _index(self, request: Request) -> list[dict[str, str]]:
        await request.body()
        models: list[dict[str, str]] = self._repository.operations["RepositoryIndex"]()["models"]
        return models

    def _model(self, request: Request) -> ServedModel:
        names = request.path_params or request.query_params
        model = self._repository.get(names.get("model"), names.get("version", ""))
        request.state.model = model.name
        return model

    async def _infer(self, request: Request) -> Response:
        model = self._model(request)
        parsed = parse(await request.body(), request.headers.get(HEADER_LENGTH))
        outputs = await model.infer(parsed, self._config.timeout, _connection(request))
        return _response(model, parsed, outputs)

    async def _images(self, request: Request) -> dict[str, object]:
        """Return classes of encoded images, or objects with boxes in pixels of each image.

        The images are a raw body, or several files as multipart/form-data.
        """
        began = time.monotonic()
        model = self._model(request)
        query = _query(dict(request.query_params))
        if request.scope["path"] != f"/v1/{model.task}":
            raise InputError(
                f"{model.name} does not support {request.scope['path']}",
                fix=f"POST /v1/{model.task}",
            )
        files = await _files(request, self._config.max_body)
        received = time.monotonic()
        loop = asyncio.get_running_loop()

        def prepare(data: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
            image = self._decode(data)
            return model.prepare(image), image.shape[:2]

        prepared = await asyncio.gather(
            *(loop.run_in_executor(self._pool, prepare, data) for data in files)
        )
        rows, sizes = zip(*prepared, strict=True)
        finished = time.monotonic()
        answered = await model.run(np.concatenate(rows), self._config.timeout, _connection(request))
        return {
            "model": model.name,
            "version": model.version,
            "assumed": list(model.session.assumed),
            "ms": {
                "receive": 1000 * (received - began),
                "preprocess": 1000 * (finished - received),
                "queue": 1000 * answered.queue_seconds,
                "compute": 1000 * answered.compute_seconds,
                "total": 1000 * (time.monotonic() - began),
            },
            **_results(model, answered, rows, sizes, query),
        }

    def _status(self) -> dict[str, object]:
        """Return the state that the page shows."""
        now, metrics = time.monotonic(), self._repository.metrics
        recent = [entry for entry in metrics.recent if now - entry[0] < 60]
        return {
            "version": __version__,
            "ready": self._repository.ready,
            "uptime": time.time() - self._started,
            "requests": metrics.total,
            "per_second": metrics.per_second(),
            "latencies_ms": [round(1000 * seconds, 3) for _, seconds in recent],
            "models": [
                {"name": model.name, "version": model.version, "task": model.task,
                 "classes": model.session.classes[:3],
                 "class_count": len(model.session.classes), "precision": model.session.precision,
                 "chain": chain(model.session.path), "assumed": list(model.session.assumed),
                 "describe": model.session.describe(), "statistics": model.statistics()}
                for model in self._repository.all()
            ],
        }  # fmt: skip


def _connection(request: Request) -> Any:
    """Return the connection of a request whose body was read; it detects that the client leaves."""
    connection = request.state.connection
    connection.flow.resume_reading()
    return connection


def _query(values: dict[str, str]) -> Query:
    """Convert the parameters of a URL.

    Raises:
        InputError: A value is not a number, or out of range.
    """
    try:
        return msgspec.convert(values, Query, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].rstrip("`")
        expected = QUERY_VALUES[name]
        raise InputError(f"{name} is {values[name][:80]!r}, expected {expected}") from None


def _results(
    model: ServedModel,
    answered: Answered,
    rows: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, ...]],
    query: Query,
) -> dict[str, object]:
    """Return the results of encoded images, from their inputs [1, ...], heights and widths."""
    if model.detector is None:
        values, classes = answered.values, model.session.classes
        indices, probabilities = most_probable(
            (values[0], values[1]) if len(values) > 1 else values[0], query.top
        )
        results = [
            [
                {"class": classes[i] if i < len(classes) else str(i), "probability": probability}
                for i, probability in zip(*row, strict=True)
            ]
            for row in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]
        return {"results": results}
    detections = [
        model.detector.detections(tuple(v[n : n + 1] for v in answered.values), row, *size)
        for n, (row, size) in enumerate(zip(rows, sizes, strict=True))
    ]
    return {
        "results": [model.detector.objects(entry, query.least_score) for entry in detections],
        "sizes": sizes,
        "unsettled": [entry.unsettled for entry in detections],
    }


async def _files(request: Request, limit: int) -> list[bytes]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        body = await request.body()
        if not body:
            raise InputError("the body is empty", fix="send an image: curl --data-binary @cat.jpg")
        return [body]
    try:
        async with request.form(max_files=MAX_FILES, max_fields=8, max_part_size=limit) as form:
            files = [await part.read() for part in form.values() if not isinstance(part, str)]
    except (MultiPartException, ValueError, KeyError) as error:
        problem = getattr(error, "message", error)
        raise InputError(f"not valid multipart/form-data: {problem}") from None
    if not files:
        raise InputError("no image in the form", fix="send files: curl -F file=@cat.jpg")
    return files


def parse(body: bytes, header_length: str | None) -> InferRequest:
    """Read a request: JSON, or a JSON header followed by binary tensors.

    Args:
        body: The request's bytes.
        header_length: Value of Inference-Header-Content-Length, where binary tensors follow.

    Raises:
        InputError: Not a request of the protocol.
    """
    size = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or not 0 < int(header_length) <= len(body):
            raise InputError(f"{HEADER_LENGTH} {header_length[:20]!r} is not within the body")
        size = int(header_length)
    request: InferRequest = protocol.validated("the JSON", DECODER.decode, body[:size])
    rest = memoryview(body)[size:]
    for tensor in request.inputs:
        length = tensor.parameters.binary_data_size
        if length is None:
            continue
        if length > len(rest):
            raise InputError(
                f"input {tensor.name[:80]}: binary_data_size {str(length)[:20]} is not within the "
                f"{len(rest)} bytes that follow"
            )
        tensor.data, rest = rest[:length], rest[length:]
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the last tensor")
    return request


def _response(
    model: ServedModel, request: InferRequest, outputs: dict[str, np.ndarray]
) -> Response:
    requested = {output.name: output.parameters.binary_data for output in request.outputs}
    tensors, parts = [], []
    for name, values in outputs.items():
        tensor = InferTensor(name, protocol.DATATYPES[values.dtype.name], list(values.shape))
        binary = requested.get(name)
        if request.parameters.binary_data_output if binary is None else binary:
            parts.append(protocol.raw(values))
            tensor.parameters = protocol.Parameters(binary_data_size=len(parts[-1]))
        else:
            tensor.data = protocol.flat(values)
        tensors.append(tensor)
    header = msgspec.json.encode(
        protocol.InferResponse(model.name, model.version, tensors, request.id)
    )
    if not parts:
        return Response(header, media_type="application/json")
    return Response(
        b"".join([header, *parts]),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header))},
    )
