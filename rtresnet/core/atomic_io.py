"""Files on the disk: written whole or not at all, hashed, refused where they cannot be used.

Knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from rtresnet.core.errors import ArtifactError, InputError

SETTLED_NS = 100_000_000
"""A file that changed within this time may change again without a new time stamp."""
_DIGESTS: dict[tuple[int, int, int, int, int], str] = {}
NETS = (".onnx", ".plan", ".pt", ".pth", ".th", ".safetensors")


def require_file(path: str | os.PathLike[str], fix: str | None = None) -> Path:
    """The path, if it is a readable, non-empty file.

    Raises:
        InputError: It is not; `fix` says what makes it.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file", fix=fix)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{path}: not a readable file", fix=fix)
    if path.stat().st_size == 0:
        raise ArtifactError(f"{path}: the file is empty", fix=fix)
    return path


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes. A process reads a file once, as long as it does not change."""
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
    """Makes a folder to write into.

    Raises:
        InputError: It cannot be made, or not be written into.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"{path}: cannot be made a folder", fix="choose another --out") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable", fix="choose another --out")
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path next to `path`; the finished file replaces `path` in one step.

    Nothing is left behind when the body raises (a full disk, Ctrl-C), and what stood at `path`
    before stays as it was. A link stays one, and the file it names is replaced.

    Args:
        path: What is replaced.
        durable: Holds when the power fails too, at the price of waiting for the disk.

    Raises:
        InputError: Something stands there that is no file.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file, and nothing that one could replace")
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A full disk is met by write(), which does not know the file's name; nor is the temporary
        # one anything to a person.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require_text_place(path: str | os.PathLike[str]) -> None:
    """Refuses what no text can be written to, before there is any.

    Raises:
        InputError: The name of a net, whose end that would be; a folder; or one that is not there
            and cannot be written into.
    """
    path = Path(path)
    if path.suffix.lower() in NETS:
        raise InputError(f"{path}: the name of a net, and this is text", fix="choose another name")
    require_place(path)


def require_place(path: str | os.PathLike[str]) -> None:
    """Refuses a path that no file can be written to, before what is to be in it is computed.

    Raises:
        InputError: A folder, or in one that cannot be written into or made.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder", fix="name a file in it")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {there} cannot be written into", fix="choose another place")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically; into a pipe or a device as it is.

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
