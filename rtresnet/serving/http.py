"""The HTTP interface: Open Inference Protocol with binary tensors, images, page and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rtresnet import __version__
from rtresnet.core.errors import InputError, RtresnetError
from rtresnet.serving.inference import (
    ClientGoneError,
    DeadlineError,
    Engine,
    InferRequest,
    Output,
    RequestedOutput,
    most_probable,
)
from rtresnet.serving.repository import (
    Model,
    ServerBusyError,
    Tensor,
    UnknownModelError,
    chain,
    statistics_of,
)

log = logging.getLogger("rtresnet.serve")

HEADER_LENGTH = "inference-header-content-length"
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository",
              "statistics")  # fmt: skip
PUBLIC = ("/v2/health/live", "/v2/health/ready")  # answered without a token: probes have none
SAFE_ID = re.compile(r"[\w.:-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """What a client may cost.

    Attributes:
        body: Bytes of a request.
        images: Files in one request to classify.
        body_seconds: Within which the whole body must arrive.
        timeout: Seconds within which a request is answered where it does not say less.
    """

    body: int = 64 * 1024 * 1024
    images: int = 32
    body_seconds: float = 30.0
    timeout: float = 30.0


class _Declared(msgspec.Struct):
    name: str
    datatype: str = ""
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**31)]] = []
    data: Any = None
    parameters: dict[str, Any] = {}


class _Body(msgspec.Struct):
    inputs: list[_Declared]
    id: str = ""
    outputs: list[_Declared] = []
    parameters: dict[str, Any] = {}


_BODY = msgspec.json.Decoder(_Body)


class _LimitedBody:
    """ASGI middleware: a body has a largest size and a longest time to arrive."""

    def __init__(self, app: Any, limits: HttpLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size, end, whole = 0, time.monotonic() + self._limits.body_seconds, False

        async def limited() -> Any:
            nonlocal size, whole
            if whole:  # waits for the client to leave
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise InputError(f"no body within {self._limits.body_seconds:g} s") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._limits.body:
                raise TooLargeError(f"more than {self._limits.body} bytes")
            return message

        await self._app(scope, limited, send)


class TooLargeError(InputError):
    """A body above the limit."""


class UnauthorizedError(InputError):
    """No token, or another one."""


STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (UnauthorizedError, 401), (UnknownModelError, 404), (TooLargeError, 413),
    (ServerBusyError, 503), (DeadlineError, 504), (ClientGoneError, 499), (InputError, 400),
    (RtresnetError, 503),
)  # fmt: skip


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


class Api:
    """The routes of a server.

    Args:
        engine: Runs requests.
        decode: Turns an encoded image into uint8 RGB [H, W, 3].
        limits: What a client may cost.
        token: Bearer token that every request must carry; None: none.
        ready: Whether the server takes requests.
        threads: Decoding threads.
    """

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[bytes], np.ndarray],
        limits: HttpLimits,
        *,
        token: str | None,
        ready: Callable[[], bool],
        threads: int,
    ) -> None:
        self._engine, self._decode, self._limits = engine, decode, limits
        self._token, self._ready = token, ready
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._page = resources.files("rtresnet.serving").joinpath("page.html").read_text()
        self._started = time.time()
        routes = Starlette(
            routes=[
                self._route("/", self._index),
                self._route("/metrics", self._metrics),
                self._route("/v1/status", self._status),
                self._route("/v1/classify", self._classify, "POST"),
                self._route("/v2", self._server),
                self._route("/v2/health/live", self._live),
                self._route("/v2/health/ready", self._is_ready),
                self._route("/v2/repository/index", self._repository, "POST"),
                *(
                    self._route(f"/v2/models/{{model}}{version}{path}", action, method)
                    for version in ("", "/versions/{version}")
                    for path, action, method in (
                        ("", self._metadata, "GET"),
                        ("/ready", self._model_ready, "GET"),
                        ("/config", self._config, "GET"),
                        ("/stats", self._statistics, "GET"),
                        ("/infer", self._infer, "POST"),
                    )
                ),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )
        self.app = _LimitedBody(routes, limits)

    def _route(self, path: str, action: Callable[..., Any], method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            began = time.monotonic()
            given = request.headers.get("x-request-id", "")
            identity = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex[:16]
            try:
                self._admit(request)
                response: Response = await action(request)
            except Exception as error:
                response = self._failed(error, identity)
            response.headers["x-request-id"] = identity
            if not self._ready():  # stopping: the client's next request goes elsewhere
                response.headers["connection"] = "close"
            if method == "POST":
                seconds = time.monotonic() - began
                model = getattr(request.state, "model", "")
                self._engine.metrics.request(model, response.status_code, seconds)
                log.info("request", extra={"fields": {
                    "id": identity, "path": request.url.path[:200], "status": response.status_code,
                    "ms": round(1000 * seconds, 3), "model": model,
                }})  # fmt: skip
            return response

        return Route(path, endpoint, methods=[method])

    def _failed(self, error: Exception, identity: str) -> Response:
        status = status_of(error)
        if status == 500:
            log.exception("request %s failed", identity)
            return JSONResponse({"error": "internal error"}, status)
        headers = {"retry-after": "1"} if status == 503 else {}
        if status == 401:
            headers = {"www-authenticate": "Bearer"}
        return JSONResponse({"error": str(error)}, status, headers=headers)

    def _admit(self, request: Request) -> None:
        """Refuses a request by its head alone."""
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body:
            raise TooLargeError(f"{length[:20]} bytes; at most {self._limits.body} are possible")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise InputError("compressed requests are not supported", fix="send them plain")
        if self._token is None or request.url.path in PUBLIC:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise UnauthorizedError("a bearer token is needed")

    def _model(self, request: Request) -> Model:
        parameters = request.path_params
        model = self._engine.repository.get(parameters["model"], parameters.get("version", ""))
        request.state.model = model.name
        return model

    async def _infer(self, request: Request) -> Response:
        model = self._model(request)
        body = await request.body()
        asked = parse(body, request.headers.get(HEADER_LENGTH), self._limits.timeout)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        outputs, _ = await self._engine.infer(model, asked, gone)
        return _answer(model, asked.id, outputs)

    async def _classify(self, request: Request) -> Response:
        """Classes of encoded images: a raw body, or several files as multipart/form-data."""
        query = request.query_params
        model = self._engine.repository.get(query.get("model"), query.get("version", ""))
        request.state.model = model.name
        top = query.get("top", "5")
        if not top.isdecimal() or not 1 <= int(top) <= 1000:
            raise InputError(f"top {top[:20]!r}: a number from 1 to 1000 is needed")
        began = time.monotonic()
        files = await self._files(request)
        received = time.monotonic()
        loop = asyncio.get_running_loop()
        inputs = np.concatenate(await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._prepare, model, data) for data in files)
        ))  # fmt: skip
        prepared = time.monotonic()
        answered = await self._engine.run(model, inputs, self._limits.timeout)
        results = [
            [{"class": name, "probability": value} for name, value in row]
            for row in most_probable(model, answered, int(top))
        ]
        return JSONResponse({
            "model": model.name,
            "version": model.version,
            "results": results,
            "assumed": list(model.session.assumed),
            "ms": {
                "receive": 1000 * (received - began),
                "preprocess": 1000 * (prepared - received),
                "queue": 1000 * answered.queue_seconds,
                "compute": 1000 * answered.compute_seconds,
                "total": 1000 * (time.monotonic() - began),
            },
        })  # fmt: skip

    def _prepare(self, model: Model, data: bytes) -> np.ndarray:
        return model.session.prepare([self._decode(data)])

    async def _files(self, request: Request) -> list[bytes]:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            body = await request.body()
            if not body:
                raise InputError("no image", fix="curl --data-binary @cat.jpg")
            return [body]
        limits = self._limits
        try:
            async with request.form(
                max_files=limits.images, max_fields=8, max_part_size=limits.body
            ) as form:
                files = [await part.read() for part in form.values() if not isinstance(part, str)]
        except (HTTPException, ValueError, KeyError) as error:
            problem = getattr(error, "detail", error)
            raise InputError(f"not valid multipart/form-data: {problem}") from None
        if not files:
            raise InputError("no image in the form", fix="curl -F file=@cat.jpg")
        return files

    async def _index(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={
            "content-security-policy": "default-src 'self' 'unsafe-inline'; img-src 'self' blob: "
            "data:", "x-content-type-options": "nosniff",
        })  # fmt: skip

    async def _metrics(self, request: Request) -> Response:
        return Response(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _status(self, request: Request) -> Response:
        """What the page shows."""
        metrics = self._engine.metrics
        now = time.monotonic()
        recent = [entry for entry in metrics.recent if now - entry[0] < 60]
        return JSONResponse({
            "version": __version__,
            "ready": self._ready(),
            "uptime": time.time() - self._started,
            "requests": metrics.total,
            "per_second": sum(now - entry[0] < 5 for entry in recent) / 5,
            "latencies_ms": [round(1000 * entry[1], 3) for entry in recent],
            "models": [
                {"name": model.name, "version": model.version, "classes": model.session.classes[:3],
                 "class_count": len(model.session.classes), "precision": model.session.precision,
                 "chain": chain(model.session.path), "assumed": list(model.session.assumed),
                 "describe": model.session.describe(), "statistics": statistics_of(model)}
                for model in self._engine.repository.all()
            ],
        })  # fmt: skip

    async def _server(self, request: Request) -> Response:
        return JSONResponse(
            {"name": "rtresnet", "version": __version__, "extensions": list(EXTENSIONS)}
        )

    async def _live(self, request: Request) -> Response:
        live = self._engine.repository.healthy
        return JSONResponse({"live": live}, 200 if live else 503)

    async def _is_ready(self, request: Request) -> Response:
        ready = self._ready() and self._engine.repository.healthy
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _model_ready(self, request: Request) -> Response:
        model = self._model(request)
        ready = self._ready() and model.healthy
        return JSONResponse({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def _metadata(self, request: Request) -> Response:
        return JSONResponse(metadata(self._engine, self._model(request)))

    async def _config(self, request: Request) -> Response:
        return JSONResponse(config(self._model(request)))

    async def _statistics(self, request: Request) -> Response:
        return JSONResponse({"model_stats": [statistics(self._model(request))]})

    async def _repository(self, request: Request) -> Response:
        await request.body()
        return JSONResponse(index(self._engine))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def parse(body: bytes, header_length: str | None, timeout: float) -> InferRequest:
    """Reads a request: JSON, or a JSON header followed by binary tensors.

    Args:
        body: The request's bytes.
        header_length: Value of Inference-Header-Content-Length, where binary tensors follow.
        timeout: The server's limit in seconds.

    Raises:
        InputError: Not a request of the protocol.
    """
    size = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or not 0 < int(header_length) <= len(body):
            raise InputError(f"{HEADER_LENGTH} {header_length[:20]!r} is not within the body")
        size = int(header_length)
    try:
        parsed = _BODY.decode(body[:size])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the request is not valid JSON of the protocol: {error}") from None
    rest = memoryview(body)[size:]
    data: list[Any] = []
    for entry in parsed.inputs:
        length = entry.parameters.get("binary_data_size")
        if length is None:
            data.append(entry.data)
            continue
        if type(length) is not int or not 0 <= length <= len(rest):
            raise InputError(
                f"input {entry.name[:80]}: binary_data_size {str(length)[:20]} is not within the "
                f"{len(rest)} bytes that follow"
            )
        data.append(rest[:length])
        rest = rest[length:]
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the last tensor")
    binary = parsed.parameters.get("binary_data_output") is True
    outputs = [
        RequestedOutput(
            name=entry.name,
            classification=_whole(entry.parameters.get("classification", 0)),
            binary=entry.parameters.get("binary_data", binary) is True,
        )
        for entry in parsed.outputs
    ]
    asked = parsed.parameters.get("timeout")
    return InferRequest(
        id=parsed.id[:1024],
        inputs=[
            Tensor(name=entry.name, datatype=entry.datatype, shape=tuple(entry.shape))
            for entry in parsed.inputs
        ],
        data=data,
        outputs=outputs or ([RequestedOutput(name="*", binary=True)] if binary else []),
        timeout=min(timeout, asked / 1e6) if type(asked) is int and asked > 0 else timeout,
    )


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise InputError(f"classification {str(value)[:20]}: a whole number is needed")
    return value


def _answer(model: Model, identity: str, outputs: Sequence[Output]) -> Response:
    entries, parts = [], []
    for output in outputs:
        entry: dict[str, Any] = {
            "name": output.name, "datatype": output.datatype, "shape": list(output.shape),
        }  # fmt: skip
        if output.binary:
            parts.append(output.raw())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = output.flat()
        entries.append(entry)
    document = {"model_name": model.name, "model_version": model.version, "outputs": entries}
    if identity:
        document["id"] = identity
    header = json.dumps(document, separators=(",", ":")).encode()
    if not parts:
        return Response(header, media_type="application/json")
    return Response(
        b"".join([header, *parts]),
        media_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(header))},
    )


def _described(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]


def metadata(engine: Engine, model: Model) -> dict[str, Any]:
    """A model's metadata in the protocol's form."""
    return {
        "name": model.name,
        "versions": engine.repository.versions(model.name),
        "platform": model.platform,
        "inputs": _described(model.inputs),
        "outputs": _described(model.outputs),
    }


def config(model: Model) -> dict[str, Any]:
    """A model's configuration in Triton's form."""
    layout = "FORMAT_NHWC" if model.inputs[0].datatype == "UINT8" else "FORMAT_NCHW"

    def entry(tensor: Tensor) -> dict[str, Any]:
        dims = list(tensor.shape[1:])
        return {"name": tensor.name, "data_type": f"TYPE_{tensor.datatype}", "dims": dims}

    return {
        "name": model.name,
        "platform": model.platform,
        "max_batch_size": model.max_batch,
        "input": [entry(tensor) | {"format": layout} for tensor in model.inputs],
        "output": [entry(tensor) for tensor in model.outputs],
    }


def statistics(model: Model) -> dict[str, Any]:
    """A model's statistics in Triton's form."""
    s = model.statistics

    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    return {
        "name": model.name,
        "version": model.version,
        "inference_count": s.images,
        "execution_count": s.batches,
        "inference_stats": {
            "success": duration(s.requests, s.request_seconds),
            "fail": duration(s.failures, s.failure_seconds),
            "queue": duration(s.images, s.queue_seconds),
            "compute_infer": duration(s.batches, s.compute_seconds),
        },
    }


def index(engine: Engine) -> list[dict[str, str]]:
    """The repository's models in Triton's form."""
    return [
        {"name": model.name, "version": model.version,
         "state": "READY" if model.healthy else "UNAVAILABLE", "reason": ""}
        for model in engine.repository.all()
    ]  # fmt: skip
