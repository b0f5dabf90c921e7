from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtresnet.core import locks
from rtresnet.core.errors import InputError
from rtresnet.core.locks import LockedError

HOLDER = """
import sys, time
from pathlib import Path
from rtresnet.core import locks, provenance
provenance.command.set(["rtresnet", "train", "--out", "a b"])
hold = locks.hold_folder if sys.argv[1] == "folder" else locks.hold_file
with hold(Path(sys.argv[2]), warn=print):
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds a lock until it is told to stop."""

    def __init__(self, kind: str, place: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, kind, str(place)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def stop(self) -> None:
        self.process.communicate("", timeout=60)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Holder]:
    """Another process that holds the folder `out`."""
    holder = Holder("folder", tmp_path / "out")
    yield holder
    holder.stop()


def refuse(line: str) -> None:
    raise AssertionError(line)


def test_folder_held_by_another_process_is_refused_and_the_holder_named(
    tmp_path: Path, other: Holder
) -> None:
    out = tmp_path / "out"
    with pytest.raises(LockedError) as caught, locks.hold_folder(out, warn=refuse):
        pass
    assert caught.value.exit_code == 2 and caught.value.fix
    message = caught.value.message
    assert str(out) in message and f"process {other.process.pid}" in message
    assert "rtresnet train --out 'a b'" in message and time.strftime("%Y-") in message
    with pytest.raises(LockedError), locks.hold_file(out / "a.onnx", warn=refuse):
        pass
    assert [entry.name for entry in out.iterdir()] == [locks.FOLDER_LOCK]  # the holder's


def test_folder_is_free_after_its_holder_ended_or_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Holder("folder", out).stop()
    assert not out.exists()
    Holder("folder", out).kill()
    assert (out / locks.FOLDER_LOCK).exists()
    with locks.hold_folder(out, warn=refuse):
        assert str(os.getpid()) in (out / locks.FOLDER_LOCK).read_text()
    assert list(out.iterdir()) == []  # it was there before


def test_file_held_by_another_process_excludes_it_and_its_folder_only(tmp_path: Path) -> None:
    holder = Holder("file", tmp_path / "a.onnx")
    (tmp_path / "link.onnx").symlink_to("a.onnx")
    try:
        for place in ("a.onnx", "link.onnx"):
            with pytest.raises(LockedError), locks.hold_file(tmp_path / place, warn=refuse):
                pass
        with pytest.raises(LockedError), locks.hold_folder(tmp_path, warn=refuse):
            pass
        with locks.hold_file(tmp_path / "b.onnx", warn=refuse):
            pass
    finally:
        holder.stop()
    with locks.hold_folder(tmp_path, warn=refuse):
        pass


def test_lock_removed_by_its_holder_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    lock, original, calls = tmp_path / locks.FOLDER_LOCK, filelock.lock_descriptor, 0

    def late(descriptor: int, *, blocking: bool) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            lock.unlink()
        return original(descriptor, blocking=blocking)

    monkeypatch.setattr(filelock, "lock_descriptor", late)
    with locks.hold_folder(tmp_path, warn=refuse):
        assert calls == 2 and lock.exists()


def test_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, *, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.lock_descriptor", unsupported)
    warned: list[str] = []
    with locks.hold_folder(tmp_path / "out", warn=warned.append) as folder:
        (folder / "a").touch()
    assert len(warned) == 1 and str(folder) in warned[0]
    assert [entry.name for entry in folder.iterdir()] == ["a"]


def test_folder_that_cannot_be_written_into_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError) as caught, locks.hold_folder(tmp_path, warn=refuse):
        pass
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_hold_file_with_wait_takes_the_lock_once_its_holder_ended(tmp_path: Path) -> None:
    holder = Holder("folder", tmp_path)
    with pytest.raises(LockedError), locks.hold_file(tmp_path / "a", warn=refuse, wait=0.1):
        pass
    stopping = threading.Timer(0.2, holder.stop)
    stopping.start()
    with locks.hold_file(tmp_path / "a", warn=refuse, wait=60):
        stopping.join()
