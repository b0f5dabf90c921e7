"""Training on a GPU: `pytest -m gpu` where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtresnet import machine
from rtresnet.cli.main import main
from rtresnet.models import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not machine.gpus(), reason="needs an NVIDIA GPU"),
]


def run(data: str, out: Path, *more: str) -> int:
    return main(["train", "--model", "resnet8", "--data", data, "--device", "cuda", "--out",
                 str(out), *more])  # fmt: skip


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", ["speed", "modern"])
def test_every_recipe_and_precision_learns(
    tints: str, tmp_path: Path, precision: str, recipe: str
) -> None:
    out = tmp_path / "run"
    assert run(tints, out, "--recipe", recipe, "--epochs", "8",
               "--set", f"precision={precision}") == 0  # fmt: skip
    best = checkpoint.load(out / "best.pt")
    assert best.measured["test_top1"] > 80
    assert all(tensor.device.type == "cpu" for tensor in best.state.values())


def test_a_resumed_run_ends_as_the_unbroken_one(
    tints: str, tmp_path: Path, interrupt_in: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("rtresnet.train.loop.READ_STEPS", 1)
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    assert run(tints, unbroken, "--epochs", "3", "--save-every", "0") == 0
    interrupt_in(9)
    assert run(tints, out, "--epochs", "3", "--save-every", "0") == 130
    assert main(["train", "--out", str(out), "--resume", "--device", "cuda"]) == 0
    ours, theirs = (checkpoint.load(path / "last.pt") for path in (out, unbroken))
    assert ours.training["step"] == theirs.training["step"] == 18
    for name, tensor in ours.state.items():  # cuDNN's sums are not in a fixed order
        assert torch.allclose(tensor.float(), theirs.state[name].float(), atol=0.05), name


def test_a_compiled_run_learns(tints: str, tmp_path: Path) -> None:
    assert run(tints, tmp_path / "run", "--epochs", "8", "--compile") == 0
    assert checkpoint.load(tmp_path / "run" / "best.pt").measured["test_top1"] > 80


def test_losses_that_are_not_finite_are_told_with_their_step(
    tints: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = checkpoint.load(trained / "best.pt")
    huge.state["fc.weight"].fill_(3e38)
    checkpoint.save(tmp_path / "huge.pt", huge)
    assert run(tints, tmp_path / "run", "--weights", str(tmp_path / "huge.pt")) == 1
    assert "at step 0" in capsys.readouterr().err
