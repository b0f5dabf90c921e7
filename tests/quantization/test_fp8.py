"""FP8: rounding, placement, calibration, lint, and results in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core.errors import UnknownNameError
from rtresnet.onnxlib.graph import copied
from rtresnet.onnxlib.interface import precision_of
from rtresnet.quantization import calibrators, placement, qdq
from rtresnet.quantization.calibrate import Calibrated, calibrate, hold_out, references
from rtresnet.quantization.calibrators import Histogram
from rtresnet.quantization.half import to_half
from rtresnet.quantization.lint import lint
from rtresnet.quantization.number_formats import FP8, INT8, quantize_weight, weight_scales
from rtresnet.quantization.sensitivity import sensitivity
from rtresnet.quantization.simulate import Simulation, make_session, noise_ratio

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def calibrated(exported: Exported, images: Images) -> Calibrated:
    model = exported("resnet8", 32)
    stem = placement.stem(model.graph.node)
    return calibrate(
        model, list(qdq.placement(model, stem)), lambda: [images(32, 32)],
        number_format=FP8, float_nodes=stem,
    )  # fmt: skip


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    result: np.ndarray = make_session(model).run(None, {model.graph.input[0].name: images})[0]
    return result


class TestRounding:
    def test_every_finite_value_of_the_format_stays(self) -> None:
        values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        values = values[np.isfinite(values)]
        assert len(values) == 254
        assert np.array_equal(FP8.round(values), values)

    def test_other_values_are_rounded_half_to_even_and_clipped(self) -> None:
        rng = np.random.default_rng(0)
        values = (rng.standard_normal(20000) * 10.0 ** rng.uniform(-4, 3, 20000)).astype(np.float32)
        expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        assert np.array_equal(FP8.round(values), expected)
        assert FP8.round(np.array([17.0, 19.0, 1e9, -1e9])).tolist() == [16, 20, 448, -448]

    def test_weight_scales_reach_448_in_each_channel(self) -> None:
        weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
        weight[2] = 0
        scales = weight_scales(weight, FP8)
        stored = quantize_weight(weight, scales, FP8)
        assert stored.dtype == ml_dtypes.float8_e4m3fn
        peaks = np.abs(stored.astype(np.float32)).reshape(4, -1).max(1)
        assert peaks.tolist() == [448, 448, 0, 448]
        assert scales[2] == 1


class TestCalibrators:
    def histogram(self) -> Histogram:
        histogram = Histogram("x")
        histogram.add(np.random.default_rng(0).standard_normal((64, 8, 8, 8)).astype(np.float32))
        return histogram

    def test_entropy_is_for_int8_only(self, exported: Exported, images: Images) -> None:
        assert "entropy" in calibrators.methods(INT8)
        assert "entropy" not in calibrators.methods(FP8)
        model = exported("resnet8", 32)
        with pytest.raises(UnknownNameError):
            calibrate(model, [], lambda: [images(1, 32)], "entropy", number_format=FP8)

    def test_mse_has_the_least_noise_of_all_methods(self) -> None:
        histogram = self.histogram()
        noises = {
            name: calibrators.noise(
                histogram, calibrators.scale(calibrators.METHODS[name](histogram, FP8), FP8), FP8
            )
            for name in calibrators.methods(FP8)
        }
        assert noises["mse"] == min(noises.values())
        assert 10 * np.log10(1 / noises["mse"]) == pytest.approx(
            31.5, abs=1.5
        )  # 3 bits of mantissa


class TestFile:
    def test_pairs_and_weights_are_fp8_and_the_stem_is_float(self, calibrated: Calibrated) -> None:
        model = calibrated.quantized()
        onnx.checker.check_model(model, full_check=True)
        assert {o.version for o in model.opset_import} == {21}
        stored = {t.name: t for t in model.graph.initializer}
        convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
        assert not convolutions[0].input[1].endswith(".dq")
        assert stored[convolutions[0].input[1]].data_type == TensorProto.FLOAT
        for node in convolutions[1:]:
            weight = stored[node.input[1].removesuffix(".dq")]
            assert weight.data_type == TensorProto.FLOAT8E4M3FN
            assert list(stored[f"{weight.name}.scale"].dims) == [weight.dims[0]]
            activation = node.input[0].removesuffix(".dq")
            scale, zero = (stored[f"{activation}.{end}"] for end in ("scale", "zero_point"))
            assert scale.data_type == TensorProto.FLOAT and not scale.dims
            assert zero.data_type == TensorProto.FLOAT8E4M3FN and not zero.dims
        assert precision_of(model) == "fp8"

    @pytest.mark.parametrize("half", [False, True])
    def test_it_computes_about_what_the_float_net_does(
        self, calibrated: Calibrated, images: Images, half: bool
    ) -> None:
        batch = images(8, 32, seed=5)
        model = calibrated.quantized()
        logits = run(to_half(model) if half else model, batch)
        assert noise_ratio(run(calibrated.model, batch), logits) > 20

    def test_the_simulation_is_the_file(self, calibrated: Calibrated, images: Images) -> None:
        batch = images(8, 32, seed=5)
        simulation = Simulation(
            calibrated.model, calibrated.float_nodes, calibrated.bias_corrections, FP8
        )
        assert np.array_equal(
            simulation.logits([batch], calibrated.scales), run(calibrated.quantized(), batch)
        )

    def test_an_older_opset_is_raised_with_the_names_kept(self, exported: Exported) -> None:
        model = exported("resnet8", 32)
        scales = dict.fromkeys(qdq.placement(model), 0.1)
        model = copied(model)
        model.opset_import[0].version = 17
        quantized = qdq.insert(model, scales, number_format=FP8)
        names = {node.name for node in quantized.graph.node}
        assert {node.name for node in model.graph.node} <= names


class TestMixed:
    def blocks(self, model: onnx.ModelProto, start: str) -> list[str]:
        return [node.name for node in model.graph.node if node.name.startswith(start)]

    def test_int8_nodes_read_int8_with_the_same_clipping_points(
        self, calibrated: Calibrated
    ) -> None:
        model = calibrated.quantized(int8_nodes=self.blocks(calibrated.model, "layer2"))
        stored = arrays(model)
        assert stored["layer2.0.conv1.weight"].dtype == np.int8
        assert stored["layer1.0.conv1.weight"].dtype == ml_dtypes.float8_e4m3fn
        source = "layer1.0.relu2"
        conv = next(n for n in model.graph.node if n.name == "layer2.0.conv1")
        assert conv.input[0] == f"{source}.int8.dq"
        assert stored[f"{source}.int8.scale"] * 127 == pytest.approx(
            calibrated.scales[source] * 448, rel=1e-6
        )
        assert not [entry for entry in lint(model) if entry.severity != "note"]

    def test_the_simulation_is_the_file(self, calibrated: Calibrated, images: Images) -> None:
        int8 = self.blocks(calibrated.model, "layer2")
        batch = images(8, 32, seed=5)
        simulation = Simulation(
            calibrated.model, calibrated.float_nodes, calibrated.bias_corrections, FP8, int8
        )
        file = run(calibrated.quantized(int8_nodes=int8), batch)
        assert np.array_equal(simulation.logits([batch], calibrated.scales), file)

    def test_sensitivity_compares_int8_and_leaves_the_stem_out(
        self, calibrated: Calibrated, images: Images
    ) -> None:
        held_out, logits = references(calibrated.model, [images(16, 32)])
        ranked = sensitivity(calibrated, held_out, logits)
        assert {block.name for block in ranked} == {"layer1.0", "layer2.0", "layer3.0", "head"}
        assert all(block.int8_gain is not None for block in ranked)
        assert hold_out([]) is not None


def retyped(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


class TestLint:
    @pytest.fixture
    def model(self, calibrated: Calibrated) -> onnx.ModelProto:
        model = calibrated.quantized()
        del model.graph.value_info[:]
        return model

    def rules(self, model: onnx.ModelProto) -> set[tuple[str, str]]:
        results = {(entry.severity, entry.rule) for entry in lint(model)}
        assert ("note", "fp8-targets") in results
        return results - {("note", "fp8-targets")}

    @pytest.mark.parametrize("half", [False, True])
    def test_our_own_file_gets_only_the_note_on_targets(
        self, model: onnx.ModelProto, half: bool
    ) -> None:
        assert self.rules(to_half(model) if half else model) == set()

    def test_e5m2_is_an_error(self, model: onnx.ModelProto) -> None:
        retyped(model, "layer1.0.relu1.zero_point", np.zeros((), ml_dtypes.float8_e5m2))
        assert ("error", "fp8-type") in self.rules(model)

    def test_a_missing_zero_point_is_an_error_where_the_type_is_unknown(
        self, model: onnx.ModelProto
    ) -> None:
        for node in model.graph.node:
            if node.name in ("layer1.0.relu1.q", "layer1.0.relu1.dq"):
                del node.input[2:]
        assert {("error", "no-zero-point"), ("error", "mixed-kernel")} <= self.rules(model)
        quantize = next(n for n in model.graph.node if n.name == "layer1.0.relu1.q")
        quantize.attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT8E4M3FN))
        assert self.rules(model) == {("note", "no-zero-point")}

    def test_a_zero_point_other_than_zero_is_an_error(self, model: onnx.ModelProto) -> None:
        retyped(model, "layer1.0.relu1.zero_point", np.array(1, ml_dtypes.float8_e4m3fn))
        assert ("error", "zero-point") in self.rules(model)

    def test_a_scale_that_leaves_fp16_is_an_error(self, model: onnx.ModelProto) -> None:
        retyped(model, "layer1.0.relu1.scale", np.array(200, np.float32))
        assert self.rules(model) == set()  # 448 * 200 is a number in FP32
        assert self.rules(to_half(model)) == {("error", "fp8-overflow")}

    def test_a_clipped_float_weight_is_a_warning(self, model: onnx.ModelProto) -> None:
        name = "layer1.0.conv1.weight"
        stored = arrays(model)
        weight = stored[name].astype(np.float32) * stored[f"{name}.scale"].reshape(-1, 1, 1, 1)
        retyped(model, name, weight)
        dequantize = next(n for n in model.graph.node if n.name == f"{name}.dq")
        quantize = helper.make_node(
            "QuantizeLinear", list(dequantize.input), [f"{name}.q"], f"{name}.q", axis=0
        )
        dequantize.input[0] = f"{name}.q"
        model.graph.node.insert(list(model.graph.node).index(dequantize), quantize)
        assert self.rules(model) == set()
        retyped(model, f"{name}.scale", stored[f"{name}.scale"] / 2)
        assert self.rules(model) == {("warning", "fp8-overflow")}

    def test_int8_and_fp8_at_one_addition_is_a_warning(self, model: onnx.ModelProto) -> None:
        add = next(n for n in model.graph.node if n.op_type == "Add")
        index = 0 if add.input[1].endswith(".dq") else 1
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(0.1, np.float32), "s"),
                numpy_helper.from_array(np.array(0, np.int8), "z"),
            ]
        )
        pair = [
            helper.make_node("QuantizeLinear", [add.input[index], "s", "z"], ["q"], "q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], "dq"),
        ]
        position = list(model.graph.node).index(add)
        for node in reversed(pair):
            model.graph.node.insert(position, node)
        add.input[index] = "dq"
        assert {("warning", "mixed-add"), ("warning", "add-both")} == self.rules(model)
