from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.flips import Answers
from rtresnet.data.sources import Source
from rtresnet.workflows import accuracy_gate
from tests.conftest import as_foreign, tinted_noise, undescribed

pytest.importorskip("onnxruntime")


@pytest.fixture
def source(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained net's FP32 file in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("resnet8.onnx", "resnet8.onnx.json"):
        shutil.copy(engines / name, tmp_path / name)
    return tmp_path / "resnet8.onnx"


def quantize(source: Path, *more: str) -> int:
    return main(["quantize", str(source), *more])


def gated(source: Path, tints: str, *more: str) -> int:
    """Quantize with the loss measured on the calibration images, by the quickest method."""
    return quantize(source, "--calib", tints, "--calibrator", "max", "--eval", tints, *more)


def test_scales_are_used_again_where_nothing_has_changed(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--calib", tints, "--calib-images", "64"]
    assert quantize(source, *arguments) == 0
    first = Path("resnet8-int8.onnx").read_bytes()
    scales = Path("calib/resnet8-int8.json").read_text()
    capsys.readouterr()
    assert quantize(source, *arguments) == 0
    assert "reusing the scales" in capsys.readouterr().err
    assert Path("resnet8-int8.onnx").read_bytes() == first
    assert Path("calib/resnet8-int8.json").read_text() == scales


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["--calib-images", "32"], "number of images"),
        (["--calibrator", "max"], "calibrator"),
        (["--calib", "digits"], "images"),
    ],
)
def test_scales_made_for_something_else_are_made_again_and_why_is_said(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str], changed: list[str], reason: str
) -> None:
    assert quantize(source, "--calib", tints, "--calib-images", "64") == 0
    capsys.readouterr()
    assert quantize(source, "--calib", tints, "--calib-images", "64", *changed) == 0
    output = capsys.readouterr().err
    assert "calibrating again" in output and reason in output


