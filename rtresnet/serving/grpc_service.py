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
import msgspec
from google.protobuf import descriptor_pb2, json_format, message_factory

from rtresnet.core.errors import InputError, RtresnetError
from rtresnet.serving import protocol
from rtresnet.serving.protocol import DATATYPES, InferRequest
from rtresnet.serving.repository import Repository

CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents", "INT64": "int64_contents"}
DESCRIPTION = descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("rtresnet.serving").joinpath("open_inference.desc").read_bytes()
)
# GetMessages creates a pool: tritonclient registers the same names in the default pool.
MESSAGES: dict[str, type[Any]] = {
    name.rpartition(".")[2]: message
    for name, message in message_factory.GetMessages(DESCRIPTION.file).items()
}
PUBLIC = ("ServerLive", "ServerReady")  # answered without a token: probes have none


class Service:
    """Answers the calls of `inference.GRPCInferenceService`."""

    def __init__(self, repository: Repository, token: str | None) -> None:
        self._repository, self._token = repository, token

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers of all calls, for a grpc.aio server."""
        calls = {name: self._read(name) for name in self._repository.operations}
        calls["ModelInfer"] = self.infer
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
        operation, response = self._repository.operations[name], MESSAGES[f"{name}Response"]

        async def call(request: Any, context: Any) -> Any:
            if name not in PUBLIC:
                self._authorize(context)
            model, version = getattr(request, "name", ""), getattr(request, "version", "")
            return json_format.ParseDict(operation(model, version), response())

        return call

    def _authorize(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        protocol.authorize(self._token, metadata.get("authorization", ""))

    async def infer(self, request: Any, context: Any) -> Any:
        """Answer a batch. A client that cancels its call cancels this task."""
        began, status = time.monotonic(), 200
        try:
            self._authorize(context)
            model = self._repository.get(request.model_name, request.model_version)
            left, limit = context.time_remaining(), self._repository.config.timeout
            outputs = await model.infer(
                _parse(request), min(limit, limit if left is None else left)
            )
        except (Exception, asyncio.CancelledError) as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            status = 499 if cancelled else protocol.status_of(error)
            raise
        finally:
            name = request.model_name if status not in (401, 404) else ""
            self._repository.metrics.request(name, status, time.monotonic() - began)
        response = MESSAGES["ModelInferResponse"](
            model_name=model.name, model_version=model.version, id=request.id
        )
        for name, values in outputs.items():
            datatype = DATATYPES[values.dtype.name]
            response.outputs.add(name=name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(protocol.raw(values))
        return response

    async def stream_infer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answer the requests of a stream in order; an error ends only its own request."""
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
    """Return the request in the protocol's JSON fields."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    document = {
        "id": request.id,
        "inputs": [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape),
             "data": raw[number] if raw else _contents(tensor)}
            for number, tensor in enumerate(request.inputs)
        ],
        "outputs": [
            {"name": output.name, "parameters": _parameters(output.parameters)}
            for output in request.outputs
        ],
        "parameters": _parameters(request.parameters),
    }  # fmt: skip
    parsed: InferRequest = protocol.validated(
        "the request", msgspec.convert, document, InferRequest
    )
    return parsed


def _parameters(parameters: Any) -> dict[str, object]:
    return {
        name: getattr(value, kind)
        for name, value in parameters.items()
        if (kind := value.WhichOneof("parameter_choice"))
    }


def _contents(tensor: Any) -> Any:
    """Return the numbers of a tensor; None for a datatype that no model takes."""
    return getattr(tensor.contents, CONTENTS.get(tensor.datatype, ""), None)
