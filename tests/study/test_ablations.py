from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.data.sources import Arrays
from rtresnet.study import ablations
from rtresnet.study.ablations import Curve, Net, Terms
from rtresnet.study.runs import Outcome, Run


def terms(images: int = 400, **settings: object) -> Terms:
    pixels = np.zeros((images, 32, 32, 3), np.uint8)
    source = Arrays("zeros", pixels, np.arange(images) % 4, list("abcd"))
    return Terms(
        source=source, test=None, recipe="paper-cifar", settings=settings, seeds=2,
        out=Path("runs/x"), device="cpu",
    )  # fmt: skip


def outcome(run: Run, train: list[float], val: list[float | None], test: float) -> Outcome:
    log = [
        {"step": 10 * (n + 1), "train_top1": t, "val_top1": v}
        for n, (t, v) in enumerate(zip(train, val, strict=True))
    ]
    return Outcome(run=run, log=log, measured={"val_top1": val[-1], "test_top1": test})


def net(*outcomes: Outcome) -> Net:
    (made,) = ablations.summarize(outcomes)
    return made


@pytest.fixture
def two() -> list[Run]:
    """One net under two seeds."""
    return ablations.plan({"resnet8": ablations.degradation_nets([8])["resnet8"]}, terms(epochs=2))


def test_plain_and_residual_nets_of_a_depth_have_the_same_parameters() -> None:
    for depth, name in ((8, "resnet8"), (18, "resnet18-A")):
        runs = ablations.plan(ablations.degradation_nets([depth]), terms(epochs=1))
        plain, residual = ablations.summarize([Outcome(run=run) for run in runs])
        assert (plain.label, residual.label) == (f"plain{depth}", name)
        assert plain.parameters == residual.parameters


def test_shortcut_options_grow_from_a_to_c_beside_the_plain_net() -> None:
    nets = ablations.shortcut_nets("resnet8")
    assert list(nets) == ["plain8", "resnet8-A", "resnet8-B", "resnet8-C"]
    runs = ablations.plan(nets, terms(epochs=1))
    plain, a, b, c = ablations.summarize([Outcome(run=run) for run in runs])
    assert plain.parameters == a.parameters < b.parameters < c.parameters
    assert a.multiply_adds < b.multiply_adds < c.multiply_adds


def test_a_net_of_bottlenecks_has_no_plain_counterpart() -> None:
    assert list(ablations.shortcut_nets("resnet50")) == [
        "resnet50-A",
        "resnet50-B",
        "resnet50-C",
    ]


def test_a_plain_net_has_no_shortcuts_to_compare() -> None:
    with pytest.raises(InputError, match="--model resnet20"):
        ablations.shortcut_nets("plain20")
    with pytest.raises(UnknownNameError):
        ablations.degradation_nets([21])


def test_every_net_comes_under_the_first_seed_before_any_under_the_second() -> None:
    runs = ablations.plan(ablations.degradation_nets([8, 14]), terms(epochs=2))
    labels = ["plain8", "plain14", "resnet8", "resnet14"]
    assert [run.job.out.name for run in runs] == [f"{n}-seed{s}" for s in (0, 1) for n in labels]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert len({run.job.recipe.lr for run in runs}) == 1


def test_errors_are_means_and_sample_deviations_over_seeds(two: list[Run]) -> None:
    made = net(
        outcome(two[0], [50, 90], [40, 80], test=85), outcome(two[1], [60, 94], [44, 84], test=88)
    )
    assert made.error("train_error") == ablations.Spread(mean=8, std=pytest.approx(8**0.5), n=2)
    assert str(made.error("val_error")) == "18.00 ± 2.83"
    assert str(made.error("test_error")) == "13.50 ± 2.12"
    assert made.curve("train_top1") == Curve(
        steps=[10, 20], mean=[45, 8], std=pytest.approx([50**0.5, 8**0.5])
    )


def test_one_seed_has_no_deviation(two: list[Run]) -> None:
    made = net(outcome(two[0], [50, 90], [40, 80], test=85))
    assert str(made.error("test_error")) == "15.00"
    curve = made.curve("val_top1")
    assert curve is not None and curve.std is None


def test_a_seed_that_diverged_is_counted_and_not_averaged(two: list[Run]) -> None:
    made = net(outcome(two[0], [90], [80], test=85), Outcome(run=two[1], diverged="nan at step 3"))
    assert str(made.error("test_error")) == "15.00"
    record = made.record()
    assert record.diverged == 1 and record.seeds[1].diverged == "nan at step 3"
    lost = net(Outcome(run=two[0], diverged="nan"))
    assert lost.error("test_error") is None and lost.curve("train_top1") is None


def test_nothing_held_out_means_no_validation_error(two: list[Run]) -> None:
    made = net(outcome(two[0], [50, 90], [None, None], test=85))
    assert made.error("val_error") is None and made.curve("val_top1") is None
    assert str(made.error("test_error")) == "15.00"


def test_the_length_of_a_run_is_set_beside_the_papers() -> None:
    def words(**settings: object) -> str:
        nets = ablations.degradation_nets([8])
        return ablations.length(ablations.plan(nets, terms(**settings))[0]).words("digits")  # type: ignore[arg-type]

    assert words(steps=2000, batch=128) == (
        "2,000 of the paper's 64,000 steps; 320 training images of digits"
    )
    assert words(epochs=3, batch=32) == (
        "30 of the paper's 64,000 steps, 32 images each (the paper's: 128); "
        "320 training images of digits"
    )
    assert words(batch=128).startswith("64,000 steps (the paper's: 64,000)")
