"""Bytes that TensorRT-RTX's kernels read and write, by precision and placement of Q/DQ.

    python benchmarks/bytes.py

Needs no GPU: the bytes are those of the layers that the builder fuses, at the optimal batch.
Weights are untrained and scales made up, because fusion does not depend on either. Nothing is
timed: the milliseconds are the two bounds of `rtresnet estimate`.

TensorRT-RTX writes the output of every INT8 convolution as float32, and another kernel scales,
adds, applies ReLU and quantizes. The variants try to make it write fewer bytes.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import markdown, save
from ml_dtypes import float8_e4m3fn
from onnx import TensorProto, helper, numpy_helper

from rtresnet.bench import roofline
from rtresnet.builder import engine, layers, nodes, preflight, targets
from rtresnet.core import hardware, trt_loading
from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import zoo
from rtresnet.quantization import half, qdq
from rtresnet.workflows.estimate import kernel_of

TARGET, BATCH = "sm_89", 8
GPUS = ("L4", "RTX 4090")
HEADINGS = ("variant", "kernels", "INT8", "read MB", "written MB", "moved MB", "times FP16",
            *(f"{gpu} ms" for gpu in GPUS))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Build settings of a variant."""

    fixed_batch: bool = False
    level: int | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to write the file.

    Attributes:
        name: A few words.
        make: The ONNX file, from the folded FP32 file.
    """

    name: str
    make: Callable[[onnx.ModelProto], onnx.ModelProto]
    settings: Settings = Settings()


def int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the project's placement, with a scale of its own for each tensor."""
    tensors = list(qdq.placement(model))
    return qdq.insert(model, {name: 0.05 + 0.001 * i for i, name in enumerate(tensors)})


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {out: node for node in model.graph.node for out in node.output}


def consumers(model: onnx.ModelProto, name: str) -> list[tuple[onnx.NodeProto, int]]:
    return [(n, i) for n in model.graph.node for i, other in enumerate(n.input) if other == name]


def adds(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Add"]


def add_pair(
    model: onnx.ModelProto, tensor: str, uses: Iterable[tuple[onnx.NodeProto, int]], scale: float
) -> None:
    """Make some inputs read a tensor through a Q/DQ pair of its own."""
    name = next(f"{tensor}.p{i}" for i in itertools.count()
                if f"{tensor}.p{i}.q" not in producers(model))  # fmt: skip
    graph = model.graph
    constants = [f"{name}.scale", f"{name}.zero"]
    graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), constants[0]))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), constants[1]))
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *constants], [f"{name}.q"], name=f"{name}.q"),
        helper.make_node(
            "DequantizeLinear", [f"{name}.q", *constants], [f"{name}.dq"], name=f"{name}.dq"
        ),
    ]
    for node, index in uses:
        node.input[index] = f"{name}.dq"
    made = producers(model).get(tensor)
    place = 0 if made is None else list(graph.node).index(made) + 1
    for node in reversed(pair):
        graph.node.insert(place, node)


def without_shortcut(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize only inputs of convolutions."""
    model = int8(model)
    for add in adds(model):
        for index, name in enumerate(add.input):
            dequantize = producers(model)[name]
            if dequantize.op_type == "DequantizeLinear":
                add.input[index] = producers(model)[dequantize.input[0]].input[0]
    return pruned(model)


def both_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize both inputs of every Add."""
    model = int8(model)
    for number, add in enumerate(adds(model)):
        for index, name in enumerate(add.input):
            if producers(model)[name].op_type != "DequantizeLinear":
                add_pair(model, name, [(add, index)], 0.03 + 0.001 * number)
    return model


def sum_instead(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize the sum in front of its ReLU, and not the shortcut."""
    model = without_shortcut(model)
    for number, add in enumerate(adds(model)):
        add_pair(model, add.output[0], consumers(model, add.output[0]), 0.03 + 0.001 * number)
    return model


def equal_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize both inputs of every Add and its sum with one scale."""
    model = both_inputs(model)
    for add in adds(model):
        add_pair(model, add.output[0], consumers(model, add.output[0]), 0.04)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".scale") and not tensor.dims:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0.04, np.float32), tensor.name))
    return model


