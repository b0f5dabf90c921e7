from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import rtresnet
from rtresnet.builder.targets import RTX_TARGETS
from rtresnet.core import artifacts, plan_info
from rtresnet.core.errors import ArtifactError, UnavailableError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Link, Model, Plan, Profile, Sidecar, Weights


def head(size: int, mask: int, version: bytes = bytes((1, 7, 1, 116))) -> bytes:
    """Return 64 bytes as TensorRT-RTX 1.7 writes them."""
    data = bytearray(64)
    data[:4] = b"vtrt"
    struct.pack_into("<Q", data, 16, size)
    data[24:28] = version
    struct.pack_into("<Q", data, 32, mask)
    return bytes(data)


def test_read_header_of_a_real_plan_has_version_targets_and_size(plan: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    header = plan_info.read_header(plan)
    assert header is not None
    assert header.version == trt.__version__
    assert header.bytes == plan.stat().st_size
    assert set(header.targets) <= set(RTX_TARGETS)
    assert "sm_86" in header.targets


@pytest.mark.parametrize("bit", range(len(RTX_TARGETS)))
def test_parse_header_each_bit_of_the_mask_is_a_target(bit: int) -> None:
    header = plan_info.parse_header(head(1000, 1 << bit))
    assert header == plan_info.Header(version="1.7.1.116", targets=(RTX_TARGETS[bit],), bytes=1000)


def test_parse_header_several_bits_are_several_targets() -> None:
    header = plan_info.parse_header(head(64, 0b010100, bytes((1, 2, 3, 4))))
    assert header is not None
    assert (header.targets, header.version) == (("sm_86", "sm_120"), "1.2.3.4")


def test_read_header_of_a_complete_file_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "whole.plan"
    path.write_bytes(head(100, 1) + bytes(36))
    header = plan_info.read_header(path)
    assert header is not None and header.bytes == 100


@pytest.mark.parametrize("size", [64, 99, 101])
def test_read_header_of_a_file_of_another_size_is_an_artifact_error(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "cut.plan"
    path.write_bytes((head(100, 1) + bytes(100))[:size])
    with pytest.raises(ArtifactError, match=rf"cut\.plan.*{size} of 100 bytes"):
        plan_info.read_header(path)


@pytest.mark.parametrize("size", [4, 20, 63])
def test_read_header_of_a_cut_header_is_an_artifact_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.plan"
    path.write_bytes(head(100, 1)[:size])
    with pytest.raises(ArtifactError, match="truncated"):
        plan_info.read_header(path)


def test_read_header_of_a_truncated_real_plan_is_an_artifact_error(
    plan: Path, tmp_path: Path
) -> None:
    path = tmp_path / "half.plan"
    path.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(ArtifactError, match="truncated") as caught:
        plan_info.read_header(path)
    assert "again" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"not a plan", b"ftrt" + bytes(200), b"\x08\x08" * 100, b"PK\x03\x04" * 40],
    ids=["text", "tensorrt", "onnx", "zip"],
)
def test_read_header_of_another_file_is_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.plan"
    path.write_bytes(data)
    assert plan_info.read_header(path) is None


def test_read_header_of_an_empty_file_is_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.plan"
    path.touch()
    with pytest.raises(ArtifactError, match="empty"):
        plan_info.read_header(path)


