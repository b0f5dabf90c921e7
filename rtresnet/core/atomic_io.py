"""Write files atomically, hash them, and check that paths can be read or written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from rtresnet.core.errors import ArtifactError, InputError

SETTLED_NS = 100_000_000
"""A file that changed within this time may change again without a new time stamp."""
_DIGESTS: dict[tuple[int, int, int, int, int], str] = {}
NETS = (".onnx", ".plan", ".pt", ".pth", ".th", ".safetensors")


def require_file(path: str | os.PathLike[str], fix: str | None = None) -> Path:
    """Return the path, if it is a readable, non-empty file.

    Raises:
        InputError: There is no such file; `fix` names the command that creates it. For a folder of
            a training run, the fix is its checkpoint.
    """
    path = Path(path)
    if not path.exists():
        if str(path) == "-":
            raise InputError("-: standard input is not supported", fix="name a file")
        raise InputError(f"{path}: no such file", fix=fix)
    if path.is_dir():
        best = path / "best.pt"
        fix = f"use its best checkpoint: {best}" if best.is_file() else fix
        raise InputError(f"{path}: a folder, not a file", fix=fix)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{path}: not a readable file", fix=fix)
    if path.stat().st_size == 0:
        raise ArtifactError(f"{path}: the file is empty", fix=fix)
    return path


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hex digest of a file's bytes; an unchanged file is read once per process."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        times = status.st_mtime_ns, status.st_ctime_ns
        state = (status.st_dev, status.st_ino, status.st_size, *times)
        if state in _DIGESTS:
            return _DIGESTS[state]
        settled = time.time_ns() - max(times) > SETTLED_NS
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if settled:
        _DIGESTS[state] = digest.hexdigest()
    return digest.hexdigest()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder to write into.

    Raises:
        InputError: It cannot be created or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"{path}: cannot create this folder", fix="choose another --out") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable", fix="choose another --out")
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the finished file replaces `path` in one step.

    If the body raises (full disk, Ctrl-C), the temporary file is removed and `path` stays as it
    was. A symbolic link stays; its target is replaced.

    Args:
        path: The file to replace.
        durable: Wait for the disk, so that the file also survives a power failure.

    Raises:
        InputError: The path exists and is not a file.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # write() does not know the file's name on a full disk, and the temporary name tells a
        # person nothing.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require_text_place(path: str | os.PathLike[str]) -> None:
    """Reject a path that no text file can be written to, before the text is computed.

    Raises:
        InputError: The path has the suffix of a net, is a folder, or is in a folder that is not
            writable.
    """
    path = Path(path)
    if path.suffix.lower() in NETS:
        raise InputError(
            f"{path}: has the suffix of a model file, but the output is text",
            fix="choose another name",
        )
    require_place(path)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `final` that takes its place if the body succeeds.

    Raises:
        InputError: The parent folder cannot be created.
    """
    make_folder(final.parent)
    temporary = final.parent / f".{final.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_place(path: str | os.PathLike[str]) -> None:
    """Reject a path that no file can be written to, before its content is computed.

    Raises:
        InputError: The path is a folder, or is in a folder that cannot be created or written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder", fix="name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {folder} is not writable", fix="choose another folder")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically; to a pipe or a device directly.

    Raises:
        InputError: See `require_text_place`.
    """
    path = Path(path)
    if path.is_fifo() or path.is_char_device():  # also /dev/stdout, and what `>(jq .)` names
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    require_text_place(path)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
