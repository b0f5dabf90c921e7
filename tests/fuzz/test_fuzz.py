"""A minute of fuzzing with fixed seeds; `python -m tests.fuzz.run --minutes 30` for more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.run import attempt
from tests.fuzz.targets import TARGETS, Target

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus.make(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_reader_damaged_file_is_refused_or_read(
    target: Target, files: Path, tmp_path: Path
) -> None:
    original = (files / target.file).read_bytes()
    assert attempt(target, original, files, tmp_path / "case") is None

    @settings(
        max_examples=target.examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        fault = attempt(target, target.mutate(original, rng), files, tmp_path / "case")
        assert fault is None, f"{fault.kind}: {fault.detail}"

    check()
