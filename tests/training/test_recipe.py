from __future__ import annotations

import dataclasses
import itertools

import pytest

from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.training.config import Recipe
from rtresnet.training.recipes import RECIPES, named, parse, resolve
from rtresnet.workflows.train_text import recipe_lines


def cifar(name: str = "paper-cifar", depth: int = 20, **settings: object) -> Recipe:
    return resolve(name, images=45_000, size=32, depth=depth, settings=settings)


def test_the_papers_cifar_recipe_is_as_published() -> None:
    recipe = cifar()
    assert recipe.total(45_000 // 128) == 64_000
    assert (recipe.batch, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)
    rates = [recipe.lr_at(step, 64_000) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (recipe.padding, recipe.padding_mode, recipe.flip) == (4, "zeros", "random")
    assert recipe.decay_norms and not recipe.ema and not recipe.label_smoothing


def test_resolve_110_layers_warms_up_until_the_error_is_below_80_percent() -> None:
    recipe = cifar(depth=110)
    assert recipe.warmup_until == 80 and cifar(depth=56).warmup_until == 0
    assert recipe.lr_at(5000, 64_000) == pytest.approx(0.01)
    rates = [recipe.lr_at(step, 64_000, warmed=400) for step in (0, 399, 400, 31_999, 32_000)]
    assert rates == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01])
    short = cifar(depth=110, steps=40)
    assert [short.lr_at(step, 40, warmed=10) for step in (9, 10)] == pytest.approx([0.01, 0.1])
    assert cifar(depth=110, warmup=0.1).warmup_until == 0


def test_plateau_divides_after_epochs_without_a_better_score() -> None:
    recipe = Recipe(epochs=9, schedule="plateau", plateau_epochs=2)
    assert [recipe.plateau_divisions([10.0, 20, 30][:n]) for n in range(4)] == [0, 0, 0, 0]
    assert recipe.plateau_divisions([10.0, 9]) == 0
    assert recipe.plateau_divisions([10.0, 9, 10]) == 1  # equal is not better
    assert recipe.plateau_divisions([10.0, 9, 10, 9]) == 1
    assert recipe.plateau_divisions([10.0, 9, 10, 9, 9]) == 2
    assert recipe.plateau_divisions([10.0, 9, 10, 11, 9]) == 1
    assert Recipe(epochs=9).plateau_divisions([10.0, 9, 9, 9, 9, 9, 9]) == 0
    assert recipe.lr_at(7, 9, divisions=2) == pytest.approx(0.001)


def test_resolve_training_at_several_sizes_has_no_mean_image() -> None:
    assert cifar().mean_image
    assert not cifar(progressive=((0.0, 0.5),)).mean_image
    with pytest.raises(InputError, match="one size"):
        cifar(progressive=((0.0, 0.5),), mean_image=True)


def test_the_papers_imagenet_recipe_is_as_published() -> None:
    recipe = resolve("paper-imagenet", images=1_281_167, size=224, depth=50)
    assert (recipe.total(5004), recipe.batch, recipe.lr) == (600_000, 256, 0.1)
    assert (recipe.crop, recipe.colour, recipe.weight_decay) == ("scale", 0.1, 1e-4)
    assert recipe.bn_images > 0


def test_the_milestones_scale_with_the_epochs_asked_for() -> None:
    recipe = cifar(epochs=10)
    assert recipe.total(351) == 3510
    assert recipe.lr_at(1754, 3510) == pytest.approx(0.1)
    assert recipe.lr_at(1755, 3510) == pytest.approx(0.01)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("total", [1, 7, 1000])
def test_every_rate_is_positive_and_none_above_the_recipes(name: str, total: int) -> None:
    recipe = named(name)
    rates = [recipe.lr_at(step, total) for step in range(total)]
    assert all(0 < rate <= recipe.lr * (1 + 1e-9) for rate in rates)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_without_a_jump_and_falls_to_the_final_one(schedule: str) -> None:
    recipe = Recipe(epochs=1, schedule=schedule, warmup=0.1, warmup_from=0.1, final_lr=0.05)
    rates = [recipe.lr_at(step, 1000) for step in range(1001)]
    assert rates[:100] == sorted(rates[:100]) and rates[0] == pytest.approx(0.01)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[100] == pytest.approx(0.1) and rates[1000] == pytest.approx(0.005)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.001


