"""The exceptions that rtresnet raises, as a tree. The exit code is a property of the class.

    RtresnetError
    ├── InputError (2, also a ValueError)   an option, a value or a file is not usable
    │   ├── UnknownNameError                a name is not in a table; suggests the nearest
    │   ├── DataError                       images or labels are not usable
    │   └── ArtifactError                   a checkpoint, ONNX file, plan or sidecar is broken
    ├── UnavailableError (3)                this machine lacks a package, a device or a builder
    │   └── QueueFullError                  too many requests are waiting; try again later
    └── CheckFailedError (1)                the command ran, but a check failed

An error states the problem and its place; `fix` is the command or the option that fixes it.
The command line prints both on one line, in one place (`cli/main.py`).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

FEW = 16  # up to this number, all known names are listed even if one is suggested


class RtresnetError(Exception):
    """Base of all exceptions that rtresnet raises.

    Args:
        message: The problem, with the name of the file, the tensor or the option.
        fix: The command or option that fixes it, as the end of the sentence.
    """

    exit_code = 2

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(f"{message}; {fix}" if fix else message)
        self.message = message
        self.fix = fix


class InputError(RtresnetError, ValueError):
    """A value, an option or a file that cannot be used as given."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is most similar to a misspelt name, or None."""

    def likeness(entry: str) -> tuple[float, int]:
        ratio = difflib.SequenceMatcher(None, name, entry).ratio()
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, entry, strict=False))
        return ratio, len(list(same))

    near = max(names, key=likeness, default="")
    return near if likeness(near)[0] >= 0.5 else None


class UnknownNameError(InputError):
    """A name that is not in its table.

    Args:
        kind: The kind of thing, as in "model".
        name: The unknown name.
        names: Every valid name.
    """

    def __init__(self, kind: str, name: str, names: Iterable[str]) -> None:
        names = list(names)
        near = nearest(name, names)
        guess = [f"did you mean {near!r}?"] if near else []
        listed = ["known: " + ", ".join(names)] if not near or len(names) <= FEW else []
        fix = " ".join(guess + listed)
        super().__init__(f"unknown {kind} {name!r}", fix=fix)


class DataError(InputError):
    """Images or labels that cannot be read or used for training."""


class ArtifactError(InputError):
    """A checkpoint, ONNX file, plan or sidecar that is broken or does not match its chain."""


class UnavailableError(RtresnetError):
    """A package, device or driver is missing; `fix` tells how to install it."""

    exit_code = 3


class QueueFullError(UnavailableError):
    """Too many requests are waiting; the same call may succeed later."""


class CheckFailedError(RtresnetError):
    """The command ran, but a check failed."""

    exit_code = 1


# Extra that installs a package, by its name on PyPI.
EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "huggingface_hub": "hub",
    "onnx": "export",
    "scikit-learn": "demo",
    "matplotlib": "report",
    "jinja2": "report",
    "pyarrow": "bulk",
    "ray[data]": "ray",
}


def missing_package(package: str, purpose: str) -> UnavailableError:
    """Return the error for an optional package (its name on PyPI) that is not installed."""
    extra = EXTRAS.get(package)
    return UnavailableError(
        f"{purpose} needs the package {package}, which is not installed",
        fix=f"pip install 'rtresnet[{extra}]'" if extra else f"pip install {package}",
    )
