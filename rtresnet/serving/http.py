"""The HTTP interface: Open Inference Protocol with binary tensors, images, page and metrics."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import msgspec
import numpy as np
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rtresnet import __version__
from rtresnet.core.errors import InputError
from rtresnet.core.metrics import softmax
from rtresnet.serving import protocol
from rtresnet.serving.metrics import Metrics
from rtresnet.serving.options import ServerOptions
from rtresnet.serving.protocol import DATATYPES, InferRequest, RequestError
from rtresnet.serving.repository import Answered, Model, Repository, chain

log = logging.getLogger("rtresnet.serve")

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_FILES = 32  # in one request to classify
PUBLIC = ("/v2/health/live", "/v2/health/ready")  # answered without a token: probes have none
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
        metrics: Counts requests.
        options: Limits and token.
        decode: Turns an encoded image into uint8 RGB [H, W, 3].
        ready: Whether the server takes requests.
    """

    def __init__(
        self,
        repository: Repository,
        metrics: Metrics,
        options: ServerOptions,
        decode: Callable[[bytes], np.ndarray],
        ready: Callable[[], bool],
    ) -> None:
        self._repository, self._metrics, self._options = repository, metrics, options
        self._decode, self._ready = decode, ready
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
        page = resources.files("rtresnet.serving").joinpath("page.html").read_text()
        self._started = time.time()
        model = self._model
        reads: dict[str, Callable[[Request], Any]] = {
            "/": lambda request: HTMLResponse(page, headers=PAGE_HEADERS),
            "/metrics": lambda request: Response(metrics.text(), media_type="text/plain"),
            "/v1/status": lambda request: self._status(),
            "/v2": lambda request: protocol.server(),
            "/v2/health/live": lambda request: _state(live=repository.healthy),
            "/v2/health/ready": lambda request: _state(ready=ready() and repository.healthy),
            "model": lambda request: repository.metadata(model(request)),
            "model/ready": lambda request: _state(ready=ready() and model(request).healthy),
            "model/config": lambda request: model(request).config(),
            "model/stats": lambda request: {"model_stats": [model(request).statistics()]},
        }
        actions: dict[str, Callable[[Request], Any]] = {
            "/v1/classify": self._classify,
            "/v1/detect": self._detect,
            "/v2/repository/index": self._index,
            "model/infer": self._infer,
        }
        self._routes = {"GET": reads, "HEAD": reads, "POST": actions}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with what an action returns or raises; counts and logs those of POST."""
        began, request = time.monotonic(), _Request(scope, receive)
        request.limit = self._options.max_body
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
            text = "internal error" if status == 500 else str(error)
            response = JSONResponse({"error": text}, status, headers=HEADERS.get(status))
        response.headers["x-request-id"] = identity
        if not self._ready():  # stopping: the client's next request goes elsewhere
            response.headers["connection"] = "close"
        if request.method == "POST":
            seconds, model = time.monotonic() - began, getattr(request.state, "model", "")
            self._metrics.request(model, response.status_code, seconds)
            log.info("request", extra={"fields": {
                "id": identity, "path": scope["path"][:200], "model": model,
                "status": response.status_code, "ms": round(1000 * seconds, 3),
            }})  # fmt: skip
        await response(scope, receive, send)

    def _action(self, request: Request) -> Callable[[Request], Any]:
        """What a request asks for; refuses it by its head alone."""
        path, name = request.scope["path"], request.scope["path"]
        if path not in PUBLIC:
            protocol.authorize(self._options.token, request.headers.get("authorization", ""))
        if match := MODEL_PATH.fullmatch(path):
            request.scope["path_params"] = match.groupdict("")
            name = "model" + match["action"]
        actions = self._routes.get(request.method, {})
        if name not in actions:
            if any(name in actions for actions in self._routes.values()):
                raise RequestError(405, f"{path} does not take {request.method[:20]}")
            raise RequestError(404, f"{path[:80]}: no such path", fix="see /v2")
        length, limit = request.headers.get("content-length", "0"), self._options.max_body
        if length.isdecimal() and int(length) > limit:
            raise RequestError(413, f"{length[:20]} bytes; at most {limit} are possible")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise InputError("compressed requests are not supported", fix="send them plain")
        return actions[name]

    def _model(self, request: Request) -> Model:
        where = request.path_params or request.query_params
        model = self._repository.get(where.get("model"), where.get("version", ""))
        request.state.model = model.name
        return model

    async def _infer(self, request: Request) -> Response:
        model = self._model(request)
        asked = parse(await request.body(), request.headers.get(HEADER_LENGTH))
        outputs = await model.infer(asked, self._options.timeout, _connection(request))
        return _response(model, asked, outputs)

    async def _classify(self, request: Request) -> dict[str, object]:
        """Classes of encoded images: a raw body, or several files as multipart/form-data."""
        model = self._model(request)
        top = request.query_params.get("top", "5")
        if not top.isdecimal() or not 1 <= int(top) <= 1000:
            raise InputError(f"top {top[:20]!r}: a number from 1 to 1000 is needed")
        if model.detector is not None:
            raise InputError(f"{model.name}: a detector", fix="POST /v1/detect")

        answered, _, _, record = await self._encoded(
            request, model, lambda image: model.session.prepare([image])
        )
        return record | {"results": most_probable(answered, model.session.classes, int(top))}

    async def _detect(self, request: Request) -> dict[str, object]:
        """Objects in encoded images, sent as to classify; boxes in pixels of each image."""
        model = self._model(request)
        detector, least = model.detector, request.query_params.get("least_score", "0.5")
        if detector is None:
            raise InputError(f"{model.name}: a classifier", fix="POST /v1/classify")
        if not re.fullmatch(r"0?\.\d{1,9}|[01](\.0{1,9})?", least):
            raise InputError(f"least_score {least[:20]!r}: a number from 0 to 1 is needed")
        answered, rows, sizes, record = await self._encoded(request, model, detector.prepare)
        found = [
            detector.detections(tuple(v[n : n + 1] for v in answered.values), row, *size)
            for n, (row, size) in enumerate(zip(rows, sizes, strict=True))
        ]
        return record | {
            "results": [detector.objects(entry, float(least)) for entry in found],
            "sizes": sizes,
            "unsettled": [entry.unsettled for entry in found],
        }

    async def _encoded(
        self, request: Request, model: Model, prepare: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[Answered, list[np.ndarray], list[tuple[int, ...]], dict[str, object]]:
        """Runs encoded images: answer, inputs, heights and widths, and a record with times."""
        began = time.monotonic()
        files = await _files(request, self._options.max_body)
        received = time.monotonic()
        loop = asyncio.get_running_loop()

        def one(data: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
            image = self._decode(data)
            return prepare(image), image.shape[:2]

        made = await asyncio.gather(
            *(loop.run_in_executor(self._pool, one, data) for data in files)
        )
        inputs, sizes = [entry for entry, _ in made], [size for _, size in made]
        prepared = time.monotonic()
        limit, connection = self._options.timeout, _connection(request)
        answered = await model.run(np.concatenate(inputs), limit, connection)
        record: dict[str, object] = {
            "model": model.name,
            "version": model.version,
            "assumed": list(model.session.assumed),
            "ms": {
                "receive": 1000 * (received - began),
                "preprocess": 1000 * (prepared - received),
                "queue": 1000 * answered.queue_seconds,
                "compute": 1000 * answered.compute_seconds,
                "total": 1000 * (time.monotonic() - began),
            },
        }
        return answered, inputs, sizes, record

    async def _index(self, request: Request) -> list[dict[str, str]]:
        await request.body()
        return self._repository.index()

    def _status(self) -> dict[str, object]:
        """What the page shows."""
        now = time.monotonic()
        recent = [entry for entry in self._metrics.recent if now - entry[0] < 60]
        return {
            "version": __version__,
            "ready": self._ready(),
            "uptime": time.time() - self._started,
            "requests": self._metrics.total,
            "per_second": sum(now - time < 5 for time, _ in recent) / 5,
            "latencies_ms": [round(1000 * seconds, 3) for _, seconds in recent],
            "models": [
                {"name": model.name, "version": model.version,
                 "task": "classify" if model.detector is None else "detect",
                 "classes": model.session.classes[:3],
                 "class_count": len(model.session.classes), "precision": model.session.precision,
                 "chain": chain(model.session.path), "assumed": list(model.session.assumed),
                 "describe": model.session.describe(), "statistics": model.statistics()}
                for model in self._repository.all()
            ],
        }  # fmt: skip


def _connection(request: Request) -> Any:
    """The connection of a request whose body was read; it notices that its client leaves."""
    connection = request.state.connection
    connection.flow.resume_reading()
    return connection


def _state(**state: bool) -> Response:
    return JSONResponse(state, 200 if all(state.values()) else 503)


async def _files(request: Request, limit: int) -> list[bytes]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        body = await request.body()
        if not body:
            raise InputError("no image", fix="curl --data-binary @cat.jpg")
        return [body]
    try:
        async with request.form(max_files=MAX_FILES, max_fields=8, max_part_size=limit) as form:
            files = [await part.read() for part in form.values() if not isinstance(part, str)]
    except (MultiPartException, ValueError, KeyError) as error:
        problem = getattr(error, "message", error)
        raise InputError(f"not valid multipart/form-data: {problem}") from None
    if not files:
        raise InputError("no image in the form", fix="curl -F file=@cat.jpg")
    return files


def most_probable(
    answered: Answered, classes: tuple[str, ...], count: int
) -> list[list[dict[str, str | float]]]:
    """The `count` most probable classes of each image with their probabilities."""
    if len(answered.values) > 1:
        indices, probabilities = answered.values
    else:
        scores = softmax(answered.values[0])
        indices = np.argsort(-scores, axis=1, kind="stable")
        probabilities = np.take_along_axis(scores, indices, axis=1)
    return [
        [
            {"class": classes[i] if i < len(classes) else str(i), "probability": value}
            for i, value in zip(row, values, strict=True)
        ]
        for row, values in zip(
            indices[:, :count].tolist(), probabilities[:, :count].tolist(), strict=True
        )
    ]


def parse(body: bytes, header_length: str | None) -> InferRequest:
    """Reads a request: JSON, or a JSON header followed by binary tensors.

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
    try:
        request = DECODER.decode(body[:size])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the request is not valid JSON of the protocol: {error}") from None
    rest = memoryview(body)[size:]
    for tensor in request.inputs:
        length = tensor.parameters.get("binary_data_size")
        if length is None:
            continue
        if type(length) is not int or not 0 <= length <= len(rest):
            raise InputError(
                f"input {tensor.name[:80]}: binary_data_size {str(length)[:20]} is not within the "
                f"{len(rest)} bytes that follow"
            )
        tensor.data, rest = rest[:length], rest[length:]
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the last tensor")
    return request


def _response(model: Model, request: InferRequest, outputs: dict[str, np.ndarray]) -> Response:
    binary = request.parameters.get("binary_data_output") is True
    asked = {output.name: output.parameters for output in request.outputs}
    entries, parts = [], []
    for name, values in outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": DATATYPES[values.dtype.name],
                                 "shape": values.shape}  # fmt: skip
        if asked.get(name, {}).get("binary_data", binary) is True:
            parts.append(protocol.raw(values))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = protocol.flat(values)
        entries.append(entry)
    document = {"model_name": model.name, "model_version": model.version, "outputs": entries}
    if request.id:
        document["id"] = request.id[:1024]
    header = json.dumps(document, separators=(",", ":")).encode()
    if not parts:
        return Response(header, media_type="application/json")
    return Response(
        b"".join([header, *parts]),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header))},
    )
