"""`--input uint8-nhwc` and `--topk K` from export to evaluation, on the small trained net."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import rtresnet
from rtresnet.cli.main import main
from rtresnet.core import artifacts, metrics
from rtresnet.core.artifacts import read_sidecar, sidecar_path
from rtresnet.core.preprocess import UINT8
from rtresnet.workflows import embedded
from rtresnet.workflows.embedded import EmbedConfig
from tests.conftest import as_foreign

pytest.importorskip("onnxruntime")

PLAIN, PIXELS, BEST, BOTH = "resnet8", "resnet8-u8", "resnet8-top2", "resnet8-u8-top2"


def result(*arguments: object, folder: Path) -> dict[str, Any]:
    file = folder / "result.json"
    assert main([*map(str, arguments), "--json", str(file)]) == 0
    actual: dict[str, Any] = json.loads(file.read_text())["result"]
    return actual


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def crops(tints: str) -> np.ndarray:
    """uint8 [6, 32, 32, 3]."""
    images: np.ndarray = np.load(tints.removeprefix("npz:"))["images"][:6]
    return images


@pytest.fixture(scope="module")
def files(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FP32 and INT8 files, and each with three kinds of ends."""
    folder = tmp_path_factory.mktemp("ends")
    for name in ("resnet8.onnx", "resnet8-int8.onnx"):
        shutil.copy(engines / name, folder)
        shutil.copy(sidecar_path(engines / name), folder)
        for config in (
            EmbedConfig(input="uint8-nhwc"),
            EmbedConfig(topk=2),
            EmbedConfig(input="uint8-nhwc", topk=2),
        ):
            embedded.write(folder / name, config)
    return folder


def test_the_sidecar_says_what_goes_in_and_comes_out(files: Path) -> None:
    for precision in ("", "-int8"):
        plain = read_sidecar(files / f"resnet8{precision}.onnx")
        path = files / f"resnet8{precision}-u8-top2.onnx"
        both = artifacts.verify(path)
        assert plain is not None and both is not None and both.parent is not None
        assert (plain.input.layout, plain.topk) == ("NCHW RGB float32", None)
        assert (both.input.layout, both.topk) == (UINT8, 2)
        assert (both.input.mean, both.input.std) == (plain.input.mean, plain.input.std)
        assert (both.parent.sha256, both.precision) == (plain.sha256, plain.precision)
        assert both.calibration == plain.calibration
        assert both.measured["ends"]["relative"] < 1e-5
        assert [state for _, _, state in artifacts.chain(path)][:2] == ["ok", "ok"]


def test_inspect_says_it_too(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(files / "resnet8-u8-top2.onnx")]) == 0
    shown = capsys.readouterr().out
    assert f"input {UINT8}: the file normalizes it with mean and std" in shown
    assert "2 most probable classes" in shown
    assert main(["inspect", str(files / "resnet8.onnx")]) == 0
    assert "takes" not in capsys.readouterr().out


