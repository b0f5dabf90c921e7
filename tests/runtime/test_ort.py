from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core import hardware
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError, UnknownNameError
from rtresnet.core.hardware import Gpu
from rtresnet.core.preprocess import Preprocess
from rtresnet.exporter import embed_io
from rtresnet.onnxlib.metadata import BRANCH_RANGES
from rtresnet.quantization import qdq
from rtresnet.runtime.cpu_rewrite import (
    dequantize_saturating,
    quantize_branches,
    quantize_early,
    rewrite_for_cpu,
    to_unsigned,
)
from rtresnet.runtime.loading import load
from rtresnet.runtime.ort import (
    RECORD,
    OrtBackend,
    check_placement,
)
from rtresnet.runtime.providers import PROVIDERS, Provider, openvino

ort = pytest.importorskip("onnxruntime")
says_where = pytest.mark.skipif(
    not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"),
    reason="ONNX Runtime before 1.24 does not say where nodes run",
)

OnnxFile = Callable[..., Path]
Images = Callable[..., np.ndarray]


def run_as_written(
    model: onnx.ModelProto, batch: np.ndarray, also: list[str], dtype: int = TensorProto.FLOAT
) -> list[np.ndarray]:
    """Return logits and other tensors without optimization: node by node."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(n, dtype, None) for n in also)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output: list[np.ndarray] = session.run(None, {"images": batch})
    return output


def relative(got: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def rewritten(path: Path, *rules: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    """Return the file after rule 1 and others."""
    model = onnx.load(path)
    assert to_unsigned(model) > 0
    for rule in rules:
        rule(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def zero_points(model: onnx.ModelProto) -> dict[str, int]:
    """Return the zero point of each quantized activation."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        node.output[0]: int(values[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64)])
def test_to_unsigned_gives_the_same_integers_plus_the_zero_point(
    name: str, size: int, onnx_file: OnnxFile, images: Images
) -> None:
    path = onnx_file(name, "int8", size)
    signed, moved = onnx.load(path), rewritten(path)
    zeros = zero_points(moved)
    assert zeros["images.q"] == 128 and sorted(set(zeros.values())) == [0, 128]
    tensors = [n.output[0] for n in signed.graph.node if n.op_type == "QuantizeLinear"]
    assert len(tensors) > 7
    for seed, factor in ((0, 1), (1, 3)):  # three times the range: some of it is clipped
        batch = images(3, size, seed=seed) * np.float32(factor)
        before = run_as_written(signed, batch, tensors, TensorProto.INT8)
        after = run_as_written(moved, batch, tensors, TensorProto.UINT8)
        for tensor, old, new in zip(tensors, before[1:], after[1:], strict=True):
            assert (old.dtype, new.dtype) == (np.int8, np.uint8)
            expected = old.astype(int) + zeros[tensor]
            np.testing.assert_array_equal(new.astype(int), expected, err_msg=tensor)
            assert zeros[tensor] == 128 or new.max() <= 127
        np.testing.assert_array_equal(after[0], before[0])
    assert {int(before[1].min()), int(before[1].max())} == {-128, 127}


@pytest.mark.parametrize(
    ("name", "size", "moves"), [("resnet8", 32, 4), ("resnet18", 64, 9), ("resnet50", 64, 33)]
)
def test_quantize_early_gives_the_same_integers(
    name: str, size: int, moves: int, onnx_file: OnnxFile, images: Images
) -> None:
    path = onnx_file(name, "int8", size)
    signed, form = onnx.load(path), rewritten(path)
    zeros = zero_points(form)
    assert quantize_early(form) == moves
    onnx.checker.check_model(form, full_check=True)
    tensors = [n.output[0] for n in signed.graph.node if n.op_type == "QuantizeLinear"]
    for seed, factor in ((0, 1), (1, 3)):
        batch = images(3, size, seed=seed) * np.float32(factor)
        before = run_as_written(signed, batch, tensors, TensorProto.INT8)
        after = run_as_written(form, batch, tensors, TensorProto.UINT8)
        for tensor, old, new in zip(tensors, before[1:], after[1:], strict=True):
            expected = old.astype(int) + zeros[tensor]
            np.testing.assert_array_equal(new.astype(int), expected, err_msg=tensor)
        np.testing.assert_array_equal(after[0], before[0])


def test_the_cpu_provider_then_runs_those_convolutions_in_integers(
    onnx_file: OnnxFile, tmp_path: Path
) -> None:
    data = rewrite_for_cpu(onnx_file("resnet50", "int8", 64), saturates=False).model
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in optimized.graph.node)
    assert kinds["QLinearConv"] == 52 and kinds["QLinearAdd"] == 15  # of 53 and 16


