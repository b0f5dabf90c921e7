"""The layers of a TensorRT engine, as its engine inspector describes them.

TensorRT-RTX logs the layers while it builds (`layers.read_dump`), `tensorrt` does not. The
inspector describes a deserialized engine, which needs the GPU that `tensorrt` builds on anyway. An
engine with dynamic shapes has formats and types only in a context whose input shapes are set;
otherwise the inspector returns "N/A due to dynamic shapes".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rtresnet.builder.layers import (
    BYTES,
    MYELIN_KERNELS,
    PROFILE,
    UNKNOWN,
    Layer,
    LayerTensor,
    classify,
    raw_layer,
    widest,
)
from rtresnet.builder.nodes import ORIGIN, NetworkNode
from rtresnet.core import trt_loading

# CaskConvolution, CaskGemmConvolution, CaskJitConv, CaskGemmMatrixMultiply, ...
KERNEL = re.compile(r"Conv(?!er)|Gemm|MatrixMultiply|FullyConnected")
# A region of Myelin is a kernel if its tactic is one.
TACTIC = re.compile(r"gemm|fprop|conv|xmma", re.IGNORECASE)
NAME_SEPARATORS = re.compile(r"[\s+(),|\[\]{}]+")
# "Int8", "Half", "Row major linear FP32", "Channel major FP16 format where channel % 8 == 0",
# "Thirty-two wide channel vectorized row major Int8 format", "N/A due to dynamic shapes".
DTYPES = (
    (r"bf16|bfloat16", "BFloat16"),
    (r"fp8|float8|e4m3", "FP8"),
    (r"fp4|float4|e2m1", "FP4"),
    (r"int8", "Int8"),
    (r"int4", "Int4"),
    (r"fp16|float16|half", "Half"),
    (r"fp32|float32|float", "Float"),
    (r"int32", "Int32"),
    (r"int64", "Int64"),
    (r"bool", "Bool"),
)


def inspect_engine(
    trt: Any, logger: Any, reason: Callable[[], str], serialized: Any, profiles: int
) -> tuple[str, ...]:
    """Deserialize an engine and describe it with the optimal shapes of each profile.

    Args:
        trt: The `tensorrt` module.
        logger: An ILogger of this module.
        reason: Returns the logger's errors.
        serialized: The engine, as the builder returned it.
        profiles: Number of its optimization profiles.

    Returns:
        The inspector's JSON, one text per profile; empty if the engine cannot be deserialized.

    Raises:
        UnavailableError: TensorRT cannot create a Runtime.
    """
    runtime = trt_loading.create(trt, "Runtime", logger, reason)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        return ()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    texts = []
    for profile in range(profiles):
        inspector = engine.create_engine_inspector()
        context = engine.create_execution_context()
        if context is not None:  # None if there is too little memory; then names have no types
            context.set_optimization_profile_async(profile, 0)
            for name in inputs:
                context.set_input_shape(name, engine.get_tensor_profile_shape(name, profile)[1])
            inspector.execution_context = context
        texts.append(str(inspector.get_engine_information(trt.LayerInformationFormat.JSON)))
        del inspector, context  # freed before the engine, and before the next one is created
    return tuple(texts)


def read_inspector(texts: Sequence[str], nodes: Mapping[str, NetworkNode]) -> tuple[Layer, ...]:
    """Parse the result of `inspect_engine`.

    Args:
        texts: JSON, one text per optimization profile.
        nodes: The nodes of the parsed network by name.

    Returns:
        The layers of every profile; empty if the texts have no details.
    """
    records = []
    for profile, text in enumerate(texts):
        for entry in _entries(text):
            # Each text lists the layers of all profiles, but has types for its own profile only.
            match = PROFILE.search(str(entry.get("Name", "")))
            if (int(match[1]) if match else 0) == profile:
                records.append(_record(entry, profile, nodes))
    return classify(records, nodes)


def _entries(text: str) -> Iterator[dict[str, Any]]:
    try:
        data = json.loads(text, strict=False)  # metadata has control characters as separators
    except json.JSONDecodeError:
        return
    listed = data.get("Layers") if isinstance(data, dict) else None
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):  # a string unless the profiling verbosity was DETAILED
            yield entry


def _record(entry: dict[str, Any], profile: int, nodes: Mapping[str, NetworkNode]) -> Layer:
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    tactic = str(entry.get("TacticName", ""))
    inputs = _tensors(entry.get("Inputs"))
    constants = _tensors(entry.get("Constants"))
    sized = [entry[key] for key in ("Weights", "Bias") if isinstance(entry.get(key), dict)]
    origins = ORIGIN.findall(str(entry.get("Metadata", "")))
    if not origins:
        origins = [word for word in NAME_SEPARATORS.split(name) if word in nodes]
    is_kernel = kind in MYELIN_KERNELS or bool(KERNEL.search(kind))
    return raw_layer(
        name=name,
        kind=kind,
        profile=profile,
        nodes=tuple(dict.fromkeys(origins)),
        inputs=inputs,
        outputs=_tensors(entry.get("Outputs")),
        weights=sum(t.bytes(1) or 0 for t in constants)
        + sum(int(BYTES.get(_dtype(part.get("Type")), 0) * part.get("Count", 0)) for part in sized),
        is_kernel=is_kernel or (kind == "fusion" and bool(TACTIC.search(tactic))),
        computes=_computes(entry, inputs, constants),
    )


def _computes(
    entry: dict[str, Any], inputs: tuple[LayerTensor, ...], constants: tuple[LayerTensor, ...]
) -> str:
    """Return the data type of a kernel's multiplications: the wider of input and weights.

    An int8 input alone is no evidence, because a kernel that first converts it has float weights.
    """
    types = {inputs[0].dtype if inputs else UNKNOWN}
    weights = entry.get("Weights")
    if isinstance(weights, dict) and weights.get("Count", 1):
        types.add(_dtype(weights.get("Type")))
    elif constants:
        types.add(max(constants, key=lambda tensor: math.prod(tensor.shape)).dtype)
    return widest(types)


def _tensors(listed: Any) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(
            name=str(entry.get("Name", "")),
            shape=tuple(int(side) for side in entry.get("Dimensions") or ()),
            dtype=_dtype(entry.get("Format/Datatype") or entry.get("Datatype")),
        )
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, dict)
    )


def _dtype(text: object) -> str:
    lowered = str(text).lower()
    return next((dtype for pattern, dtype in DTYPES if re.search(pattern, lowered)), UNKNOWN)
