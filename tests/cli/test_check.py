"""`rtresnet check`, with correct and wrong backends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.cli.main import main
from rtresnet.core import artifacts, hardware
from rtresnet.core.preprocess import UINT8
from rtresnet.runtime.session import Session

ort = pytest.importorskip("onnxruntime")
from rtresnet.runtime.ort import OrtBackend  # noqa: E402
from tests.conftest import as_foreign  # noqa: E402

Infer = Callable[..., Any]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, Infer], Any]], None]:
    """broken(change): every ONNX file gives change(images, right) instead of right(images)."""
    right = OrtBackend.infer

    def install(change: Callable[[Any, Infer], Any]) -> None:
        monkeypatch.setattr(
            OrtBackend, "infer", lambda self, images: change(images, lambda i: right(self, i))
        )

    return install


def checked(path: Path, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    record = tmp_path / "check.json"
    code = main(["check", str(path), "--images", "6", "--json", str(record), *more])
    return code, json.loads(record.read_text())["result"]


@pytest.mark.parametrize("name", ["resnet8.onnx", "resnet8-fp16.onnx", "resnet8-int8.onnx"])
def test_check_own_files_pass_and_agree_with_the_fp32_file(
    engines: Path, tmp_path: Path, tints: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = checked(engines / name, tmp_path, "--provider", "cpu", "--data", tints)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert {entry["compared"] for entry in result["checks"] if entry["name"] == "batch size"} == {
        "1 with alone", "8 with alone", "32 with alone",
    }  # fmt: skip
    last = result["checks"][-1]
    if name == "resnet8.onnx":
        assert result["parent"] is None and "FP32 ONNX file" in captured.out
    else:
        assert last["name"] == "parent" and last["compared"] == "resnet8.onnx" and last["n"] == 6
        assert 0 < last["largest"] < last["tolerance"]
    table = captured.out.split("6 images")[0]
    assert max(map(len, table.splitlines())) <= 80 and "FAILED" not in table
    assert f"6 images ({tints})" in captured.out and "WEAK" not in captured.out


def test_check_checkpoint_runs_in_torch(trained: Path, tmp_path: Path) -> None:
    code, result = checked(trained / "best.pt", tmp_path)
    assert (code, result["provider"], result["bound"]) == (0, "torch", "fp32")
    assert result["images"] == "noise" and result["told_apart"] > 0.5


@pytest.mark.parametrize(
    ("name", "precision"),
    [("resnet8.onnx", "fp32"), ("resnet8-fp16.onnx", "fp16"), ("resnet8-int8.onnx", "int8")],
)
def test_check_file_without_sidecar_takes_noise_and_its_own_precision(
    name: str, precision: str, copied: Path, tmp_path: Path, tints: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = copied / name
    artifacts.sidecar_path(path).unlink()
    as_foreign(path)
    code, result = checked(path, tmp_path, "--provider", "cpu")
    assert (code, result["precision"], result["bound"]) == (0, precision, precision)
    assert "preset imagenet" in result["assumed"][0]  # also of noise
    capsys.readouterr()
    assert main(["check", str(path), "--data", tints]) == 2
    assert "--preset" in capsys.readouterr().err
    code, result = checked(path, tmp_path, "--provider", "cpu", "--data", tints, "--preset", "half")
    assert code == 0 and "preset half" in result["assumed"][0]
    assert "preset half" in capsys.readouterr().out


def test_check_unknown_precision_gets_the_widest_bound(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = copied / "resnet8.onnx"
    artifacts.sidecar_path(path).unlink()
    as_foreign(path)
    installed = hardware.installed
    monkeypatch.setattr(hardware, "installed", lambda name: name != "onnx" and installed(name))
    code, result = checked(path, tmp_path, "--provider", "cpu")
    assert (code, result["precision"], result["bound"]) == (0, "unknown", "int8")
    assert "tolerance of int8" in " ".join(capsys.readouterr().out.split())


def test_check_exchanged_rows_exit_1(
    engines: Path, tmp_path: Path, broken: Infer, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(lambda images, right: np.roll(right(images), 1, axis=0))
    code, result = checked(engines / "resnet8.onnx", tmp_path, "--provider", "cpu")
    captured = capsys.readouterr()
    assert code == 1 and "FAILED" in captured.out
    assert "resnet8.onnx: in a batch (8 with alone): 8 of 8 outputs differ" in captured.err
    assert {entry["name"] for entry in result["checks"] if entry["ok"]} <= {
        "batch size", "odd batch", "repeated",
    }  # fmt: skip


def test_check_disagreement_with_fp32_file_fails_only_parent(
    engines: Path, tmp_path: Path, broken: Infer, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(engines, tmp_path / "engines")
    path = tmp_path / "engines" / "resnet8-int8.onnx"
    from rtresnet.bench import consistency

    real, calls = consistency.alone, []

    def alone(infer: Infer, images: np.ndarray) -> consistency.Outputs:
        calls.append(infer)
        answers = real(infer, images)
        return answers[np.arange(len(images))[::-1]] if len(calls) > 1 else answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency, "alone", alone)  # the second is the FP32 file's
        code, result = checked(path, tmp_path, "--provider", "cpu", "--data", tints)
    assert code == 1
    assert [e["name"] for e in result["checks"] if not e["ok"]] == ["parent"]
    assert "parent (resnet8.onnx): " in capsys.readouterr().err


def test_check_answers_not_finite_exit_1(
    engines: Path, tmp_path: Path, broken: Infer, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(lambda images, right: right(images) * np.float32(np.nan))
    code, result = checked(engines / "resnet8-int8.onnx", tmp_path, "--provider", "cpu")
    assert code == 1 and "6 outputs are not finite" in capsys.readouterr().err
    assert result["checks"][0]["largest"] is None  # JSON has no NaN


def test_check_equal_answers_print_weak(
    engines: Path, tmp_path: Path, broken: Infer, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(lambda images, right: np.repeat(np.eye(1, 4, dtype=np.float32), len(images), axis=0))
    code, result = checked(engines / "resnet8.onnx", tmp_path, "--provider", "cpu")
    assert code == 0 and result["told_apart"] == 0
    assert "WEAK: 100 %" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["missing", "changed"])
def test_check_fp32_file_missing_or_changed_is_printed(
    copied: Path, tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = copied / "resnet8.onnx"
    parent.unlink() if state == "missing" else parent.write_bytes(b"something else")
    code, result = checked(copied / "resnet8-fp16.onnx", tmp_path, "--provider", "cpu")
    assert code == 0 and result["no_parent"] == f"{parent} is {state}"
    assert f"Not compared with an FP32 file: {parent} is {state}." in capsys.readouterr().out


def pixels_in_best_out(source: Path, path: Path, k: int) -> Path:
    """Return the file with its preprocessing inside, and the k most probable classes out."""
    sidecar = artifacts.read_sidecar(source)
    assert sidecar is not None
    model = onnx.load(source)
    graph, make = model.graph, helper.make_node
    image, logits = graph.input[0].name, graph.output[0].name
    scale, shift = (value.reshape(1, 3, 1, 1) for value in sidecar.input.factors())
    side, one = sidecar.input.size, np.array([k], np.int64)
    for name, value in (("scale", scale), ("shift", shift), ("k", one)):
        graph.initializer.append(numpy_helper.from_array(value, name))
    before = [
        make("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        make("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        make("Mul", ["planes", "scale"], ["scaled"]),
        make("Add", ["scaled", "shift"], [image]),
    ]
    after = [
        make("Softmax", [logits], ["shares"], axis=1),
        make("TopK", ["shares", "k"], ["probabilities", "indices"], axis=1),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    info = helper.make_tensor_value_info
    graph.input.append(info("pixels", TensorProto.UINT8, ["batch", side, side, 3]))
    graph.output.append(info("indices", TensorProto.INT64, ["batch", k]))
    graph.output.append(info("probabilities", TensorProto.FLOAT, ["batch", k]))
    made = dataclasses.replace(
        sidecar,
        input=dataclasses.replace(sidecar.input, layout=UINT8),
        topk=k,
        parent=artifacts.link_to(source, path),
    )
    artifacts.publish(path, lambda p: p.write_bytes(model.SerializeToString()), made)
    return path


@pytest.mark.parametrize("precision", ["-fp16", "-int8"])
def test_check_uint8_topk_file_passes_and_is_packaged(
    copied: Path, tmp_path: Path, tints: str, precision: str
) -> None:
    path = pixels_in_best_out(copied / f"resnet8{precision}.onnx", copied / "served.onnx", 3)
    code, result = checked(path, tmp_path, "--provider", "cpu", "--data", tints)
    assert code == 0
    names = [entry["name"] for entry in result["checks"]]
    assert "white in one row" in names and names[-1] == "parent"
    assert 0 < result["checks"][-1]["largest"] < result["checks"][-1]["tolerance"] <= 0.5
    assert main(["package", str(path), "--triton", str(tmp_path / "models")]) == 0
    text = (tmp_path / "models" / "served" / "config.pbtxt").read_text()
    assert "data_type: TYPE_UINT8" in text and "FORMAT_NHWC" in text and "TYPE_INT64" in text
    assert "label_filename" not in text


@pytest.mark.usefixtures("without_gpu")
def test_check_plan_without_gpu_exits_3(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = engines / "resnet8-int8.plan"
    if not plan.exists():
        pytest.skip("no TensorRT-RTX here")
    assert main(["check", str(plan)]) == 3
    assert "resnet8-int8.onnx" in capsys.readouterr().err


def test_check_plan_uses_the_batches_of_its_profiles(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ONNX file that the plan was built from stands in for a GPU."""
    plan, source = engines / "resnet8-int8.plan", engines / "resnet8-int8.onnx"
    if not plan.exists():
        pytest.skip("no TensorRT-RTX here")
    from rtresnet.runtime import loading

    real = loading.load

    def load(path: Any, **options: Any) -> Session:
        if Path(path) != plan:
            return real(path, **options)
        return Session(Path(path), artifacts.verify(path), OrtBackend(source, provider="cpu"))

    monkeypatch.setattr(loading, "load", load)
    code, result = checked(plan, tmp_path)
    assert code == 0 and result["checks"][-1]["compared"] == "resnet8.onnx"
    sidecar = artifacts.read_sidecar(plan)
    assert sidecar is not None and sidecar.plan is not None
    expected = {n for p in sidecar.plan.profiles for n in (p.min, p.opt, p.max)}
    tried = {e["compared"] for e in result["checks"] if e["name"] == "batch size"}
    assert tried == {f"{n} with alone" for n in expected}


def test_check_impossible_options_exit_2(trained: Path, tmp_path: Path) -> None:
    assert main(["check", str(trained / "best.pt"), "--provider", "cpu"]) == 2
    assert main(["check", str(tmp_path / "none.onnx")]) == 2
    assert main(["check", str(trained / "best.pt"), "--images", "1"]) == 2