def before_relu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Also quantize every convolution's output in front of its ReLU."""
    model = int8(model)
    for number, node in enumerate(list(model.graph.node)):
        readers = consumers(model, node.output[0]) if node.op_type == "Conv" else []
        if [reader.op_type for reader, _ in readers] == ["Relu"]:
            add_pair(model, node.output[0], readers, 0.03 + 0.0001 * number)
    return model


def pool_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Also quantize the input of the average pooling."""
    model = int8(model)
    for node in list(model.graph.node):
        if node.op_type in ("GlobalAveragePool", "ReduceMean"):
            add_pair(model, node.input[0], [(node, 0)], 0.02)
    return model


def weights_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize weights to INT8; activations stay FP16."""
    model = int8(model)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            dequantize = producers(model).get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = producers(model).get(dequantize.input[0])
            if quantize is not None:
                node.input[index] = quantize.input[0]
    return fp16_scales(pruned(model), weights=True)


def per_tensor(*, bias: bool) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Use one weight scale for each layer instead of one for each channel."""

    def make(model: onnx.ModelProto) -> onnx.ModelProto:
        model = int8(model)
        tensors = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Conv":
                dequantize = producers(model)[node.input[1]]
                for index, name in ((1, dequantize.input[1]), (2, dequantize.input[2])):
                    value = numpy_helper.to_array(tensors[name])
                    single = np.array(value.reshape(-1)[0] if value.size else 0, value.dtype)
                    tensors[name].CopyFrom(numpy_helper.from_array(single, name))
                    dequantize.input[index] = name
                del dequantize.attribute[:]
                if not bias:
                    del node.input[2]
        return model

    return make


def stages(*names: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Quantize only convolutions of these stages to INT8; the others are FP16."""

    def make(model: onnx.ModelProto) -> onnx.ModelProto:
        excluded = [
            node.name
            for node in model.graph.node
            if node.op_type in ("Conv", "Gemm", "Add") and not node.name.startswith(names)
        ]
        tensors = list(qdq.placement(model, excluded))
        scales = {name: 0.05 + 0.001 * i for i, name in enumerate(tensors)}
        return half.to_half(qdq.insert(model, scales, excluded))

    return make


def only(kernel: int) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Quantize only convolutions with this kernel to INT8; the others are FP16."""

    def make(model: onnx.ModelProto) -> onnx.ModelProto:
        sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
        excluded = [
            node.name
            for node in model.graph.node
            if node.op_type == "Add"
            or (node.op_type in ("Conv", "Gemm") and sizes[node.input[1]][-1] != kernel)
        ]
        tensors = list(qdq.placement(model, excluded))
        scales = {name: 0.05 + 0.001 * i for i, name in enumerate(tensors)}
        return half.to_half(qdq.insert(model, scales, excluded))

    return make


def fp16_scales(model: onnx.ModelProto, *, weights: bool = False) -> onnx.ModelProto:
    """Use FP16 for data, scales and biases, without Cast around Q/DQ."""
    model = model if weights else int8(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    del model.graph.value_info[:]
    return with_float_ends(model)


def with_float_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep input and output in float32, with a Cast inside."""
    graph = model.graph
    images, logits = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = f"{images}.half" if name == images else name
        for index, name in enumerate(node.output):
            node.output[index] = f"{logits}.half" if name == logits else name
    first = helper.make_node("Cast", [images], [f"{images}.half"], to=TensorProto.FLOAT16)
    last = helper.make_node("Cast", [f"{logits}.half"], [logits], to=TensorProto.FLOAT)
    graph.node.insert(0, first)
    graph.node.append(last)
    return model


def fp8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the project's placement with FP8 (E4M3) in place of INT8."""
    model = int8(model)
    kind = TensorProto.FLOAT8E4M3FN
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            codes = numpy_helper.to_array(tensor).astype(np.float32).astype(float8_e4m3fn)
            tensor.CopyFrom(
                helper.make_tensor(tensor.name, kind, tensor.dims, codes.tobytes(), raw=True)
            )
    del model.graph.value_info[:]
    for entry in model.opset_import:
        entry.version = max(entry.version, 21) if not entry.domain else entry.version
    return model


