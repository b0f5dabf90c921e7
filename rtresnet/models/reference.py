"""Torch nets as backends: NumPy in, NumPy out.

They are the reference that exports, quantized files and plans are compared with.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rtresnet.models.resnet import ResNet


class TorchBackend:
    """Runs a net in evaluation mode; `backend(images)` gives logits.

    Implements `runtime.backend.Backend`.

    Args:
        net: On the device it should run on; put into evaluation mode.
        size: Side of its input, in pixels, where it is known.
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
        """Runs float32 [N, 3, S, S] and waits for the result: float32 logits [N, classes]."""
        with torch.inference_mode():
            logits: torch.Tensor = self.net(torch.from_numpy(images).to(self._device))
        return logits.float().cpu().numpy()

    infer = __call__

    def timings(self) -> dict[str, float]:
        """Returns nothing: only wall time is known."""
        return {}

    def close(self) -> None:
        """Does nothing: Python frees the memory."""


class DenseBackend(TorchBackend):
    """A ResNet as a fully convolutional net: its FC is a 1x1 convolution (section 3.4, testing)."""

    net: ResNet

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Runs float32 [N, 3, H, W] of any H and W; float32 logits [N, classes, h, w]."""
        fc = self.net.fc
        with torch.inference_mode():
            features = self.net.features(torch.from_numpy(images).to(self._device))
            logits = nn.functional.conv2d(features, fc.weight[:, :, None, None], fc.bias)
        return logits.float().cpu().numpy()

    infer = __call__
