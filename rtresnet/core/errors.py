"""Every error a person can meet, as a tree. The exit code is a property of the class.

    RtresnetError
    ├── InputError (2, also a ValueError)   what was given cannot be used
    │   ├── UnknownNameError                     a name that is not in a table; suggests the nearest
    │   ├── DataError                       images or labels
    │   └── ArtifactError                   a checkpoint, ONNX file, plan or sidecar
    ├── UnavailableError (3)                 this machine lacks a package, a device or a builder
    │   └── QueueFullError                      or, for the moment, the time
    └── CheckFailedError (1)                      everything ran, and a bound was not held

An error says what went wrong and where; `fix` is the command or the option that mends it.
The command line prints both on one line, in one place (`cli/main.py`).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

FEW = 8  # names: so many are listed even where one of them is probably meant


class RtresnetError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What went wrong, naming the file, the tensor or the option.
        fix: How to mend it, as the end of the sentence.
    """

    exit_code = 2

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(f"{message}; {fix}" if fix else message)
        self.message = message
        self.fix = fix


class InputError(RtresnetError, ValueError):
    """A value, an option or a file that cannot be used as given."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that a misspelt name most likely means; None where none is similar."""

    def likeness(entry: str) -> tuple[float, int]:
        ratio = difflib.SequenceMatcher(None, name, entry).ratio()
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, entry, strict=False))
        return ratio, len(list(same))

    near = max(known, key=likeness, default="")
    return near if likeness(near)[0] >= 0.5 else None


class UnknownNameError(InputError):
    """A name that is not in its table.

    Args:
        what: The kind of thing, as in "model".
        name: What was asked for.
        known: Every name that would have been accepted.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        near = nearest(name, known)
        guess = [f"did you mean {near!r}?"] if near else []
        listed = ["known: " + ", ".join(known)] if not near or len(known) <= FEW else []
        fix = " ".join(guess + listed)
        super().__init__(f"unknown {what} {name!r}", fix=fix)


class DataError(InputError):
    """Images or labels that cannot be read, or that no net can learn from."""


class ArtifactError(InputError):
    """A checkpoint, ONNX file, plan or sidecar that is broken or does not match its chain."""


class UnavailableError(RtresnetError):
    """The machine lacks something; `fix` says how to get it."""

    exit_code = 3


class QueueFullError(UnavailableError):
    """More is waiting to be computed than was agreed on; the same call may succeed later."""


class CheckFailedError(RtresnetError):
    """A bound was not held: the work was done, and the result is not good enough."""

    exit_code = 1


# Packages that an extra brings, by their name on PyPI.
EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "onnx": "export",
    "scikit-learn": "demo",
    "matplotlib": "report",
    "jinja2": "report",
    "pyarrow": "bulk",
    "ray[data]": "ray",
}


def missing_package(package: str, purpose: str) -> UnavailableError:
    """The error for an optional package (its name on PyPI) that is not installed."""
    extra = EXTRAS.get(package)
    return UnavailableError(
        f"{purpose} needs the package {package}, which is not installed",
        fix=f"pip install 'rtresnet[{extra}]'" if extra else f"pip install {package}",
    )
