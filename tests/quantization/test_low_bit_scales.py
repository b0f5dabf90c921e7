"""Scales of few significant bits, which make sums independent of their order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rtresnet.quantization import number_formats, qdq
from rtresnet.quantization.simulate import make_session

pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


def some() -> np.ndarray:
    """Return positive float32 of many magnitudes, and those on and next to the borders."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.uniform(-30, 30, 5000)).astype(np.float32)
    whole = np.array([1, 1.125, 1.25, 1.5, 1.75, 1.875, 2, 2**-20, 7, 7.5, 15, 15.5], np.float32)
    neighbours = [np.nextafter(whole, np.float32(side)) for side in (0, 1e9)]
    return np.concatenate([drawn, whole, *neighbours])


def significant_bits(numbers: np.ndarray) -> int:
    fractions = np.frexp(numbers.astype(np.float64))[0]
    return next(b for b in range(1, 54) if (np.rint(fractions * 2**b) == fractions * 2**b).all())


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
class TestFewBits:
    def test_nearest(self, bits: int) -> None:
        numbers = some()
        result = number_formats.round_to_bits(numbers.view(np.int32), bits).view(np.float32)
        assert significant_bits(result) == bits
        spacing = np.ldexp(1.0, np.frexp(numbers)[1] - bits)
        assert (np.abs(result - numbers.astype(np.float64)) <= spacing / 2).all()

    def test_at_least(self, bits: int) -> None:
        numbers = some()
        result = number_formats.round_up_to_bits(numbers.view(np.int32), bits).view(np.float32)
        assert significant_bits(result) == bits
        assert (result >= numbers).all()
        spacing = np.ldexp(1.0, np.frexp(numbers)[1] - bits)
        assert (result - numbers.astype(np.float64) < spacing).all()

    @pytest.mark.parametrize(
        "rounding", [number_formats.round_to_bits, number_formats.round_up_to_bits]
    )
    def test_once_is_enough_and_torch_does_the_same(
        self, rounding: Callable[..., np.ndarray], bits: int
    ) -> None:
        pattern = some().view(np.int32)
        result = rounding(pattern, bits)
        assert np.array_equal(rounding(result, bits), result)
        by_torch = rounding(torch.from_numpy(pattern.copy()), bits)
        assert np.array_equal(np.asarray(by_torch), result)


def in_another_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return one convolution with its input channels turned round, here and in the weights."""
    turned = onnx.ModelProto()
    turned.CopyFrom(model)
    for tensor in turned.graph.initializer:
        if tensor.name == "w":
            weight = np.ascontiguousarray(numpy_helper.to_array(tensor)[:, ::-1])
            tensor.CopyFrom(numpy_helper.from_array(weight, "w"))
    return turned


def convolution(channels: int) -> onnx.ModelProto:
    rng, value = np.random.default_rng(1), helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "w", "b"], ["y"], name="conv", pads=[1] * 4)],
        "convolution",
        [value("images", TensorProto.FLOAT, ["N", channels, 8, 8])],
        [value("y", TensorProto.FLOAT, ["N", 32, 8, 8])],
        [
            numpy_helper.from_array(
                rng.normal(0, 0.1, (32, channels, 3, 3)).astype(np.float32), "w"
            ),
            numpy_helper.from_array(rng.normal(0, 0.5, 32).astype(np.float32), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_sums_are_the_same_in_any_order_and_are_exact() -> None:
    model, scale = convolution(64), 0.0391
    images = np.random.default_rng(2).normal(0, 2, (4, 64, 8, 8)).astype(np.float32)
    turned = np.ascontiguousarray(images[:, ::-1])
    results = {}
    for low_bit in (False, True):
        written = qdq.insert(model, {"images": scale}, low_bit=low_bit)
        (straight,) = make_session(written).run(None, {"images": images})
        (other,) = make_session(in_another_order(written)).run(None, {"images": turned})
        results[low_bit] = np.array_equal(straight, other)
        if low_bit:
            constants = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
            steps = np.clip(np.rint(images / constants["images.scale"]), -128, 127)
            units = (constants["images.scale"] * constants["w.scale"].astype(np.float64))[:, None]
            padded = np.pad(steps, ((0, 0), (0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
            sums = np.einsum("nchwij,ocij->nohw", windows, constants["w"].astype(np.float64))
            expected = sums * units[..., None] + constants["b"].astype(np.float64)[:, None, None]
            assert np.array_equal(straight, expected)  # float64 holds all of it
    assert results == {False: False, True: True}


def test_what_is_written(exported: Exported) -> None:
    model = exported("resnet8", 32)
    scales = {name: 0.0123 * (1 + n) for n, name in enumerate(qdq.placement(model))}
    written = qdq.insert(model, scales, low_bit=True)
    constants = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, calibrated in scales.items():
        scale = constants[f"{name}.scale"]
        assert significant_bits(scale) <= 3 and abs(scale / calibrated - 1) <= 1 / 9
        assert (
            float(scale)
            == number_formats.low_bit_scale(calibrated)
            == number_formats.low_bit_scale(float(scale))
        )
    weighted = [node for node in written.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(weighted) == 8
    for node in weighted:
        weight, bias = f"{node.name}.weight", constants[node.input[2]]
        of_weight, steps = constants[f"{weight}.scale"], constants[weight].astype(int)
        assert significant_bits(of_weight) <= 4 and of_weight.dtype == np.float32
        largest = np.abs(steps.reshape(len(steps), -1)).max(1)
        assert (largest <= 127).all() and (largest >= 127 * 8 / 9 - 1).all()
        assert (np.abs(floats[weight].reshape(len(steps), -1)).max(1) <= 127.5 * of_weight).all()
        units = of_weight.astype(np.float64) * float(constants[node.input[0][:-3] + ".scale"])
        assert np.array_equal(np.rint(bias / units) * units, bias)
        assert (np.abs(bias - floats[node.input[2]]) <= units / 2 * (1 + 1e-6)).all()


def test_without_it_nothing_of_this_is_done(exported: Exported) -> None:
    model = exported("resnet8", 32)
    scales = dict.fromkeys(qdq.placement(model), 0.0123)
    constants = {t.name: t for t in qdq.insert(model, scales).graph.initializer}
    assert float(numpy_helper.to_array(constants["relu.scale"])) == np.float32(0.0123)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".bias"):
            assert constants[tensor.name] == tensor
