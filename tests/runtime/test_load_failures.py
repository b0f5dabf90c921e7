"""A plan that is loaded, and then not used because of an error, leaves nothing on the fake GPU."""

from __future__ import annotations

import pytest
from fake_gpu import Bench, images

import rtresnet
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.runtime import profilers


@pytest.mark.parametrize("workflow", ["load", "check"])
def test_plan_with_unfit_stated_preprocessing_is_closed(bench: Bench, workflow: str) -> None:
    stated = rtresnet.InputConfig(size=99)
    with pytest.raises(InputError):
        getattr(rtresnet, workflow)(bench.path, stated=stated)
    assert bench.cuda.live == []


def test_check_of_a_plan_without_preprocessing_closes_it(bench: Bench) -> None:
    with pytest.raises(InputError):
        rtresnet.check(bench.path, "shapes:4")
    assert bench.cuda.live == []


def test_record_plan_second_backend_that_fails_closes_the_first(bench: Bench) -> None:
    rtresnet.load(bench.path, graphs=False, timings=True).close()
    contexts = bench.engine.calls["create_execution_context"]
    bench.fail("create_execution_context", contexts + 1)
    with pytest.raises(UnavailableError):
        profilers.record_plan(bench.path, images(2), seconds=0)
    assert bench.cuda.live == []


def test_predictor_of_a_net_that_fails_closes_it(bench: Bench) -> None:
    stated = rtresnet.InputConfig(size=4, preset="half")
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError):  # counts the classes with one image
        rtresnet.Predictor(bench.path, runtime=rtresnet.RuntimeConfig(graphs=False), stated=stated)
    assert bench.cuda.live == []
