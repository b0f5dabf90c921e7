"""The images that a run holds out of a data set without test images.

A run writes their indices into its folder, as split.json. The data set `run:DIR` opens them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import DataError

SPLIT_FILE = "split.json"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How a run split its images.

    Attributes:
        data: The data set, as the run names it.
        fingerprint: Of all its images; see `Source.fingerprint`.
        train: Number of training images.
        val: Indices of the images that select the epoch.
        test: Indices of the images that the run is tested on.
    """

    data: str
    fingerprint: str
    train: int
    val: list[int]
    test: list[int]

    def write(self, folder: Path) -> None:
        """Write split.json into a run's folder."""
        text = json.dumps(dataclasses.asdict(self)) + "\n"
        atomic_io.write_text(folder / SPLIT_FILE, text)


def read_held_out(folder: Path) -> HeldOut | None:
    """Read split.json of a run's folder; None if there is none. Raises DataError."""
    path = folder / SPLIT_FILE
    if not path.is_file():
        return None
    record = serialization.load(path, error=DataError)
    return serialization.convert(record, HeldOut, where=str(path), error=DataError)
