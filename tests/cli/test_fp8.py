"""`quantize --fp8`, and the other commands with an FP8 file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from rtresnet.cli.main import main
from rtresnet.core.artifacts import read_sidecar
from rtresnet.core.flips import Answers
from rtresnet.data.sources import Source
from rtresnet.onnxlib.interface import precision_of
from rtresnet.runtime.backend import logits
from rtresnet.runtime.ort import OrtBackend
from rtresnet.workflows import accuracy_gate
from rtresnet.workflows.accuracy_gate import _fallbacks
from rtresnet.workflows.quantize import QuantizeConfig

pytest.importorskip("onnxruntime")


@pytest.fixture
def source(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return engines / "resnet8.onnx"


def quantize(source: Path, *more: str) -> int:
    return main(["quantize", str(source), "--fp8", "--out", "net-fp8.onnx", *more])


@pytest.mark.parametrize("calib", ["tints", "none"])
def test_quantize_fp8_writes_a_file_that_passes_lint_and_runs(
    source: Path, tints: str, calib: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, "--calib", tints if calib == "tints" else "none") == 0
    sidecar = read_sidecar("net-fp8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert (sidecar.precision, sidecar.calibration.rest) == ("fp8", "fp16")
    assert sidecar.calibration.kept == ("conv1",)
    assert precision_of(onnx.load("net-fp8.onnx")) == "fp8"
    assert main(["lint", "net-fp8.onnx"]) == 0
    assert main(["inspect", "net-fp8.onnx"]) == 0
    assert "fp8" in capsys.readouterr().out
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    # With ONNX Runtime's optimizer, as every command runs it: see WRONG_IN_FP8.
    expected, got = (
        logits(OrtBackend(path).infer(images), Path(path))
        for path in (source, Path("net-fp8.onnx"))
    )
    noise = np.square(expected - got).sum() / np.square(expected).sum()
    assert 10 * np.log10(1 / noise) > 12


def test_scales_of_int8_are_not_used_for_fp8(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), "--calib", tints, "--out", "net-fp8.onnx"]) == 0
    assert quantize(source, "--calib", tints) == 0
    assert "with different number format" in capsys.readouterr().err
    assert quantize(source, "--calib", tints) == 0
    assert "reusing the scales" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--int8"],
        ["--fp16"],
        ["--fp8-min-channels", "0"],
        ["--calibrator", "entropy", "--calib", "none"],
    ],
)
def test_contradicting_options_exit_2(source: Path, more: list[str]) -> None:
    assert quantize(source, *more) == 2
    assert not Path("net-fp8.onnx").exists()


def test_a_quantized_file_is_refused(source: Path) -> None:
    assert quantize(source, "--calib", "none") == 0
    Path("net-fp8.onnx.json").unlink()
    assert main(["quantize", "net-fp8.onnx", "--int8", "--size", "32"]) == 2


def test_fp8_stem_is_quantized_if_asked(source: Path) -> None:
    assert quantize(source, "--calib", "none", "--fp8-stem") == 0
    sidecar = read_sidecar("net-fp8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert sidecar.calibration.kept == ()
    assert QuantizeConfig(precision="fp8").wide_dtype == "fp16"


def test_narrow_convolutions_stay_in_float_if_asked(source: Path, tints: str) -> None:
    assert quantize(source, "--calib", tints, "--fp8-min-channels", "32") == 0
    sidecar = read_sidecar("net-fp8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    narrow = {"conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"}  # 3 or 16 channels
    graph = onnx.load("net-fp8.onnx").graph
    operators = {node.name: node.op_type for node in graph.node}
    excluded = set(sidecar.calibration.kept)
    assert {name for name in excluded if operators[name] == "Conv"} == narrow
    assert [operators[name] for name in excluded - narrow] == ["Add"]  # that of layer1.0
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    in_fp8 = {
        node.name
        for node in graph.node
        if node.op_type == "Conv"
        and types.get(node.input[1].removesuffix(".half").removesuffix(".dq"))
        == onnx.TensorProto.FLOAT8E4M3FN
    }
    assert in_fp8 == {name for name, op in operators.items() if op == "Conv"} - narrow


def test_scales_of_other_convolutions_are_not_reused(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, "--calib", tints, "--fp8-min-channels", "32") == 0
    assert quantize(source, "--calib", tints) == 0
    assert "with different number format" in capsys.readouterr().err


def test_the_gate_tries_int8_before_float(
    source: Path, tints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[set[int], str]] = []

    def answers(path: Path, labelled: Source, *rest: object) -> Answers:
        model = onnx.load(path)
        types = {t.data_type for t in model.graph.initializer if t.name.endswith(".weight")}
        tried.append((types, precision_of(model)))
        good = precision_of(model) == "fp32" or onnx.TensorProto.INT8 in types
        classes = labelled.labels if good else (labelled.labels + 1) % 4
        count = len(labelled)
        return Answers(indices=np.arange(count), classes=classes, probabilities=np.ones(count))

    monkeypatch.setattr(accuracy_gate, "_answers", answers)
    out = Path("result.json")
    code = quantize(source, "--calib", tints, "--eval", tints, "--json", str(out))
    sidecar = read_sidecar("net-fp8.onnx") if code == 0 else None
    assert [precision for _, precision in tried[:2]] == ["fp32", "fp8"]
    blocks = json.loads(out.read_text())["result"]["measured"]["blocks"]
    better = [block["name"] for block in blocks if block["int8_gain_db"] > 0]
    if better:  # the net is untrained: which block is better depends on the rounding
        assert sidecar is not None and sidecar.calibration is not None
        assert sidecar.calibration.int8
        runs = {block["runs_in"] for block in blocks}
        assert "int8" in runs
    else:
        assert code == 1


def test_fallbacks_try_int8_where_it_gains_then_float() -> None:
    class Block:
        def __init__(self, name: str, int8_gain: float | None) -> None:
            self.name, self.int8_gain = name, int8_gain

    ranked = [Block("a", 0.5), Block("b", -1.0), Block("c", 0.1)]
    assert list(_fallbacks(ranked)) == [  # type: ignore[arg-type]
        {}, {"a": "int8"}, {"a": "float"}, {"a": "int8", "b": "float"},
        {"a": "float", "b": "float"},
    ]  # fmt: skip
    int8 = [Block("a", None), Block("b", None)]
    assert list(_fallbacks(int8)) == [{}, {"a": "float"}]  # type: ignore[arg-type]


def test_onnx_runtimes_figures_say_that_fp8_is_converted(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, "--calib", "none") == 0
    assert main(["bench", "net-fp8.onnx", str(source), "--queries", "5", "--json", "b.json"]) == 0
    assert "converts FP8 to FP32" in capsys.readouterr().err
    result = json.loads(Path("b.json").read_text())["result"]
    assert len(result["notes"]) == 1 and "net-fp8.onnx" in result["notes"][0]


def test_triton_whose_onnx_runtime_computes_fp8_wrongly_gets_none(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, "--calib", "none") == 0
    assert main(["package", "net-fp8.onnx", "--triton", "models"]) == 2
    assert "--builder tensorrt" in capsys.readouterr().err and not Path("models").exists()


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["--fp16", "--calib", "digits"], "add --int8 or --fp8"),
        (["--calibrator", "max"], "add --int8 or --fp8"),
        (["--int8", "--fp8-stem"], "add --fp8"),
        (["--int8", "--fp8-min-channels", "32"], "add --fp8"),
    ],
)
def test_export_rejects_an_option_of_a_precision_that_is_not_written(
    options: list[str], fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = ["--model", "resnet8", "--weights", "untrained", "--out", str(tmp_path / "a.onnx")]
    assert main(["export", *net, *options]) == 2
    assert fix in capsys.readouterr().err and not list(tmp_path.iterdir())
