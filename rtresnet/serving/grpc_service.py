"""The gRPC interface of the Open Inference Protocol, with Triton's extensions.

The messages are those of protocol/open_inference.proto. Their compiled description is loaded at run
time, which works with every version of protobuf, unlike generated code.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import resources
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from rtresnet import __version__
from rtresnet.core.errors import InputError, RtresnetError
from rtresnet.serving import http
from rtresnet.serving.inference import (
    DeadlineError,
    Engine,
    InferRequest,
    Output,
    RequestedOutput,
)
from rtresnet.serving.repository import Model, ServerBusyError, Tensor, UnknownModelError

CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents", "INT64": "int64_contents"}
CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (ServerBusyError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (http.UnauthorizedError, grpc.StatusCode.UNAUTHENTICATED),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (RtresnetError, grpc.StatusCode.UNAVAILABLE),
)


def _messages() -> dict[str, Any]:
    """Every message class by its name."""
    data = resources.files("rtresnet.serving").joinpath("open_inference.desc").read_bytes()
    files = descriptor_pb2.FileDescriptorSet.FromString(data)
    pool = descriptor_pool.DescriptorPool()  # its own: tritonclient registers the same names
    for file in files.file:
        pool.Add(file)
    names = [f"{file.package}.{m.name}" for file in files.file for m in file.message_type]
    return {
        name.rpartition(".")[2]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
        for name in names
    }


M = _messages()


class Service:
    """Answers the calls of `inference.GRPCInferenceService`."""

    def __init__(
        self, engine: Engine, *, token: str | None, ready: Callable[[], bool], timeout: float
    ) -> None:
        self._engine, self._token, self._ready, self._timeout = engine, token, ready, timeout

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server dispatches to."""
        calls = {
            "ServerLive": self.server_live, "ServerReady": self.server_ready,
            "ModelReady": self.model_ready, "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata, "ModelInfer": self.model_infer,
            "ModelConfig": self.model_config, "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
        }  # fmt: skip
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, call),
                request_deserializer=M[f"{name}Request"].FromString,
                response_serializer=M[f"{name}Response"].SerializeToString,
            )
            for name, call in calls.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.model_stream_infer,
            request_deserializer=M["ModelInferRequest"].FromString,
            response_serializer=M["ModelStreamInferResponse"].SerializeToString,
        )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(request: Any, context: Any) -> Any:
            try:
                if name not in ("ServerLive", "ServerReady"):
                    self._authorize(context)
                return await call(request, context)
            except RtresnetError as error:
                code = next(code for kind, code in CODES if isinstance(error, kind))
                await context.abort(code, str(error))

        return guarded

    def _authorize(self, context: Any) -> None:
        if self._token is None:
            return
        given = dict(context.invocation_metadata()).get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise http.UnauthorizedError("a bearer token is needed")

    def _model(self, request: Any) -> Model:
        return self._engine.repository.get(request.name, request.version)

    async def server_live(self, request: Any, context: Any) -> Any:
        """Whether the process works."""
        return M["ServerLiveResponse"](live=self._engine.repository.healthy)

    async def server_ready(self, request: Any, context: Any) -> Any:
        """Whether requests are taken."""
        ready = self._ready() and self._engine.repository.healthy
        return M["ServerReadyResponse"](ready=ready)

    async def model_ready(self, request: Any, context: Any) -> Any:
        """Whether a model takes requests."""
        ready = self._ready() and self._model(request).healthy
        return M["ModelReadyResponse"](ready=ready)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        """Name, version and extensions."""
        return M["ServerMetadataResponse"](
            name="rtresnet", version=__version__, extensions=http.EXTENSIONS
        )

    async def model_metadata(self, request: Any, context: Any) -> Any:
        """Inputs and outputs of a model."""
        document = http.metadata(self._engine, self._model(request))
        return json_format.ParseDict(document, M["ModelMetadataResponse"]())

    async def model_config(self, request: Any, context: Any) -> Any:
        """A model's configuration."""
        document = {"config": http.config(self._model(request))}
        return json_format.ParseDict(document, M["ModelConfigResponse"]())

    async def model_statistics(self, request: Any, context: Any) -> Any:
        """Counts and times of one model, or of all."""
        models = [self._model(request)] if request.name else self._engine.repository.all()
        document = {"model_stats": [http.statistics(model) for model in models]}
        return json_format.ParseDict(document, M["ModelStatisticsResponse"]())

    async def repository_index(self, request: Any, context: Any) -> Any:
        """Every model and its state."""
        document = {"models": http.index(self._engine)}
        return json_format.ParseDict(document, M["RepositoryIndexResponse"]())

    async def model_infer(self, request: Any, context: Any) -> Any:
        """Answers a batch."""
        began = time.monotonic()
        status = 200
        try:
            model = self._engine.repository.get(request.model_name, request.model_version)
            left = context.time_remaining()
            asked = self._parse(request)
            if left is not None:
                asked = InferRequest(**{**vars(asked), "timeout": min(asked.timeout, left)})
            # A client that cancels its call cancels this task, and with it the queued images.
            outputs, _ = await self._engine.infer(model, asked)
            return _answer(model, request, outputs)
        except Exception as error:
            status = http.status_of(error)
            raise
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            name = request.model_name if status != 404 else ""
            self._engine.metrics.request(name, status, time.monotonic() - began)

    async def model_stream_infer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answers requests of a stream in their order; an error ends only its own request."""
        async for request in requests:
            try:
                self._authorize(context)
                yield M["ModelStreamInferResponse"](
                    infer_response=await self.model_infer(request, context)
                )
            except RtresnetError as error:
                yield M["ModelStreamInferResponse"](error_message=str(error))

    def _parse(self, request: Any) -> InferRequest:
        raw = list(request.raw_input_contents)
        if raw and len(raw) != len(request.inputs):
            raise InputError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
        data = raw or [_contents(entry) for entry in request.inputs]
        micros = _parameter(request.parameters, "timeout")
        return InferRequest(
            id=request.id,
            inputs=[
                Tensor(name=entry.name, datatype=entry.datatype, shape=tuple(entry.shape))
                for entry in request.inputs
            ],
            data=data,
            outputs=[
                RequestedOutput(
                    name=entry.name,
                    classification=int(_parameter(entry.parameters, "classification") or 0),
                    binary=True,
                )
                for entry in request.outputs
            ],
            timeout=min(self._timeout, micros / 1e6) if micros else self._timeout,
        )


def _parameter(parameters: Any, name: str) -> int | None:
    """A whole number among a message's parameters; None where it is absent."""
    if name not in parameters:
        return None
    kind = parameters[name].WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InputError(f"parameter {name}: a whole number is needed")
    value: int = getattr(parameters[name], kind)
    return value


def _contents(entry: Any) -> np.ndarray:
    name = CONTENTS.get(entry.datatype)
    if name is None:
        raise InputError(f"input {entry.name[:80]}: datatype {entry.datatype[:20]!r} is unknown")
    dtype = np.float32 if entry.datatype == "FP32" else np.int64
    return np.asarray(getattr(entry.contents, name), dtype)


def _answer(model: Model, request: Any, outputs: Sequence[Output]) -> Any:
    response = M["ModelInferResponse"](
        model_name=model.name, model_version=model.version, id=request.id
    )
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        response.raw_output_contents.append(output.raw())
    return response
