"""Plans on a real GPU: built here, run here, held against ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rtresnet import machine
from rtresnet.artifacts import Profile
from rtresnet.build import engine
from rtresnet.build.targets import RTX_TARGETS
from rtresnet.errors import EnvironmentLack, InputError
from rtresnet.runtime.session import Session, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not machine.gpus(), reason="no GPU"),
]

OnnxFile = Callable[..., Path]
Images = Callable[..., np.ndarray]
LARGEST = 32
# Norm of the difference over the norm of the reference: the same arithmetic, in another order.
BOUNDS = {"fp32": 1e-2, "fp16": 1e-2, "int8": 0.1}


@pytest.fixture(scope="module")
def builder() -> str:
    """What builds for the GPU that is here: tensorrt for any, RTX for those it serves."""
    if machine.installed("tensorrt"):
        return "tensorrt"
    if machine.installed("tensorrt_rtx") and machine.gpus()[0].target in RTX_TARGETS:
        return "rtx"
    pytest.skip("no builder for this GPU")


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["A", "B"])
def source(precision: str, request: pytest.FixtureRequest, onnx_file: OnnxFile) -> Path:
    return onnx_file("resnet8", precision, shortcut=request.param)


@pytest.fixture(scope="module")
def plan(source: Path, builder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plans") / f"{source.stem}.plan"
    engine.build(source, out, profiles=[Profile(min=1, opt=8, max=LARGEST)], builder=builder)
    return out


@pytest.fixture
def session(plan: Path) -> Session:
    return load(plan)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_a_plan_agrees_with_onnx_runtime(
    count: int, session: Session, source: Path, precision: str, images: Images
) -> None:
    batch = images(count)
    with session, load(source, provider="cpu") as reference:
        wanted, got = reference(batch), session(batch)
    assert got.shape == wanted.shape and np.isfinite(got).all()
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert error < BOUNDS[precision]


def test_rows_of_a_batch_equal_the_same_rows_alone(
    session: Session, precision: str, images: Images
) -> None:
    batch = images(LARGEST + 3)
    with session:
        together = session(batch)
        alone = np.concatenate([session(batch[index : index + 1]) for index in range(5)])
    error = np.linalg.norm(together[:5] - alone) / np.linalg.norm(alone)
    assert error < BOUNDS[precision]


def test_the_same_images_give_the_same_logits(session: Session, images: Images) -> None:
    batch = images(7)
    with session:
        np.testing.assert_array_equal(session(batch), session(batch))


def test_timings_are_positive(session: Session, images: Images) -> None:
    with session:
        session(images(8))
        timings = session.backend.timings()
    assert set(timings) == {"h2d", "compute", "d2h"}
    assert all(0 < value < 1000 for value in timings.values())


def test_the_description_names_the_gpu(session: Session) -> None:
    with session:
        described = session.describe()
    assert described["device"] == machine.gpus()[0].name
    assert str(described["provider"]).startswith("TensorRT")
    assert described["threads"] is None


def test_images_of_another_shape_are_refused(session: Session, images: Images) -> None:
    with session, pytest.raises(InputError, match="takes float32"):
        session(images(2, 16))


def test_closing_twice_is_fine_and_loading_again_works(
    session: Session, plan: Path, images: Images
) -> None:
    before = session(images(3))
    session.close()
    session.close()
    with load(plan) as again:
        np.testing.assert_allclose(again(images(3)), before, rtol=1e-3, atol=1e-3)


def test_bytes_that_are_no_plan_are_not_accepted(builder: str, tmp_path: Path) -> None:
    if builder != "rtx":
        pytest.skip("a plan without sidecar is taken for TensorRT-RTX's")
    path = tmp_path / "net.plan"
    path.write_bytes(b"vtrt" + bytes(1000))
    with pytest.raises(EnvironmentLack, match="does not accept"):
        load(path)
