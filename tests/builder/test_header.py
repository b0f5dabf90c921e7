from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rtresnet.builder import header
from rtresnet.builder.targets import RTX_TARGETS
from rtresnet.core.errors import ArtifactError


def head(size: int, mask: int, version: bytes = bytes((1, 7, 1, 116))) -> bytes:
    """64 bytes as TensorRT-RTX 1.7 writes them."""
    data = bytearray(64)
    data[:4] = b"vtrt"
    struct.pack_into("<Q", data, 16, size)
    data[24:28] = version
    struct.pack_into("<Q", data, 32, mask)
    return bytes(data)


def test_a_real_plan_tells_version_targets_and_size(plan: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    found = header.read(plan)
    assert found is not None
    assert found.version == trt.__version__
    assert found.bytes == plan.stat().st_size
    assert set(found.targets) <= set(RTX_TARGETS)
    assert "sm_86" in found.targets


@pytest.mark.parametrize("bit", range(len(RTX_TARGETS)))
def test_each_bit_of_the_mask_is_a_target(bit: int) -> None:
    found = header.parse(head(1000, 1 << bit))
    assert found == header.Header(version="1.7.1.116", targets=(RTX_TARGETS[bit],), bytes=1000)


def test_several_bits_are_several_targets() -> None:
    found = header.parse(head(64, 0b010100, bytes((1, 2, 3, 4))))
    assert found is not None
    assert (found.targets, found.version) == (("sm_86", "sm_120"), "1.2.3.4")


def test_a_whole_file_reads(tmp_path: Path) -> None:
    path = tmp_path / "whole.plan"
    path.write_bytes(head(100, 1) + bytes(36))
    found = header.read(path)
    assert found is not None and found.bytes == 100


@pytest.mark.parametrize("size", [64, 99, 101])
def test_a_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.plan"
    path.write_bytes((head(100, 1) + bytes(100))[:size])
    with pytest.raises(ArtifactError, match=rf"cut\.plan.*{size} of 100 bytes"):
        header.read(path)


@pytest.mark.parametrize("size", [4, 20, 63])
def test_a_plan_cut_within_its_header_is_truncated(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.plan"
    path.write_bytes(head(100, 1)[:size])
    with pytest.raises(ArtifactError, match="truncated"):
        header.read(path)


def test_a_truncated_real_plan_is_refused(plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.plan"
    path.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(ArtifactError, match="truncated") as caught:
        header.read(path)
    assert "again" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"not a plan", b"ftrt" + bytes(200), b"\x08\x08" * 100, b"PK\x03\x04" * 40],
    ids=["text", "tensorrt", "onnx", "zip"],
)
def test_a_file_that_is_no_plan_has_no_header(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.plan"
    path.write_bytes(data)
    assert header.read(path) is None


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.plan"
    path.touch()
    with pytest.raises(ArtifactError, match="empty"):
        header.read(path)
