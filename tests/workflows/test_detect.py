"""A detector through the steps: train, load, evaluate, detect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rtresnet
from rtresnet.builder import targets
from rtresnet.cli.main import main
from rtresnet.detection.data import open_detection
from rtresnet.workflows.detect import is_detector

TINY = (
    "width=0.125", "shorter=64", "longer=64", "candidates=60", "regions=12", "detections=8",
    "rpn_batch=16", "head_batch=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> rtresnet.TrainDetectorResult:
    config = rtresnet.TrainDetectorConfig(
        backbone="resnet18", data="shapes:8", epochs=1, batch=4, settings=TINY,
        out=tmp_path_factory.mktemp("run") / "run",
    )  # fmt: skip
    return rtresnet.train_detector(config)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    source = open_detection("shapes:2", "test")
    for index in range(2):
        Image.fromarray(source.read(index)).save(folder / f"{index}.png")
    return folder


def test_train_detector_result_has_average_precision(run: rtresnet.TrainDetectorResult) -> None:
    assert run.measured is not None and run.measured.n == 8
    assert run.detection.width == 0.125 and run.recipe.name == "scratch-detection"
    assert is_detector(run.checkpoint)
    Path(f"{run.checkpoint}.json").rename(f"{run.checkpoint}.away")
    try:
        assert is_detector(run.checkpoint)
    finally:
        Path(f"{run.checkpoint}.away").rename(f"{run.checkpoint}.json")


def test_load_detector_detects_in_the_images_own_coordinates(
    run: rtresnet.TrainDetectorResult,
) -> None:
    with rtresnet.load(run.checkpoint) as session:
        image = np.zeros((30, 50, 3), np.uint8)
        detections = session.detect(image)
        assert (detections.boxes >= 0).all() and (detections.boxes <= [50, 30, 50, 30]).all()
        assert detections.unsettled == 0
        with pytest.raises(rtresnet.InputError, match="detect"):
            session(np.zeros((1, 3, 64, 64), np.float32))


def test_evaluate_detector_repeats_the_accuracy_of_training(
    run: rtresnet.TrainDetectorResult,
) -> None:
    result = rtresnet.evaluate_detector(run.checkpoint, "shapes:8")
    assert run.measured is not None
    assert (result.ap50, result.voc07, result.n) == (
        run.measured.ap50, run.measured.voc07, 8,
    )  # fmt: skip
    sidecar = rtresnet.read_sidecar(run.checkpoint)
    assert sidecar is not None and sidecar.measured["average_precision"]["ap50"] == result.ap50


def test_detect_draws_boxes(
    run: rtresnet.TrainDetectorResult, images: Path, tmp_path: Path
) -> None:
    result = rtresnet.detect(images, run.checkpoint, draw=tmp_path / "drawn", least_score=0.0)
    assert len(result.images) == 2
    for entry in result.images:
        assert entry.drawn is not None
        with Image.open(entry.drawn) as drawn:
            assert drawn.size == (128, 128)
            changed = np.abs(
                np.asarray(drawn, np.int32) - np.asarray(Image.open(entry.image), np.int32)
            ).max()
        assert (changed > 60) == bool(entry.objects)
    with pytest.raises(rtresnet.InputError):
        rtresnet.detect(images, run.checkpoint, draw=images)


def test_commands_of_a_detector(
    run: rtresnet.TrainDetectorResult, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(run.checkpoint)
    assert main(["eval", path, "--data", "shapes:4", "--no-record", "--report", "page"]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Precision and recall" in page and page.count("<img") >= 4
    assert main(["predict", path, str(images), "--draw", "out", "--json", "p.json"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert main(["train", "--task", "detect", "--out", str(run.checkpoint.parent), "--resume"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--backbone", "resnet18"],
        ["train", "--task", "detect", "--model", "resnet18"],
        ["train", "--task", "detect", "--qat"],
        ["train", "--task", "detect", "--backbone", "resnet20"],
        ["train", "--task", "detect", "--data", "digits"],
        ["train", "--task", "detect", "--set", "anchor=3"],
        ["train", "--task", "detect", "--backbone", "resnet18", "--recipe", "paper-detection"],
    ],
)
def test_train_detector_wrong_options_are_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2


@pytest.fixture(scope="module")
def exported(
    run: rtresnet.TrainDetectorResult, tmp_path_factory: pytest.TempPathFactory
) -> rtresnet.ExportResult:
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return rtresnet.export(
            run.checkpoint, folder,
            rtresnet.ExportConfig(precisions=("fp32", "fp16", "int8"), canvas=(64, 96)),
            quantize=rtresnet.QuantizeConfig(calib="shapes:8"),
        )  # fmt: skip


def test_export_detector_writes_three_precisions_equal_to_torch(
    exported: rtresnet.ExportResult,
) -> None:
    assert [entry.precision for entry in exported.onnx] == ["fp32", "fp16", "int8"]
    parity = exported.onnx[0].measured["detection_parity"]
    assert parity["n"] == 3 and parity["unsettled"] == 0
    for entry in exported.onnx:
        sidecar = rtresnet.read_sidecar(entry.path)
        assert sidecar is not None and sidecar.detection is not None
        assert sidecar.detection.canvas == (64, 96) and is_detector(entry.path)
    assert sidecar.calibration is not None and sidecar.calibration.n == 8


def test_export_boxes_stay_float32(exported: rtresnet.ExportResult) -> None:
    onnx = pytest.importorskip("onnx")
    for entry in exported.onnx[1:]:
        model = onnx.load(entry.path)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        coordinates = [n for n in kinds if n.startswith(("proposals.", "select.", "align.grid."))]
        assert len(coordinates) > 100
        halves = [n for n in coordinates if kinds[n] == onnx.TensorProto.FLOAT16]
        # The weights of RoIAlign's products are computed in float32, and cast once.
        assert all(n.endswith(".mean.half") for n in halves)
        adds = {n.name for n in model.graph.node if n.op_type == "Add" and "." in n.name}
        quantized = {n.name for n in model.graph.node if n.op_type == "QuantizeLinear"}
        assert not any(name.startswith(("proposals", "select", "align.grid")) for name in quantized)
        if entry.precision == "int8":
            convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
            assert all(n.input[0].endswith(".dq") for n in convolutions) and adds


def test_exported_files_detect_in_onnx_runtime(
    exported: rtresnet.ExportResult, run: rtresnet.TrainDetectorResult
) -> None:
    image = open_detection("shapes:1", "test").read(0)
    for entry in exported.onnx:
        with rtresnet.load(entry.path, provider="cpu") as session:
            detections = session.detect(image)
            assert detections.unsettled == 0
            assert (detections.boxes <= 128).all() and session.classes == (
                "circle", "square", "triangle",
            )  # fmt: skip


@pytest.mark.slow
def test_build_detector_attests_every_convolution(
    exported: rtresnet.ExportResult, tmp_path: Path
) -> None:
    if not targets.available():
        pytest.skip("no TensorRT builder")
    for entry, dtype in zip(exported.onnx, ("Float", "Half", "Int8"), strict=True):
        plan = rtresnet.build(entry.path, out=tmp_path / f"{entry.precision}.plan").plan
        assert plan.attested is not None
        assert plan.attested.dtypes == {dtype: plan.attested.convolutions}
        assert plan.attested.convolutions == 23
        assert is_detector(tmp_path / f"{entry.precision}.plan")


@pytest.mark.slow
def test_quantize_detector_to_fp8_builds_all_but_the_first_convolution(
    exported: rtresnet.ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not targets.available():
        pytest.skip("no TensorRT builder")
    monkeypatch.chdir(tmp_path)
    config = rtresnet.QuantizeConfig(precision="fp8", calib="shapes:4")
    rtresnet.quantize(exported.path, config, out="a.onnx")
    plan = rtresnet.build("a.onnx", rtresnet.BuildConfig(targets=("sm_89",))).plan
    assert plan.attested is not None
    assert sum(plan.attested.dtypes.values()) == 23 and plan.attested.dtypes["Half"] == 1


def test_quantize_detector_gate_compares_average_precision(
    exported: rtresnet.ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = rtresnet.QuantizeConfig(calib="shapes:4", eval_data="shapes:4", max_drop=100.0)
    result = rtresnet.quantize(exported.path, config, out="a.onnx")
    assert result.sidecar.precision == "int8"
    with pytest.raises(rtresnet.InputError, match="calibrated on images"):
        rtresnet.quantize(exported.path, rtresnet.QuantizeConfig(), out="b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("canvas", [(60, 96), (16, 16)])
def test_export_detector_wrong_canvas_is_refused(
    run: rtresnet.TrainDetectorResult, tmp_path: Path, canvas: tuple[int, int]
) -> None:
    with pytest.raises(rtresnet.InputError, match="multiples of 16"):
        rtresnet.export(run.checkpoint, tmp_path, rtresnet.ExportConfig(canvas=canvas))
