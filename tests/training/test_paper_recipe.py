"""Parts of the paper's recipes: mean image, warm-up by error, plateau; stochastic depth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.data import loader
from rtresnet.data.sources import open_source
from rtresnet.models import checkpoint, zoo
from rtresnet.training import loop
from rtresnet.training.config import Recipe
from rtresnet.training.loader import split
from rtresnet.training.step import StochasticDepth


def train(data: str, out: Path, *more: str, epochs: int = 2) -> int:
    return main(
        ["train", "--model", "resnet8", "--data", data, "--epochs", str(epochs), "--out", str(out),
         "--set", "precision=fp32", *more]
    )  # fmt: skip


def rates(out: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = (checkpoint.load(out / "last.pt").state for out in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def with_mean_image(tmp_path_factory: pytest.TempPathFactory, tints_path: str) -> Path:
    out = tmp_path_factory.mktemp("mean") / "run"
    assert train(tints_path, out, "--recipe", "paper-cifar") == 0
    return out


@pytest.fixture(scope="module")
def tints_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 4
    images = rng.integers(0, 60, (240, 32, 32, 3)) + 40 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("data") / "tints.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return f"npz:{path}"


def test_mean_image_is_that_of_the_training_images(with_mean_image: Path, tints_path: str) -> None:
    best = checkpoint.load(with_mean_image / "best.pt")
    source = open_source(tints_path, "train")
    chosen = split(source, Recipe(**best.training["recipe"])).train
    images = np.concatenate([x for x, _ in loader.batches(source, best.input, 64, indices=chosen)])
    expected = images.astype(np.float64).mean(0)
    np.testing.assert_allclose(best.state[checkpoint.MEAN_IMAGE].numpy(), expected, atol=1e-6)


def test_mean_image_is_in_the_export_and_its_int8_file(
    with_mean_image: Path, tints_path: str, tmp_path: Path
) -> None:
    best, out = str(with_mean_image / "best.pt"), tmp_path / "a.onnx"
    assert main(["export", "--weights", best, "--out", str(out)]) == 0
    from rtresnet.workflows.loading import load

    inputs = np.random.default_rng(1).normal(0, 1, (4, 3, 32, 32)).astype(np.float32)
    with load(best) as torch_net, load(str(out)) as exported:
        np.testing.assert_allclose(
            exported.backend.infer(inputs), torch_net.backend.infer(inputs), rtol=1e-3, atol=1e-4
        )
    int8 = tmp_path / "a.int8.onnx"
    assert main(["quantize", str(out), "--calib", tints_path, "--out", str(int8)]) == 0
    assert main(["lint", str(int8)]) == 0


def test_mean_image_dense_test_and_other_sizes_are_refused(
    with_mean_image: Path, tints_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(with_mean_image / "best.pt")
    assert main(["eval", best, "--data", tints_path, "--protocol", "dense"]) == 2
    assert "mean image" in capsys.readouterr().err
    arguments = ("--recipe", "speed", "--weights", best)
    assert train(tints_path, tmp_path / "run", *arguments) == 2
    assert "--set progressive=" in capsys.readouterr().err
    assert train(tints_path, tmp_path / "run", "--weights", best, epochs=1) == 0
    tuned = checkpoint.load(tmp_path / "run" / "best.pt")
    before = checkpoint.load(best).state[checkpoint.MEAN_IMAGE]
    assert torch.equal(tuned.state[checkpoint.MEAN_IMAGE], before)


@pytest.mark.parametrize(
    "settings",
    [
        ("--recipe", "paper-cifar", "--set", "warmup_until=80"),
        ("--set", "stochastic_depth=0.5"),
    ],
)
def test_train_stopped_and_resumed_equals_the_unbroken_run(
    settings: tuple[str, ...],
    tints_path: str,
    tmp_path: Path,
    interrupt_in: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "WARMUP_STEPS", 3)
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    assert train(tints_path, unbroken, *settings) == 0
    interrupt_in(2)
    assert train(tints_path, out, *settings) == 130
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert_same_weights(out, unbroken)


def test_warmup_until_the_error_falls_then_the_rate_rises(
    tints_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "WARMUP_STEPS", 2)
    never, soon = tmp_path / "never", tmp_path / "soon"
    settings = ("--recipe", "paper-cifar", "--lr", "0.1", "--set")
    assert train(tints_path, never, *settings, "warmup_until=0.0001") == 0
    assert rates(never) == pytest.approx([0.01, 0.01])
    assert train(tints_path, soon, *settings, "warmup_until=100", "--set", "milestones=1") == 0
    assert rates(soon) == pytest.approx([0.1, 0.1])
    assert checkpoint.load(soon / "last.pt").training["warmup"][0] == 2


def test_plateau_lowers_the_rate_in_a_run(tints_path: str, tmp_path: Path) -> None:
    settings = ("--lr", "1e-9", "--set", "schedule=plateau", "--set", "plateau_epochs=1")
    recipe = ("--recipe", "paper-cifar")
    assert train(tints_path, tmp_path / "run", *recipe, *settings, epochs=3) == 0
    first, second, third = rates(tmp_path / "run")
    assert first == second == pytest.approx(1e-9) and third == pytest.approx(1e-10)


def test_stochastic_depth_leaves_out_later_blocks_more_often_and_keeps_the_mean() -> None:
    net = zoo.build(zoo.spec("resnet20"), 3)
    depth = StochasticDepth(net, Recipe(epochs=1, stochastic_depth=0.5, seed=1))
    dropped, scaled = np.zeros(9), np.zeros(9)
    for step in range(2000):
        with depth.drawn(step):
            dropped += [block.dropped for block in depth.blocks]
            scaled += [0 if block.dropped else block.scale for block in depth.blocks]
    np.testing.assert_allclose(dropped / 2000, 0.5 * np.arange(1, 10) / 9, atol=0.04)
    np.testing.assert_allclose(scaled / 2000, 1, atol=0.06)
    assert not any(block.dropped or block.scale != 1 for block in depth.blocks)


def test_stochastic_depth_dropped_blocks_get_no_gradient() -> None:
    net = zoo.build(zoo.spec("resnet8"), 3)
    depth = StochasticDepth(net, Recipe(epochs=1, stochastic_depth=0.9))
    for step in range(20):
        net.zero_grad(set_to_none=True)
        with depth.drawn(step):
            left_out = [block.dropped for block in depth.blocks]
            net(torch.randn(2, 3, 16, 16)).sum().backward()
        assert [block.conv1.weight.grad is None for block in net.blocks().values()] == left_out


def test_stochastic_depth_plain_net_is_refused(
    tints_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--model", "plain8", "--set", "stochastic_depth=0.5")
    assert train(tints_path, tmp_path / "run", *settings) == 2
    assert "no shortcuts" in capsys.readouterr().err


@pytest.mark.slow
def test_1202_layers_train_a_step_export_quantize_and_build(
    tints_path: str, tmp_path: Path
) -> None:
    run, fp32, int8 = tmp_path / "run", tmp_path / "a.onnx", tmp_path / "a.int8.onnx"
    # After one step the moving averages overflow, so batch norm's statistics are recomputed.
    settings = ("--recipe", "paper-cifar", "--batch", "4", "--set", "steps=1",
                "--set", "bn_images=16")  # fmt: skip
    arguments = ["train", "--model", "resnet1202", "--data", tints_path, "--out", str(run)]
    assert main([*arguments, *settings, "--set", "stochastic_depth=0.5"]) == 0
    assert main(["export", "--weights", str(run / "best.pt"), "--out", str(fp32)]) == 0
    assert main(["quantize", str(fp32), "--calib", tints_path, "--calib-images", "8",
                 "--out", str(int8)]) == 0  # fmt: skip
    pytest.importorskip("tensorrt_rtx")
    assert main(["build", str(int8), "--out", str(tmp_path / "a.plan")]) == 0
    assert (tmp_path / "a.plan").stat().st_size > 10_000_000


def test_a_recipe_that_does_not_fit_the_net_leaves_nothing(
    tints_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--model", "vgg16", "--size", "32", "--recipe", "paper-cifar", "--out", str(out)]
    assert main(["train", *arguments, "--data", tints_path]) == 2
    assert "--set mean_image=false" in capsys.readouterr().err
    assert not list(out.glob("*"))
