"""Record how an artifact or a result was made: command line, commit and versions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar

PACKAGES = ("rtresnet", "numpy", "torch", "onnx", "onnxruntime")
command: ContextVar[Sequence[str]] = ContextVar("command", default=())
"""The running command line; empty if a Python program calls a function."""


def command_line() -> str:
    """Return the command line of this process."""
    return shlex.join(command.get() or sys.argv)


def made_by() -> dict[str, str]:
    """Return the command line, the code's commit and the versions of the libraries."""
    from rtresnet.core import hardware

    made = {"command": command_line(), "commit": hardware.commit()}
    made |= {name: hardware.version(name) for name in PACKAGES}
    return {name: value for name, value in made.items() if value is not None}
