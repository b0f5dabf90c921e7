from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rtresnet.core.errors import DataError, UnknownNameError
from rtresnet.onnxlib.metadata import BRANCH_RANGES
from rtresnet.quantization import calibrate as calibrate_module
from rtresnet.quantization import calibrators, qdq
from rtresnet.quantization.calibrate import (
    MAX_HELD_OUT,
    SMALL_HELD_OUT,
    calibrate,
    hold_out,
    observe,
    references,
)
from rtresnet.quantization.equalization import OUTLIER
from rtresnet.quantization.simulate import Simulation, make_session, noise_ratio

METHODS = tuple(calibrators.METHODS)

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
    """Return the tensors by another way than the module's: one run with all as outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    types = {value.name: value for value in model.graph.value_info}
    watched.graph.output.extend(types[name] for name in names if name in types)
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result = dict(
        zip(
            [output.name for output in watched.graph.output],
            session.run(None, {"images": batch}),
            strict=True,
        )
    )
    return [batch if name == "images" else result[name] for name in names]


def test_max_is_the_largest_magnitude_over_all_batches(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    scales = calibrate(model, tensors, lambda: batches, "max").scales
    assert list(scales) == tensors
    observed = [activations(model, tensors, batch) for batch in batches]
    for index, name in enumerate(tensors):
        largest = max(float(np.abs(values[index]).max()) for values in observed)
        assert scales[name] == pytest.approx(largest / 127, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_over_the_images_is_enough(
    method: str, model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    calls = []

    def stream() -> Iterator[np.ndarray]:
        calls.append(1)
        yield from batches

    calibration = calibrate(model, tensors, stream, method)
    assert len(calls) == 1 and calibration.method == method


def test_auto_passes_once_too_and_keeps_the_method_of_least_noise(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    calls = []

    def stream() -> Iterator[np.ndarray]:
        calls.append(1)
        yield from batches

    calibration = calibrate(model, tensors, stream)
    assert len(calls) == 1
    tried = {name: ratio for name, ratio in calibration.ratios.items() if name != "kept"}
    assert len(tried) == 2 * len(METHODS)
    best = max(tried, key=lambda name: tried[name])
    assert best.startswith(calibration.method) and ("biases" in best) == bool(
        calibration.bias_corrections
    )
    assert calibration.ratios["kept"] >= tried[best]


def test_the_noise_that_auto_reports_is_that_of_the_file_it_leads_to(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    batch = images(64, 32)
    calibration = calibrate(model, tensors, lambda: [batch])
    held_out, others = hold_out([batch])
    list(others)
    reference = make_session(model).run(None, {"images": held_out[0]})[0]
    logits = make_session(calibration.quantized()).run(None, {"images": held_out[0]})[0]
    assert noise_ratio(reference, logits) == pytest.approx(calibration.ratios["kept"], abs=0.05)


@pytest.mark.parametrize("method", ["auto", "max"])
@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet8", 32, [f"layer{n}.0.conv2" for n in (1, 2, 3)]),
        ("resnet18", 32, [f"layer{n}.{b}.conv2" for n in (1, 2, 3, 4) for b in (0, 1)]),
        ("plain8", 32, []),
    ],
)
def test_every_method_tells_how_far_each_branch_went(
    method: str, name: str, size: int, expected: list[str], exported: Exported, images: Images
) -> None:
    model, batch = exported(name, size), images(24, size)
    batch[5] *= 20  # one that is not held back
    batch[20] *= 10  # and one that is
    batches = [batch[:12], batch[12:]]
    calibration = calibrate(model, list(qdq.placement(model)), lambda: batches, method)
    assert list(calibration.branches) == expected
    for tensor, observed in zip(expected, activations(model, expected, batch), strict=True):
        low, high = min(0.0, float(observed.min())), max(0.0, float(observed.max()))
        assert calibration.branches[tensor] == pytest.approx((low, high), rel=1e-5)
    written = {entry.key: entry.value for entry in calibration.quantized().metadata_props}
    assert (BRANCH_RANGES.read(written) or {}) == calibration.branches


@pytest.mark.parametrize("method", ["max", "auto"])
def test_what_python_holds_does_not_grow_with_the_images(
    method: str,
    model: onnx.ModelProto,
    tensors: list[str],
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No batch is kept but those held back; benchmarks/calibration.py takes the whole process."""
    monkeypatch.setattr(calibrate_module, "SMALL_HELD_OUT", 16)  # two batches' share

    def peak(count: int) -> int:
        def batches() -> Iterator[np.ndarray]:
            for seed in range(count):
                yield images(32, 32, seed)

        tracemalloc.start()
        calibrate(model, tensors, batches, method)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # imports and caches of the first use
    few, many = peak(4), peak(28)  # 0.4 MB a batch, so 9 MB if all were kept
    assert many - few < 2_000_000, (few, many)


