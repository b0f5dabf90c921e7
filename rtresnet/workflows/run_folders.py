"""The folders of runs without --out: runs/MODEL-DATA, numbered from the second run on."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from rtresnet.core import locks
from rtresnet.core.locks import LockedError, Warn

RUNS = Path("runs")


@contextlib.contextmanager
def new_folder(model: str | None, data: str | None, *, warn: Warn) -> Iterator[Path]:
    """Create and lock runs/MODEL-DATA, numbered from the second run on.

    Uses the first number without a run. A folder with only the list of broken images belongs to a
    run that never started, and is used again.

    Args:
        model: Name of the net; None is the default.
        data: The data as on the command line; None is the default.
        warn: See `locks.hold_folder`.

    Raises:
        InputError: The folder cannot be created or written into.
    """
    for folder in _numbered(model, data):
        exists = folder.exists()
        if exists and not _is_unused(folder):
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.hold_folder(folder, warn=warn, exclusive=not exists))
            except (LockedError, FileExistsError):  # another process was faster
                continue
            if _is_unused(folder):  # a run may have finished there since
                yield folder
                return


def latest_folder(model: str | None, data: str | None) -> Path:
    """Return the folder of the latest run: of a net on data, of any net on data, or of all runs.

    If there is none, the folder that the first such run would have.
    """
    if model is None:
        name = "*" if data is None else f"*-{_words(data)}"
        states = [*RUNS.glob(f"{name}/last.pt"), *RUNS.glob(f"{name}-[0-9]*/last.pt")]
        if states:
            return max(states, key=lambda path: path.stat().st_mtime).parent
    folders = _numbered(model, data)
    latest = next(folders)
    for folder in itertools.takewhile(Path.exists, folders):
        latest = folder
    return latest


def _words(data: str | None) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", data or "digits").strip("-")[-40:]


def _numbered(model: str | None, data: str | None) -> Iterator[Path]:
    """Return the folders of a net's runs on data, in order, whether they exist or not."""
    base = RUNS / f"{model or 'resnet20'}-{_words(data)}"
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def _is_unused(folder: Path) -> bool:
    """Return whether no run has left anything in a folder."""
    from rtresnet.training.dataset import BROKEN_LIST

    try:
        return {entry.name for entry in folder.iterdir()} <= {BROKEN_LIST, locks.FOLDER_LOCK}
    except OSError:  # a file, or not readable
        return False