def block(result: float, shortcut: float, signed: bool) -> onnx.ModelProto:
    """Return a residual block's end, after rule 1: 1x1 convolution, addition, ReLU, all in Q/DQ.

    The outputs are the block's result and, so that the second Q/DQ pair stays, its integers.
    """
    scales = {"x": 0.05, "weight": 1 / 127, "shortcut": shortcut, "result": result}

    def pair(name: str, source: str) -> list[onnx.NodeProto]:
        constants, q, dq = [f"{name}.scale", f"{name}.zero"], f"{name}.q", f"{name}.dq"
        return [
            helper.make_node("QuantizeLinear", [source, *constants], [q], name=q),
            helper.make_node("DequantizeLinear", [q, *constants], [dq], name=dq),
        ]

    nodes = [
        *pair("x", "x"),
        helper.make_node("DequantizeLinear", ["weight", "weight.scale"], ["w"], name="w"),
        helper.make_node("Conv", ["x.dq", "w"], ["branch"], name="branch"),
        helper.make_node("Identity" if signed else "Relu", ["before"], ["s"], name="s"),
        *pair("shortcut", "s"),
        helper.make_node("Add", ["branch", "shortcut.dq"], ["sum"], name="sum"),
        helper.make_node("Relu", ["sum"], ["y"], name="y"),
        *pair("result", "y"),
    ]
    constants = [
        *(
            numpy_helper.from_array(np.array(v, np.float32), f"{n}.scale")
            for n, v in scales.items()
        ),
        *(
            numpy_helper.from_array(np.array(0, np.int8), f"{n}.zero")
            for n in ("x", "shortcut", "result")
        ),
        numpy_helper.from_array(np.full((1, 1, 1, 1), 127, np.int8), "weight"),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, None, None])
              for n in ("x", "before")]  # fmt: skip
    output = helper.make_tensor_value_info("result.dq", TensorProto.FLOAT, [1, 1, None, None])
    graph = helper.make_graph(nodes, "block", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert to_unsigned(model) == 3
    return model


def integers(model: onnx.ModelProto, optimized: bool) -> np.ndarray:
    """Return the block's quantized result over a grid that goes far beyond every range."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.append(helper.make_tensor_value_info("result.q", TensorProto.UINT8, None))
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.log_severity_level = 3
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    session = ort.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x, before = np.meshgrid(np.linspace(-7, 7, 300), np.linspace(-9, 9, 301))
    feed = {"x": x, "before": before}
    feed = {name: values.astype(np.float32)[None, None] for name, values in feed.items()}
    output: np.ndarray = session.run(["result.q"], feed)[0]
    return output.astype(int)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("times", [0.05, 0.5, 1.0, 1.4, 2.0, 2.9, 3.1])
@pytest.mark.parametrize("result", [0.01, 0.03, 0.2])
def test_a_quantized_branch_changes_a_result_by_at_most_one_step(
    result: float, times: float, signed: bool
) -> None:
    before = block(result, result * times, signed)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    done = quantize_branches(after)
    assert done == (times < (1.5 if signed else 3.0))
    quantize_early(after)
    onnx.checker.check_model(after, full_check=True)
    old = integers(before, optimized=False)
    for optimized in (False, True):
        off = np.abs(integers(after, optimized) - old)
        assert off.max() <= done, (optimized, off.max())
    assert old.min() == 0 and (old.max() == 127 or result == 0.2)


@pytest.mark.parametrize(
    ("extent", "branches"), [((-0.7, 0.4), 1), ((0.1, 0.4), 1), ((-900.0, 900.0), 1), ((0, 0), 0)]
)
def test_a_branch_of_known_extent_is_rounded_finer(
    extent: tuple[float, float], branches: int
) -> None:
    """(-900, 900): what the scales say of the range still holds. (0, 0): nothing to round."""
    plain, bounded = block(0.03, 0.03, signed=False), block(0.03, 0.03, signed=False)
    BRANCH_RANGES.set(bounded, {"branch": extent})
    assert (quantize_branches(plain), quantize_branches(bounded)) == (1, branches)
    if not branches:
        return
    wide, steps = scale_of(plain, "branch.branch_scale"), scale_of(bounded, "branch.branch_scale")
    low, high = max(-127 * 0.03, 1.25 * min(0, extent[0])), min(127 * 0.03, 1.25 * extent[1])
    assert steps == pytest.approx((high - low) / 255) and steps <= wide * (1 + 1e-6)
    quantize_early(bounded)
    old, x = integers(block(0.03, 0.03, signed=False), False), np.linspace(-7, 7, 300)
    off = np.abs(integers(bounded, optimized=True) - old)
    inside = (np.rint(x / 0.05) * 0.05 >= low) & (np.rint(x / 0.05) * 0.05 <= high)
    assert inside.any() and off[..., inside].max() <= 1
    if extent[1] < 1:
        assert (off > 0)[..., inside].mean() < 0.15  # of a step: far less than half of one
        assert off[..., ~inside].max() > 1  # and this is clipped


def scale_of(model: onnx.ModelProto, name: str) -> float:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return float(numpy_helper.to_array(tensor))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"branch": 1}', '{"branch": [2, 1]}', '{"branch": [null, 1]}',
             '{"branch": [-Infinity, 1]}', '{"branch": ["a", "b"]}'],
)  # fmt: skip
def test_damaged_extents_are_an_error(text: str) -> None:
    model = block(0.03, 0.03, signed=False)
    model.metadata_props.add(key=BRANCH_RANGES.key, value=text)
    with pytest.raises(ArtifactError, match="quantize the net again"):
        quantize_branches(model)


def test_a_branch_with_another_reader_or_nothing_quantized_behind_it_stays() -> None:
    for change in ("branch", "sum", "y"):
        model = block(0.03, 0.03, signed=False)
        model.graph.output.append(helper.make_tensor_value_info(change, TensorProto.FLOAT, None))
        assert quantize_branches(model) == 0, change
    model = block(0.03, 0.03, signed=False)
    for tensor in model.graph.initializer:
        if tensor.name == "result.zero":
            tensor.CopyFrom(numpy_helper.from_array(np.array(1, np.int8), tensor.name))
    model = block(0.03, 0.03, signed=False)
    model.graph.node[-2].input[2] = model.graph.node[-1].input[2] = "x.zero"
    assert quantize_branches(model) == 0


@pytest.mark.parametrize(
    ("name", "size", "branches"), [("resnet14", 32, 3), ("resnet18", 64, 7), ("resnet50", 64, 15)]
)
def test_every_block_adds_in_integers_where_all_that_reads_it_does(
    name: str, size: int, branches: int, onnx_file: OnnxFile
) -> None:
    form = rewritten(onnx_file(name, "int8", size))
    assert quantize_branches(form) == branches
    assert quantize_branches(form) == 0  # not twice
    onnx.checker.check_model(form, full_check=True)


@pytest.mark.parametrize(("pixels", "topk"), [(True, None), (True, 3), (False, 3)])
def test_ends_inside_the_file_cost_no_integer_convolution(
    pixels: bool, topk: int | None, onnx_file: OnnxFile, tmp_path: Path
) -> None:
    def integer(path: Path) -> int:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        data = rewrite_for_cpu(path, saturates=False).model
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        return sum(node.op_type == "QLinearConv" for node in nodes)

    plain, path = onnx_file("resnet18", "int8", 64), tmp_path / "ends.onnx"
    contract = Preprocess.for_size(64)
    changed = embed_io.rewrite(onnx.load(plain), contract, pixels=pixels, topk=topk)
    onnx.save(changed, path)
    assert integer(path) == integer(plain) > 15
    before, after = OrtBackend(plain, provider="cpu"), OrtBackend(path, provider="cpu")
    assert after.input_dtype == (np.uint8 if pixels else np.float32)
    embed_io.check(before.infer, after.infer, contract, pixels=pixels, topk=topk)  # type: ignore[arg-type]


def test_to_unsigned_leaves_another_zero_point_alone(onnx_file: OnnxFile) -> None:
    model = onnx.load(onnx_file("resnet8", "int8"))
    for tensor in model.graph.initializer:
        if not tensor.dims and tensor.data_type == TensorProto.INT8:
            tensor.CopyFrom(numpy_helper.from_array(np.array(7, np.int8), tensor.name))
    before = model.SerializeToString()
    assert to_unsigned(model) == quantize_early(model) == quantize_branches(model) == 0
    assert model.SerializeToString() == before


def test_to_unsigned_leaves_the_weights_alone(onnx_file: OnnxFile) -> None:
    path = onnx_file("resnet8", "int8")
    signed, moved = onnx.load(path), rewritten(path)
    before = {t.name: t for t in signed.graph.initializer}
    after = {t.name: t for t in moved.graph.initializer}
    assert all(after[name] == tensor for name, tensor in before.items())
    dequantizers = {n.name: n for n in moved.graph.node if n.op_type == "DequantizeLinear"}
    for node in signed.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in before:
            assert dequantizers[node.name] == node


@pytest.mark.parametrize("integers", ["q.out", "dq.only"])
def test_to_unsigned_leaves_integers_that_others_read(integers: str, onnx_file: OnnxFile) -> None:
    """A graph output, or a reader that is no DequantizeLinear, expects int8."""
    model = onnx.load(onnx_file("resnet8", "int8"))
    if integers == "q.out":
        model.graph.output.append(helper.make_tensor_value_info("images.q", TensorProto.INT8, None))
    else:
        model.graph.node.append(helper.make_node("Identity", ["images.q"], ["copy"], name="copy"))
    to_unsigned(model)
    (quantize,) = [n for n in model.graph.node if n.output[0] == "images.q"]
    assert quantize.input[2] == "images.zero_point"


def test_backend_threads_do_not_spin_between_calls(onnx_file: OnnxFile) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")
    options = backend._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_damaged_record_of_branches_names_the_file(onnx_file: OnnxFile, tmp_path: Path) -> None:
    model, path = onnx.load(onnx_file("resnet8", "int8")), tmp_path / "damaged.onnx"
    model.metadata_props.add(key=BRANCH_RANGES.key, value="{")
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"damaged\.onnx: rtresnet\.branches: damaged"):
        OrtBackend(path, provider="cpu")


def test_the_file_on_disk_stays_as_it_is(onnx_file: OnnxFile) -> None:
    path = onnx_file("resnet8", "int8")
    before = path.read_bytes()
    OrtBackend(path, provider="cpu").close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_without_quantization_is_not_touched(precision: str, onnx_file: OnnxFile) -> None:
    path = onnx_file("resnet8", precision)
    for saturates in (False, True):
        rewritten = rewrite_for_cpu(path, saturates=saturates)
        assert (rewritten.model, rewritten.quantized) == (str(path), False)
        assert rewritten.float_layers == ()


def test_a_file_moved_already_is_not_touched(onnx_file: OnnxFile, tmp_path: Path) -> None:
    path = tmp_path / "moved.onnx"
    data = rewrite_for_cpu(onnx_file("resnet8", "int8"), saturates=True).model
    assert isinstance(data, bytes)
    path.write_bytes(data)
    again = rewrite_for_cpu(path, saturates=True)
    assert (again.model, again.quantized) == (str(path), True)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 5e-3), ("int8", 0.1)])
def test_the_cpu_provider_agrees_with_the_file_as_written(
    precision: str, bound: float, onnx_file: OnnxFile, images: Images
) -> None:
    batch = images(8)
    backend = OrtBackend(onnx_file("resnet8", precision), provider="cpu")
    logits = backend.infer(batch)
    assert logits.shape == (8, 10) and logits.dtype == np.float32
    (written,) = run_as_written(onnx.load(onnx_file("resnet8", precision)), batch, [])
    (reference,) = run_as_written(onnx.load(onnx_file("resnet8", "fp32")), batch, [])
    assert relative(logits, reference) < bound
    # Optimizing rounds differently, which costs an INT8 net less than quantizing did.
    assert relative(logits, written) <= max(1e-5, relative(written, reference))


def test_a_dot_product_beyond_16_bits_is_exact(tmp_path: Path) -> None:
    """Largest weights on largest activations: without VNNI, u8s8 kernels saturate at 32767."""
    channels, value = 32, helper.make_tensor_value_info
    first = np.full((channels, 3, 1, 1), 1 / 3, np.float32)
    others = {n: np.full((channels, channels, 1, 1), 1 / channels, np.float32) for n in "bc"}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "wa"], ["a"], name="a"),
            helper.make_node("Conv", ["a", "wb"], ["b"], name="b"),
            helper.make_node("Conv", ["b", "wc"], ["c"], name="c"),
            helper.make_node("GlobalAveragePool", ["c"], ["p"], name="p"),
            helper.make_node("Flatten", ["p"], ["logits"], name="f"),
        ],
        "ones",
        [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", channels])],
        [
            numpy_helper.from_array(first, "wa"),
            *(numpy_helper.from_array(weight, f"w{name}") for name, weight in others.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = tmp_path / "ones.onnx"
    onnx.save(qdq.insert(model, dict.fromkeys(qdq.placement(model), 1 / 127)), path)
    logits = OrtBackend(path, provider="cpu").infer(np.ones((2, 3, 8, 8), np.float32))
    np.testing.assert_allclose(logits, 1, atol=0.01)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_infer_of_any_batch_equals_its_rows_alone(
    precision: str, onnx_file: OnnxFile, images: Images
) -> None:
    backend = OrtBackend(onnx_file("resnet8", precision), provider="cpu")
    batch = images(5)
    alone = np.concatenate([backend.infer(batch[index : index + 1]) for index in range(5)])
    np.testing.assert_allclose(backend.infer(batch), alone, atol=1e-4 * np.abs(alone).max())


def test_backend_attributes_describe_what_runs(onnx_file: OnnxFile) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu", threads=1)
    assert (backend.provider, backend.device, backend.threads) == ("ONNX Runtime CPU", "cpu", 1)
    assert backend.versions == {"onnxruntime": ort.__version__}
    assert backend._session.get_providers() == ["CPUExecutionProvider"]
    assert backend._session.get_session_options().intra_op_num_threads == 1
    assert backend.timings() == {}


def test_backend_threads_by_default_are_all_cores(onnx_file: OnnxFile) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")
    assert backend.threads == hardware.cores()
    assert backend._session.get_session_options().intra_op_num_threads == hardware.cores()


def test_backend_auto_takes_openvino_if_it_supports_the_cpu(onnx_file: OnnxFile) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"))
    assert backend.provider == (openvino() or PROVIDERS["cpu"]).title


def test_backend_openvino_runs_everything_or_raises(onnx_file: OnnxFile, images: Images) -> None:
    path = onnx_file("resnet8", "fp32")
    about = openvino()
    if about is None:
        with pytest.raises(UnavailableError, match="pip install onnxruntime-") as caught:
            OrtBackend(path, provider="openvino")
        assert caught.value.exit_code == 3
        return
    backend = OrtBackend(path, provider="openvino")
    assert about.package in backend.versions
    reference = OrtBackend(path, provider="cpu").infer(images(4))
    assert relative(backend.infer(images(4)), reference) < 1e-4


def test_backend_openvino_missing_names_its_package(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "installed", lambda module: "openvino" not in module)
    if openvino() is not None:
        pytest.skip("this onnxruntime has OpenVINO in it")
    with pytest.raises(UnavailableError, match="pip install onnxruntime-ep-openvino"):
        OrtBackend(onnx_file("resnet8", "fp32"), provider="openvino")
    assert OrtBackend(onnx_file("resnet8", "fp32")).provider == "ONNX Runtime CPU"


def test_backend_provider_not_built_in_raises(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, (9, 0))
    about = PROVIDERS["cuda"]
    if about.ep in ort.get_available_providers():
        pytest.skip("it is here")
    with pytest.raises(UnavailableError, match=about.ep) as caught:
        OrtBackend(onnx_file("resnet8", "fp32"), provider="cuda")
    assert caught.value.exit_code == 3
    assert caught.value.fix is not None
    # Two builds of ONNX Runtime must not lie on top of each other.
    assert "pip uninstall -y onnxruntime &&" in caught.value.fix
    assert "'onnxruntime-gpu[cuda,cudnn]'" in caught.value.fix


@pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "fix"),
    [({"device": "cuda"}, "use --device cpu"), ({"provider": "cuda"}, "use --provider cpu")],
)
def test_load_cuda_without_gpu_keeps_the_cpu_install(
    onnx_file: OnnxFile, options: dict[str, str], fix: str
) -> None:
    with pytest.raises(UnavailableError, match="NVIDIA GPU") as caught:
        load(onnx_file("resnet8", "fp32"), **options)
    assert caught.value.fix == fix


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_find_provider_tensorrt_names_the_plan_runtime(onnx_file: OnnxFile, device: str) -> None:
    with pytest.raises(InputError) as caught:
        load(onnx_file("resnet8", "fp32"), provider="tensorrt", device=device)
    assert not isinstance(caught.value, UnknownNameError)
    assert caught.value.fix is not None and "--builder tensorrt" in caught.value.fix


@pytest.mark.parametrize("name", sorted(PROVIDERS))
def test_providers_are_those_of_onnx_runtime(name: str) -> None:
    reference = {
        *ort.get_all_providers(),
        "NvTensorRTRTXExecutionProvider",
    }  # that one is a plugin only
    assert PROVIDERS[name].ep in reference


@says_where
def test_placement_of_the_cpu_provider_has_every_node(onnx_file: OnnxFile) -> None:
    path = onnx_file("resnet8", "fp32")
    backend = OrtBackend(path, provider="cpu")
    assert backend.placement == {"CPUExecutionProvider": len(onnx.load(path).graph.node)}


@pytest.fixture
def takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider "cuda" becomes one that starts everywhere and has no kernel for any node."""
    azure = Provider(ep="AzureExecutionProvider", title="Azure", package="onnxruntime")
    if azure.ep not in ort.get_available_providers():
        pytest.skip("onnxruntime without the Azure provider")
    monkeypatch.setitem(PROVIDERS, "cuda", azure)


@says_where
@pytest.mark.usefixtures("takes_nothing")
def test_backend_nodes_falling_back_raises_their_names(onnx_file: OnnxFile) -> None:
    path = onnx_file("resnet8", "fp32")
    total = len(onnx.load(path).graph.node)
    session = ort.InferenceSession(path, providers=["AzureExecutionProvider"])
    assert session.get_providers()[0] == "AzureExecutionProvider"  # which says it is in use
    with pytest.raises(UnavailableError) as caught:
        OrtBackend(path, provider="cuda")
    assert caught.value.exit_code == 3
    assert f"AzureExecutionProvider was requested, but {total} of {total} nodes" in str(
        caught.value
    )
    assert "conv1 (Conv) on CPUExecutionProvider" in str(caught.value)


@says_where
@pytest.mark.usefixtures("takes_nothing")
def test_backend_without_placement_api_refuses_fallback(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ort.InferenceSession.__mro__[1]
    monkeypatch.delattr(base, "get_provider_graph_assignment_info")
    with pytest.raises(UnavailableError, match="fallback to CPU EP"):
        OrtBackend(onnx_file("resnet8", "fp32"), provider="cuda")
    assert OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu").placement == {}


@says_where
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_check_placement_dropped_provider_raises(
    onnx_file: OnnxFile,
) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("has CUDA")
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    session = ort.InferenceSession(
        onnx_file("resnet8", "fp32"), options, providers=["CUDAExecutionProvider"]
    )
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider was requested"):
        check_placement(session, "CUDAExecutionProvider")


@says_where
def test_check_placement_one_node_elsewhere_raises() -> None:
    part, node = ort.OrtEpAssignedSubgraph, ort.OrtEpAssignedNode
    assert hasattr(part, "ep_name") and hasattr(part, "get_nodes")
    assert hasattr(node, "name") and hasattr(node, "op_type")

    def on(ep: str, *names: str) -> SimpleNamespace:
        nodes = [SimpleNamespace(name=name, op_type="Conv") for name in names]
        return SimpleNamespace(ep_name=ep, get_nodes=lambda: nodes)

    def session(*parts: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(get_provider_graph_assignment_info=lambda: list(parts))

    fused = on("CUDAExecutionProvider", "conv1", "layer1.0.conv1")
    assert check_placement(session(fused), "CUDAExecutionProvider") == {"CUDAExecutionProvider": 2}
    with pytest.raises(UnavailableError) as caught:
        check_placement(session(fused, on("CPUExecutionProvider", "")), "CUDAExecutionProvider")
    assert "1 of 3 nodes would run on another provider: unnamed (Conv) on CPU" in str(caught.value)


def test_infer_failing_is_not_repeated_on_another_provider(onnx_file: OnnxFile) -> None:
    """By default ONNX Runtime's Python session makes itself again on the CPU provider then."""
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")
    assert backend._session._enable_fallback is False


def test_backend_missing_plugin_names_its_package(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hardware.installed("onnxruntime_ep_nv_tensorrt_rtx"):
        pytest.skip("it is here")
    gpu = Gpu(name="NVIDIA X", capability=(8, 9), memory=1 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    with pytest.raises(UnavailableError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        OrtBackend(onnx_file("resnet8", "fp32"), provider="tensorrt-rtx")


def test_backend_broken_plugin_raises_the_reason(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NVIDIA's does without a driver."""
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"no library")
    (tmp_path / "plugin_of_a_test.py").write_text(
        "get_ep_name = lambda: 'TestExecutionProvider'\n"
        f"get_library_path = lambda: {str(library)!r}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugin = dataclasses.replace(PROVIDERS["tensorrt-rtx"], plugin="plugin_of_a_test")
    monkeypatch.setitem(PROVIDERS, "tensorrt-rtx", plugin)
    with_gpu(monkeypatch, (8, 9))
    with pytest.raises(UnavailableError, match=r"does not load: .*libplugin\.so") as caught:
        OrtBackend(onnx_file("resnet8", "fp32"), provider="tensorrt-rtx")
    assert caught.value.exit_code == 3


def with_gpu(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    gpus = tuple(Gpu(name="NVIDIA X", capability=each, memory=1 << 30) for each in capabilities)
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0), (11, 0)])
def test_backend_rtx_plugin_on_an_unsupported_gpu_names_supported_ones(
    capability: tuple[int, int], onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "installed", lambda module: True)
    with_gpu(monkeypatch, capability)
    with pytest.raises(UnavailableError, match=r"sm_86, sm_89 and from sm_120 on") as caught:
        OrtBackend(onnx_file("resnet8", "fp32"), provider="tensorrt-rtx")
    assert caught.value.exit_code == 3 and caught.value.fix == "use --provider cuda"


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ONNX Runtime's GPU build without its CUDA libraries, on a machine with a GPU.

    As the wheel of 1.31.1 behaves: the provider is offered, and dropped when a session is made.
    Returns what is done, in order.
    """
    done: list[str] = []
    everything = [*ort.get_available_providers(), "CUDAExecutionProvider"]
    make = ort.InferenceSession

    class Session(make):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, options: Any, **more: Any) -> None:
            done.append("session")
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    def preload_dlls() -> None:
        done.append("preload")
        print("Failed to load libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(ort, "get_available_providers", lambda: everything)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "preload_dlls", preload_dlls, raising=False)
    with_gpu(monkeypatch, (9, 0))
    return done


def test_backend_cuda_missing_library_is_named(
    cuda_build: list[str], onnx_file: OnnxFile, capfd: pytest.CaptureFixture[str]
) -> None:
    library = Path(ort.__file__).parent / "capi" / str(PROVIDERS["cuda"].library)
    if library.exists():
        pytest.skip("onnxruntime-gpu is here")
    with pytest.raises(UnavailableError, match=library.name) as caught:
        OrtBackend(onnx_file("resnet8", "fp32"), provider="cuda")
    assert caught.value.exit_code == 3
    assert caught.value.fix is not None and "onnxruntime-gpu[cuda,cudnn]" in caught.value.fix
    assert "would run on another" not in str(caught.value)
    assert cuda_build == ["preload", "session"]
    assert capfd.readouterr().out == ""  # standard output may be a JSON document


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(("tf32", "option"), [(None, "1"), (True, "1"), (False, "0")])
def test_backend_cuda_passes_tf32_to_onnx_runtime(
    tf32: bool | None, option: str, onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(model: Any, options: Any, *, providers: Any, **more: Any) -> Any:
        assert providers == [("CUDAExecutionProvider", {"use_tf32": option})]
        raise RuntimeError("reached")

    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(ArtifactError, match="reached"):
        load(onnx_file("resnet8", "fp32"), provider="cuda", tf32=tf32)


def test_load_refuses_tf32_for_another_provider(onnx_file: OnnxFile) -> None:
    path = onnx_file("resnet8", "fp32")
    with pytest.raises(InputError, match="CUDA provider") as caught:
        load(path, provider="cpu", tf32=False)
    assert caught.value.exit_code == 2 and caught.value.fix is not None
    with load(path, provider="cpu") as session:
        assert session.info.tf32 is None


@pytest.mark.usefixtures("cuda_build")
def test_backend_cuda_without_a_gpu_loads_nothing(
    cuda_build: list[str], onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch)
    with pytest.raises(UnavailableError, match="needs an NVIDIA GPU") as caught:
        OrtBackend(onnx_file("resnet8", "fp32"), provider="cuda")
    assert caught.value.exit_code == 3 and cuda_build == []


# As onnxruntime-gpu 1.31.1 says it over a driver for CUDA 12.4.
OLD_DRIVER = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, "
    "void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, "
    "SUCCTYPE, const char*, const char*, int) [with ERRTYPE = cudaError; bool THRW = true; "
    "SUCCTYPE = cudaError] CUDA failure 35: CUDA driver version is insufficient for CUDA runtime "
    "version ; GPU=-1 ; hostname=vm ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/"
    "cuda_execution_provider.cc ; line=355 ; expr=cudaSetDevice(info_.device_id); "
)


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(
    ("message", "reason", "fix"),
    [
        (OLD_DRIVER, "CUDA failure 35: CUDA driver version is insufficient", "r580"),
        ("[...] CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ;", "CUBLAS failure 3", "doc"),
    ],
)
def test_backend_cuda_failing_does_not_blame_the_file(
    message: str, reason: str, fix: str, onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(UnavailableError, match=reason) as caught:
        OrtBackend(onnx_file("resnet8", "fp32"), provider="cuda")
    assert "/onnxruntime_src" not in str(caught.value) and "hostname" not in str(caught.value)
    assert caught.value.fix is not None and fix in caught.value.fix


def test_find_provider_unknown_suggests_the_nearest(onnx_file: OnnxFile) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'openvino'"):
        OrtBackend(onnx_file("resnet8", "fp32"), provider="openvinno")


@pytest.mark.parametrize("data", [b"{}", b"hello, this is no onnx", bytes(100)], ids=str)
def test_backend_file_that_is_not_onnx_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"garbage\.onnx"):
        OrtBackend(path, provider="cpu")


def test_backend_truncated_file_is_refused(onnx_file: OnnxFile, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(onnx_file("resnet8", "fp32").read_bytes()[:10_000])
    with pytest.raises(ArtifactError, match=r"cut\.onnx"):
        OrtBackend(path, provider="cpu")


def test_backend_unknown_operator_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Wibble", ["images"], ["logits"], domain="com.example")],
        "odd",
        [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", 3])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(ArtifactError, match="Wibble"):
        OrtBackend(path, provider="cpu")


def test_close_twice_is_fine(onnx_file: OnnxFile) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")
    backend.close()
    backend.close()


def test_infer_of_a_wrong_shape_names_it(onnx_file: OnnxFile) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")
    with pytest.raises(InputError, match=r"\[2, 3, 16, 16\]"):
        backend.infer(np.zeros((2, 3, 16, 16), np.float32))


def test_backend_without_vnni_gives_the_same_answers_and_says_how(
    onnx_file: OnnxFile, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, batch = onnx_file("resnet8", "int8"), images(4)
    monkeypatch.setattr(hardware, "int8_sums_saturate", lambda: False)
    with_vnni = OrtBackend(path, provider="cpu")
    monkeypatch.setattr(hardware, "int8_sums_saturate", lambda: True)
    without = OrtBackend(path, provider="cpu")
    assert with_vnni.cpu_note is None
    assert without.cpu_note is not None and "conv1" in without.cpu_note
    assert OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu").cpu_note is None
    assert relative(without.infer(batch), with_vnni.infer(batch)) < 0.05


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = hardware.installed
    monkeypatch.setattr(hardware, "installed", lambda name: name != "onnx" and installed(name))
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnx"]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("saturates", [False, True])
def test_backend_without_onnx_computes_int8_as_the_file_says(
    onnx_file: OnnxFile,
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    saturates: bool,
) -> None:
    path, batch = onnx_file("resnet8", "int8"), images(4)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = plain.run(None, {plain.get_inputs()[0].name: batch})[0]
    monkeypatch.setattr(hardware, "int8_sums_saturate", lambda: saturates)
    request.getfixturevalue("without_onnx")
    backend = OrtBackend(path, provider="auto" if saturates else "cpu")
    assert backend.provider == "ONNX Runtime CPU"
    assert backend.cpu_note is not None and "rtresnet[export]" in backend.cpu_note
    assert relative(backend.infer(batch), expected) < 0.01


def test_backend_without_onnx_runs_fp32(
    onnx_file: OnnxFile, images: Images, request: pytest.FixtureRequest
) -> None:
    path, batch = onnx_file("resnet8", "fp32"), images(4)
    expected = OrtBackend(path, provider="cpu").infer(batch)
    request.getfixturevalue("without_onnx")
    backend = OrtBackend(path, provider="cpu")
    assert backend.cpu_note is None
    assert np.array_equal(backend.infer(batch), expected)


def test_openvino_without_onnx_and_vnni_refuses_int8(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    path = onnx_file("resnet8", "int8")
    monkeypatch.setattr(hardware, "int8_sums_saturate", lambda: True)
    request.getfixturevalue("without_onnx")
    with pytest.raises(UnavailableError) as caught:
        OrtBackend(path, provider="openvino")
    assert caught.value.fix == "pip install 'rtresnet[export]'"


def products(model: onnx.ModelProto, batch: np.ndarray) -> dict[str, int]:
    """Return for each layer a bound on the sum of two u8 x s8 products on `batch`."""
    nodes = {node.output[0]: node for node in model.graph.node}
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layers = {
        node.name: (nodes[node.input[0]].input[0], weights[nodes[node.input[1]].input[0]])
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm") and nodes.get(node.input[1]) is not None
    }
    tensors = sorted({tensor for tensor, _ in layers.values()})
    (_, *values) = run_as_written(model, batch, tensors, TensorProto.UINT8)
    largest = {tensor: int(value.max()) for tensor, value in zip(tensors, values, strict=True)}
    return {
        name: 2 * largest[tensor] * int(np.abs(weight.astype(int)).max())
        for name, (tensor, weight) in layers.items()
    }


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64), ("resnet50", 64)])
def test_no_product_pair_of_the_saturation_free_form_exceeds_16_bits(
    name: str, size: int, onnx_file: OnnxFile, images: Images
) -> None:
    path = onnx_file(name, "int8", size)
    batch = 3 * images(2, size)  # beyond every range, so that the largest integers appear
    assert max(products(rewritten(path), batch).values()) > 32767
    safe = rewritten(path, dequantize_saturating)
    for rule in (lambda model: None, quantize_branches, quantize_early):
        rule(safe)
        output = products(safe, batch)
        assert len(output) >= 7 and max(output.values()) <= 32767


def test_dequantize_saturating_keeps_every_number(onnx_file: OnnxFile, images: Images) -> None:
    path, batch = onnx_file("resnet18", "int8", 64), images(2, 64)
    safe = rewritten(path, dequantize_saturating)
    (expected,), (result,) = (
        run_as_written(onnx.load(path), batch, []),
        run_as_written(safe, batch, []),
    )
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("largest", [64, 65])
@pytest.mark.parametrize("form", ["int8", "uint8", "float"])
def test_dequantize_saturating_judges_other_tools_weights_by_their_size(
    largest: int, form: str, tmp_path: Path
) -> None:
    """Full-range uint8 activations: 7-bit weights are safe, larger ones run in float.

    "float": a weight behind QuantizeLinear and DequantizeLinear, as some tools write it.
    """
    rng = np.random.default_rng(0)
    weight = rng.integers(-largest, largest + 1, (4, 3, 3, 3))
    weight.flat[0] = -largest
    scale = np.array([0.5, 0.25, 1, 2], np.float32)
    offset = 128 if form == "uint8" else 0
    zero = np.full(4, offset, np.uint8 if form == "uint8" else np.int8)
    stored = (weight + offset).astype(zero.dtype)
    if form == "float":
        stored = (weight * scale.reshape(4, 1, 1, 1)).astype(np.float32)
    constants = {
        "s": np.array(0.02, np.float32), "z": np.array(131, np.uint8), "w": stored, "ws": scale,
        "wz": zero,
    }  # fmt: skip
    quantized = [helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0)]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        *(quantized if form == "float" else []),
        helper.make_node(
            "DequantizeLinear", ["wq" if form == "float" else "w", "ws", "wz"], ["wdq"], axis=0
        ),
        helper.make_node("Conv", ["dq", "wdq"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "other", [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    safe = rewrite_for_cpu(tmp_path / "other.onnx", saturates=True)
    assert safe.quantized
    assert safe.float_layers == (() if largest == 64 else ("y",))
    if safe.float_layers:
        assert isinstance(safe.model, bytes)
        batch = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
        (expected,) = run_as_written(model, batch, [])
        (result,) = run_as_written(onnx.load_from_string(safe.model), batch, [])
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_infer_failing_provider_does_not_blame_the_images(
    onnx_file: OnnxFile, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")

    class Failing:
        def run(self, outputs: object, feed: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 6 : bad allocation")

    monkeypatch.setattr(backend, "_session", Failing())
    with pytest.raises(UnavailableError, match=r"CPU failed.*bad allocation"):
        backend.infer(images(2))
    other_way_round = images(2).astype(
        images(2).dtype.newbyteorder()
    )  # ONNX Runtime reads it as is
    for wrong in (images(2, 16), images(2).astype(np.float64), images(2)[0], images(0),
                  other_way_round):  # fmt: skip
        with pytest.raises(InputError, match=r"does not fit|byte order"):
            backend.infer(wrong)
    for nothing in (None, [[1.0]], "abc"):
        with pytest.raises(InputError, match="not a NumPy array"):
            backend.infer(nothing)  # type: ignore[arg-type]


def test_infer_of_a_foreign_half_precision_file_runs(tmp_path: Path) -> None:
    net = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["logits"])], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["n", 12])],
    )  # fmt: skip
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(net, opset_imports=[opset], ir_version=10), tmp_path / "half.onnx")
    images = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    output = OrtBackend(tmp_path / "half.onnx", provider="cpu").infer(images)
    assert isinstance(output, np.ndarray) and (output == images.reshape(2, 12)).all()


@pytest.fixture
def two_inputs(tmp_path: Path) -> OrtBackend:
    """A file with the inputs of a detector."""
    value, canvas = helper.make_tensor_value_info, [1, 3, 4, 6]
    net = helper.make_graph(
        [helper.make_node("Identity", ["extent"], ["boxes"]),
         helper.make_node("Identity", ["images"], ["scores"])], "net",
        [value("images", TensorProto.FLOAT, canvas), value("extent", TensorProto.FLOAT, [1, 2])],
        [value("boxes", TensorProto.FLOAT, [1, 2]), value("scores", TensorProto.FLOAT, canvas)],
    )  # fmt: skip
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(net, opset_imports=[opset], ir_version=10), tmp_path / "two.onnx")
    return OrtBackend(tmp_path / "two.onnx", provider="cpu")


@pytest.mark.parametrize("wrong", ["images", "extent"])
@pytest.mark.parametrize(
    "change",
    [lambda x: x[0], lambda x: x[..., :1], lambda x: x.astype(np.float64),
     lambda x: x.astype(x.dtype.newbyteorder()), lambda x: x.tolist()],
    ids=["rank", "shape", "type", "byte order", "list"],
)  # fmt: skip
def test_detect_with_a_wrong_input_names_it_as_the_callers_fault(
    two_inputs: OrtBackend, wrong: str, change: Callable[[np.ndarray], Any]
) -> None:
    feeds = {"images": np.ones((1, 3, 4, 6), np.float32), "extent": np.ones((1, 2), np.float32)}
    with pytest.raises(InputError, match=wrong):
        two_inputs.detect(**feeds | {wrong: change(feeds[wrong])})
    assert two_inputs.detect(**feeds)["boxes"].tolist() == [[1, 1]]


def test_infer_after_close_raises(onnx_file: OnnxFile, images: Images) -> None:
    backend = OrtBackend(onnx_file("resnet8", "fp32"), provider="cpu")
    backend.close()
    with pytest.raises(InputError, match=r"infer: .* closed"):
        backend.infer(images(1))


@pytest.mark.parametrize("batch", [1, 4])
def test_infer_with_a_fixed_batch_splits_and_pads(
    onnx_file: OnnxFile, images: Images, tmp_path: Path, batch: int
) -> None:
    path = onnx_file("resnet8", "fp32")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed = OrtBackend(tmp_path / "fixed.onnx", provider="cpu")
    plain = OrtBackend(path, provider="cpu")
    assert fixed.batch == batch and plain.batch is None
    for count in (1, 3, 4, 6, 9):
        pixels = images(count)
        result, expected = fixed.infer(pixels), plain.infer(pixels)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    for wrong in (images(0), images(2)[:, :, :4], images(2).astype(np.float64)):
        with pytest.raises(InputError):
            fixed.infer(wrong)


def test_infer_with_a_fixed_batch_whose_rows_are_not_images_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["images"], ["logits"], axes=[0, 2, 3], keepdims=0)],
        "mixed",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "mixed.onnx")
    backend = OrtBackend(tmp_path / "mixed.onnx", provider="cpu")
    with pytest.raises(ArtifactError, match="takes batches of 2"):
        backend.infer(np.zeros((3, 3, 8, 8), np.float32))
