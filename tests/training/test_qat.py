"""Quantization-aware fine-tuning: the exported file computes what was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rtresnet.cli.main import main
from rtresnet.core.artifacts import read_sidecar
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import checkpoint, zoo
from rtresnet.models.resnet import ResNet
from rtresnet.onnxlib import metadata
from rtresnet.quantization import number_formats, placement, qdq
from rtresnet.quantization.calibrate import MinMaxObserver
from rtresnet.quantization.number_formats import FP8, INT8, NumberFormat
from rtresnet.quantization.simulate import make_session, noise_ratio
from rtresnet.training import qat
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import ALONE
from rtresnet.training.loader import MicroBatch
from rtresnet.training.step import Stepper
from tests.conftest import tinted_noise, undescribed

pytest.importorskip("onnxruntime")


def net_of(name: str, **options: str | None) -> ResNet:
    """Return a net with active batch norms; scales may be negative."""
    torch.manual_seed(0)
    net = zoo.build(zoo.spec(name, **options))
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                norm.weight.uniform_(0.5, 1.5)
                norm.weight *= torch.where(torch.rand_like(norm.weight) < 0.3, -1.0, 1.0)
                norm.bias.normal_(0, 0.2)
    return net.eval()


def images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fake_of(name: str, number_format: NumberFormat = INT8) -> qat.FakeQuantized:
    fake = qat.FakeQuantized(net_of(name), number_format.name)
    qat.calibrate(fake, [images(16)])
    return fake


def micro(count: int = 16) -> MicroBatch:
    labels = torch.arange(count) % 10
    return MicroBatch(inputs=images(count, seed=1), labels=labels, others=labels, share=1.0)


def stepper(fake: qat.FakeQuantized, lr: float = 0.01, **fields: object) -> Stepper:
    recipe = Recipe(epochs=1, batch=16, lr=lr, qat=True, precision="fp32", **fields)  # type: ignore[arg-type]
    return Stepper(fake, recipe, ALONE, "cpu")


class TestPlaces:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("resnet20", {}),  # option A: Slice and Pad on the shortcut
            ("resnet18", {}),  # option B, max pool
            ("resnet50", {}),  # bottlenecks
            ("resnet50", {"stride_in": "1x1"}),
            ("resnet14", {"shortcut": "C"}),
            ("plain20", {}),
        ],
    )
    def test_they_are_where_the_file_has_its_pairs(
        self, name: str, options: dict[str, str]
    ) -> None:
        net = net_of(name, **options)
        fake = qat.FakeQuantized(net)
        written = qdq.placement(to_onnx(fold(net), size=64, name=name))
        assert list(fake.places) == list(written)
        assert fake.uses == {(use.node, use.index) for uses in written.values() for use in uses}

    @pytest.mark.parametrize(
        ("name", "side"), [("resnet20", None), ("resnet18", None), ("resnet8", 32)]
    )
    def test_in_fp8_the_first_convolution_stays_in_float(self, name: str, side: int | None) -> None:
        net = zoo.build(zoo.spec(name), mean_image=side).eval()
        fake = qat.FakeQuantized(net, "fp8")
        model = to_onnx(fold(net, side or 64), size=side or 64, name=name)
        stem = placement.stem(model.graph.node)
        assert stem == ("conv1",)  # also where the mean image is subtracted before it
        assert list(fake.places) == list(qdq.placement(model, stem))
        assert ("conv1", 0) not in fake.uses

    def test_the_float_net_is_the_net(self) -> None:
        for name in ("resnet20", "resnet14", "plain8"):
            fake, tensors = qat.FakeQuantized(net_of(name)), list[str]()

            def look(
                tensor: str, values: torch.Tensor, tensors: list[str] = tensors
            ) -> torch.Tensor:
                tensors.append(tensor)
                return values

            with torch.no_grad():
                torch.testing.assert_close(fake.observe(images(4), look), fake.net(images(4)))
            assert tensors == list(fake.places)  # each once, whoever reads it


class TestRounding:
    @pytest.mark.parametrize("shape", [(8, 3, 3, 3), (10, 64)])
    def test_fp8_weights_are_the_files_bit_for_bit(self, shape: tuple[int, ...]) -> None:
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        weight[0] = 0
        weight[1] *= 1e-40
        weight[2] *= np.float32(10.0) ** np.random.default_rng(1).uniform(-4, 0, weight[2].shape)
        weight[3].flat[:4] = 448, 17, 19, 0.0009765625  # scale 1, ties
        scales = number_formats.weight_scales(weight, FP8)
        stored = number_formats.quantize_weight(weight, scales, FP8).astype(np.float32)
        expected = stored * scales.reshape((-1,) + (1,) * (len(shape) - 1))
        bias = torch.ones(shape[0])
        got = qat.rounded(torch.from_numpy(weight), bias, torch.tensor(0.1), FP8)
        assert np.array_equal(got[0].numpy(), expected) and got[1] is bias

    @pytest.mark.parametrize("shape", [(8, 3, 3, 3), (10, 64)])
    def test_weights_are_the_files_bit_for_bit(self, shape: tuple[int, ...]) -> None:
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        weight[0] = 0
        weight[1] *= 1e-40  # less than a float32 scale can say
        weight[2].flat[:3] = 127, 0.5, 1.5  # scale 1, and ties
        bias = np.random.default_rng(1).standard_normal(shape[0]).astype(np.float32)
        scales, scale = (
            number_formats.low_bit_weight_scales(number_formats.weight_scales(weight)),
            np.float32(0.0391),
        )
        stored = number_formats.quantize_weight(weight, scales).astype(np.float32)
        expected = stored * scales.reshape((-1,) + (1,) * (len(shape) - 1))
        got = qat.rounded(*map(torch.from_numpy, (weight, bias)), torch.tensor(scale))
        assert np.array_equal(got[0].numpy(), expected)
        assert np.array_equal(
            got[1].numpy(), number_formats.low_bit_bias(bias, float(scale), scales)
        )

    @pytest.mark.parametrize("number_format", [INT8, FP8], ids=lambda kind: kind.name)
    def test_activations_are_onnx_runtimes_bit_for_bit(self, number_format: NumberFormat) -> None:
        rng, scale = np.random.default_rng(0), np.float32(0.0373)
        values = rng.normal(0, 3, (40, 5, 6, 7)).astype(np.float32)
        values[20:] *= np.float32(10.0) ** rng.uniform(-5, 1, values[20:].shape)  # subnormal in FP8
        ties = (np.arange(-600, 600) / 2 + 0.5).astype(np.float32) * scale
        values.flat[: len(ties)] = ties
        assert np.abs(values).max() > number_format.largest * scale
        zero = np.zeros((), number_format.dtype)
        pair = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ]
        graph = helper.make_graph(
            pair,
            "pair",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
            [
                numpy_helper.from_array(np.array(scale), "scale"),
                numpy_helper.from_array(zero, "zero"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        expected = make_session(model).run(None, {"x": values})[0]
        got = qat.quantized(torch.from_numpy(values), torch.tensor(scale), number_format)
        assert np.array_equal(got.numpy(), expected)

    def test_gradients(self) -> None:
        values = torch.tensor([[0.2, 1.3, -0.6, 300.0, -300.0]], requires_grad=True)
        scale = torch.tensor(1.0, requires_grad=True)
        weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
        (qat.quantized(values, scale) * weights).sum().backward()
        assert values.grad is not None and values.grad.tolist() == [[1, 2, 3, 0, 0]]
        # Rounded minus exact inside, the bound outside.
        expected = (-0.2) * 1 + (-0.3) * 2 + (-0.4) * 3 + 127 * 4 - 128 * 5
        assert scale.grad is not None
        assert float(scale.grad) == pytest.approx(expected / (127 * 5) ** 0.5)

        values.grad = scale.grad = None
        wide = torch.tensor([[0.2, 17.0, -0.6, 500.0, -500.0]], requires_grad=True)
        (qat.quantized(wide, scale, FP8) * weights).sum().backward()
        assert wide.grad is not None and wide.grad.tolist() == [[1, 2, 3, 0, 0]]
        # 0.2 to 0.203125, 17 to 16, 0.6 to 0.625.
        expected = 0.003125 * 1 + (-1) * 2 + (-0.025) * 3 + 448 * 4 - 448 * 5
        assert float(scale.grad) == pytest.approx(expected / (448 * 5) ** 0.5)

        weight = torch.randn(4, 3, 3, 3, requires_grad=True)
        bias = torch.randn(4, requires_grad=True)
        used = qat.rounded(weight, bias, scale)
        (used[0].sum() + used[1].sum()).backward()
        assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))
        assert bias.grad is not None and torch.equal(bias.grad, torch.ones_like(bias))

        scales = torch.tensor([0.0391, 2.7], requires_grad=True)
        rounded = qat.exact_scales(scales)
        assert rounded.tolist() == [0.0390625, 2.5]
        (rounded * torch.tensor([2.0, 3.0])).sum().backward()
        assert scales.grad is not None and scales.grad.tolist() == [2, 3]


class TestLearning:
    @pytest.mark.parametrize("number_format", [INT8, FP8], ids=lambda kind: kind.name)
    def test_a_step_changes_weights_and_scales_and_no_statistics(
        self, number_format: NumberFormat
    ) -> None:
        fake = fake_of("resnet8", number_format)
        before = {name: tensor.clone() for name, tensor in fake.state_dict().items()}
        learner = stepper(fake)
        learner.train()
        learner.step([micro()], lr=0.01)
        for name, tensor in fake.state_dict().items():
            statistic = "running_" in name or "num_batches" in name
            assert torch.equal(tensor, before[name]) == statistic, name
        assert not (fake.scales == before["scales"]).any()

    def test_a_scale_learns_to_be_neither_too_large_nor_too_small(self) -> None:
        values = images(4)
        good = values.abs().max() / 127
        for factor in (8, 1 / 8):
            scale = (good * factor).requires_grad_()
            (qat.quantized(values, scale) - values).square().mean().backward()
            assert scale.grad is not None and (scale.grad > 0) == (factor > 1)

    def test_no_rate_makes_a_scale_zero_or_less(self) -> None:
        fake = fake_of("resnet8")
        before = fake.scales.detach().clone()
        learner = stepper(fake, lr=90.0)
        learner.step([micro()], lr=90.0)
        assert (fake.scales >= before / 2).all() and (fake.scales == before / 2).any()

    @pytest.mark.parametrize("norms", [True, False])
    def test_scales_do_not_decay(self, norms: bool) -> None:
        fake = fake_of("resnet8")
        groups = stepper(fake, weight_decay=0.1, decay_norms=norms).optimizer.param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decay[id(fake.scales)] == 0
        assert decay[id(fake.net.bn1.weight)] == (0.1 if norms else 0)
        assert decay[id(fake.net.conv1.weight)] == 0.1
        assert len(decay) == len(list(fake.parameters()))

    def test_precision_and_statistics_that_do_not_go_with_it_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"precision=bf16.*--set precision=fp32"):
            Recipe(epochs=1, qat=True, precision="bf16")
        with pytest.raises(InputError, match=r"bn_images=100.*--set bn_images=0"):
            Recipe(epochs=1, qat=True, bn_images=100)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, trained: Path, tints: str) -> Path:
    """A folder with runs/tuned, a fine-tuned net, and engines/, its FP32 and INT8 files."""
    folder = tmp_path_factory.mktemp("qat")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tune(trained, tints, folder / "runs/tuned") == 0
        weights = ["--weights", "runs/tuned/best.pt"]
        assert main(["export", *weights, "--int8", "--no-plan"]) == 0
    return folder


def tune(trained: Path, data: str, out: Path, *more: str, name: str = "best.pt") -> int:
    return main(["train", "--weights", str(trained / name), "--data", data, "--qat",
                 "--epochs", "1", "--out", str(out), *more])  # fmt: skip


def of_checkpoint(path: Path) -> qat.FakeQuantized:
    saved = checkpoint.load(path)
    assert saved.learned is not None
    fake = qat.FakeQuantized(saved.net(), saved.learned.format)
    fake.set_scales(saved.learned.scales)
    return fake


class TestTheFile:
    def test_it_is_what_the_rules_make_of_the_float_file_with_the_learned_scales(
        self, tuned: Path
    ) -> None:
        saved = checkpoint.load(tuned / "runs/tuned/best.pt")
        assert saved.learned is not None
        fp32 = onnx.load(tuned / "engines/resnet8.onnx")
        expected = qdq.insert(fp32, saved.learned.scales, low_bit=True)
        metadata.BRANCH_RANGES.set(expected, saved.learned.branches)
        assert undescribed(onnx.load(tuned / "engines/resnet8-int8.onnx")) == undescribed(expected)
        constants = {t.name: numpy_helper.to_array(t) for t in expected.graph.initializer}
        for name, scale in of_checkpoint(tuned / "runs/tuned/best.pt").named_scales().items():
            assert float(constants[f"{name}.scale"]) == number_formats.low_bit_scale(scale)

    def test_it_says_how_far_its_branches_went(self, tuned: Path) -> None:
        """As the file itself computes them, on the images that the run took for it."""
        fake = of_checkpoint(tuned / "runs/tuned/best.pt").eval()
        fp32 = onnx.load(tuned / "engines/resnet8.onnx")
        ends = MinMaxObserver(fp32)
        saved = checkpoint.load(tuned / "runs/tuned/best.pt")
        assert saved.learned is not None
        assert list(saved.learned.branches) == list(ends.ranges) == list(fake.branches)
        assert all(low < 0 < high for low, high in saved.learned.branches.values())
        batch = images(16)
        result = qat.branch_ranges(fake, [batch[:7], batch[7:]])
        model = onnx.load(tuned / "engines/resnet8-int8.onnx")
        running = make_session(model, ends.outputs, ends.nodes)
        ends.add(running.run(None, {"images": batch.numpy()}))
        for name, pair in ends.ranges.items():
            assert result[name] == pytest.approx(pair, rel=1e-5)

    def test_its_weights_are_those_that_were_trained(self, tuned: Path) -> None:
        model = onnx.load(tuned / "engines/resnet8-int8.onnx")
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        fake, count = of_checkpoint(tuned / "runs/tuned/best.pt"), 0
        for operation in fake.operations:
            module = fake.net.get_submodule(operation.name)
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            weight, bias = module.weight, module.bias
            if isinstance(module, nn.Conv2d):
                norm = fake.net.get_submodule(operation.norm)
                assert isinstance(norm, nn.BatchNorm2d)
                weight, bias = qat.folded(module, norm)
            stored = constants[f"{operation.name}.weight"].astype(np.float32)
            scales = constants[f"{operation.name}.weight.scale"]
            stored *= scales.reshape((-1,) + (1,) * (stored.ndim - 1))
            scale = torch.tensor(constants[f"{operation.input[0]}.scale"])
            used = qat.rounded(weight, bias, scale)
            assert np.array_equal(used[0].detach().numpy(), stored)
            assert np.array_equal(used[1].detach().numpy(), constants[f"{operation.name}.bias"])
            count += 1
        assert count == 8

    def test_it_agrees_with_the_net_that_was_trained(self, tuned: Path) -> None:
        fake = of_checkpoint(tuned / "runs/tuned/best.pt")
        pixels, _ = tinted_noise(400, seed=9)
        batch = checkpoint.load(tuned / "runs/tuned/best.pt").input.normalize(pixels)
        model = onnx.load(tuned / "engines/resnet8-int8.onnx")
        written = make_session(model).run(None, {"images": batch})[0]
        with torch.inference_mode():
            tensor = torch.from_numpy(batch)
            trained, plain = fake(tensor).numpy(), fake.net.eval()(tensor).numpy()
        assert np.array_equal(written, trained)  # bit for bit, whatever order sums are made in
        assert noise_ratio(plain, trained) < 50  # and that is not because nothing was rounded

    def test_the_sidecars_and_the_scales_file_tell(self, tuned: Path) -> None:
        saved = checkpoint.load(tuned / "runs/tuned/best.pt")
        assert saved.learned is not None and saved.learned.n == 192
        origin = read_sidecar(tuned / "runs/tuned/best.pt")
        result = read_sidecar(tuned / "engines/resnet8-int8.onnx")
        plain = read_sidecar(tuned / "engines/resnet8.onnx")
        assert origin and origin.calibration and result and result.calibration and plain
        assert origin.calibration.method == result.calibration.method == "qat"
        assert origin.calibration.images_sha256 == result.calibration.images_sha256
        assert (result.calibration.n, result.precision, plain.precision) == (192, "int8", "fp32")
        assert plain.calibration is None
        written = json.loads((tuned / result.calibration.scales).read_text())
        assert written["scales"] == {
            name: number_formats.low_bit_scale(scale)
            for name, scale in saved.learned.scales.items()
        }

    def test_without_int8_it_is_the_float_net(self, tuned: Path) -> None:
        net = checkpoint.load(tuned / "runs/tuned/best.pt").net()
        model, batch = onnx.load(tuned / "engines/resnet8.onnx"), images(8)
        got = make_session(model).run(None, {"images": batch.numpy()})[0]
        with torch.inference_mode():
            expected = net(batch).numpy()
        assert noise_ratio(expected, got) > 100

    @pytest.mark.parametrize(
        ("verb", "more", "message"),
        [
            (["export", "--weights", "runs/tuned/best.pt", "--no-plan"], ["--calib", "DATA"],
             "learned in training"),
            (["export", "--weights", "runs/tuned/best.pt", "--no-plan"], ["--calibrator", "max"],
             "leave --calibrator max out"),
            (["quantize", "engines/resnet8.onnx"], ["--calib", "none"], "leave --calib none out"),
            (["quantize", "engines/resnet8.onnx"], ["--eval", "DATA"], "leave --eval out"),
        ],
    )  # fmt: skip
    def test_calibration_does_not_replace_what_was_learned(
        self, verb: list[str], more: list[str], message: str, tuned: Path, tints: str,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tuned)
        before = (tuned / "engines/resnet8-int8.onnx").read_bytes()
        options = [tints if option == "DATA" else option for option in more]
        assert main([*verb, "--int8", *options]) == 2
        assert message in capsys.readouterr().err
        assert (tuned / "engines/resnet8-int8.onnx").read_bytes() == before

    def test_quantizing_the_float_file_makes_the_same(
        self, tuned: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tuned)
        assert main(["quantize", "engines/resnet8.onnx", "--out", "again.onnx"]) == 0
        again, first = onnx.load("again.onnx"), onnx.load("engines/resnet8-int8.onnx")
        assert undescribed(again) == undescribed(first)


@pytest.fixture(scope="module")
def tuned_fp8(tmp_path_factory: pytest.TempPathFactory, trained: Path, tints: str) -> Path:
    """A folder with runs/tuned, a net fine-tuned for FP8, and engines/, its files."""
    folder = tmp_path_factory.mktemp("qat-fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tune(trained, tints, folder / "runs/tuned", "--precision", "fp8") == 0
        weights = ["--weights", "runs/tuned/best.pt"]
        assert main(["export", *weights, "--fp8", "--no-plan"]) == 0
        assert main(["quantize", "engines/resnet8.onnx", "--fp8", "--float-dtype", "fp32",
                     "--out", "wide.onnx"]) == 0  # fmt: skip
    return folder


class TestFp8:
    def test_the_run_says_what_it_trained_for(self, tuned_fp8: Path) -> None:
        saved = checkpoint.load(tuned_fp8 / "runs/tuned/best.pt")
        recipe = saved.training["recipe"]
        assert (recipe["qat"], recipe["qat_format"], recipe["precision"]) == (True, "fp8", "fp32")
        assert saved.learned is not None and saved.learned.format == "fp8"
        assert "images" not in saved.learned.scales  # the first convolution is in float
        assert saved.measured["test_top1"] > 90

    def test_the_file_has_the_trained_scales_and_weights(self, tuned_fp8: Path) -> None:
        fake = of_checkpoint(tuned_fp8 / "runs/tuned/best.pt")
        fp32 = onnx.load(tuned_fp8 / "engines/resnet8.onnx")
        expected = qdq.insert(fp32, fake.named_scales(), ["conv1"], number_format=FP8)
        assert undescribed(onnx.load(tuned_fp8 / "wide.onnx")) == undescribed(expected)
        constants = {t.name: numpy_helper.to_array(t) for t in expected.graph.initializer}
        for name, scale in fake.named_scales().items():
            assert constants[f"{name}.scale"] == np.float32(scale)
        half = onnx.load(tuned_fp8 / "engines/resnet8-fp8.onnx")
        again = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
        for name, values in constants.items():
            if name.endswith(".scale") or values.dtype == FP8.dtype:
                assert again[name].tobytes() == values.tobytes(), name
        record = read_sidecar(tuned_fp8 / "engines/resnet8-fp8.onnx")
        assert record and record.calibration and record.calibration.method == "qat"
        assert record.calibration.kept == ("conv1",)

    @pytest.mark.parametrize(
        ("file", "margin", "agreeing"),
        # Between the kernels of the second file is FP16, whose rounding training does not simulate.
        [("wide.onnx", 20, 0.99), ("engines/resnet8-fp8.onnx", 8, 0.98)],
    )
    def test_the_file_computes_what_was_trained_but_for_borders(
        self, file: str, margin: float, agreeing: float, tuned_fp8: Path
    ) -> None:
        """Float32 sums in another order move few values over the border between two of FP8."""
        fake = of_checkpoint(tuned_fp8 / "runs/tuned/best.pt")
        pixels, _ = tinted_noise(400, seed=9)
        batch = checkpoint.load(tuned_fp8 / "runs/tuned/best.pt").input.normalize(pixels)
        written = make_session(onnx.load(tuned_fp8 / file)).run(None, {"images": batch})[0]
        with torch.inference_mode():
            tensor = torch.from_numpy(batch)
            trained, plain = fake(tensor).numpy(), fake.net.eval()(tensor).numpy()
        assert noise_ratio(trained, written) > noise_ratio(plain, trained) + margin
        assert (trained.argmax(1) == written.argmax(1)).mean() >= agreeing

    def test_each_operation_is_the_files_to_the_last_bits(self, tuned_fp8: Path) -> None:
        """Given the file's own inputs, so that nothing adds up."""
        fake = of_checkpoint(tuned_fp8 / "runs/tuned/best.pt").eval()
        model = onnx.load(tuned_fp8 / "wide.onnx")
        nodes = {node.name: node for node in model.graph.node}
        convolutions = [op for op in fake.operations if op.op_type == "Conv"]
        names = [name for op in convolutions for name in (nodes[op.name].input[0], op.name)]
        inner = [name for name in dict.fromkeys(names) if name != "images"]
        pixels, _ = tinted_noise(64, seed=9)
        batch = checkpoint.load(tuned_fp8 / "runs/tuned/best.pt").input.normalize(pixels)
        output = make_session(model, inner).run(inner, {"images": batch})
        values = {"images": batch, **dict(zip(inner, output, strict=True))}
        scales = fake.named_scales()
        for op in convolutions:
            source = torch.from_numpy(values[nodes[op.name].input[0]])

            def weights(
                name: str, weight: torch.Tensor, bias: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return qat.rounded(weight, bias, torch.tensor(scales[name]), FP8)

            with torch.inference_mode():
                got = fake._operate(op, [source], weights).numpy()
            scale = np.abs(values[op.name]).max()
            assert np.abs(got - values[op.name]).max() < 1e-5 * scale, op.name

    @pytest.mark.parametrize(
        ("verb", "message"),
        [
            (["export", "--weights", "runs/tuned/best.pt", "--no-plan", "--int8"], "use --fp8"),
            (["export", "--weights", "runs/tuned/best.pt", "--no-plan", "--fp8", "--fp8-stem"],
             "leave --fp8-stem out"),
            (["export", "--weights", "runs/tuned/best.pt", "--no-plan", "--fp8",
              "--calibrator", "max"], "leave --calibrator max out"),
            (["quantize", "engines/resnet8.onnx", "--int8"], "use --fp8"),
        ],
    )  # fmt: skip
    def test_other_rounding_is_refused(
        self, verb: list[str], message: str, tuned_fp8: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tuned_fp8)
        assert main([*verb, "--out", "elsewhere/x.onnx"]) == 2
        assert message in capsys.readouterr().err
        assert not list(Path("elsewhere").glob("*.onnx"))

    def test_a_run_goes_on_in_the_other_format_from_new_scales(
        self, tuned_fp8: Path, tints: str, tmp_path: Path
    ) -> None:
        slow = ["--lr", "1e-9", "--set", "steps=1"]
        before = checkpoint.load(tuned_fp8 / "runs/tuned/best.pt").learned
        assert (
            tune(tuned_fp8 / "runs/tuned", tints, tmp_path / "a", *slow, "--precision", "fp8") == 0
        )
        after = checkpoint.load(tmp_path / "a/best.pt").learned
        assert before and after and after.scales == pytest.approx(before.scales, rel=1e-5)
        assert tune(tuned_fp8 / "runs/tuned", tints, tmp_path / "b", *slow) == 0
        other = checkpoint.load(tmp_path / "b/best.pt").learned
        assert other is not None and other.format == "int8" and "images" in other.scales


class TestTheRun:
    @pytest.mark.parametrize(("ema", "precision"), [("0.9", "int8"), ("0", "int8"), ("0.9", "fp8")])
    def test_an_interrupted_one_comes_to_the_same(
        self, ema: str, precision: str, trained: Path, tints: str, tmp_path: Path,
        interrupt_in: Callable[[int], None],
    ) -> None:  # fmt: skip
        options = ["--set", f"ema={ema}", "--set", "steps=4", "--precision", precision]
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert tune(trained, tints, whole, *options) == 0
        interrupt_in(2)
        assert tune(trained, tints, cut, *options) == 130
        assert main(["train", "--out", str(cut), "--resume"]) == 0
        for name in ("best.pt", "last.pt"):
            a, b = checkpoint.load(whole / name), checkpoint.load(cut / name)
            assert a.learned == b.learned and a.learned is not None
            assert all(torch.equal(tensor, b.state[key]) for key, tensor in a.state.items())
        assert a.training["step"] == b.training["step"] == 4

    def test_a_run_learns_from_the_calibrated_scales(self, trained: Path, tuned: Path) -> None:
        saved = checkpoint.load(tuned / "runs/tuned/best.pt")
        recipe = saved.training["recipe"]
        assert (recipe["name"], recipe["qat"], recipe["precision"]) == ("qat", True, "fp32")
        assert recipe["lr"] < 0.01
        start = checkpoint.load(trained / "best.pt")
        moved = [
            name for name in start.state if not torch.equal(start.state[name], saved.state[name])
        ]
        assert moved and not any("running_" in name for name in moved)
        assert saved.measured["test_top1"] > 90

    def test_it_can_be_gone_on_with_for_int8_or_in_float(
        self, tuned: Path, tints: str, tmp_path: Path
    ) -> None:
        before = checkpoint.load(tuned / "runs/tuned/best.pt")
        slow = ["--lr", "1e-9", "--set", "steps=1"]
        assert tune(tuned / "runs/tuned", tints, tmp_path / "int8", *slow) == 0
        after = checkpoint.load(tmp_path / "int8/best.pt")
        assert before.learned and after.learned
        assert after.learned.scales == pytest.approx(before.learned.scales, rel=1e-5)
        weights = ["--weights", str(tuned / "runs/tuned/best.pt"), "--data", tints]
        assert main(["train", *weights, *slow, "--out", str(tmp_path / "float")]) == 0
        assert checkpoint.load(tmp_path / "float/best.pt").learned is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "name it with --weights FILE"),
            (["--weights", "WEIGHTS", "--set", "precision=bf16"], "--set precision=fp32"),
            (["--weights", "WEIGHTS", "--recipe", "paper-imagenet"], "--set bn_images=0"),
            (["--weights", "WEIGHTS", "--precision", "bf16"], "--set precision=fp32"),
        ],
    )
    def test_refused(
        self, options: list[str], message: str, trained: Path, tints: str, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        arguments = [
            str(trained / "best.pt") if option == "WEIGHTS" else option for option in options
        ]
        out = tmp_path / "run"
        assert main(["train", "--qat", "--data", tints, "--out", str(out), *arguments]) == 2
        assert message in capsys.readouterr().err and not out.exists()

    @pytest.mark.parametrize("options", [["--precision", "fp8"], ["--precision", "int8"],
                                         ["--set", "qat_format=fp8"]])  # fmt: skip
    def test_a_number_format_without_qat_is_refused(
        self, options: list[str], trained: Path, tints: str, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        out = tmp_path / "run"
        command = ["train", "--data", tints, "--weights", str(trained / "best.pt")]
        assert main([*command, "--out", str(out), *options]) == 2
        assert "--qat" in capsys.readouterr().err and not out.exists()

    def test_precision_without_qat_is_the_recipes(
        self, trained: Path, tints: str, tmp_path: Path
    ) -> None:
        command = ["train", "--data", tints, "--weights", str(trained / "best.pt")]
        slow = ["--set", "steps=1", "--out", str(tmp_path / "run"), "--precision", "bf16"]
        assert main([*command, *slow]) == 0
        recipe = checkpoint.load(tmp_path / "run/best.pt").training["recipe"]
        assert (recipe["precision"], recipe["qat"]) == ("bf16", False)


class TestRecords:
    def test_scales_of_another_net_or_none_at_all_are_refused(
        self, trained: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ArtifactError, match="do not belong"):
            qat.FakeQuantized(net_of("resnet8")).set_scales({"images": 1.0})
        for value in (0.0, -1.0, float("nan"), "1"):
            payload = torch.load(trained / "best.pt", weights_only=True)
            payload["learned"] = {"scales": {"images": value}, "images": "x", "images_sha256": "",
                                  "n": 1}  # fmt: skip
            torch.save(payload, tmp_path / "broken.pt")
            with pytest.raises(ArtifactError, match=r"broken\.pt: broken checkpoint"):
                checkpoint.load(tmp_path / "broken.pt")

    def test_the_files_record_comes_back_and_a_damaged_one_is_refused(self) -> None:
        encode, decode = metadata.TRAINED_SCALES.encode, metadata.TRAINED_SCALES.decode
        record = metadata.TrainedScales(scales={"a": 0.1}, images="x", images_sha256="y", n=3)
        assert metadata.TRAINED_SCALES.read({metadata.TRAINED_SCALES.key: encode(record)}) == record
        assert metadata.TRAINED_SCALES.read({}) is None
        assert "format" not in json.loads(encode(record))  # as versions without FP8 wrote it
        other = dataclasses.replace(record, format="fp8")
        assert decode(encode(other)) == other
        with pytest.raises(ArtifactError, match="damaged"):
            decode(encode(other).replace("fp8", "fp4"))
        for text in ("", "[]", "{}", encode(record)[:-9], encode(record) + "}",
                     encode(dataclasses.replace(record, scales={"a": 0.0})),
                     encode(dataclasses.replace(record, branches={"a": (2.0, 1.0)})),
                     ):  # fmt: skip
            with pytest.raises(ArtifactError, match="damaged"):
                decode(text)

    def test_a_record_that_lacks_a_tensor_makes_no_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        record = metadata.TrainedScales(scales={"images": 0.1}, images="x", images_sha256="y", n=3)
        net = checkpoint.untrained(zoo.spec("resnet8"), Preprocess.for_size(32))
        checkpoint.save("net.pt", dataclasses.replace(net, learned=record))
        assert main(["export", "--weights", "net.pt", "--int8", "--no-plan"]) == 2
        assert "relu: unusable scale None" in capsys.readouterr().err
        assert not (tmp_path / "engines/resnet8-int8.onnx").exists()
        assert not (tmp_path / "calib").exists()
