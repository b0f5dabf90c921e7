"""Weights as safetensors files, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core import locks
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.locks import LockedError
from rtresnet.models import checkpoint
from rtresnet.workflows.evaluate import evaluate
from rtresnet.workflows.weights import export_weights, import_weights

safetensors = pytest.importorskip("safetensors")


def test_export_and_import_keep_everything_but_the_training(trained: Path, tmp_path: Path) -> None:
    result = export_weights(trained / "best.pt", tmp_path / "net.safetensors")
    assert (result.model, result.classes) == ("resnet8", 4)
    first, second = checkpoint.load(trained / "best.pt"), checkpoint.load(result.path)
    assert second.model == first.model and second.input == first.input
    assert second.measured == first.measured and second.training == {}
    assert second.weights.origin == "trained" and second.assumed == ()
    back = import_weights(result.path, tmp_path / "net.pt")
    third = checkpoint.load(back.path)
    for loaded in (second, third):
        assert loaded.state.keys() == first.state.keys()
        for name, tensor in first.state.items():
            assert torch.equal(loaded.state[name], tensor), name


def test_exported_file_is_read_by_the_library_alone_and_has_no_pickle(
    trained: Path, tmp_path: Path
) -> None:
    path = export_weights(trained / "best.pt", tmp_path / "net.safetensors").path
    with safetensors.safe_open(path, framework="numpy") as file:
        assert "layer1.0.conv1.weight" in set(file.keys())
        assert json.loads(file.metadata()["rtresnet"])["model"]["architecture"] == "resnet8"


def test_exported_file_evaluates_and_exports_as_the_checkpoint(
    trained: Path, tints: str, tmp_path: Path
) -> None:
    path = export_weights(trained / "best.pt", tmp_path / "net.safetensors").path
    assert evaluate(path, tints).top1 == evaluate(trained / "best.pt", tints).top1
    out = str(tmp_path / "engines")
    assert main(["export", "--weights", str(path), "--fp32", "--no-plan", "--out", out]) == 0


def test_import_of_weights_from_another_tool_states_what_is_assumed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.load(trained / "best.pt").state
    state = {name: tensor.contiguous() for name, tensor in saved.items()}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "theirs.safetensors")
    arguments = [str(tmp_path / "theirs.safetensors"), "--out", str(tmp_path / "ours.pt")]
    assert main(["weights", "import", *arguments]) == 0
    printed = capsys.readouterr()
    assert "resnet8" in printed.out and "Assumed" in printed.out + printed.err
    assert checkpoint.load(tmp_path / "ours.pt").spec.name == "resnet8"


@pytest.mark.parametrize("damage", ["[]", "{", '{"rtresnet": 99}', '{"rtresnet": 1}'])
def test_safetensors_with_broken_metadata_is_refused(
    damage: str, trained: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    saved = checkpoint.load(trained / "best.pt").state
    state = {name: tensor.contiguous() for name, tensor in saved.items()}
    save_file(state, tmp_path / "net.safetensors", {"rtresnet": damage})
    with pytest.raises(ArtifactError):
        checkpoint.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize("out", ["net.pt", "net"])
def test_export_weights_other_suffix_is_refused(out: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.safetensors"):
        export_weights(trained / "best.pt", tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_export_next_to_other_work_in_the_folder_is_not_refused(
    trained: Path, tmp_path: Path
) -> None:
    """Only the file is locked: another conversion may write next to it."""
    with locks.hold_file(tmp_path / "other.safetensors", warn=print):
        export_weights(trained / "best.pt", tmp_path / "net.safetensors")
    with locks.hold_file(tmp_path / "net.safetensors", warn=print), pytest.raises(LockedError):
        export_weights(trained / "best.pt", tmp_path / "net.safetensors")
