"""Results of the analyses, without torch: what is measured, and how it is kept.

Results are written as they are made, so that an interrupted study continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """Gradients of one net after some steps.

    Attributes:
        step: Number of steps so far.
        loss: Loss of the measured batch.
        norms: L2 norm of the loss gradient for the weights of each 3x3 convolution, by name, in
            the order of the layers.
        ratio: The first layer's norm over the last one's.
    """

    step: int
    loss: float
    norms: dict[str, float]
    ratio: float


class PartialResults:
    """Named results in a JSON file.

    Args:
        path: Path of the file, which may not exist yet.
        about: Settings that the results depend on. A file with different settings is rejected.

    Raises:
        InputError: The file is not a results file, or has different settings.
    """

    def __init__(self, path: Path, about: Mapping[str, object]) -> None:
        self._path, self._about = path, json.loads(json.dumps(about))
        self._results: dict[str, object] = {}
        if not path.exists():
            return
        fix = "choose another --out"
        document = serialization.load(path, fix=fix)
        if not isinstance(document, dict) or document.get("about") != self._about:
            raise InputError(
                f"{path}: contains results of different nets, images or settings", fix=fix
            )
        self._results = dict(document.get("results", {}))

    def get(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """Return the recorded result, or compute and record it.

        Args:
            name: Name of the result.
            kind: Type of the result; must be JSON-serializable.
            make: Makes it.
        """
        if name not in self._results:
            self._results[name] = serialization.to_builtins(make())
            document = {"about": self._about, "results": self._results}
            atomic_io.write_text(self._path, json.dumps(document, indent=1) + "\n")
        result: T = serialization.convert(
            self._results[name], kind, at=name, where=str(self._path),
            fix="choose another --out",
        )  # fmt: skip
        return result