def test_a_small_set_gets_a_smaller_batch_and_rate_in_proportion() -> None:
    recipe = resolve("paper-cifar", images=1300, size=32, depth=20)
    assert recipe.batch == 32
    assert recipe.lr == pytest.approx(0.1 * 32 / 128)
    recipe = resolve("paper-cifar", images=1300, size=32, depth=20, settings={"batch": 64})
    assert (recipe.batch, recipe.lr) == (64, pytest.approx(0.05))


def test_no_batch_is_larger_than_the_set() -> None:
    assert resolve("speed", images=20, size=32, depth=20).batch == 20


def test_the_modern_recipe_trains_below_the_evaluations_size_where_that_is_large() -> None:
    large = resolve("modern", images=10_000, size=224, depth=50)
    assert large.side_at(0, 100, 224) == 176
    small = resolve("modern", images=10_000, size=32, depth=20)
    assert small.side_at(0, 100, 32) == 32


def test_the_size_of_training_images_grows_with_the_run() -> None:
    recipe = Recipe(epochs=1, progressive=((0.0, 0.5), (0.5, 1.0)))
    assert [recipe.side_at(step, 10, 32) for step in (0, 4, 5, 9)] == [16, 16, 32, 32]
    assert recipe.side_at(0, 10, 30) == 16  # a multiple of 4, so that three halvings stay even


def test_fields_are_set_in_their_own_types() -> None:
    settings = parse(
        ["lr=0.05", "epochs=3", "nesterov=true", "milestones=0.3,0.6", "progressive=0:0.5,0.6:1",
         "flip=none", "steps=10"]
    )  # fmt: skip
    assert settings == {
        "lr": 0.05, "epochs": 3, "nesterov": True, "milestones": (0.3, 0.6),
        "progressive": ((0.0, 0.5), (0.6, 1.0)), "flip": "none", "steps": 10,
    }  # fmt: skip
    recipe = cifar(**settings)
    assert (recipe.lr, recipe.steps, recipe.flip) == (0.05, 10, "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zzz=1", "known: "),
        ("label_smoothin=0.1", "did you mean 'label_smoothing'?"),
        ("lr", "not FIELD=VALUE"),
        ("lr=fast", "as in --set lr=0.05"),
        ("nesterov=maybe", "as in --set nesterov=true"),
        ("progressive=1", "as in --set progressive=0:0.5"),
        ("name=mine", "unknown recipe field 'name'"),
    ],
)
def test_what_cannot_be_set_says_what_can(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse([text])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0}, {"lr": 0.0}, {"batch": 0}, {"lr": float("nan")}, {"holdout": 0.9},
        {"batch": 10, "accumulate": 3}, {"milestones": (0.7, 0.2)}, {"area": (0.5,)},
        {"ema": 1.0}, {"progressive": ((0.0, 2.0),)}, {"momentum": float("nan")},
    ],
)  # fmt: skip
def test_nonsense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Recipe(**({"epochs": 1} | fields))  # type: ignore[arg-type]


def test_unknown_choices_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'cosine'"):
        Recipe(epochs=1, schedule="cosin")
    with pytest.raises(UnknownNameError, match="'paper-cifar'"):
        named("papercifar")


def test_differences_name_the_fields() -> None:
    recipe = Recipe(epochs=2)
    stored = dataclasses.asdict(recipe)
    assert recipe.changes_from(stored) == []
    assert dataclasses.replace(recipe, lr=0.05).changes_from(stored) == ["lr 0.1 -> 0.05"]
    del stored["ema"]
    assert recipe.changes_from(stored) == []  # stored before there was such a field: it was off
    assert dataclasses.replace(recipe, ema=0.9).changes_from(stored) == ["ema 0.0 -> 0.9"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_described_within_80_columns_by_its_fields(name: str) -> None:
    lines = recipe_lines(named(name))
    assert max(map(len, lines)) < 80
    text = " ".join(lines)
    assert name in text and f"lr={named(name).lr:g}" in text and "seed=0" in text
