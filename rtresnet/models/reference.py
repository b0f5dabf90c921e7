"""The torch net behind the same calls as every other backend: NumPy in, NumPy out.

The reference that exports, quantized files and plans are compared with.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rtresnet.models.resnet import ResNet


class TorchBackend:
    """Runs a net in evaluation mode; `backend(images)` gives logits.

    Has what `runtime.backend.Backend` asks for, so that a checkpoint is timed as any file is.

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
        self._place = next(net.parameters()).device
        on_gpu = self._place.type == "cuda"
        self.device: str = torch.cuda.get_device_name(self._place) if on_gpu else "cpu"
        self.threads: int | None = None if on_gpu else torch.get_num_threads()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, S, S] to float32 logits [N, classes], which are there on return."""
        with torch.inference_mode():
            logits: torch.Tensor = self.net(torch.from_numpy(images).to(self._place))
        return logits.float().cpu().numpy()

    infer = __call__

    def timings(self) -> dict[str, float]:
        """Nothing but wall time is known."""
        return {}

    def close(self) -> None:
        """Nothing is held that Python does not free."""


class DenseBackend:
    """The net as a fully convolutional one: the FC is a 1x1 convolution (section 3.4, testing).

    Args:
        net: On the device it should run on; put into evaluation mode.
    """

    def __init__(self, net: ResNet) -> None:
        self.net = net.eval()
        self.device = next(net.parameters()).device

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, H, W] of any H and W to float32 logits [N, classes, h, w]."""
        fc = self.net.fc
        with torch.inference_mode():
            found = self.net.features(torch.from_numpy(images).to(self.device))
            logits = nn.functional.conv2d(found, fc.weight[:, :, None, None], fc.bias)
        return logits.float().cpu().numpy()