def padded(multiple: int) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Pad channels with zeros to a multiple of this number, and then quantize."""

    def make(model: onnx.ModelProto) -> onnx.ModelProto:
        padded_model = onnx.ModelProto()
        padded_model.CopyFrom(model)
        tensors = {t.name: t for t in padded_model.graph.initializer}

        def up(count: int) -> int:
            return -(-count // multiple) * multiple

        def widen(name: str, axes: Iterable[int]) -> None:
            value = numpy_helper.to_array(tensors[name])
            widths = [
                (0, up(n) - n) if axis in axes else (0, 0) for axis, n in enumerate(value.shape)
            ]
            tensors[name].CopyFrom(numpy_helper.from_array(np.pad(value, widths), name))

        images = padded_model.graph.input[0].name
        for node in padded_model.graph.node:
            if node.op_type == "Conv":
                widen(node.input[1], (0,) if node.input[0] == images else (0, 1))
                widen(node.input[2], (0,))
            elif node.op_type == "Gemm":
                widen(node.input[1], (1,))
        del padded_model.graph.value_info[:]
        return int8(onnx.shape_inference.infer_shapes(padded_model, strict_mode=True))

    return make


def pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove nodes that nothing reads."""
    graph = model.graph
    while True:
        read = {name for node in graph.node for name in node.input} | {graph.output[0].name}
        unread = [node for node in graph.node if not read & set(node.output)]
        if not unread:
            return model
        for node in unread:
            graph.node.remove(node)


REFERENCES = (
    Variant(name="FP32", make=lambda model: model),
    Variant(name="FP16", make=half.to_half),
)
VARIANTS = (
    Variant(name="INT8, as `quantize` places it", make=int8),
    Variant(name="the same, rest in FP16 (`--float-dtype fp16`)",
            make=lambda m: half.to_half(int8(m))),
    Variant(name="FP16 scales, no Cast around Q/DQ", make=fp16_scales),
    Variant(name="no Q/DQ on the shortcut", make=without_shortcut),
    Variant(name="no Q/DQ on the shortcut, rest in FP16",
            make=lambda m: half.to_half(without_shortcut(m))),
    Variant(name="Q/DQ on both inputs of the Add", make=both_inputs),
    Variant(name="Q/DQ on the sum instead of the shortcut", make=sum_instead),
    Variant(name="Q/DQ on both inputs and the sum, equal scales", make=equal_scales),
    Variant(name="Q/DQ also between convolution and ReLU", make=before_relu),
    Variant(name="Q/DQ also in front of the average pooling", make=pool_input),
    Variant(name="a fixed batch of 8", make=int8, settings=Settings(fixed_batch=True)),
    *(Variant(name=f"builder_optimization_level {level}", make=int8,
              settings=Settings(level=level)) for level in (0, 5)),
    Variant(name="channels padded to a multiple of 32", make=padded(32)),
    Variant(name="one weight scale for each layer", make=per_tensor(bias=True)),
    Variant(name="one weight scale for each layer, no biases", make=per_tensor(bias=False)),
    Variant(name="layer3 and layer4 only, rest in FP16", make=stages("layer3", "layer4")),
    Variant(name="layer4 only, rest in FP16", make=stages("layer4")),
    Variant(name="3x3 convolutions only, rest in FP16", make=only(3)),
    Variant(name="1x1 convolutions only, rest in FP16", make=only(1)),
    Variant(name="weights only, activations in FP16", make=weights_only),
    Variant(name="FP8 in place of INT8", make=fp8),
)  # fmt: skip


