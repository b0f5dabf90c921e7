"""A detector in torch as a backend: NumPy in, NumPy out."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from rtresnet.core.errors import InputError
from rtresnet.detection.net import Detector, detect


class TorchDetector:
    """Runs a detector in evaluation mode. Implements `runtime.backend.Backend`.

    Args:
        net: On the device it should run on.
    """

    provider = "torch"
    size: int | None = None
    batch = 1
    input_dtype: np.dtype[Any] = np.dtype("float32")
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __init__(self, net: Detector) -> None:
        self.net = net.eval()
        self.versions = {"torch": str(torch.__version__)}
        self._device = next(net.parameters()).device
        on_gpu = self._device.type == "cuda"
        self.device: str = torch.cuda.get_device_name(self._device) if on_gpu else "cpu"
        self.threads: int | None = None if on_gpu else torch.get_num_threads()

    def detect(self, images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
        """Run one image float32 [1, 3, H, W] of `extent` [1, 2]; the outputs by name."""
        return detect(
            self.net,
            torch.from_numpy(images).to(self._device),
            torch.from_numpy(extent).to(self._device),
        )

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Raise InputError: a detector has no logits."""
        raise InputError("a detector has no logits", fix="call detect(image)")

    def timings(self) -> dict[str, float]:
        """Return None: only wall time is measured."""
        return {}

    def close(self) -> None:
        """Do nothing: Python frees the memory."""