def test_a_session_takes_crops_whatever_the_file_does_itself(
    files: Path, crops: np.ndarray
) -> None:
    with rtresnet.load(files / f"{PLAIN}.onnx", provider="cpu") as session:
        assert (session.image_shape, session.example(2).dtype) == ((3, 32, 32), np.float32)
        assert session.example(2).shape == (2, 3, 32, 32)
        logits = session(session.prepare(crops))
    with rtresnet.load(files / f"{PIXELS}.onnx", provider="cpu") as session:
        assert (session.image_shape, session.example(2).dtype) == ((32, 32, 3), np.uint8)
        assert session.prepare(crops) is crops
        np.testing.assert_array_equal(session(crops), logits)
        with pytest.raises(rtresnet.InputError, match="does not fit"):
            session(session.preprocess.normalize(crops))
    with rtresnet.load(files / f"{BOTH}.onnx", provider="cpu") as session:
        indices, probabilities = session(session.prepare(crops))
        assert (indices.dtype, probabilities.dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(indices, np.argsort(-logits, axis=1)[:, :2])
        expected = np.take_along_axis(metrics.softmax(logits), indices, axis=1)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_pixels_need_no_sidecar_to_run(files: Path, crops: np.ndarray, tmp_path: Path) -> None:
    shutil.copy(files / f"{PIXELS}.onnx", tmp_path)
    with rtresnet.load(tmp_path / f"{PIXELS}.onnx", provider="cpu") as session:
        assert session(session.prepare(crops)).shape == (6, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["", "-int8"])
def test_eval_counts_the_same(precision: str, files: Path, tints: str, tmp_path: Path) -> None:
    counts = [
        result("eval", files / f"resnet8{precision}{ends}.onnx", "--data", tints, folder=tmp_path)
        for ends in ("", "-u8", "-top2", "-u8-top2")
    ]
    assert counts[0]["top1_percent"] > 90
    assert len({(entry["n"], entry["top1"], entry["top5"]) for entry in counts}) == 1


def test_top5_is_counted_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez("ten.npz", images=images, labels=np.arange(40) % 10)
    export = ["export", "--model", "resnet8", "--weights", "untrained", "--fp32", "--no-plan"]
    assert main([*export, "--topk", "7"]) == 0
    assert main([*export, "--topk", "3"]) == 0
    plain, seven, three = (
        result("eval", f"engines/resnet8{ends}.onnx", "--data", "npz:ten.npz", folder=tmp_path)
        for ends in ("", "-top7", "-top3")
    )
    assert plain["top5"] > plain["top1"]
    assert (seven["top1"], seven["top5"]) == (plain["top1"], plain["top5"])
    assert (three["top1"], three["top5"]) == (plain["top1"], None)
    sidecar = read_sidecar("engines/resnet8-top3.onnx")
    assert sidecar is not None and sidecar.measured["accuracy"][-1]["top5"] is None


def test_compare_says_what_it_knows(
    files: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(first: str, second: str) -> dict[str, Any]:
        names = (files / f"{first}.onnx", files / f"{second}.onnx")
        # ONNX Runtime's own provider computes both alike; OpenVINO fuses the pixels' arithmetic.
        options = ("--data", tints, "--provider", "cpu")
        return result("compare", *names, *options, folder=tmp_path)

    pixels = compare(PLAIN, PIXELS)
    assert (pixels["agreement"], pixels["largest"], pixels["relative"]) == (1.0, 0.0, 0.0)
    capsys.readouterr()
    best = compare(PLAIN, BOTH)
    assert (best["agreement"], best["largest"], best["relative"]) == (1.0, None, None)
    assert "agreement 100.00 % of 240 images, logits unknown" in capsys.readouterr().out
    plain, both = compare(PLAIN, "resnet8-int8"), compare(BOTH, "resnet8-int8-u8-top2")
    assert both["agreement"] == plain["agreement"] and both["n"] == 240


def test_predict_says_the_same(files: Path, crops: np.ndarray, tmp_path: Path) -> None:
    for index, image in enumerate(crops):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    results = [
        result(
            "predict", files / f"{name}.onnx", tmp_path, "--top", 2, "--provider", "cpu",
            folder=tmp_path,
        )["images"]
        for name in (PLAIN, PIXELS, BOTH)
    ]  # fmt: skip
    assert results[0] == results[1]
    for plain, both in zip(results[0], results[2], strict=True):
        assert [g["class"] for g in plain["top"]] == [g["class"] for g in both["top"]]
        for one, other in zip(plain["top"], both["top"], strict=True):
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)


def test_bench_and_check_make_input_of_the_right_type(files: Path, tmp_path: Path) -> None:
    options = ("--batch", "2", "--seconds", "0.05", "--provider", "cpu")
    names = (files / f"{PLAIN}.onnx", files / f"{BOTH}.onnx")
    measured = result("bench", *names, *options, folder=tmp_path)
    assert [entry["batch"] for entry in measured["results"]] == [2, 2]
    checked = result("check", files / f"{BOTH}.onnx", "--images", 4, folder=tmp_path)
    assert all(entry["ok"] for entry in checked["checks"])


def test_an_ensemble_and_several_crops_need_all_probabilities(
    files: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    best, plain = files / f"{BEST}.onnx", files / f"{PLAIN}.onnx"
    for more in ((plain,), ("--protocol", "10-crop")):
        output = refused("eval", best, *more, "--data", tints, capsys=capsys)
        assert "the 2 most probable classes" in output and str(plain) in output


def test_mean_and_std_that_are_inside_cannot_be_changed(
    files: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", files / f"{PIXELS}.onnx", "--data", tints, "--mean", "0,0,0")
    assert "normalizes" in refused(*arguments, capsys=capsys)


@pytest.mark.parametrize("name", [PIXELS, BEST, BOTH])
def test_quantizing_comes_first(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = refused("quantize", files / f"{name}.onnx", "--fp16", capsys=capsys)
    assert (
        "added after quantization" in output and f"rtresnet quantize {files / PLAIN}.onnx" in output
    )


def test_ends_are_changed_once(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.iterdir())
    output = refused("build", files / f"{PIXELS}.onnx", "--topk", 2, capsys=capsys)
    assert "already has an embedded" in output or "no TensorRT builder" in output
    assert sorted(files.iterdir()) == before


def test_a_file_without_sidecar_has_no_mean_to_put_inside(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = as_foreign(shutil.copy(files / f"{PLAIN}.onnx", tmp_path))
    assert "no sidecar" in refused("build", path, "--input", "uint8-nhwc", capsys=capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_too_many_classes_are_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engines"
    weights = ("--weights", trained / "best.pt", "--out", out)
    output = refused("export", *weights, "--topk", 5, capsys=capsys)
    assert "--topk 5: resnet8 has 4 classes" in output
    assert not list(out.glob("*"))


@pytest.mark.parametrize("precision", ["", "-int8"])
def test_a_plan_is_built_with_these_ends_and_every_convolution_as_before(
    precision: str, files: Path, tmp_path: Path
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    name = f"resnet8{precision}"
    for suffix in ("", ".json"):
        shutil.copy(files / f"{name}.onnx{suffix}", tmp_path)
    options = ("--input", "uint8-nhwc", "--topk", 2, "--target", "sm_86")
    built = result("build", tmp_path / f"{name}.onnx", *options, folder=tmp_path)
    expected = "Int8" if precision else "Float"
    assert built["attested"]["dtypes"] == {expected: built["attested"]["convolutions"]}
    sidecar = artifacts.verify(built["plan"])
    assert sidecar is not None and sidecar.plan is not None
    assert (sidecar.input.layout, sidecar.topk) == (UINT8, 2)
    # What TensorRT's parser makes of the two ends.
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse_from_file(str(tmp_path / f"{name}-u8-top2.onnx"))
    tensor = network.get_input(0)
    assert (tensor.dtype, tuple(tensor.shape)) == (trt.uint8, (-1, 32, 32, 3))
    outputs = {network.get_output(index).name: network.get_output(index).dtype for index in (0, 1)}
    assert outputs == {"indices": trt.int64, "probabilities": trt.float32}


def test_export_writes_the_plain_files_and_those_asked_for(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ends = ("--input", "uint8-nhwc", "--topk", 3, "--no-plan", "--calib", "none")
    weights = ("--weights", trained / "best.pt")
    exported = result("export", *weights, "--fp32", "--int8", *ends, folder=tmp_path)
    names = [Path(entry["file"]).name for entry in exported["onnx"]]
    assert names == [
        "resnet8.onnx", "resnet8-u8-top3.onnx", "resnet8-int8.onnx", "resnet8-int8-u8-top3.onnx",
    ]  # fmt: skip
    quantized = onnx.load(tmp_path / "engines" / names[3])
    first = next(node for node in quantized.graph.node if node.op_type == "QuantizeLinear")
    assert first.input[0] == "normalized"
