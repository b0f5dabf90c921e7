from __future__ import annotations

import dataclasses

import pytest

from rtresnet.errors import InputError
from rtresnet.train.recipe import Recipe, differences, scaled


def test_the_rate_drops_at_half_and_three_quarters_of_the_run() -> None:
    recipe = Recipe(epochs=1, warmup=0)
    rates = [recipe.lr_at(step, 64_000) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_rate_rises_during_warm_up_and_never_jumps_by_more_than_a_step() -> None:
    recipe = Recipe(epochs=1, warmup=0.1)
    rates = [recipe.lr_at(step, 1000) for step in range(100)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0.01)
    assert recipe.lr_at(100, 1000) == pytest.approx(0.1)


def test_the_papers_batch_and_rate_on_a_set_of_cifars_size() -> None:
    recipe = scaled(45_000, epochs=182)
    assert (recipe.batch, recipe.lr) == (128, 0.1)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 1e-4)


def test_a_small_set_gets_a_smaller_batch_and_rate_in_proportion() -> None:
    recipe = scaled(1300, epochs=10)
    assert recipe.batch == 32
    assert recipe.lr == pytest.approx(0.1 * 32 / 128)


@pytest.mark.parametrize(
    "fields", [{"epochs": 0}, {"epochs": 1, "lr": 0.0}, {"epochs": 1, "batch": 0}]
)
def test_nonsense_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Recipe(**fields)  # type: ignore[arg-type]


def test_differences_name_the_fields() -> None:
    recipe = Recipe(epochs=2)
    stored = dataclasses.asdict(recipe)
    assert differences(stored, recipe) == []
    assert differences(stored, dataclasses.replace(recipe, lr=0.05)) == ["lr 0.1 -> 0.05"]
