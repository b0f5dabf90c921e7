"""Inspecting artifacts from Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.serialization import to_builtins
from rtresnet.workflows.inspect import inspect, inspect_folder, inspect_layers
from tests.conftest import as_foreign


@pytest.fixture
def copies(engines: Path, tmp_path: Path) -> Path:
    """A folder with copies of an INT8 file and of its FP32 parent."""
    folder = tmp_path / "copies"
    folder.mkdir()
    for name in ("resnet8.onnx", "resnet8-int8.onnx"):
        for suffix in ("", ".json"):
            shutil.copy(engines / f"{name}{suffix}", folder)
    return folder


def test_inspect_onnx_file_returns_chain_to_the_checkpoint(engines: Path, trained: Path) -> None:
    result = inspect(engines / "resnet8-int8.onnx")
    paths = [entry.path.resolve() for entry in result.chain]
    expected = [engines / "resnet8-int8.onnx", engines / "resnet8.onnx", trained / "best.pt"]
    assert paths == [path.resolve() for path in expected]
    assert {entry.state for entry in result.chain} == {"ok"}
    assert [entry.sidecar.precision for entry in result.chain if entry.sidecar] == [
        "int8", "fp32", "fp32",
    ]  # fmt: skip
    assert result.kind == "onnx" and result.header is None and result.manifest is None
    result.require_unchanged()


def test_inspect_onnx_file_counts_operators(engines: Path) -> None:
    operations = inspect(engines / "resnet8.onnx").operations
    assert operations is not None and operations["Conv"] == 7
    assert list(operations.values()) == sorted(operations.values(), reverse=True)


def test_inspect_result_serializes_paths_and_sidecars(engines: Path) -> None:
    record = to_builtins(inspect(engines / "resnet8.onnx"))
    assert record["kind"] == "onnx"
    assert record["chain"][0]["path"] == str(engines / "resnet8.onnx")
    assert record["chain"][0]["sidecar"]["model"]["architecture"] == "resnet8"


def test_inspect_changed_parent_ends_the_chain(copies: Path) -> None:
    with open(copies / "resnet8.onnx", "ab") as file:
        file.write(b"more")
    result = inspect(copies / "resnet8-int8.onnx")
    assert [entry.state for entry in result.chain] == ["ok", "changed"]
    with pytest.raises(ArtifactError) as caught:
        result.require_unchanged()
    assert caught.value.exit_code == 2 and caught.value.fix


def test_inspect_missing_parent_is_no_error(copies: Path) -> None:
    (copies / "resnet8.onnx").unlink()
    result = inspect(copies / "resnet8-int8.onnx")
    assert [entry.state for entry in result.chain] == ["ok", "missing"]
    result.require_unchanged()


def test_inspect_changed_file_raises_artifact_error(copies: Path) -> None:
    with open(copies / "resnet8.onnx", "ab") as file:
        file.write(b"more")
    with pytest.raises(ArtifactError) as caught:
        inspect(copies / "resnet8.onnx")
    assert caught.value.fix and "rtresnet" in caught.value.fix


def test_inspect_onnx_file_without_sidecar_shows_what_it_says_of_itself(copies: Path) -> None:
    own = inspect(copies / "resnet8.onnx").chain[0].sidecar
    (copies / "resnet8.onnx.json").unlink()
    (entry,) = inspect(copies / "resnet8.onnx").chain
    assert own is not None and entry.sidecar is not None and entry.state != "ok"
    for name in ("model", "input", "precision", "sha256", "bytes"):
        assert getattr(entry.sidecar, name) == getattr(own, name)


def test_inspect_onnx_file_of_another_tool_has_no_record(copies: Path) -> None:
    (copies / "resnet8.onnx.json").unlink()
    (entry,) = inspect(as_foreign(copies / "resnet8.onnx")).chain
    assert (entry.state, entry.sidecar) == ("no sidecar", None)


def test_inspect_foreign_checkpoint_is_recognized_by_its_tensors(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copy(trained / "best.pt", tmp_path / "foreign.pt")
    result = inspect(tmp_path / "foreign.pt")
    (entry,) = result.chain
    assert result.kind == "checkpoint" and entry.state != "ok"
    assert entry.sidecar is not None and entry.sidecar.model.architecture == "resnet8"
    result.require_unchanged()


def test_inspect_unknown_plan_raises_artifact_error(tmp_path: Path) -> None:
    plan = tmp_path / "unknown.plan"
    plan.write_bytes(b"no plan at all" * 10)
    with pytest.raises(ArtifactError):
        inspect(plan)


def test_inspect_missing_or_unknown_file_raises_input_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("a.txt", "a.onnx"):
        with pytest.raises(InputError):
            inspect(tmp_path / name)


def test_inspect_folder_lists_artifacts_with_their_states(copies: Path) -> None:
    (copies / "deeper").mkdir()
    shutil.copy(copies / "resnet8.onnx", copies / "deeper" / "bare.onnx")
    with open(copies / "resnet8.onnx", "ab") as file:
        file.write(b"more")
    result = inspect_folder(copies)
    assert {entry.path.name: (entry.precision, entry.state) for entry in result.artifacts} == {
        "bare.onnx": (None, "no sidecar"),
        "resnet8-int8.onnx": ("int8", "resnet8.onnx changed"),
        "resnet8.onnx": ("fp32", "changed"),
    }
    assert all(entry.bytes == entry.path.stat().st_size for entry in result.artifacts)
    with pytest.raises(ArtifactError) as caught:
        result.require_unchanged()
    assert str(copies / "resnet8.onnx") in str(caught.value.fix)


def test_inspect_folder_reports_a_broken_sidecar(copies: Path) -> None:
    (copies / "resnet8.onnx.json").write_text("{}")
    states = {entry.path.name: entry.state for entry in inspect_folder(copies).artifacts}
    assert states["resnet8.onnx"] == "broken sidecar"


def test_inspect_folder_without_artifacts_raises_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        inspect_folder(tmp_path)


def test_inspect_layers_of_an_onnx_file_raises_input_error(engines: Path) -> None:
    with pytest.raises(InputError) as caught:
        inspect_layers(engines / "resnet8.onnx")
    assert caught.value.fix
