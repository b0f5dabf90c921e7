"""A teacher for knowledge distillation (Hinton, Vinyals and Dean, 2015): a trained net, fixed.

The student receives the teacher's soft outputs for its training images, in addition to their
labels. `step.py` has the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtresnet.core.errors import InputError
from rtresnet.core.labels import match
from rtresnet.core.preprocess import Preprocess
from rtresnet.models.checkpoint import Checkpoint


class Teacher(nn.Module):
    """A trained net whose logits are in the order of the student's classes.

    Args:
        checkpoint: Checkpoint of a net with the same classes.
        classes: The student's classes.
        preprocess: The student's input contract; mean and std may differ from the teacher's.
        named: Whether `classes` are names, not numbers.

    Raises:
        InputError: The classes differ.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        classes: Sequence[str],
        preprocess: Preprocess,
        *,
        named: bool = True,
    ) -> None:
        super().__init__()
        name = checkpoint.model.architecture
        mapping = match(
            checkpoint.model.classes, tuple(classes), data_named=named,
            model_name=f"the teacher {name}", data_name="the student",
        )  # fmt: skip
        if not mapping.is_permutation:
            raise InputError(
                f"the teacher {name} has {len(checkpoint.model.classes)} classes, but the student "
                f"has {len(classes)}",
                fix="train the teacher on the same classes",
            )
        self.net = checkpoint.net().requires_grad_(False)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        own = checkpoint.input
        mean, std, own_mean, own_std = (
            torch.tensor(v).view(1, 3, 1, 1)
            for v in (preprocess.mean, preprocess.std, own.mean, own.std)
        )
        self.order: Tensor
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("order", torch.tensor(mapping.indices))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits [N, classes] of normalized images [N, 3, S, S]."""
        logits: Tensor = self.net(images * self.scale + self.shift)
        return logits[:, self.order]
