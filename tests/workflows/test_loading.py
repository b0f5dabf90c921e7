"""Loading any artifact as a session."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from rtresnet.core.errors import InputError
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import load
from tests.conftest import as_foreign, tinted_noise


@pytest.fixture
def without_sidecar(engines: Path, tmp_path: Path) -> Path:
    return as_foreign(shutil.copy(engines / "resnet8.onnx", tmp_path / "foreign.onnx"))


def test_load_checkpoint_and_onnx_file_give_the_same_logits(trained: Path, engines: Path) -> None:
    images = tinted_noise(6)[0]
    logits = []
    for path in (trained / "best.pt", engines / "resnet8.onnx"):
        with load(path, device="cpu") as session:
            assert session.precision == "fp32" and len(session.classes) == 4
            logits.append(session(session.prepare(images)))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_load_file_without_sidecar_runs_and_prepares_what_is_stated(without_sidecar: Path) -> None:
    images = tinted_noise(2)[0]
    with load(without_sidecar) as session:
        assert session(session.example(2)).shape == (2, 4)
        with pytest.raises(InputError):
            session.prepare(images)
    stated = InputConfig(preset="half")
    with load(without_sidecar, provider="cpu", threads=1, stated=stated) as session:
        assert session.info.threads == 1 and "preset half" in session.assumed[0]
        assert session.prepare(images).max() <= 1


@pytest.mark.parametrize(
    "options", [{"device": "tpu"}, {"provider": "tensorrt"}, {"threads": 0}, {"contexts": 0}]
)
def test_load_impossible_option_is_refused(engines: Path, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        load(engines / "resnet8.onnx", **options)  # type: ignore[arg-type]


def test_session_restated_size_changes_what_prepare_returns(trained: Path) -> None:
    images = tinted_noise(2)[0]
    with load(trained / "best.pt", stated=InputConfig(size=48)) as session:
        assert session.size == session.preprocess.size == 48
        assert session.prepare(images).shape == (2, 3, 48, 48)
        assert session(session.prepare(images)).shape == (2, 4)
        other = dataclasses.replace(session.preprocess, size=32, resize=32)
        assert session.restated(other, ()).prepare(images).shape == (2, 3, 32, 32)
