"""Random changes to a batch of uint8 images on the device it will be trained on.

Section 4.2: four pixels of padding on each side, a random crop of the original size, a
horizontal flip with probability one half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtresnet.preprocess import Preprocess


def pad_and_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pads with black and cuts the original size at a random place, each image its own.

    Args:
        images: uint8 [N, 3, H, W].
        padding: Pixels on each side.
        generator: On the CPU, so that a run is the same on every device.
    """
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    top, left = offsets.to(images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    batch = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[batch, channel, rows, columns]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors about half of the images left to right."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def normalize(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [N, 3, H, W] to float32: `Preprocess.normalize`, on the device."""
    mean = torch.tensor(preprocess.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocess.std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std