def test_scales_of_other_weights_and_another_preprocessing_are_refused_with_the_reason(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    arguments = ["--calib", tints, "--calib-images", "16"]
    assert quantize(source, *arguments) == 0
    model, sidecar = onnx.load(source), artifacts.read_sidecar(source)
    assert sidecar is not None
    other = dataclasses.replace(sidecar.input, mean=(0.1, 0.2, 0.3))
    model.graph.doc_string = "retrained"
    for changed, contract, reason in ((False, other, "preprocessing"), (True, other, "weights")):
        record = dataclasses.replace(sidecar, input=contract)
        data = model.SerializeToString() if changed else source.read_bytes()
        artifacts.publish(source, lambda path, data=data: path.write_bytes(data), record)
        capsys.readouterr()
        assert quantize(source, *arguments) == 0
        output = capsys.readouterr().err
        assert f"was made with different {reason}" in output


def test_a_damaged_file_of_scales_is_made_again(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("calib").mkdir()
    path = Path("calib/resnet8-int8.json")
    arguments = ["--calib", tints, "--calib-images", "16", "--calibrator", "max"]
    assert quantize(source, *arguments) == 0
    record = json.loads(path.read_text())
    broken = [json.dumps(record | {"branches": wrong}) for wrong in (5, {"x": 1}, {"x": [2, 1]})]
    for text in ("", "{", "[]", '{"schema": 2}', '{"schema": 1, "scales": {}}', *broken):
        capsys.readouterr()
        path.write_text(text)
        assert quantize(source, *arguments) == 0
        assert "calibrating again" in capsys.readouterr().err


def test_the_file_of_scales_has_a_line_a_tensor(source: Path, tints: str) -> None:
    assert quantize(source, "--calib", tints, "--calib-images", "64") == 0
    text = Path("calib/resnet8-int8.json").read_text()
    record = json.loads(text)
    for name, scale in record["scales"].items():
        (_line,) = (line for line in text.splitlines() if f'"{name}": {scale}' in line)
    assert len(record["branches"]) == 3
    for name, (low, high) in record["branches"].items():
        (_line,) = (line for line in text.splitlines() if f'"{name}": [{low}, {high}]' in line)
    assert record["signal_to_noise_db"]["kept"] > 15


def test_without_images_the_ranges_come_from_the_batch_norms(source: Path, tints: str) -> None:
    assert quantize(source, "--calib", "none") == 0
    sidecar = artifacts.read_sidecar("resnet8-int8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert "batch norms" in sidecar.calibration.images and sidecar.calibration.n == 0
    out = Path("eval.json")
    assert main(["eval", "resnet8-int8.onnx", "--data", tints, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["result"]["top1_percent"] > 90


def test_the_gate_measures_and_records_what_is_lost(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ("--report", "page")
    assert quantize(source, "--calib", tints, "--eval", tints, "--max-drop", "2", *report) == 0
    shown = capsys.readouterr().out
    assert "a different class than FP32" in Path("page/index.html").read_text()
    assert "INT8 loses" in shown and "95 %" in shown and "layer1.0" in shown
    assert max(map(len, shown.split("INT8 loses")[0].splitlines())) <= 80
    sidecar = artifacts.read_sidecar("resnet8-int8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert sidecar.measured["drop"]["n"] == 240 and sidecar.calibration.kept == ()
    assert main(["inspect", "resnet8-int8.onnx"]) == 0
    shown = capsys.readouterr().out
    assert "{" not in shown and "% of weights" in shown and "layer1.0" in shown


def harmed(source: Path) -> None:
    """Return the same function, with channels of the last block a thousand times larger for the FC.

    They are the first ones, which the shortcut fills with zeros. An addition lies before them, so
    they cannot be brought down.
    """
    from onnx import numpy_helper

    model = onnx.load(source)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("layer3.0.conv2.weight", "layer3.0.conv2.bias"):
            values[:4] *= 1000
        elif tensor.name == "fc.weight":
            values[:, :4] /= 1000
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    sidecar = artifacts.read_sidecar(source)
    assert sidecar is not None
    artifacts.publish(source, lambda path: path.write_bytes(model.SerializeToString()), sidecar)


def test_where_too_much_is_lost_the_worst_blocks_stay_in_float(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harmed(source)
    assert gated(source, tints, "--max-drop", "0") == 0
    shown = capsys.readouterr().out
    sidecar = artifacts.read_sidecar("resnet8-int8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    float_nodes = sidecar.calibration.kept
    assert float_nodes and "left in float" in shown
    assert "fc" in float_nodes
    model = onnx.load("resnet8-int8.onnx")
    inputs = {node.name: node.input[0] for node in model.graph.node if node.name in float_nodes}
    assert not any(name.endswith(".dq") for name in inputs.values())
    assert main(["lint", "resnet8-int8.onnx"]) == 0  # what was left in float was meant to be
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


Hits = dict[str, Any]


def right_where(right: np.ndarray, answers: Answers, source: Source) -> Answers:
    """Return answers that are right only for these images."""
    labels = source.labels[answers.indices]
    wrong = (labels + 1) % len(source.classes)
    return dataclasses.replace(answers, classes=np.where(right, labels, wrong))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Hits:
    """The gate sees what `judge` makes of each INT8 file: (model) -> share of images right."""
    real, result = accuracy_gate._answers, Hits(judge=None, files=[])

    def hits(path: Path, source: Source, *rest: Any) -> Answers:
        answers = real(path, source, *rest)
        model = onnx.load(path)
        if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            return answers
        result["files"].append(undescribed(onnx.load(path)).SerializeToString())
        if not result["judge"]:
            return answers
        right = answers.classes == source.labels[answers.indices]
        return right_where(right & result["judge"](model), answers, source)

    monkeypatch.setattr(accuracy_gate, "_answers", hits)
    return result


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_what_the_gate_measures_is_what_is_written(
    source: Path, tints: str, judged: Hits, rest: str
) -> None:
    assert gated(source, tints, "--rest", rest) == 0
    assert judged["files"] == [undescribed(onnx.load("resnet8-int8.onnx")).SerializeToString()]


def floats(model: onnx.ModelProto) -> set[str]:
    """Return names of the convolutions and the FC that read a float activation."""
    return {
        node.name for node in model.graph.node
        if node.op_type in ("Conv", "Gemm") and not node.input[0].endswith(".dq")
    }  # fmt: skip


def test_as_few_blocks_stay_in_float_as_bring_it_back(
    source: Path, tints: str, judged: Hits, tmp_path: Path
) -> None:
    tried: list[int] = []

    def judge(model: onnx.ModelProto) -> bool:
        tried.append(len(floats(model)))
        return len(tried) > 2  # what two blocks in float mend, one does not

    judged["judge"] = judge
    out = tmp_path / "q.json"
    assert gated(source, tints, "--json", str(out)) == 0
    assert tried[0] == 0 and len(tried) == 3 and tried == sorted(tried)
    measured = json.loads(out.read_text())["result"]["measured"]
    places = [entry["runs_in"] for entry in measured["blocks"]]
    assert places == ["float"] * 2 + ["int8"] * (len(places) - 2)
    gains = [entry["gain_db"] for entry in measured["blocks"]]
    assert gains[0] == max(gains)  # the most harmful first
    sidecar = artifacts.read_sidecar("resnet8-int8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert floats(onnx.load("resnet8-int8.onnx")) <= set(sidecar.calibration.kept)


def test_where_nothing_brings_it_back_the_exit_code_is_1_and_nothing_is_written(
    source: Path, tints: str, judged: Hits, capsys: pytest.CaptureFixture[str]
) -> None:
    judged["judge"] = lambda model: False
    assert gated(source, tints) == 1
    output = capsys.readouterr().err.splitlines()[-1]
    assert "bound 0.5: missed" in output and "keep FP16" in output
    assert not Path("resnet8-int8.onnx").exists()
    assert len(judged["files"]) == 5  # all but one of stem, three blocks and FC were tried


def gate_of(path: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(path).read_text())["result"]
    return result["measured"]["gate"]


def test_quantize_interval_beyond_the_bound_is_not_called_held(
    source: Path, tints: str, judged: Hits, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 240 images even equal answers reach 0.81 points: a bound of 0.5 cannot be shown."""
    arguments = [tints, "--json", "q.json"]
    judged["judge"] = lambda model: np.arange(240) != 0  # one image lost: 0.42 points
    assert gated(source, *arguments) == 0
    captured = capsys.readouterr()
    output = captured.out
    assert "Passed (--gate point): measured loss" in output
    assert "not shown to hold" in output and "images would be needed" in output
    assert "training images of" in captured.err  # of tints, which has no test split
    assert "images of --eval" in captured.err
    sidecar = artifacts.read_sidecar("resnet8-int8.onnx")
    assert sidecar is not None
    result = sidecar.measured["gate"]
    assert result == gate_of("q.json")
    assert result["verdict"] == "not shown to hold" and result["passed"] is True
    assert result["rule"] == "point" and result["bound"] == 0.5 and result["images_needed"] > 1000
    drop = sidecar.measured["drop"]
    assert drop["points"] <= 0.5 < drop["high"] and drop["n"] == 240 and drop["lost"] == 1
    assert gated(source, *arguments, "--max-drop", "3") == 0
    assert gate_of("q.json")["verdict"] == "held"


def test_quantize_gate_upper_fails_where_the_bound_is_not_shown(
    source: Path, tints: str, judged: Hits, capsys: pytest.CaptureFixture[str]
) -> None:
    judged["judge"] = lambda model: np.arange(240) != 0
    arguments = [tints, "--max-drop", "1", "--json", "q.json"]
    assert gated(source, *arguments, "--gate", "upper") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not shown to hold" in error and "--gate point" in error
    assert not Path("resnet8-int8.onnx").exists() and not Path("calib/resnet8-int8.json").exists()
    result = gate_of("q.json")
    assert result["verdict"] == "not shown to hold" and result["passed"] is False
    assert gated(source, *arguments, "--gate", "point") == 0
    assert gated(source, *arguments, "--gate", "upper", "--max-drop", "2") == 0
    assert gate_of("q.json") == {
        "rule": "upper", "bound": 2.0, "passed": True, "verdict": "held", "images_needed": 240
    }  # fmt: skip


def test_quantize_gate_upper_with_too_few_images_is_refused_before_the_work(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for bound, needed in (("0.5", "at least 390"), ("0", "a bound above 0")):
        arguments = ["--eval", tints, "--max-drop", bound, "--gate", "upper"]
        assert quantize(source, "--calib", tints, *arguments) == 2
        error = capsys.readouterr().err
        assert needed in error and "calibrating" not in error
    assert quantize(source, "--calib", tints, "--gate", "upper") == 2
    assert "--eval SPEC" in capsys.readouterr().err


def test_quantize_better_int8_is_told_as_a_gain(
    source: Path, tints: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = accuracy_gate._answers

    def hits(path: Path, images: Source, *rest: Any) -> Answers:
        answers = real(path, images, *rest)
        right = answers.classes == images.labels[answers.indices]
        right[:2] = path.name != source.name  # FP32 is wrong on two images
        return right_where(right, answers, images)

    monkeypatch.setattr(accuracy_gate, "_answers", hits)
    assert gated(source, tints, "--json", "q.json") == 0
    output = capsys.readouterr().out
    assert "INT8 gains 0.83 points" in output and "measured gain 0.83 points" in output
    assert "-0.83" not in output
    assert json.loads(Path("q.json").read_text())["result"]["measured"]["drop"]["points"] < 0


def test_the_gate_needs_labels_and_is_for_int8(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, "--fp16", "--eval", tints) == 2
    assert quantize(source, "--calib", tints, "--report", "page") == 2
    assert "--eval" in capsys.readouterr().err
    assert quantize(source, "--calib", "none", "--eval", tints) == 2
    assert "noise of each block" in capsys.readouterr().err
    assert quantize(source, "--calib", tints, "--eval", "nowhere") == 2
    output = capsys.readouterr().err
    assert "nowhere" in output and "calibrating" not in output  # before the work, not after it
    assert not Path("calib").exists()


def test_the_gate_matches_labels_by_name_and_refuses_other_classes(
    source: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    sidecar = artifacts.read_sidecar(source)
    assert sidecar is not None
    model = dataclasses.replace(sidecar.model, classes=("red", "green", "blue", "grey"))
    record = dataclasses.replace(sidecar, model=model)
    data = source.read_bytes()
    artifacts.publish(source, lambda path: path.write_bytes(data), record)
    images, labels = tinted_noise(80)
    other = {"order": ["grey", "red", "green", "blue"], "other": ["gray", "red", "green", "blue"]}
    for name, classes in other.items():
        moved = (labels + 1) % 4  # the label of the same colour in this order
        np.savez(f"{name}.npz", images=images, labels=moved, classes=classes)
    arguments = ["--calib", tints, "--calib-images", "32", "--max-drop", "5"]
    assert quantize(source, *arguments, "--eval", "npz:other.npz") == 2
    output = capsys.readouterr().err
    assert "'gray'" in output and "'grey'" in output and "calibrating" not in output
    assert quantize(source, *arguments, "--classes", "names.txt") == 2
    observed: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        real = accuracy_gate._answers

        def spy(path: Path, images: Source, *rest: Any) -> Answers:
            answers = real(path, images, *rest)
            observed.append(float((answers.classes == images.labels[answers.indices]).mean()))
            return answers

        patch.setattr(accuracy_gate, "_answers", spy)
        assert quantize(source, *arguments, "--eval", "npz:order.npz") == 0
    assert observed[0] > 0.9
    written = artifacts.read_sidecar("resnet8-int8.onnx")
    assert written is not None
    assert written.measured["drop"]["labels"]["matched_by"] == "name"


def test_the_rest_can_be_fp16(source: Path, tints: str) -> None:
    assert quantize(source, "--calib", tints, "--calib-images", "64", "--out", "a.onnx") == 0
    assert quantize(source, "--calib", tints, "--calib-images", "64", "--rest", "fp16",
                    "--out", "b.onnx") == 0  # fmt: skip
    sidecar = artifacts.read_sidecar("b.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert sidecar.calibration.rest == "fp16"
    types = {tensor.data_type for tensor in onnx.load("b.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types and onnx.TensorProto.INT8 in types
    assert main(["compare", "a.onnx", "b.onnx", "--data", tints, "--json", "c.json"]) == 0
    assert json.loads(Path("c.json").read_text())["result"]["agreement"] > 0.98


def test_a_foreign_file_is_quantized_when_its_input_is_said(
    source: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_foreign(shutil.copy(source, tmp_path / "foreign.onnx"))
    foreign = tmp_path / "foreign.onnx"
    assert quantize(foreign, "--calib", tints) == 2
    assert "--preset" in capsys.readouterr().err
    assert quantize(foreign, "--calib", tints, "--size", "32", "--mean", "0,0,0") == 2
    for precision in ("--int8", "--fp16"):
        assert quantize(foreign, precision, "--size", "48") == 2
        assert "has 32x32 pixels, not 48" in capsys.readouterr().err
    stated = ["--mean", "123,116,103", "--std", "1,1,1"]
    assert quantize(foreign, "--size", "32", *stated) == 2
    assert "in units of [0, 1]" in capsys.readouterr().err
    assert quantize(source, "--fp16", "--int8") == 2
    assert "cannot be combined" in capsys.readouterr().err
    assert quantize(source, "--fp16", "--out", "half.onnx") == 0
    artifacts.sidecar_path("half.onnx").unlink()
    as_foreign("half.onnx")
    for precision in ("--int8", "--fp16"):
        assert quantize("half.onnx", precision, "--calib" if precision == "--int8" else "--size",
                        tints if precision == "--int8" else "32") == 2  # fmt: skip
        assert "is fp16 already" in capsys.readouterr().err
    assert quantize(foreign, "--calib", tints, "--preset", "imagenet") == 0
    assert "Assumed: input: mean" in capsys.readouterr().out
    assert quantize("resnet8.onnx", "--calib", tints, "--mean", "0,0,0") == 2  # it has a sidecar
    assert "contradict its sidecar" in capsys.readouterr().err
    sidecar = artifacts.read_sidecar("foreign-int8.onnx")
    assert sidecar is not None and sidecar.input.size == 32
    assert sidecar.assumed == sidecar.input.assumptions() and len(sidecar.assumed) == 1
    assert len(sidecar.model.classes) == 4 and sidecar.weights.origin == "file"
    assert main(["inspect", "foreign-int8.onnx"]) == 0


def test_nets_of_one_name_share_a_file_of_scales_and_inspect_says_so(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, calibrator in (("a", "max"), ("b", "mse")):
        Path(folder).mkdir()
        out = f"{folder}/net.onnx"
        assert quantize(source, "--calib", tints, "--calibrator", calibrator, "--out", out) == 0
    capsys.readouterr()
    for folder, words in (("a", "net.json (changed since)"), ("b", "calib/net.json\n")):
        assert main(["inspect", f"{folder}/net.onnx"]) == 0
        assert words in capsys.readouterr().out


def with_an_outlier(source: Path) -> None:
    """Return the same function, one channel inside a block a hundred times larger."""
    from onnx import numpy_helper

    model = onnx.load(source)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("layer2.0.conv1.weight", "layer2.0.conv1.bias"):
            values[5] *= 100
        elif tensor.name == "layer2.0.conv2.weight":
            values[:, 5] /= 100
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    sidecar = artifacts.read_sidecar(source)
    assert sidecar is not None
    artifacts.publish(source, lambda path: path.write_bytes(model.SerializeToString()), sidecar)


@pytest.mark.parametrize(
    ("calibrator", "remedy"), [("auto", "scaled down"), ("max", "only --calibrator auto")]
)
def test_outliers_are_told_with_the_remedy_that_was_taken(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str], calibrator: str, remedy: str
) -> None:
    with_an_outlier(source)
    arguments = ["--calib", tints, "--calibrator", calibrator, "--json", "q.json"]
    for again in (False, True):
        assert quantize(source, *arguments) == 0
        output = capsys.readouterr().err
        assert ("reusing the scales" in output) == again
        assert "layer2.0.relu1: 1 of its channels" in output and remedy in output
        (text,) = json.loads(Path("q.json").read_text())["result"]["measured"]["outliers"]
        assert text["tensor"] == "layer2.0.relu1" and remedy in text["remedy"]
        assert text["times"] > 8 and text["channels"] == 1


def test_one_outlier_ruins_a_net_and_auto_saves_it(source: Path, tints: str) -> None:
    """The collapse test: of the trained net, on the images it is measured on."""
    with_an_outlier(source)
    ratio = {}
    for calibrator in ("max", "auto"):
        assert quantize(source, "--calib", tints, "--calibrator", calibrator) == 0
        assert main(["compare", "resnet8.onnx", "resnet8-int8.onnx", "--data", tints,
                     "--json", "c.json"]) == 0  # fmt: skip
        ratio[calibrator] = json.loads(Path("c.json").read_text())["result"]["relative"]
    assert ratio["max"] > 5 * ratio["auto"], ratio
    assert quantize(source, "--calib", tints, "--eval", tints, "--max-drop", "0.5") == 0
    sidecar = artifacts.read_sidecar("resnet8-int8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert sidecar.measured["drop"]["points"] <= 0.5 and sidecar.calibration.kept == ()


def reshaped(source: Path, out: Path, batch: int | str, side: int | str) -> Path:
    """Return the file as somebody else's, its input with another shape."""
    model = onnx.load(source)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, value in zip((dims[0], *dims[2:]), (batch, side, side), strict=True):
        dim.Clear()
        if isinstance(value, int):
            dim.dim_value = value
        else:
            dim.dim_param = value
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


def test_a_side_that_was_open_is_the_one_that_was_said(
    source: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    free = as_foreign(reshaped(source, tmp_path / "free.onnx", "n", "side"))
    assert main(["build", str(free), "--out", "free.plan"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its input is [-1, 3, -1, -1]" in error and f"rtresnet adopt {free} --size S" in error
    assert quantize(free, "--calib", tints, "--size", "32", "--preset", "half") == 0
    assert main(["build", "free-int8.onnx"]) == 0
    assert main(["bench", "free-int8.onnx", "--queries", "5"]) == 0


def test_weights_in_a_file_beside_are_found_or_asked_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    split = tmp_path / "split.onnx"
    onnx.save(onnx.load(source), split, save_as_external_data=True, location="split.onnx.data",
              size_threshold=0)  # fmt: skip
    assert main(["build", str(split), "--out", "split.plan"]) == 0
    assert main(["package", str(split), "--triton", "store"]) == 2
    assert "onnx.save(" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("store").exists()


def test_quantize_checks_every_place_it_writes_to_before_it_calibrates(
    source: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("no folder")
    Path("sidecar.onnx.json").mkdir()
    Path("folder.onnx").mkdir()
    for out in ("file/int8.onnx", "sidecar.onnx", "folder.onnx"):
        for more in (["--calib", tints], ["--calib", "none"], ["--fp16"]):
            assert quantize(source, *more, "--out", out) == 2
            (line,) = capsys.readouterr().err.splitlines()  # and not a word of calibrating
            assert out in line


@pytest.mark.parametrize("calib", ["tints", "none"])
def test_scales_go_next_to_the_file_where_calib_is_not_writable(
    source: Path, tints: str, calib: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("calib").write_text("no folder")
    arguments = ["--calib", tints if calib == "tints" else "none", "--calib-images", "16"]
    assert quantize(source, *arguments, "--out", "out/x.onnx") == 0
    assert "out/x.scales.json" in capsys.readouterr().out
    sidecar = artifacts.read_sidecar("out/x.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert sidecar.calibration.scales == "out/x.scales.json"
    assert json.loads(Path("out/x.scales.json").read_text())["scales"]
    if calib == "tints":
        assert quantize(source, *arguments, "--out", "out/x.onnx") == 0
        assert "reusing the scales of out/x.scales.json" in capsys.readouterr().err


def test_scales_of_a_calib_folder_that_is_read_only_are_used_again(
    source: Path, tints: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--calib", tints, "--calib-images", "16", "--out", "out/x.onnx"]
    assert quantize(source, *arguments) == 0
    access = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path).name != "calib" and access(path, mode)
    )
    assert quantize(source, *arguments) == 0
    assert "reusing the scales of calib/x.json" in capsys.readouterr().err
    assert not Path("out/x.scales.json").exists()


def test_calibration_tells_how_far_it_is_and_how_long_it_takes(
    source: Path, tints: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rtresnet.cli.console.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr("rtresnet.data.loader.batch_size", lambda preprocess: 16)
    assert quantize(source, "--calib", tints, "--calib-images", "64") == 0
    output = capsys.readouterr().err
    lines = [line for line in output.splitlines() if line.endswith("s left")]
    assert any(line.startswith("observing activations: 50 %") for line in lines), output
    assert any(line.startswith("comparing ranges") for line in lines), output


def test_calibration_draws_a_bar_with_the_time_left_on_a_terminal(
    source: Path, tints: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.progress import Progress

    monkeypatch.setattr("rtresnet.cli.console.on_terminal", lambda: True)
    phases = {}
    update = Progress.update

    def watched(self: Progress, task: Any, **options: Any) -> None:
        update(self, task, **options)
        phases[self.tasks[0].description] = (self.tasks[0].completed, self.tasks[0].total)

    monkeypatch.setattr(Progress, "update", watched)
    assert quantize(source, "--calib", tints, "--calib-images", "64") == 0
    assert phases["observing activations"] == (64, 64)
    done, total = phases["comparing ranges by their noise"]
    assert 0 < done <= total
