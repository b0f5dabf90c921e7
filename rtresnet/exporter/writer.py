"""Write a folded net as an ONNX model with one node per operation, named as in the net.

`layer1.0.conv1` in the net is the node `layer1.0.conv1` in the file; its output tensor has the same
name, and its weights are `layer1.0.conv1.weight` and `.bias`. Builders, profilers and calibration
tables then name stages and blocks instead of `node_Conv_754`. A net with an operation that the
writer does not know is rejected; parity with torch is checked after every export (`verify.py`).

Input `images` float32 [batch, 3, S, S], output `logits` float32 [batch, classes]; the batch is
dynamic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from rtresnet.core.sidecar import Sidecar
from rtresnet.models.nets import INPUT, OUTPUT
from rtresnet.models.resnet import Add, MeanImage, PadShortcut
from rtresnet.onnxlib import metadata
from rtresnet.onnxlib.graph import checked

OPSET = 18


def to_onnx(
    graph: fx.GraphModule,
    *,
    size: int,
    name: str,
    scales: metadata.TrainedScales | None = None,
    description: Sidecar | None = None,
) -> onnx.ModelProto:
    """Write a folded net.

    Args:
        graph: The result of `fold()`.
        size: Side of the input in pixels.
        name: The graph's name, shown by viewers.
        scales: Activation scales from training; stored in the file.
        description: Description stored in the file, for use without a sidecar.

    Returns:
        A checked model, opset 18, with every shape inferred.

    Raises:
        TypeError: The net has an operation that the writer does not support.
    """
    writer = NodeWriter()
    modules = dict(graph.named_modules())
    tensors: dict[fx.Node, str] = {}
    classes = 0
    for node in graph.graph.nodes:
        inputs = [tensors[argument] for argument in node.all_input_nodes]
        if node.op == "placeholder":
            tensors[node] = INPUT
        elif node.op == "call_module":
            module = modules[node.target]
            writer.write(node.target, module, inputs)
            tensors[node] = node.target
            if isinstance(module, nn.Linear):
                classes = module.out_features
        elif node.op == "output":
            writer.rename_output(inputs[0], OUTPUT)
        else:
            raise TypeError(f"cannot export {node.op} {node.target} to ONNX")
    model = helper.make_model(
        helper.make_graph(
            writer.nodes,
            name,
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, size, size])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])],
            writer.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="rtresnet",
    )
    if graph.meta.get(metadata.NORM_STATISTICS.key):
        metadata.NORM_STATISTICS.set(model, graph.meta[metadata.NORM_STATISTICS.key])
    if scales is not None:
        metadata.TRAINED_SCALES.set(model, scales)
    if description is not None:
        metadata.DESCRIPTION.set(model, description)
    return checked(model)


class NodeWriter:
    """Collects the nodes and constants of a graph; `write` adds those of one module."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.writers: dict[type[nn.Module], Callable[[str, Any, list[str]], None]] = {
            nn.Conv2d: self.conv,
            nn.Linear: self.linear,
            nn.MaxPool2d: lambda *args: self.pool("MaxPool", *args),
            nn.AvgPool2d: lambda *args: self.pool("AveragePool", *args),
            PadShortcut: self.pad_shortcut,
            MeanImage: self.mean_image,
            nn.ReLU: lambda name, _, inputs: self.node("Relu", name, inputs),
            Add: lambda name, _, inputs: self.node("Add", name, inputs),
            nn.AdaptiveAvgPool2d: lambda n, _, inputs: self.node("GlobalAveragePool", n, inputs),
            nn.Flatten: lambda name, _, inputs: self.node("Flatten", name, inputs, axis=1),
        }

    def write(self, name: str, module: nn.Module, inputs: list[str]) -> None:
        """Add the nodes of a module, whose output tensor has the module's name.

        Raises:
            TypeError: The module has no ONNX form.
        """
        if type(module) not in self.writers:
            raise TypeError(f"cannot export {type(module).__name__} at {name} to ONNX")
        self.writers[type(module)](name, module, inputs)

    def node(self, op: str, name: str, inputs: list[str], out: str = "", **attributes: Any) -> None:
        """Add a node; its output is called `out`, by default `name`."""
        self.nodes.append(
            helper.make_node(op, inputs, [out or name], name=out or name, **attributes)
        )

    def constant(self, name: str, value: Tensor | list[int]) -> str:
        """Add a constant and return its name."""
        if isinstance(value, Tensor):
            tensor = numpy_helper.from_array(value.detach().numpy(), name)
        else:
            tensor = helper.make_tensor(name, TensorProto.INT64, [len(value)], value)
        self.initializers.append(tensor)
        return name

    def conv(self, name: str, module: nn.Conv2d, inputs: list[str]) -> None:
        """Add a convolution with bias."""
        assert module.bias is not None and isinstance(module.padding, tuple)
        assert module.padding_mode == "zeros"
        attributes: dict[str, Any] = {}  # without those that have ONNX's default
        if module.groups > 1:
            attributes["group"] = module.groups
        if set(module.dilation) != {1}:
            attributes["dilations"] = module.dilation
        weight = self.constant(f"{name}.weight", module.weight)
        bias = self.constant(f"{name}.bias", module.bias)
        self.node(
            "Conv",
            name,
            [*inputs, weight, bias],
            kernel_shape=module.kernel_size,
            strides=module.stride,
            pads=module.padding * 2,
            **attributes,
        )

    def linear(self, name: str, module: nn.Linear, inputs: list[str]) -> None:
        """Add a fully connected layer."""
        weight = self.constant(f"{name}.weight", module.weight)
        bias = self.constant(f"{name}.bias", module.bias)
        self.node("Gemm", name, [*inputs, weight, bias], transB=1)

    def mean_image(self, name: str, module: MeanImage, inputs: list[str]) -> None:
        """Add the subtraction of a mean image."""
        image = self.constant(f"{name}.image", module.image[None])
        self.node("Sub", name, [*inputs, image])

    def pool(
        self, op: str, name: str, module: nn.MaxPool2d | nn.AvgPool2d, inputs: list[str]
    ) -> None:
        """Add a pool without ceiling."""

        def pair(value: Any) -> list[int]:
            return [value, value] if isinstance(value, int) else list(value)

        self.node(
            op,
            name,
            inputs,
            kernel_shape=pair(module.kernel_size),
            strides=pair(module.stride),
            pads=pair(module.padding) * 2,
        )

    def pad_shortcut(self, name: str, module: PadShortcut, inputs: list[str]) -> None:
        """Add option A's shortcut."""
        end = 2**31 - 1  # larger than any image, and in the range that every parser accepts
        slices = [
            self.constant(f"{name}.starts", [0, 0]),
            self.constant(f"{name}.ends", [end, end]),
            self.constant(f"{name}.axes", [2, 3]),
            self.constant(f"{name}.steps", [module.stride] * 2),
        ]
        self.node("Slice", name, [*inputs, *slices], out=f"{name}.subsample")
        pads = self.constant(f"{name}.pads", [0, module.before, 0, 0, 0, module.after, 0, 0])
        self.node("Pad", name, [f"{name}.subsample", pads])

    def rename_output(self, tensor: str, name: str) -> None:
        """Give a tensor the name of the graph's output."""
        (producer,) = (node for node in self.nodes if tensor in node.output)
        producer.output[0] = name