def test_a_single_tensor_may_get_a_range_of_its_own(
    model: onnx.ModelProto, tensors: list[str], images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = images(48, 32, 5)
    best = calibrate(model, tensors, lambda: [batch])
    monkeypatch.setattr(calibrate_module, "SMALL_TRIALS", 0)
    for_all = calibrate(model, tensors, lambda: [batch])
    assert best.overrides and not for_all.overrides and best.method == for_all.method
    assert best.ratios["kept"] > for_all.ratios["kept"] + calibrate_module.GAIN
    for name in tensors:
        factor = best.overrides.get(name, 1.0)
        assert best.scales[name] == pytest.approx(factor * for_all.scales[name])


@pytest.mark.parametrize(("size", "most"), [(8, SMALL_HELD_OUT), (72, MAX_HELD_OUT)])
def test_images_held_back_are_not_calibrated_on_and_none_is_lost(
    images: Images, size: int, most: int
) -> None:
    batches = [images(16, size, seed) for seed in range(40)]
    held_out, others = hold_out(batches)
    rest = list(others)
    assert sum(map(len, held_out)) == most
    assert sum(map(len, rest)) == 640 - most
    observed = {image.tobytes() for part in rest for image in part}
    assert not any(image.tobytes() in observed for part in held_out for image in part)


def test_references_reads_no_more_images_than_it_holds_out(
    model: onnx.ModelProto, images: Images
) -> None:
    read = []

    def batches() -> Iterator[np.ndarray]:
        for seed in range(1000):
            read.append(seed)
            yield images(16, 32, seed)

    held_out, logits = references(model, batches())
    complete, others = hold_out([images(16, 32, seed) for seed in range(60)])
    assert [*others] and all(map(np.array_equal, held_out, complete))
    assert len(logits) == sum(map(len, held_out)) == SMALL_HELD_OUT
    assert len(read) < 60


def test_a_single_image_serves_for_both(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    calibration = calibrate(model, tensors, lambda: [images(1, 32)])
    assert set(calibration.scales) == set(tensors)


def test_the_input_of_the_graph_is_calibrated(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    largest = max(float(np.abs(batch).max()) for batch in batches)
    for method in METHODS:
        scale = calibrate(model, tensors, lambda: batches, method).scales["images"]
        assert 0 < scale <= largest / 127 * (1 + 1e-6)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_an_outlier_pixel_is_clipped(
    method: str, model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    batch = images(16, 32)
    ordinary = np.abs(batch).max()
    batch[0, 0, 0, 0] = 40 * ordinary
    scale = calibrate(model, tensors, lambda: [batch], method).scales["images"]
    assert scale < 10 * ordinary / 127
    widest = calibrate(model, tensors, lambda: [batch], "max").scales["images"]
    assert widest == pytest.approx(40 * ordinary / 127, rel=1e-5)


def with_constant(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray],
                  ) -> onnx.ModelProto:  # fmt: skip
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    value = change(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return changed


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_dead_tensor_gets_scale_1(
    method: str, model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    dead = with_constant(model, "layer2.0.conv1.bias", lambda bias: np.full_like(bias, -1e6))
    calibration = calibrate(dead, tensors, lambda: batches, method)
    assert calibration.scales["layer2.0.relu1"] == 1
    calibration.quantized()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_constant_image_and_a_dead_channel_give_usable_scales(
    method: str, model: onnx.ModelProto, tensors: list[str]
) -> None:
    def kill(bias: np.ndarray) -> np.ndarray:
        bias = bias.copy()
        bias[3] = -1e6
        return bias

    dead = with_constant(model, "layer1.0.conv1.bias", kill)
    grey = np.full((4, 3, 32, 32), 0.5, np.float32)
    calibration = calibrate(dead, tensors, lambda: [grey], method)
    assert all(np.isfinite(scale) and scale > 0 for scale in calibration.scales.values())
    calibration.quantized()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["auto", "max"])
def test_a_pixel_that_is_not_finite_is_an_error_that_names_a_tensor(
    value: float, method: str, model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    batch = images(4, 32)
    batch[3, 2, 3, 4] = value
    with pytest.raises(DataError, match="not finite") as caught:
        calibrate(model, tensors, lambda: [images(2, 32), batch], method)
    assert str(caught.value).split()[0] in [*tensors, "logits"]


@pytest.mark.parametrize("method", ["auto", "max", "entropy"])
def test_no_images_is_an_error(method: str, model: onnx.ModelProto, tensors: list[str]) -> None:
    with pytest.raises(DataError, match="no calibration images"):
        calibrate(model, tensors, list, method)


def test_an_unknown_method_suggests_the_nearest(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'entropy'"):
        calibrate(model, tensors, lambda: batches, "entrpy")


def test_the_model_is_not_changed(
    model: onnx.ModelProto, tensors: list[str], batches: list[np.ndarray]
) -> None:
    before = model.SerializeToString(deterministic=True)
    calibrate(model, tensors, lambda: batches)
    assert model.SerializeToString(deterministic=True) == before


def rescaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Return the same function with one channel inside of a block larger by `factor`."""

    def larger(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[5] *= factor
        return values

    def smaller(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[:, 5] /= factor
        return values

    model = with_constant(model, "layer2.0.conv1.weight", larger)
    model = with_constant(model, "layer2.0.conv1.bias", larger)
    return with_constant(model, "layer2.0.conv2.weight", smaller)


def test_a_channel_a_hundred_times_larger_is_brought_down_and_costs_nothing(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    batch, fresh = images(64, 32), images(32, 32, 9)
    outlying = rescaled(model, 100)
    reference = make_session(model).run(None, {"images": fresh})[0]
    same = make_session(outlying).run(None, {"images": fresh})[0]
    assert np.allclose(reference, same, atol=1e-4)
    ratio = {}
    for name, candidate, method in (
        ("whole", model, "auto"), ("naive", outlying, "max"), ("ours", outlying, "auto")
    ):  # fmt: skip
        calibration = calibrate(candidate, tensors, lambda: [batch], method)
        logits = Simulation(calibration.model, (), calibration.bias_corrections).logits(
            [fresh], calibration.scales
        )
        ratio[name] = noise_ratio(reference, logits)
        observed = [outlier.tensor for outlier in calibration.outliers]
        assert ("layer2.0.relu1" in observed) == (name != "whole")
    assert ratio["naive"] < ratio["whole"] - 6
    assert ratio["ours"] > ratio["whole"] - 1


def test_equalizing_leaves_the_function_as_it_is(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    from rtresnet.quantization.equalization import equalize

    outlying, batch = rescaled(model, 100), images(16, 32)
    ranges = observe(outlying, tensors, [batch])
    equal, mended = equalize(outlying, ranges)
    assert [outlier.tensor for outlier in mended] == ["layer2.0.relu1"]
    assert mended[0].channels == (5,) and mended[0].times > OUTLIER
    first, second = (make_session(m).run(None, {"images": batch})[0] for m in (outlying, equal))
    assert np.allclose(first, second, atol=1e-4)
    again = observe(equal, tensors, [batch])["layer2.0.relu1"]
    assert again.largest == pytest.approx(np.delete(again.channels, 5).max(), rel=1e-4)


def test_shifted_biases_take_the_mean_error_off_every_channel(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    from rtresnet.quantization.equalization import bias_corrections

    batch = images(64, 32) + 1  # with a mean, or there is nothing to correct
    ranges = observe(model, tensors, [batch])
    # Of the first convolution: exact input, rounded weights.
    name, scales = "conv1", {"images": 1e-4}
    rest = [node.name for node in model.graph.node if node.name != name]
    exact = make_session(model, [name]).run(None, {"images": batch})[0].mean((0, 2, 3))
    errors = []
    for shifts in ({}, bias_corrections(model, ranges)):
        written = qdq.insert(model, scales, rest, shifts)
        for node in written.graph.node:  # its input in float: only the weights are at issue
            if node.name == name:
                node.input[0] = "images"
        mean = make_session(written, [name]).run(None, {"images": batch})[0].mean((0, 2, 3))
        errors.append(np.abs(mean - exact).mean())
    assert errors[1] < errors[0] / 3


def test_a_node_that_stays_in_float_keeps_its_bias(
    model: onnx.ModelProto, tensors: list[str], images: Images
) -> None:
    calibration = calibrate(model, tensors, lambda: [images(64, 32) + 1])
    shifts = {node.name: np.ones(node_channels(model, node)) for node in model.graph.node
              if node.op_type == "Conv"}  # fmt: skip
    quantized = dataclasses.replace(calibration, bias_corrections=shifts).quantized(
        ["layer1.0.conv1"]
    )
    biases = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in calibration.model.graph.initializer}
    for name, moved in (("layer1.0.conv1", 0), ("layer1.0.conv2", 1)):
        assert np.allclose(before[f"{name}.bias"] - biases[f"{name}.bias"], moved, atol=1e-5)


def node_channels(model: onnx.ModelProto, node: onnx.NodeProto) -> int:
    return next(t.dims[0] for t in model.graph.initializer if t.name == node.input[1])
