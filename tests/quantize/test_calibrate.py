from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rtresnet.errors import DataError, UnknownName
from rtresnet.quantize import qdq
from rtresnet.quantize.calibrate import BINS, calibrate, entropy_limit, write_scales

onnxruntime = pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def model(exported: Exported) -> onnx.ModelProto:
    return exported("resnet8", 32)


@pytest.fixture(scope="module")
def tensors(model: onnx.ModelProto) -> list[str]:
    return list(qdq.placement(model))


@pytest.fixture(scope="module")
def batches(images: Images) -> list[np.ndarray]:
    """Three batches of different sizes and ranges."""
    return [images(4, 32, 0), images(7, 32, 1) * 2, images(1, 32, 2)]


def activations(model: onnx.ModelProto, names: list[str], batch: np.ndarray) -> list[np.ndarray]:
    """The tensors themselves, by another way than the module's: one run with all as outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    types = {value.name: value for value in model.graph.value_info}
    watched.graph.output.extend(types[name] for name in names if name in types)
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = dict(
        zip(
            [output.name for output in watched.graph.output],
            session.run(None, {"images": batch}),
            strict=True,
        )
    )
    return [batch if name == "images" else found[name] for name in names]


def histogram(samples: np.ndarray) -> tuple[np.ndarray, float]:
    limit = float(np.abs(samples).max())
    return np.histogram(np.abs(samples), bins=BINS, range=(0, limit))[0], limit


def test_max_is_the_largest_magnitude_over_all_batches(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    scales = calibrate(model, tensors, lambda: batches, "max")
    assert list(scales) == tensors
    seen = [activations(model, tensors, batch) for batch in batches]
    for index, name in enumerate(tensors):
        largest = max(float(np.abs(values[index]).max()) for values in seen)
        assert scales[name] == pytest.approx(largest / 127, rel=1e-5)


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_the_order_of_the_batches_does_not_matter(
    method: str, model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    forward = calibrate(model, tensors, lambda: batches, method)
    backward = calibrate(model, tensors, lambda: batches[::-1], method)
    assert forward == backward


@pytest.mark.parametrize(("method", "passes"), [("max", 1), ("entropy", 2)])
def test_images_are_asked_for_once_a_pass(
    method: str,
    passes: int,
    model: onnx.ModelProto,
    tensors: list[str],
    batches: list[np.ndarray],
) -> None:
    calls = []

    def stream() -> Iterator[np.ndarray]:
        calls.append(1)
        yield from batches

    calibrate(model, tensors, stream, method)
    assert len(calls) == passes


def test_the_input_of_the_graph_is_calibrated(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    assert "images" in tensors
    largest = max(float(np.abs(batch).max()) for batch in batches)
    for method in ("max", "entropy"):
        scale = calibrate(model, tensors, lambda: batches, method)["images"]
        assert 0 < scale <= largest / 127
    assert calibrate(model, tensors, lambda: batches)["images"] == largest / 127


def test_entropy_never_exceeds_max_and_clips_something(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    widest = calibrate(model, tensors, lambda: batches, "max")
    clipped = calibrate(model, tensors, lambda: batches, "entropy")
    assert all(0 < clipped[name] <= widest[name] for name in tensors)
    assert any(clipped[name] < 0.9 * widest[name] for name in tensors)


def test_entropy_clips_an_outlier_pixel(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    batch = images(4, 32)
    ordinary = np.abs(batch).max()
    batch[0, 0, 0, 0] = 40 * ordinary
    scale = calibrate(model, tensors, lambda: [batch], "entropy")["images"]
    assert scale < 4 * ordinary / 127
    assert calibrate(model, tensors, lambda: [batch], "max")["images"] > 39 * ordinary / 127


def test_entropy_clips_an_outlier_of_a_histogram() -> None:
    samples = np.random.default_rng(0).standard_normal(100_000)
    limit = entropy_limit(*histogram(np.append(samples, 100.0)))
    assert 2 < limit < 15


def test_entropy_keeps_the_range_of_a_uniform_distribution() -> None:
    samples = np.random.default_rng(0).uniform(-3, 3, 200_000)
    assert entropy_limit(*histogram(samples)) > 0.95 * 3


def test_entropy_of_zeros_alone_keeps_the_limit() -> None:
    counts = np.zeros(BINS)
    counts[0] = 1000
    assert entropy_limit(counts, 5.0) == 5.0


def test_entropy_does_not_look_at_exact_zeros() -> None:
    counts, limit = histogram(np.random.default_rng(0).standard_normal(50_000))
    many = counts.copy()
    many[0] += 10_000_000
    assert entropy_limit(many, limit) == entropy_limit(counts, limit)
    assert many[0] > 10_000_000, "the caller's histogram is not changed"


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_a_dead_tensor_gets_scale_1(
    method: str, model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    dead = onnx.ModelProto()
    dead.CopyFrom(model)
    bias = next(t for t in dead.graph.initializer if t.name == "layer2.0.conv1.bias")
    value = np.full(tuple(bias.dims), -1e6, np.float32)
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    scales = calibrate(dead, tensors, lambda: batches, method)
    assert scales["layer2.0.relu1"] == 1
    qdq.insert(dead, scales)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["max", "entropy"])
def test_a_pixel_that_is_not_finite_is_an_error_that_names_a_tensor(
    value: float, method: str, model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    batch = images(2, 32)
    batch[1, 2, 3, 4] = value
    with pytest.raises(DataError, match="not finite") as caught:
        calibrate(model, tensors, lambda: [images(2, 32), batch], method)
    assert str(caught.value).split()[0] in tensors


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_no_images_is_an_error(method: str, model: onnx.ModelProto, tensors: list[str]) -> None:
    with pytest.raises(DataError, match="no calibration images"):
        calibrate(model, tensors, list, method)


def test_an_unknown_method_suggests_the_nearest(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    with pytest.raises(UnknownName, match="did you mean 'entropy'"):
        calibrate(model, tensors, lambda: batches, "entrpy")


def test_the_model_is_not_changed(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    before = model.SerializeToString(deterministic=True)
    calibrate(model, tensors, lambda: batches)
    assert model.SerializeToString(deterministic=True) == before


def test_the_scales_file_has_a_line_a_tensor_and_reads_back(
    tmp_path: Path, model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    scales = calibrate(model, tensors, lambda: batches)
    path = write_scales(tmp_path / "calib" / "net.json", scales, method="max", n=12)
    data = json.loads(path.read_text())
    assert (data["schema"], data["method"], data["n"]) == (1, "max", 12)
    assert data["scales"] == scales
    lines = path.read_text().splitlines()
    for name in tensors:
        (line,) = (line for line in lines if f'"{name}"' in line)
        assert float(line.split(":")[1].rstrip(",")) == scales[name]


def test_a_changed_scale_is_one_changed_line(tmp_path: Path) -> None:
    first = write_scales(tmp_path / "a.json", {"a": 0.1, "b": 0.2, "c": 0.3}, method="max")
    second = write_scales(tmp_path / "b.json", {"a": 0.1, "b": 0.25, "c": 0.3}, method="max")
    pairs = zip(first.read_text().splitlines(), second.read_text().splitlines(), strict=True)
    assert sum(one != other for one, other in pairs) == 1
