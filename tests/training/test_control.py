"""Early stopping, class balance, layer-wise rates and distillation: values, and resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from rtresnet.cli.main import main
from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.loader import DecodeErrors
from rtresnet.data.sources import Arrays
from rtresnet.models import checkpoint, zoo
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import ALONE
from rtresnet.training.loader import MicroBatch, TrainLoader
from rtresnet.training.loop import stalled
from rtresnet.training.recipes import RECIPES, advice, resolve
from rtresnet.training.step import Stepper, distillation
from rtresnet.training.teacher import Teacher
from tests.training.test_loop import assert_identical, untimed


def train(data: str, out: Path, *more: str) -> int:
    return main(["train", "--model", "resnet8", "--data", data, "--out", str(out), *more])


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([50, 60, 60], 1, True),
        ([50, 60, 60], 2, False),
        ([60, 50, 50], 2, True),
        ([50, 60, 70], 1, False),
        ([50, 40, 40], 0, False),
        ([], 1, False),
    ],
)
def test_stalled(scores: list[float], patience: int, expected: bool) -> None:
    assert stalled([{"val_top1": score} for score in scores], patience) is expected


def test_patience_without_held_out_images_is_refused() -> None:
    with pytest.raises(InputError, match="holdout"):
        Recipe(epochs=3, patience=2, holdout=0)


def test_train_patience_stops_early_and_tests_the_best_epoch(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(tints, out, "--epochs", "40", "--patience", "2") == 0
    assert "stopped early" in capsys.readouterr().err
    log = (out / "log.jsonl").read_text().splitlines()
    assert 3 <= len(log) < 40
    assert checkpoint.load(out / "best.pt").measured["test_n"] == 24
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == len(log)


def skewed() -> Arrays:
    """Return 90 images of class a, 10 of class b, none of class c."""
    labels = np.array([0] * 90 + [1] * 10)
    return Arrays("skewed", np.zeros((100, 8, 8, 3), np.uint8), labels, ("a", "b", "c"))


def loader(**fields: object) -> TrainLoader:
    recipe = Recipe(epochs=50, batch=20, padding=0, **fields)  # type: ignore[arg-type]
    return TrainLoader(
        skewed(), np.arange(100), Preprocess.for_size(8), recipe, tally=DecodeErrors(100)
    )


def test_class_weights_are_inverse_frequencies_with_mean_1() -> None:
    weights = loader().class_weights()
    assert weights[2] == 0 and weights[1] / weights[0] == pytest.approx(9)
    assert weights[skewed().labels].mean() == pytest.approx(1)


def test_balanced_sampling_draws_every_class_equally_often() -> None:
    balanced = loader(balance="sampling")
    drawn = [
        label
        for epoch in range(20)
        for _, micros in balanced.steps(5 * epoch, 5 * epoch + 5)
        for label in micros[0].labels.tolist()
    ]
    assert 0.45 < np.mean(drawn) < 0.55
    again = [m[0].labels.tolist() for _, m in loader(balance="sampling").steps(7, 9)]
    assert again == [m[0].labels.tolist() for s, m in balanced.steps(5, 10) if s in (7, 8)]


def stepper(recipe: Recipe, **options: object) -> Stepper:
    torch.manual_seed(0)
    net = zoo.build(zoo.spec("resnet8"), 4)
    return Stepper(net, recipe, ALONE, "cpu", **options)  # type: ignore[arg-type]


def batch(count: int = 8) -> MicroBatch:
    inputs = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 4
    return MicroBatch(inputs=inputs, labels=labels, others=labels, share=1.0)


RECIPE = Recipe(epochs=1, batch=8, precision="fp32", lr=0.1, momentum=0.0, weight_decay=0.0)


def test_step_balanced_loss_weights_each_images_loss() -> None:
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    trained = stepper(dataclasses.replace(RECIPE, balance="loss"), class_weights=weights)
    trained.net.eval()
    micro = batch()
    logits = trained.net(micro.inputs).detach()
    expected = functional.cross_entropy(logits, micro.labels, reduction="none")
    loss, _ = trained.step([micro], 0.1)
    assert float(loss) == pytest.approx(float((expected * weights[micro.labels]).mean()), rel=1e-5)


def test_distillation_loss_is_the_divergence_of_softened_answers() -> None:
    student, teacher = torch.randn(2, 5, 4).unbind()
    p = torch.softmax(teacher / 3, 1)
    expected = (p * (p.log() - torch.log_softmax(student / 3, 1))).sum(1).mean() * 9
    assert float(distillation(student, teacher, 3.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


def test_step_with_a_teacher_mixes_both_losses_and_leaves_the_teacher(trained: Path) -> None:
    saved = checkpoint.load(trained / "best.pt")
    teacher = Teacher(saved, saved.model.classes, saved.input, named=False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = stepper(dataclasses.replace(RECIPE, distill=0.25), teacher=teacher)
    student.net.eval()
    micro = batch()
    logits = student.net(micro.inputs).detach()
    hard = functional.cross_entropy(logits, micro.labels)
    soft = distillation(logits, teacher(micro.inputs), 4.0)
    loss, _ = student.step([micro], 0.1)
    assert float(loss) == pytest.approx(float(0.75 * hard + 0.25 * soft), rel=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())


def test_teacher_answers_in_the_students_order_and_for_its_normalization(trained: Path) -> None:
    saved = checkpoint.load(trained / "best.pt")
    model = dataclasses.replace(saved.model, classes=("a", "b", "c", "d"))
    saved = dataclasses.replace(saved, model=model)
    pixels = torch.rand(2, 3, 32, 32)
    other = dataclasses.replace(saved.input, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))

    def normalized(preprocess: Preprocess) -> torch.Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
        return (pixels - mean) / std

    expected = saved.net()(normalized(saved.input)).detach()
    answers = Teacher(saved, ("c", "a", "d", "b"), other)(normalized(other))
    torch.testing.assert_close(answers, expected[:, [2, 0, 3, 1]], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError):
        Teacher(saved, ("a", "b"), other)


def test_layer_decay_gives_each_part_its_rate() -> None:
    trained = stepper(dataclasses.replace(RECIPE, layer_decay=0.5, decay_norms=False))
    trained.step([batch()], 0.8)
    rates = {
        id(parameter): group["lr"]
        for group in trained.optimizer.param_groups
        for parameter in group["params"]
    }
    names = {name: rates[id(parameter)] for name, parameter in trained.net.named_parameters()}
    assert names["fc.weight"] == names["fc.bias"] == pytest.approx(0.8)
    assert names["layer3.0.conv1.weight"] == pytest.approx(0.4)
    assert names["layer1.0.bn1.weight"] == pytest.approx(0.1)
    assert names["conv1.weight"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "options",
    [
        ["--balance", "loss", "--patience", "3"],
        ["--balance", "sampling", "--set", "mixup=0.2"],
        ["--layer-decay", "0.7", "--freeze", "1"],
        ["--teacher", "TEACHER"],
    ],
)
def test_train_resumed_with_each_option_equals_the_unbroken_run(
    options: list[str], tints: str, trained: Path, tmp_path: Path,
    interrupt_in: Callable[[int], None],
) -> None:  # fmt: skip
    options = [option.replace("TEACHER", str(trained / "best.pt")) for option in options]
    options += ["--epochs", "2", "--set", "precision=fp32"]
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    assert train(tints, unbroken, *options) == 0
    interrupt_in(7)
    assert train(tints, out, *options) == 130
    assert main(["train", "--out", str(out), "--resume"]) == 0
    for name in ("best.pt", "last.pt"):
        assert_identical(out, unbroken, name)
    ours, theirs = ((run / "log.jsonl").read_text().splitlines() for run in (out, unbroken))
    assert [untimed(line) for line in ours] == [untimed(line) for line in theirs]


def test_train_resumed_with_another_teacher_is_refused(
    tints: str, trained: Path, tmp_path: Path, interrupt_in: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    interrupt_in(3)
    assert train(tints, out, "--epochs", "1", "--teacher", str(trained / "best.pt")) == 130
    other = ["--teacher", str(trained / "last.pt")]
    assert main(["train", "--out", str(out), "--resume", *other]) == 2
    assert "differs from the teacher" in capsys.readouterr().err


def test_advice_few_updates_and_high_rate() -> None:
    recipe = resolve("speed", images=1080, size=32, depth=20, settings={"batch": 1024, "lr": 16})
    few, high = advice(recipe, 1080)
    assert "only 10 weight updates" in few and "16 is 5 times" in high
    one = resolve("speed", images=1080, size=32, depth=20, settings={"steps": 1})
    assert "only 1 weight update:" in advice(one, 1080)[0]


def rate_warnings(name: str, images: int = 45_000, **settings: object) -> list[str]:
    recipe = resolve(name, images=images, size=32, depth=20, settings=settings)
    return [line for line in advice(recipe, images) if "learning rate" in line]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_advice_recipes_rates_are_not_too_high(name: str) -> None:
    for images in (54, 1_080, 45_000, 1_281_167):
        assert rate_warnings(name, images) == []
    for batch in (32, 128, 256, 8_192):
        assert rate_warnings(name, batch=batch) == []


def test_advice_paper_rate_at_half_and_at_large_batches_is_not_too_high() -> None:
    assert rate_warnings("paper-cifar", batch=64, lr=0.1) == []
    assert rate_warnings("paper-imagenet", 1_281_167, batch=8_192, lr=3.2) == []


@pytest.mark.parametrize(("batch", "lr"), [(4096, 12.8), (256, 2.0), (256, 3.0), (1024, 8.0)])
def test_advice_rate_above_twice_the_usual_one_is_too_high(batch: int, lr: float) -> None:
    assert rate_warnings("speed", batch=batch, lr=lr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "4096"], "has 192 training images"),
        (["--set", "batch=100000"], "has 192 training images"),
        (["--lr", "1e9"], "<=100"),
        (["--set", "lr=1e9"], "at most 100"),
        (["--set", "distill=0.5"], "--teacher"),
    ],
)
def test_train_impossible_batch_and_rate_are_refused_with_the_bound(
    options: list[str], message: str, tints: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(tints, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
