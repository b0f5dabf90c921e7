"""Residual networks from images to measured TensorRT engines.

`rtresnet --help` lists the verbs. In Python, `rtresnet.load(path)` runs an ONNX file or a plan;
nothing heavier than NumPy is imported for it, and nothing at all before it is asked for.
`rtresnet.Batcher` makes batches of what many threads ask for, `rtresnet.pinned` allocates memory
that a GPU reads without another copy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtresnet.core.errors import (
        CheckFailedError,
        InputError,
        QueueFullError,
        RtresnetError,
        UnavailableError,
    )
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.runtime.batcher import Batcher
    from rtresnet.runtime.cuda import pinned
    from rtresnet.runtime.session import Session, load

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "CheckFailedError",
    "InputError",
    "Preprocess",
    "QueueFullError",
    "RtresnetError",
    "Session",
    "UnavailableError",
    "__version__",
    "load",
    "pinned",
]
_HOMES = {
    "Batcher": "runtime.batcher",
    "Preprocess": "core.preprocess",
    "Session": "runtime.session",
    "load": "runtime.session",
    "pinned": "runtime.cuda",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rtresnet' has no attribute {name!r}")
    home = importlib.import_module(f"rtresnet.{_HOMES.get(name, 'core.errors')}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
