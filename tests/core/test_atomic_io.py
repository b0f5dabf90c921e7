from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from rtresnet.core import atomic_io
from rtresnet.core.atomic_io import atomic_path, write_text
from rtresnet.core.errors import InputError


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom((2 << 20) + 17)
    path = tmp_path / "large"
    path.write_bytes(content)
    assert atomic_io.sha256(path) == hashlib.sha256(content).hexdigest()


def test_sha256_reads_an_unchanged_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"first")
    monkeypatch.setattr(atomic_io, "SETTLED_NS", -1)  # as if it had been written long ago
    digest = atomic_io.sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "sha256", None)  # hashing again would fail
        assert atomic_io.sha256(path) == digest
    status = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a copy that keeps the time
    assert atomic_io.sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_sha256_of_a_file_that_was_just_written_is_never_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for number in range(200):
        content = number.to_bytes(4, "big")
        with open(path, "wb" if not number else "r+b") as file:
            file.write(content)
        assert atomic_io.sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_finished_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "old")
    write_text(path, "new: été\n")
    assert path.read_bytes() == "new: été\n".encode()
    assert names_in(path.parent) == ["a.txt"]


def test_the_temporary_file_is_beside_the_target_and_the_target_untouched_meanwhile(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, SystemExit])
def test_whatever_interrupts_a_write_the_old_file_stays_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_an_interrupted_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(small_disk: Path) -> None:
    path = small_disk / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as caught, atomic_path(path) as temporary:
        temporary.write_bytes(bytes(200_000))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert names_in(small_disk) == ["a.bin"]


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    atomic_io.write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_a_pipe_is_written_through_and_stays_one(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    atomic_io.write_text(pipe, "text")
    reader.join(30)
    assert read == ["text"] and pipe.is_fifo()
    with pytest.raises(InputError, match="not a file"), atomic_io.atomic_path(pipe):
        raise AssertionError("it would have been replaced")


def test_a_device_is_never_replaced() -> None:
    before = Path(os.devnull).stat()
    atomic_io.write_text(os.devnull, "text")
    with pytest.raises(InputError, match="not a file"), atomic_io.atomic_path(os.devnull):
        raise AssertionError("it would have been replaced")
    assert Path(os.devnull).stat().st_rdev == before.st_rdev


@pytest.mark.parametrize("name", ["net.onnx", "NET.ONNX", "net.plan", "best.pt", "a.pth", "b.th"])
def test_text_never_takes_the_place_of_a_net(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(InputError, match="the suffix of a model"):
        atomic_io.write_text(tmp_path / name, "{}")
    assert (tmp_path / name).read_bytes() == b"weights"


def test_require_file_standard_input_is_refused_with_a_fix() -> None:
    with pytest.raises(InputError, match="standard input") as caught:
        atomic_io.require_file("-")
    assert caught.value.fix is not None and "no such file" not in caught.value.message
