"""Locks on output folders and files, so that two processes never write to the same place.

A folder's lock excludes every other writer in it; locks on different files of a folder exclude each
other only if the file is the same. A lock is a separate file, locked by the operating
system: it ends with its process. The file names its owner and is removed with the lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from rtresnet.core import atomic_io, provenance
from rtresnet.core.errors import InputError

FOLDER_LOCK = ".rtresnet.lock"
# Errors of flock on file systems without locks, such as some network file systems.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_RETRY = 0.05  # seconds
Warn = Callable[[str], None]


class LockedError(InputError):
    """Another process writes to the same place."""


@contextlib.contextmanager
def hold_folder(
    path: str | os.PathLike[str], *, warn: Warn, exclusive: bool = False
) -> Iterator[Path]:
    """Create a folder and prevent every other process from writing into it.

    On leaving, a folder that was created here and is still empty is removed again.

    Args:
        path: The folder.
        warn: Called with a line if the file system has no locks; the folder is then used without.
        exclusive: Whether the folder must be new.

    Yields:
        The folder.

    Raises:
        FileExistsError: `exclusive` is set, and the folder exists.
        InputError: The folder cannot be created or written into.
        LockedError: Another process writes into it, or a file in it.
    """
    path = Path(path)
    with _hold(path / FOLDER_LOCK, path, warn, exclusive=exclusive):
        for other in path.glob(".*.lock"):
            if other.name != FOLDER_LOCK:
                _refuse_if_held(other, path)
        yield path


@contextlib.contextmanager
def hold_file(path: str | os.PathLike[str], *, warn: Warn, wait: float = 0.0) -> Iterator[Path]:
    """Prevent every other process from writing a file, or into its complete folder.

    Args:
        path: The file; its folder is created, and removed again if it stays empty.
        warn: As in `hold_folder`.
        wait: Seconds to wait for another process that writes there.

    Yields:
        The file.

    Raises:
        InputError: The file cannot be written there.
        LockedError: Another process writes the file, or into its folder.
    """
    path = Path(path)
    atomic_io.require_place(path)
    # A link's file is what is replaced; see `atomic_io.atomic_path`.
    file = path.resolve() if path.is_symlink() else path
    deadline = time.monotonic() + wait
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(_hold_file_lock(file, path, warn))
                break
            except LockedError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY)
        yield path


@contextlib.contextmanager
def _hold_file_lock(file: Path, place: Path, warn: Warn) -> Iterator[None]:
    with _hold(file.with_name(f".{file.name}.lock"), place, warn):
        # Both take their own lock before they check the other's, so at most one continues.
        _refuse_if_held(file.with_name(FOLDER_LOCK), place.parent)
        yield


@contextlib.contextmanager
def _hold(lock: Path, place: Path, warn: Warn, *, exclusive: bool = False) -> Iterator[None]:
    folder = lock.parent
    created = [entry for entry in (folder, *folder.parents) if not entry.exists()]
    if exclusive:
        atomic_io.make_folder(folder.parent)
        folder.mkdir()
    descriptor: int | None = None
    try:
        descriptor = _acquire(lock, place)
        if descriptor is None:
            warn(
                f"{place}: this file system has no locks; make sure that no other process "
                "writes there"
            )
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)  # before it is given up: another may lock it then
            os.close(descriptor)
        for entry in created:
            try:
                entry.rmdir()
            except OSError:  # something is in it
                break


def _acquire(lock: Path, place: Path) -> int | None:
    """Return the descriptor that holds the lock; None if the file system has no locks."""
    from filelock import lock_descriptor

    while True:
        atomic_io.make_folder(lock.parent)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder was removed by the process that had created it
            continue
        except PermissionError:
            raise InputError(
                f"{place}: its lock {lock} cannot be written",
                fix=f"remove {lock} if no other rtresnet is running there, or choose another --out",
            ) from None
        try:
            if not lock_descriptor(descriptor, blocking=False):
                raise _locked(lock, place)
            if _is_at(descriptor, lock):
                with contextlib.suppress(OSError):  # a full disk: held, but without a name
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_own_record()).encode(), 0)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            lock.unlink(missing_ok=True)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between opening and locking


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _refuse_if_held(lock: Path, place: Path) -> None:
    """Raise LockedError where another process holds `lock`."""
    from filelock import lock_descriptor

    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # it does not exist or cannot be read
        return
    try:
        if not lock_descriptor(descriptor, blocking=False):
            raise _locked(lock, place)
    except LockedError:
        raise
    except OSError:  # a file system without locks
        return
    finally:
        os.close(descriptor)


def _own_record() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "command": provenance.command_line(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "host": socket.gethostname(),
    }


def _locked(lock: Path, place: Path) -> LockedError:
    """Return the error that names the holder."""
    try:
        record = json.loads(lock.read_text(encoding="utf-8"))
        where = "" if record["host"] == socket.gethostname() else f" on {record['host']}"
        holder = (
            f"process {record['pid']}{where} has been writing there since {record['since']} "
            f"({record['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has not said so yet
        holder = "another process is writing there"
    return LockedError(f"{place}: {holder}", fix="wait until it has ended, or choose another --out")
