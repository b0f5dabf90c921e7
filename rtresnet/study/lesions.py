"""Lesions: how a trained net does without one of its blocks (Veit, Wilber, Belongie, 2016).

Only the shortcut of the block remains. A plain net has no shortcuts; there, only a block whose
input and output have the same shape can be left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rtresnet.core.errors import InputError
from rtresnet.models.nets import Net
from rtresnet.models.resnet import ResNet


def removable_blocks(net: Net, name: str) -> list[str]:
    """Return the blocks that the net works without, in order of execution.

    Args:
        net: The net.
        name: Of it, for the error.

    Raises:
        InputError: It has none.
    """
    blocks = net.blocks() if isinstance(net, ResNet) else {}
    found = [block for block, module in blocks.items() if module.removable]
    if not found:
        raise InputError(f"{name}: a net without removable blocks", fix="give a residual net")
    return found


@contextlib.contextmanager
def without(net: Net, block: str) -> Iterator[None]:
    """Leave a block out of a net within the `with` block."""
    assert isinstance(net, ResNet)
    module = net.blocks()[block]
    module.dropped = True
    try:
        yield
    finally:
        module.dropped = False
