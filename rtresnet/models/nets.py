"""Operations on any net: trace, fold, count, run with NumPy.

Export writes the traced graph and quantization-aware training computes it. Both use the same
arithmetic for batch norm, so that they get the same weights bit for bit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from rtresnet.core.errors import InputError
from rtresnet.models.resnet import Add, MeanImage, PadShortcut, ResNet
from rtresnet.models.vgg import VGG

Net = ResNet | VGG
INPUT, OUTPUT = "images", "logits"
TYPES: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.Linear: "Gemm", Add: "Add"}
POOLED = 7  # side of the last map at 224 pixels, which the paper's net pools


class _Tracer(fx.Tracer):
    """Treats our own operations as leaf modules, like torch's."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        is_leaf = isinstance(m, Add | MeanImage | PadShortcut) or getattr(m, "traced_whole", False)
        return is_leaf or super().is_leaf_module(m, qualified_name)


def trace(net: nn.Module) -> fx.GraphModule:
    """Return the net as a graph of named modules, in order of execution."""
    return fx.GraphModule(net, _Tracer().trace(net))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A module of the net with its input and output tensors, named as in the ONNX file.

    Attributes:
        norm: The batch norm that is folded into it; empty if there is none.
    """

    name: str
    op_type: str
    input: tuple[str, ...]
    output: tuple[str, ...]
    norm: str = ""


def operations(net: Net) -> list[Operation]:
    """List the operations of the folded net, in order of execution."""
    traced = trace(net)
    modules = dict(traced.named_modules())
    by_name: dict[str, Operation] = {}
    tensors: dict[Any, str] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            tensors[node] = INPUT
        elif node.op == "call_module":
            name, module = str(node.target), modules[node.target]
            reads = tuple(tensors[argument] for argument in node.all_input_nodes)
            if isinstance(module, nn.BatchNorm2d):
                by_name[reads[0]] = dataclasses.replace(by_name[reads[0]], norm=name)
                tensors[node] = reads[0]
            elif isinstance(module, nn.Dropout):  # only active in training
                tensors[node] = reads[0]
            else:
                kind = TYPES.get(type(module), type(module).__name__)
                by_name[name] = Operation(name=name, op_type=kind, input=reads, output=(name,))
                tensors[node] = name
    return list(by_name.values())


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution equal to `norm(convolution(x))` in evaluation mode.

        w' = w * gamma / sqrt(var + eps)        for each output channel
        b' = beta + (b - mean) * gamma / sqrt(var + eps)

    Computed in float64 and rounded once to float32; gradients pass.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.double() - norm.running_mean.double() * factor
    if convolution.bias is not None:
        bias = bias + convolution.bias.double() * factor
    weight = convolution.weight.double() * factor[:, None, None, None]
    return weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)


def multiply_adds(net: nn.Module, size: int) -> int:
    """Count multiply-adds of convolutions and FC layers for one image of `size` by `size` pixels.

    Counts a forward pass as the paper does, without batch norm, ReLU, pooling and additions.
    On the meta device nothing is computed.
    """
    total, training = 0, net.training

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        positions = out.numel() // module.weight.shape[0]
        total += positions * module.weight.numel()

    hooks = [
        module.register_forward_hook(count)
        for module in net.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    weight = next(net.parameters())
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, size, size, device=weight.device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return total


class TorchBackend:
    """Runs a net in evaluation mode: the reference for exports, quantized files and plans.

    Implements `runtime.backend.Backend`.

    Args:
        net: The net, on its device; put into evaluation mode.
        size: Side of its input, in pixels, if known.
    """

    provider = "torch"
    input_dtype: np.dtype[Any] = np.dtype("float32")
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __init__(self, net: nn.Module, size: int | None = None) -> None:
        self.net, self.size = net.eval(), size
        self.versions = {"torch": str(torch.__version__)}
        self._device = next(net.parameters()).device
        on_gpu = self._device.type == "cuda"
        self.device: str = torch.cuda.get_device_name(self._device) if on_gpu else "cpu"
        self.threads: int | None = None if on_gpu else torch.get_num_threads()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run float32 [N, 3, S, S] and wait for the result: float32 logits [N, classes]."""
        with torch.inference_mode():
            logits = self._forward(torch.from_numpy(images).to(self._device))
        return logits.float().cpu().numpy()

    infer = __call__

    def _forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def timings(self) -> dict[str, float]:
        """Return an empty dict: only wall time is known."""
        return {}

    def close(self) -> None:
        """Do nothing: Python frees the memory."""


class DenseBackend(TorchBackend):
    """Runs a net in its fully convolutional form (section 3.4, testing).

    `backend(images)` converts float32 [N, 3, H, W] of any H and W to float32 maps of logits
    [N, classes, h, w].

    Args:
        net: As for `TorchBackend`.
        size: Side of its usual input, in pixels.
        sliding: Whether the average pooling slides over the map with the window that the net has
            at its usual size, instead of pooling the complete map at once.

    Raises:
        InputError: The net subtracts a mean image, which has a fixed size.
    """

    net: Net

    def __init__(self, net: Net, size: int | None = None, *, sliding: bool = False) -> None:
        super().__init__(net, size)
        self.window = None
        if isinstance(net, ResNet):
            if net.mean_image is not None:
                raise InputError(
                    "this net subtracts a mean image of one size, but the dense test uses several "
                    "sizes",
                    fix="evaluate it with --protocol center or 10-crop",
                )
            if sliding:
                stem = 4 if net.maxpool is not None else 1
                self.window = max(1, (size or 32 * POOLED) // (stem * 2 ** (len(net.stages) - 1)))

    def _forward(self, images: Tensor) -> Tensor:
        return self.net.dense(images, self.window)
