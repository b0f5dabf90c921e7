"""The torch net behind the same call as every other backend: NumPy in, NumPy out.

The reference that exports, quantized files and plans are compared with.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rtresnet.models.resnet import ResNet


class TorchBackend:
    """Runs a net in evaluation mode; `backend(images)` gives logits.

    Args:
        net: On the device it should run on; put into evaluation mode.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval()
        self.device = next(net.parameters()).device

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, S, S] to float32 logits [N, classes]."""
        with torch.inference_mode():
            logits: torch.Tensor = self.net(torch.from_numpy(images).to(self.device))
        return logits.float().cpu().numpy()


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