def built(model: onnx.ModelProto, settings: Settings) -> tuple[layers.Layer, ...]:
    """Return the layers that TensorRT-RTX fuses.

    Raises:
        ArtifactError: It does not parse or build; the message has TensorRT's reason.
    """
    trt = targets.builder("rtx")
    log = engine.make_log(trt)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        path.write_bytes(model.SerializeToString())
        maker = trt_loading.create(trt, "Builder", log, log.reason)
        network = maker.create_network(0)
        preflight.parse(trt, maker, network, log, path)
    graph = nodes.read(trt, network)
    config = maker.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    engine.require_user_allocation(trt, config)
    targets.apply(trt, config, [TARGET])
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    images = network.get_input(0)
    if settings.fixed_batch:
        images.shape = (BATCH, *tuple(images.shape)[1:])
    else:
        profile = maker.create_optimization_profile()
        profile.set_shape(images.name, *[(n, *tuple(images.shape)[1:]) for n in (1, BATCH, 32)])
        config.add_optimization_profile(profile)
    plan = maker.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(log.reason())
    return layers.read_dump(log.layers, graph)


def row(name: str, made: tuple[layers.Layer, ...], net: str) -> dict[str, Any]:
    """Return the bytes and bounds of one variant."""
    kernels = [kernel_of(layer, BATCH) for layer in made if layer.role != "idle"]
    bounds = {}
    for gpu in GPUS:
        times = roofline.minimum_times(kernels, roofline.find_gpu(gpu), BATCH)
        bounds[gpu] = [sum(t.least for t in times), sum(t.through_memory for t in times)]
    return {
        "net": net,
        "variant": name,
        "kernels": len(kernels),
        "narrow_kernels": sum(kernel.dtype in ("int8", "fp8") for kernel in kernels),
        "read": BATCH * sum(sum(kernel.read) for kernel in kernels),
        "written": BATCH * sum(kernel.written for kernel in kernels),
        "weights": sum(kernel.weights for kernel in kernels),
        "moved": sum(kernel.moved(BATCH) for kernel in kernels),
        "bounds_ms": bounds,
        "error": None,
    }


def folded(name: str, shortcut: str | None = None) -> onnx.ModelProto:
    spec = zoo.spec(name, shortcut=shortcut)
    torch.manual_seed(0)
    return to_onnx(fold(zoo.build(spec).eval()), size=spec.size, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("nets", nargs="*", default=["resnet50", "resnet18", "resnet20"])
    rows = []
    tables = []
    for net in parser.parse_args().nets:
        model = folded(net, "B" if net.startswith("resnet20") else None)
        own: list[dict[str, Any]] = []
        for variant in (*REFERENCES, *VARIANTS):
            if variant.name.startswith("layer4") and "layer4" not in str(model.graph.node):
                continue
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            try:
                own.append(row(variant.name, built(variant.make(copy), variant.settings), net))
            except Exception as error:  # a rejected variant is a result, too
                own.append({"net": net, "variant": variant.name, "error": str(error)[:200]})
            print(own[-1], flush=True)
        fp16_bytes = next(entry["moved"] for entry in own if entry["variant"] == "FP16")
        tables.append(f"{net}, batch {BATCH}, {TARGET}:\n\n" + table(own, fp16_bytes))
        rows += own
    record = {
        "batch": BATCH, "target": TARGET, "rows": rows,
        "versions": hardware.versions(("rtresnet", "tensorrt-rtx-cu13", "onnx")),
    }  # fmt: skip
    save("bytes", record, "\n\n".join(tables))


def table(rows: list[dict[str, Any]], reference: int) -> str:
    cells = []
    for entry in rows:
        if entry["error"]:
            cells.append((entry["variant"], "refused", *[""] * (len(HEADINGS) - 2)))
            continue
        megabytes = [f"{entry[part] / 1e6:.1f}" for part in ("read", "written", "moved")]
        cells.append(
            (entry["variant"], entry["kernels"], entry["narrow_kernels"], *megabytes,
             f"{entry['moved'] / reference:.2f}",
             *("\u2013".join(f"{ms:.2g}" for ms in pair) for pair in entry["bounds_ms"].values()))
        )  # fmt: skip
    return markdown(HEADINGS, cells)


if __name__ == "__main__":
    main()
