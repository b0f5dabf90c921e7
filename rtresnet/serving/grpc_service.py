"""The gRPC interface of the Open Inference Protocol, with Triton's extensions.

The messages are those of protocol/open_inference.proto. Their compiled description is loaded at run
time, which works with every version of protobuf, unlike generated code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from rtresnet.core.errors import InputError, RtresnetError
from rtresnet.serving import protocol
from rtresnet.serving.metrics import Metrics
from rtresnet.serving.options import ServerOptions
from rtresnet.serving.protocol import DATATYPES, InferRequest, Tensor
from rtresnet.serving.repository import Model, Repository

CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents", "INT64": "int64_contents"}


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


MESSAGES = _messages()


class Service:
    """Answers the calls of `inference.GRPCInferenceService`."""

    def __init__(
        self,
        repository: Repository,
        metrics: Metrics,
        options: ServerOptions,
        ready: Callable[[], bool],
    ) -> None:
        self._repository, self._metrics, self._options = repository, metrics, options

        def model(request: Any) -> Model:
            return repository.get(request.name, request.version)

        def asked(request: Any) -> list[Model]:
            return [model(request)] if request.name else repository.all()

        self._reads: dict[str, Callable[[Any], dict[str, Any]]] = {
            "ServerLive": lambda request: {"live": repository.healthy},
            "ServerReady": lambda request: {"ready": ready() and repository.healthy},
            "ModelReady": lambda request: {"ready": ready() and model(request).healthy},
            "ServerMetadata": lambda request: protocol.server(),
            "ModelMetadata": lambda request: repository.metadata(model(request)),
            "ModelConfig": lambda request: {"config": model(request).config()},
            "ModelStatistics": lambda request: {
                "model_stats": [entry.statistics() for entry in asked(request)]
            },
            "RepositoryIndex": lambda request: {"models": repository.index()},
        }

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server dispatches to."""
        calls = {name: self._read(name) for name in self._reads} | {"ModelInfer": self.infer}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                _guarded(call),
                request_deserializer=MESSAGES[f"{name}Request"].FromString,
                response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
            )
            for name, call in calls.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.stream_infer,
            request_deserializer=MESSAGES["ModelInferRequest"].FromString,
            response_serializer=MESSAGES["ModelStreamInferResponse"].SerializeToString,
        )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    def _read(self, name: str) -> Callable[..., Any]:
        async def call(request: Any, context: Any) -> Any:
            if name not in ("ServerLive", "ServerReady"):
                self._authorize(context)
            return json_format.ParseDict(self._reads[name](request), MESSAGES[f"{name}Response"]())

        return call

    def _authorize(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        protocol.authorize(self._options.token, metadata.get("authorization", ""))

    async def infer(self, request: Any, context: Any) -> Any:
        """Answers a batch. A client that cancels its call cancels this task."""
        began, status = time.monotonic(), 200
        try:
            self._authorize(context)
            model = self._repository.get(request.model_name, request.model_version)
            left, limit = context.time_remaining(), self._options.timeout
            outputs = await model.infer(
                _parse(request), min(limit, limit if left is None else left)
            )
        except (Exception, asyncio.CancelledError) as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            status = 499 if cancelled else protocol.status_of(error)
            raise
        finally:
            name = request.model_name if status not in (401, 404) else ""
            self._metrics.request(name, status, time.monotonic() - began)
        response = MESSAGES["ModelInferResponse"](
            model_name=model.name, model_version=model.version, id=request.id
        )
        for name, values in outputs.items():
            datatype = DATATYPES[values.dtype.name]
            response.outputs.add(name=name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(protocol.raw(values))
        return response

    async def stream_infer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answers requests of a stream in their order; an error ends only its own request."""
        response = MESSAGES["ModelStreamInferResponse"]
        async for request in requests:
            try:
                yield response(infer_response=await self.infer(request, context))
            except RtresnetError as error:
                yield response(error_message=str(error))


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await call(request, context)
        except RtresnetError as error:
            await context.abort(
                grpc.StatusCode[protocol.GRPC_STATUS[protocol.status_of(error)]], str(error)
            )

    return guarded


def _parse(request: Any) -> InferRequest:
    """The request in the protocol's JSON fields."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    return InferRequest(
        id=request.id,
        inputs=[
            Tensor(
                entry.name, entry.datatype, list(entry.shape),
                raw[number] if raw else _contents(entry),
            )
            for number, entry in enumerate(request.inputs)
        ],
        outputs=[Tensor(e.name, parameters=_parameters(e.parameters)) for e in request.outputs],
        parameters=_parameters(request.parameters),
    )  # fmt: skip


def _parameters(parameters: Any) -> dict[str, object]:
    return {
        name: getattr(value, kind)
        for name, value in parameters.items()
        if (kind := value.WhichOneof("parameter_choice"))
    }


def _contents(entry: Any) -> np.ndarray:
    name = CONTENTS.get(entry.datatype)
    if name is None:
        raise InputError(f"input {entry.name[:80]}: datatype {entry.datatype[:20]!r} is unknown")
    dtype = np.float32 if entry.datatype == "FP32" else np.int64
    return np.asarray(getattr(entry.contents, name), dtype)