def planned(classes: tuple[str, ...], **changes: object) -> Sidecar:
    """Return a plan's sidecar as the builder has it before the build."""
    return Sidecar(
        kind="plan",
        file="net.plan",
        model=Model(
            architecture="resnet18", classes=classes, shortcut="B", stride_in="3x3"
        ),
        input=Preprocess(
            size=224, resize=256, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation="bicubic"
        ),
        weights=Weights(origin="trained", sha256="1" * 64, source="runs/a/best.pt"),
        precision="int8",
        parent=Link(file="../x/net.onnx", sha256="2" * 64),
        plan=Plan(
            builder="tensorrt_rtx", version="1.7.1", targets=(), seconds=0.0, tf32=True,
            profiles=(Profile(min=1, opt=8, max=32),),
        ),
        **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def in_a_file(text: str, folder: Path) -> plan_info.NameField:
    path = folder / "net.plan"
    path.write_bytes(b"\0engine\0" + text.encode() + b"\0more" * 1000)
    name = plan_info.read_name_field(path)
    assert name is not None
    return name


@pytest.mark.parametrize(
    "classes",
    [("cat", "dog"), ("é", '"', "\\"), tuple(f"{i * 7919:x} name of a class" for i in range(320))],
    ids=["few", "odd characters", "compressed"],
)
def test_name_field_keeps_everything_that_an_evaluation_needs(
    classes: tuple[str, ...], tmp_path: Path
) -> None:
    sidecar = planned(classes)
    text = plan_info.name_field(sidecar)
    assert len(text.encode()) <= plan_info.NAME_LIMIT
    name = in_a_file(text, tmp_path)
    assert (name.model, name.precision, name.input) == ("resnet18", "int8", 224)
    assert (name.batches, name.onnx, name.classes) == (("1:8:32",), "2" * 16, len(classes))
    result = name.sidecar
    assert result is not None
    assert (result.model, result.input, result.plan) == (sidecar.model, sidecar.input, sidecar.plan)
    assert (result.precision, result.assumed) == ("int8", ())
    assert result.parent == Link(file="net.onnx", sha256="2" * 64), "folder names stay private"


def test_name_field_numbers_the_classes_whose_names_do_not_fit(tmp_path: Path) -> None:
    rng = random.Random(0)
    classes = tuple(f"{rng.getrandbits(64):x}" for _ in range(1000))
    text = plan_info.name_field(planned(classes))
    assert len(text.encode()) <= plan_info.NAME_LIMIT
    result = in_a_file(text, tmp_path).sidecar
    assert result is not None
    assert result.model.classes == tuple(map(str, range(1000)))
    assert result.assumed == (plan_info.NAMES_LEFT_OUT,)
    assert result.input == planned(classes).input


def test_name_field_of_an_earlier_version_is_read_without_a_sidecar(tmp_path: Path) -> None:
    text = (
        '{"rtresnet":"0.1.0","model":"resnet8","precision":"int8","input":32,"classes":10,'
        '"batches":["1:4:8"],"weights":"untrained","onnx":"0123456789abcdef"}'
    )
    name = in_a_file(text, tmp_path)
    assert (name.model, name.classes, name.sidecar) == ("resnet8", 10, None)
    assert plan_info.described(tmp_path / "net.plan") is None


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        '{"rtresnet":"0.1',
        '{"rtresnet":[]}',
        '{"rtresnet":"0.1.0","model":7}',
        plan_info.name_field(planned(("a", "b"))).replace('"schema":1', '"schema":9'),
        plan_info.name_field(planned(tuple(f"{i * 7919:x} name of a class" for i in range(320))))
        .replace('"classes":320', '"classes":321'),
    ],
    ids=["none", "cut", "types", "missing", "schema", "another number of classes"],
)  # fmt: skip
def test_read_name_field_of_damaged_text_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    path.write_bytes(b"\xff\xfe" + text.encode() + b"\xff\xfe")
    assert plan_info.read_name_field(path) is None


def test_a_real_plan_without_its_sidecar_describes_itself(plan: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.plan"
    moved.write_bytes(plan.read_bytes())
    reference, result = artifacts.read_sidecar(plan), plan_info.described(moved)
    assert reference is not None and result is not None and reference.plan is not None
    for name in ("kind", "model", "input", "weights", "precision", "topk", "assumed", "sha256"):
        assert getattr(result, name) == getattr(reference, name), name
    assert result.plan is not None and result.parent is not None and reference.parent is not None
    for name in ("builder", "version", "targets", "profiles", "tf32"):
        assert getattr(result.plan, name) == getattr(reference.plan, name), name
    assert result.parent.sha256 == reference.parent.sha256
    assert (result.file, result.bytes) == ("moved.plan", moved.stat().st_size)


def test_inspect_of_a_real_plan_without_its_sidecar_shows_its_description(
    plan: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.plan"
    moved.write_bytes(plan.read_bytes())
    (entry,) = rtresnet.inspect(moved).chain
    assert entry.sidecar is not None and entry.sidecar.model.architecture == "resnet8"
    assert "no sidecar" in entry.state


def test_load_of_a_real_plan_without_its_sidecar_checks_its_description(
    plan: Path, tmp_path: Path, without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the checks run, and the error names the ONNX file."""
    moved = tmp_path / "moved.plan"
    moved.write_bytes(plan.read_bytes())
    with pytest.raises(UnavailableError) as caught:
        rtresnet.load(moved)
    assert caught.value.fix is not None and "resnet8-int8.onnx" in caught.value.fix
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(trt, "__version__", "9.9")
    with pytest.raises(ArtifactError, match=r"9\.9"):
        rtresnet.load(moved)
