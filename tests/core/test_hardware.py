from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rtresnet.core import hardware


def test_a_gpu_is_named_as_builders_name_it() -> None:
    ada = hardware.Gpu(name="L4", capability=(8, 9), memory=1 << 34)
    blackwell = hardware.Gpu(name="B200", capability=(10, 0), memory=1 << 37)
    assert (ada.target, blackwell.target) == ("sm_89", "sm_100")


def test_gpus_are_all_described_or_there_are_none() -> None:
    for gpu in hardware.gpus():
        assert gpu.name
        assert gpu.capability >= (5, 0)
        assert gpu.memory > 1 << 30


class Driver:
    """libcuda with two devices, as ctypes calls it; `uuid_calls` are the functions it has."""

    def __init__(self, *uuid_calls: str) -> None:
        for name in uuid_calls:
            setattr(self, name, self.uuid)

    def uuid(self, out: Any, device: ctypes.c_int) -> int:
        out[:] = bytes(range(15)) + bytes([device.value])
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("cuDeviceGetUuid"):
            raise AttributeError(name)
        return lambda *arguments: 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = 2
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0


@pytest.mark.parametrize(
    ("calls", "first"),
    [
        (("cuDeviceGetUuid_v2", "cuDeviceGetUuid"), "00010203-0405-0607-0809-0a0b0c0d0e00"),
        (("cuDeviceGetUuid",), "00010203-0405-0607-0809-0a0b0c0d0e00"),
        ((), None),
    ],
)
def test_gpus_uuid_is_the_drivers_or_none(
    calls: tuple[str, ...], first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(*calls))
    result = hardware.gpus.__wrapped__()
    assert len(result) == 2 and result[0].uuid == first
    assert first is None or result[1].uuid == f"{first[:-1]}1"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    assert hardware.cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert hardware.cores() == 1
        assert hardware.cpu().endswith(", 1 cores")
    finally:
        os.sched_setaffinity(0, before)


def test_installed_needs_no_import_to_know() -> None:
    assert hardware.installed("numpy")
    assert hardware.installed("importlib.metadata")
    assert not hardware.installed("no_such_module")
    assert not hardware.installed("no_such_parent.child")


def test_the_version_is_that_of_the_first_distribution_there_is() -> None:
    assert hardware.version("no-such-distribution", "numpy") == metadata.version("numpy")
    assert hardware.version("no-such-distribution") is None


def test_versions_leave_out_what_is_not_installed() -> None:
    versions = hardware.versions(["numpy", "no-such-distribution"])
    assert versions == {"python": platform.python_version(), "numpy": metadata.version("numpy")}


def test_available_memory_is_some_of_what_there_is() -> None:
    available = hardware.available_memory()
    if available is not None:
        assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write_group(folder: Path, version: int, limit: object, used: int, cached: int) -> None:
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, used_file, field = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{field} {cached}\n")


@pytest.mark.parametrize("inside", ["", "app"])  # the mount is the container's group, or above it
@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_what_the_control_groups_have_left(
    version: int, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "memory" if version == 1 else tmp_path
    write_group(top, version, 10_000, 9_000, 500)
    write_group(top / inside, version, 5_000, 4_000, 200)
    membership = {1: "5:cpu:/\n4:memory:/app\n", 2: "0::/app\n"}[version]
    own, *others = hardware._free_in_groups(tmp_path, membership)
    assert own == 1_200 and others == ([1_500] if inside else [])
    write_group(top / inside, version, "max", 4_000, 200)
    assert 1_200 not in hardware._free_in_groups(tmp_path, membership)
    write_group(top / inside, version, 5_000, 5_100, 0)
    assert next(hardware._free_in_groups(tmp_path, membership)) == 0
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    used = list(hardware._free_in_groups(tmp_path, Path("/proc/self/cgroup").read_text()))
    if used:  # this process is in a group of that version
        assert hardware.available_memory() == min(used)


def test_the_commit_is_gits_own(tmp_path: Path) -> None:
    """Of a branch, packed or not, of a detached head, of a worktree; None without git."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    here = tmp_path / "checkout"
    (here / "rtresnet" / "core").mkdir(parents=True)
    shutil.copy(hardware.__file__, here / "rtresnet" / "core" / "hardware.py")

    def git(*arguments: str, folder: Path = here) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(folder: Path = here) -> str | None:
        place = folder / "rtresnet" / "core" / "hardware.py"
        spec = importlib.util.spec_from_file_location("m", place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["m"] = module  # its dataclass looks itself up
        spec.loader.exec_module(module)
        result: str | None = module.commit()
        return result

    assert commit() is None
    git("init", "-q", "-b", "main")
    assert commit() is None  # nothing is committed yet
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    git("pack-refs", "--all")
    assert commit() == head
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    git("commit", "-qm", "two", "--allow-empty", folder=tmp_path / "tree")
    assert commit(tmp_path / "tree") == git("rev-parse", "HEAD", folder=tmp_path / "tree") != head
    git("checkout", "-q", "--detach")
    assert commit() == head


def test_cores_in_use_counts_other_processes_and_not_this_one() -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    quiet = min(hardware.cores_in_use() for _ in range(5))
    with subprocess.Popen(spin) as process:
        try:
            time.sleep(0.3)
            loaded = max(hardware.cores_in_use(0.5) for _ in range(5))
        finally:
            process.kill()
    assert 0 <= quiet <= loaded <= hardware.cores()
    assert loaded > 0.2  # a machine with other work gives it less than a core


def test_cores_in_use_is_zero_where_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert hardware.cores_in_use(0.01) == 0
