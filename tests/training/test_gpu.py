"""Training on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.loader import DecodeErrors
from rtresnet.data.sources import Arrays, Source
from rtresnet.models import checkpoint, zoo
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import ALONE
from rtresnet.training.loader import TrainLoader
from rtresnet.training.step import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hardware.gpus(), reason="needs an NVIDIA GPU"),
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
    monkeypatch.setattr("rtresnet.training.loop.READ_STEPS", 1)
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


class Photographs:
    """Images of one size that are decoded one by one, as photographs are."""

    def __init__(self, images: Arrays) -> None:
        self.images, self.name, self.labels = images, images.name, images.labels
        self.classes, self.splits = images.classes, images.splits

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        return self.images.image(index)

    def fingerprint(self) -> str:
        return self.images.fingerprint()


@pytest.mark.parametrize("photos", [False, True])
def test_training_steps_never_wait_for_the_gpu(photos: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    arrays = Arrays("noise", images, np.arange(64) % 4, list("abcd"))
    source: Source = Photographs(arrays) if photos else arrays
    recipe = Recipe(
        epochs=3, batch=16, precision="bf16", flip="random", crop="area", colour=0.1, erasing=0.5,
        mixup=0.2, cutmix=1.0, trivial_augment=True, clip=1.0, ema=0.99, label_smoothing=0.1,
    )  # fmt: skip
    feed = TrainLoader(source, np.arange(64), Preprocess.for_size(32), recipe, device="cuda",
                tally=DecodeErrors(64))  # fmt: skip
    net = zoo.build(zoo.spec("resnet8"), 4).to("cuda").to(memory_format=torch.channels_last)
    stepper = Stepper(net, recipe, ALONE, "cuda")
    for epoch in range(2):  # constants are created, and memory allocated, in the first
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")
        try:
            for step, micros in feed.steps(4 * epoch, 4 * epoch + 4):
                stepper.step(micros, recipe.lr_at(step, feed.total))
        finally:
            torch.cuda.set_sync_debug_mode("default")
