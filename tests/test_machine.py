from __future__ import annotations

import os
import platform
from importlib import metadata

import pytest

from rtresnet import machine


def test_a_gpu_is_named_as_builders_name_it() -> None:
    ada = machine.Gpu(name="L4", capability=(8, 9), memory=1 << 34)
    blackwell = machine.Gpu(name="B200", capability=(10, 0), memory=1 << 37)
    assert (ada.target, blackwell.target) == ("sm_89", "sm_100")


def test_gpus_are_all_described_or_there_are_none() -> None:
    for gpu in machine.gpus():
        assert gpu.name
        assert gpu.capability >= (5, 0)
        assert gpu.memory > 1 << 30


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    assert machine.cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cores() == 1
        assert machine.cpu().endswith(", 1 cores")
    finally:
        os.sched_setaffinity(0, before)


def test_installed_needs_no_import_to_know() -> None:
    assert machine.installed("numpy")
    assert machine.installed("importlib.metadata")
    assert not machine.installed("no_such_module")
    assert not machine.installed("no_such_parent.child")


def test_the_version_is_that_of_the_first_distribution_there_is() -> None:
    assert machine.version("no-such-distribution", "numpy") == metadata.version("numpy")
    assert machine.version("no-such-distribution") is None


def test_versions_leave_out_what_is_not_installed() -> None:
    found = machine.versions(["numpy", "no-such-distribution"])
    assert found == {"python": platform.python_version(), "numpy": metadata.version("numpy")}


def test_available_memory_is_some_of_what_there_is() -> None:
    available = machine.available_memory()
    if available is not None:
        assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
