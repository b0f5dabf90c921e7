"""The folder of a run: which one is meant, created for this process alone, locked while it runs."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from rtresnet.core import locks
from rtresnet.core.locks import LockedError, Warn
from rtresnet.training.dataset import BROKEN_LIST

RUNS = Path("runs")


@contextlib.contextmanager
def new(model: str | None, data: str | None, *, warn: Warn) -> Iterator[Path]:
    """Creates and locks runs/MODEL-DATA, numbered from the second run on.

    The number is the first that no run has. A folder in which there is only the list of broken
    images is of a run that never began, and is used again.

    Args:
        model: Name of the net; None is the default one.
        data: The data as on the command line; None is the default one.
        warn: See `locks.hold_folder`.

    Raises:
        InputError: The folder cannot be created or written into.
    """
    base = _default(model, data)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        exists = folder.exists()
        if exists and not _is_unused(folder):
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.hold_folder(folder, warn=warn, exclusive=not exists))
            except (LockedError, FileExistsError):  # another process was faster
                continue
            if _is_unused(folder):  # a run may have ended there since
                yield folder
                return


def latest(model: str | None, data: str | None) -> Path:
    """The folder of the latest run of a net on data; without either, of all runs.

    Returns:
        The folder, or the one that the first such run would have.
    """
    if model is None and data is None:
        states = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
        if states:
            return states[-1].parent
    folder = base = _default(model, data)
    for number in itertools.count(2):
        following = base.with_name(f"{base.name}-{number}")
        if not following.exists():
            break
        folder = following
    return folder


def _default(model: str | None, data: str | None) -> Path:
    model, data = model or "resnet20", data or "digits"
    return RUNS / f"{model}-{re.sub(r'[^A-Za-z0-9]+', '-', data).strip('-')[-40:]}"


def _is_unused(folder: Path) -> bool:
    """Whether no run has left anything in a folder."""
    try:
        return {entry.name for entry in folder.iterdir()} <= {BROKEN_LIST, locks.FOLDER_LOCK}
    except OSError:  # a file, or not readable
        return False
