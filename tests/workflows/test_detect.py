"""A detector from training to evaluation and prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import rtresnet
from rtresnet.builder import targets
from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.reporter import LogReporter
from rtresnet.detection.data import open_detection
from rtresnet.workflows.detect import is_detector

TINY = (
    "width=0.125", "shorter=64", "longer=64", "candidates=60", "regions=12", "detections=8",
    "rpn_batch=16", "head_batch=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> rtresnet.TrainDetectorResult:
    config = rtresnet.TrainDetectorConfig(
        backbone="resnet18", data="shapes:8", epochs=1, batch=4, settings=TINY,
        out=tmp_path_factory.mktemp("run") / "run",
    )  # fmt: skip
    return rtresnet.train_detector(config)


@pytest.fixture
def run(finished_run: rtresnet.TrainDetectorResult, tmp_path: Path) -> rtresnet.TrainDetectorResult:
    """A run that a test may change."""
    folder = shutil.copytree(finished_run.checkpoint.parent, tmp_path / "run")
    return dataclasses.replace(finished_run, checkpoint=folder / finished_run.checkpoint.name)


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
    Path(f"{run.checkpoint}.json").unlink()
    assert is_detector(run.checkpoint)


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


class Progress(LogReporter):
    """Keeps the numbers of completed files."""

    def __init__(self) -> None:
        self.completed: list[float | None] = []

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Any]:
        yield lambda completed=None, **_: self.completed.append(completed)


def test_detect_skips_images_that_cannot_be_decoded_or_read(
    run: rtresnet.TrainDetectorResult, images: Path, tmp_path: Path
) -> None:
    good = sorted(images.iterdir())[0]
    damaged, unreadable = tmp_path / "damaged.png", Path("/proc/self/mem")  # an I/O error
    damaged.write_bytes(b"no image")
    reporter = Progress()
    files = [damaged, unreadable, good]
    result = rtresnet.detect(files, run.checkpoint, reporter=reporter)
    assert [entry.image for entry in result.images] == [str(good)]
    assert len(result.skipped) == 2
    assert str(damaged) in result.skipped[0] and str(unreadable) in result.skipped[1]
    assert reporter.completed == [1, 2, 3]
    with pytest.raises(rtresnet.DataError):
        rtresnet.detect([damaged, unreadable], run.checkpoint)


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
    finished_run: rtresnet.TrainDetectorResult, tmp_path_factory: pytest.TempPathFactory
) -> rtresnet.ExportResult:
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return rtresnet.export(
            finished_run.checkpoint, folder,
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


@pytest.mark.parametrize(
    ("precision", "quantize", "build"),
    [
        ("fp16", {}, {"targets": ("sm_12345",)}),
        ("fp16", {}, {"batch": "8:4:2"}),
        ("int8", {}, {}),
        ("int8", {"calib": "no/such/folder"}, {}),
    ],
    ids=["target", "batch", "no images", "missing images"],
)
def test_export_detector_rejects_invalid_options_before_it_writes(
    run: rtresnet.TrainDetectorResult,
    tmp_path: Path,
    precision: Any,
    quantize: dict[str, Any],
    build: dict[str, Any],
) -> None:
    with pytest.raises(rtresnet.InputError):
        rtresnet.export(
            run.checkpoint, tmp_path / "engines",
            rtresnet.ExportConfig(precisions=(precision,), canvas=(64, 96)),
            quantize=rtresnet.QuantizeConfig(**quantize), build=rtresnet.BuildConfig(**build),
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.onnx"))


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


def own_detections(net: Path, folder: Path) -> str:
    """Images with a detector's own detections as their boxes: its average precision is 100."""
    source, images, annotations = open_detection("shapes:4", "test"), [], []
    (folder / "own").mkdir()
    with rtresnet.load(net) as session:
        for index in range(4):
            pixels = source.read(index)
            Image.fromarray(pixels).save(folder / "own" / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png"})
            entry = session.detect(pixels)
            for box, label in zip(entry.boxes.tolist(), entry.labels.tolist(), strict=True):
                x1, y1, x2, y2 = box
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": index,
                        "area": 1.0,
                        "category_id": label,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                    }
                )
    categories = [{"id": index, "name": name} for index, name in enumerate(source.classes)]
    record = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "own.json").write_text(json.dumps(record))
    return f"coco:{folder}/own.json:{folder}/own"


@pytest.mark.parametrize(
    "options", [{"gate": "upper"}, {"classes": ("a", "b")}, {"max_broken": 0.5}]
)
def test_quantize_detector_option_of_classifiers_is_refused(
    exported: rtresnet.ExportResult, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = rtresnet.QuantizeConfig(calib="shapes:4", eval_data="shapes:4", **options)
    with pytest.raises(rtresnet.InputError, match=f"--{next(iter(options)).replace('_', '-')}"):
        rtresnet.quantize(exported.path, config, out=tmp_path / "a.onnx")


def test_quantize_detector_gate_compares_average_precision(
    exported: rtresnet.ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = own_detections(exported.path, tmp_path)
    config = rtresnet.QuantizeConfig(calib="shapes:4", eval_data=data, max_drop=100.0)
    result = rtresnet.quantize(exported.path, config, out="a.onnx")
    recorded = result.sidecar.measured["average_precision"]
    measured = rtresnet.evaluate_detector(exported.path, data, record=False)
    assert result.sidecar.precision == "int8" and recorded["data"] == data
    assert measured.ap is not None and measured.ap > 99 > recorded["ap"] > 0
    scales = Path("calib/a.json").read_text()
    strict = dataclasses.replace(config, max_drop=0.0)
    with pytest.raises(rtresnet.CheckFailedError) as caught:
        rtresnet.quantize(exported.path, strict, out="strict.onnx")
    assert caught.value.exit_code == 1 and caught.value.fix
    assert [path.name for path in Path("calib").iterdir()] == ["a.json"]
    assert not Path("strict.onnx").exists() and Path("calib/a.json").read_text() == scales
    with pytest.raises(rtresnet.InputError, match="calibrated on images"):
        rtresnet.quantize(exported.path, rtresnet.QuantizeConfig(), out="b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("canvas", [(60, 96), (16, 16)])
def test_export_detector_wrong_canvas_is_refused(
    run: rtresnet.TrainDetectorResult, tmp_path: Path, canvas: tuple[int, int]
) -> None:
    with pytest.raises(rtresnet.InputError, match="multiples of 16"):
        rtresnet.export(run.checkpoint, tmp_path, rtresnet.ExportConfig(canvas=canvas))


# --- compare, check, report


class Shifted:
    """A backend whose detections another one's are, with changes."""

    def __init__(self, inner: Any, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        self.inner, self.change = inner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def detect(self, images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
        outputs = {
            name: values.copy() for name, values in self.inner.detect(images, extent).items()
        }
        self.change(outputs)
        return outputs


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """changed(name, change): the detector in the file `name` gives changed outputs."""
    from rtresnet.runtime.session import Session

    right = Session.detect

    def install(name: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        def detect(self: Session, image: np.ndarray) -> Any:
            if self.path.name == name:
                return right(self.with_backend(cast(Any, Shifted(self.backend, change))), image)
            return right(self, image)

        monkeypatch.setattr(Session, "detect", detect)

    return install


def confident(outputs: dict[str, np.ndarray]) -> None:
    """Raise all scores, so that an untrained net shows its detections."""
    outputs["scores"][outputs["scores"] > 0] += 0.5


def test_compare_detectors_same_detections(exported: rtresnet.ExportResult, changed: Any) -> None:
    changed("resnet18-detector.onnx", confident)
    result = rtresnet.compare_detectors(exported.path, exported.path, "shapes:4")
    assert (result.n, result.changed, result.agreement, result.ap_change) == (4, 0, 1.0, 0.0)
    assert result.both == result.reference.detections > 0
    assert (result.largest_score, result.largest_box, result.images) == (0, 0, ())
    assert result.reference.accuracy is not None and result.reference.accuracy.n == 4


def test_compare_detectors_counts_and_lists_what_differs(
    exported: rtresnet.ExportResult, changed: Any, images: Path
) -> None:
    changed("resnet18-detector.onnx", confident)
    result = rtresnet.compare_detectors(exported.path, exported.onnx[2].path, str(images))
    assert result.reference.accuracy is None and result.ap_change is None  # no boxes there
    assert result.only_reference == result.reference.detections > 0
    assert (result.both, result.candidate.detections, result.agreement) == (0, 0, 0.0)
    assert result.changed == 2 and len(result.images) == 2
    assert sum(len(entry.only_reference) for entry in result.images) == result.only_reference
    assert all(entry.place.endswith(".png") for entry in result.images)


def test_compare_detectors_differing_image_has_three_groups() -> None:
    from rtresnet.core.detector_preprocess import Detections
    from rtresnet.detection.agreement import agree

    def detected(*rows: tuple[float, float, int]) -> Detections:
        boxes = np.array([[x, 0, x + 10, 10] for x, _, _ in rows], np.float32)
        return Detections(
            boxes=boxes.reshape(-1, 4),
            scores=np.array([score for _, score, _ in rows], np.float32),
            labels=np.array([label for *_, label in rows], np.int64),
        )

    one = detected((0, 0.9, 0), (40, 0.8, 1), (80, 0.51, 0))
    other = detected((1, 0.85, 0), (40, 0.8, 2), (80, 0.49, 0), (81, 0.2, 0))
    pair = agree(one, other)
    assert (pair.both, pair.first, pair.second) == (((0, 0),), (1, 2), (1,))
    assert pair.score == pytest.approx(0.05) and pair.box == 1
    near = agree(one, other, margin=0.05)
    assert (near.both, near.first, near.second) == (((0, 0), (2, 2)), (1,), (1,))
    assert agree(detected(), detected()).different == 0
    assert agree(detected(), other).second == (0, 1)


def test_check_detector_own_files_pass(
    exported: rtresnet.ExportResult, run: rtresnet.TrainDetectorResult
) -> None:
    config = rtresnet.CheckConfig(images=4)
    for path, compared in (
        (exported.onnx[0].path, ("best.pt in torch", "RoiAlign and NonMaxSuppression")),
        (exported.onnx[1].path, ("resnet18-detector.onnx",)),
        (exported.onnx[2].path, ("resnet18-detector.onnx",)),
        (run.checkpoint, ()),
    ):
        result = rtresnet.check_detector(path, "shapes:4", config)
        assert result.failed == () and result.compared == compared and result.n == 4
        names = [entry.name for entry in result.checks]
        assert names[:4] == ["valid", "suppressed", "settled", "repeated"]
        assert result.detections > 0


@pytest.mark.parametrize(
    "fault", ["outside", "unsorted", "label", "overlap", "unsettled", "random"]
)
def test_check_detector_finds_a_fault(
    exported: rtresnet.ExportResult, changed: Any, fault: str
) -> None:
    rng = np.random.default_rng(0)

    def change(outputs: dict[str, np.ndarray]) -> None:
        if fault == "outside":
            outputs["boxes"][0, 0] += 1000
        elif fault == "unsorted":
            outputs["scores"][0, :2] = 0.3, 0.9
        elif fault == "label":
            outputs["labels"][0, 0] = 3
        elif fault == "overlap":
            outputs["boxes"][0, 1] = outputs["boxes"][0, 0]
            outputs["labels"][0, 1] = outputs["labels"][0, 0]
        elif fault == "unsettled":
            outputs["unsettled"] += 1
        else:
            outputs["scores"] *= rng.uniform(0.9, 1)

    changed("resnet18-detector.onnx", change)
    result = rtresnet.check_detector(exported.path, "shapes:4", rtresnet.CheckConfig(images=4))
    expected = {"overlap": "suppressed", "unsettled": "settled", "random": "repeated"}
    assert expected.get(fault, "valid") in [entry.name for entry in result.failed]


def test_check_detector_compares_with_the_files_it_came_from(
    exported: rtresnet.ExportResult, changed: Any
) -> None:
    def moved(outputs: dict[str, np.ndarray]) -> None:
        confident(outputs)
        outputs["boxes"][..., 2:] -= outputs["boxes"][..., 2:] / 2

    config = rtresnet.CheckConfig(images=4)
    changed("resnet18-detector-int8.onnx", moved)
    result = rtresnet.check_detector(exported.onnx[2].path, "shapes:4", config)
    assert "parity" in [entry.name for entry in result.failed]
    changed("resnet18-detector.onnx", moved)
    result = rtresnet.check_detector(exported.path, "shapes:4", config)
    assert [entry.name for entry in result.failed].count("parity") == 2


def test_check_detector_without_its_checkpoint_says_so(
    exported: rtresnet.ExportResult, tmp_path: Path
) -> None:
    for suffix in ("", ".json"):
        shutil.copy(f"{exported.path}{suffix}", tmp_path / f"a.onnx{suffix}")
    text = (tmp_path / "a.onnx.json").read_text().replace("best.pt", "gone.pt")
    (tmp_path / "a.onnx.json").write_text(text.replace(exported.path.name, "a.onnx"))
    result = rtresnet.check_detector(tmp_path / "a.onnx", "shapes:2")
    assert result.compared == () and "checkpoint is missing" in result.missing[0]


def test_commands_compare_check_and_report_a_detector(
    exported: rtresnet.ExportResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = str(exported.path), str(exported.onnx[2].path)
    changed("resnet18-detector.onnx", confident)
    options = ["--data", "shapes:4", "--json", "compare.json", "--report", "page"]
    assert main(["compare", one, other, *options]) == 0
    assert "only in the reference" in capsys.readouterr().out
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<img") == 4 and "only resnet18-detector.onnx" in page
    assert main(["eval", one, "--data", "shapes:4", "--details", "--json", "eval.json"]) == 0
    assert main(["bench", one, "--seconds", "0.1", "--json", "bench.json"]) == 0
    files = ["eval.json", "bench.json", "compare.json"]
    assert main(["report", *files, "--markdown", "r.md"]) == 0
    report = (tmp_path / "report.html").read_text()
    for part in ("AP50 %", "Detections compared", "Precision and recall", "same detections as"):
        assert part in report
    assert "top-1" not in report and "AP %" in (tmp_path / "r.md").read_text()
    check = ["check", other, "--data", "shapes:4", "--json", "check.json"]
    assert main(check) == 1
    changed("resnet18-detector.onnx", lambda outputs: None)
    assert main(check) == 0
    assert main(["inspect", one]) == 0
    shown = capsys.readouterr().out
    assert "on 64x96" in shown and "average precision AP50" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "DETECTOR", "CLASSIFIER", "--data", "shapes:4"],
        ["compare", "DETECTOR", "DETECTOR", "--data", "shapes:4", "--batch", "2"],
        ["compare", "DETECTOR", "DETECTOR", "--data", "shapes:4", "--split", "all"],
        ["eval", "DETECTOR", "--data", "shapes:4", "--size", "64"],
        ["eval", "DETECTOR", "--data", "shapes:4", "--protocol", "dense"],
        ["check", "DETECTOR", "--data", "shapes:1"],
        ["profile", "DETECTOR"],
        ["estimate", "DETECTOR", "--gpu", "A10"],
    ],
)
def test_commands_of_a_detector_refuse_in_one_line(
    arguments: list[str],
    exported: rtresnet.ExportResult,
    engines: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"DETECTOR": str(exported.path), "CLASSIFIER": str(engines / "resnet8.onnx")}
    assert main([paths.get(entry, entry) for entry in arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_evaluate_detector_takes_stated_mean(
    exported: rtresnet.ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtresnet.runtime.session import Session

    right, means = Session.detect, []

    def detect(self: Session, image: np.ndarray) -> Any:
        means.append(self.preprocess.mean)
        return right(self, image)

    monkeypatch.setattr(Session, "detect", detect)
    stated = rtresnet.InputConfig(mean=(0.1, 0.2, 0.3))
    rtresnet.evaluate_detector(exported.path, "shapes:2", stated=stated, record=False)
    assert means == [(0.1, 0.2, 0.3)] * 2


def test_evaluate_detector_with_stated_mean_is_not_recorded(
    exported: rtresnet.ExportResult, tmp_path: Path
) -> None:
    net = shutil.copy(exported.path, tmp_path / "net.onnx")
    command = ["eval", str(net), "--data", "shapes:2"]
    assert main([*command, "--no-record"]) == main(command) == 0
    assert main([*command, "--record", "--json", str(tmp_path / "result.json")]) == 2
    assert (tmp_path / "result.json").exists()  # without a sidecar
    shutil.copy(f"{exported.path}.json", f"{net}.json")
    before = rtresnet.read_sidecar(net)
    stated = rtresnet.InputConfig(mean=(0.1, 0.2, 0.3))
    rtresnet.evaluate_detector(net, "shapes:2", stated=stated)
    assert rtresnet.read_sidecar(net) == before
    with pytest.raises(rtresnet.InputError):
        rtresnet.evaluate_detector(net, "shapes:2", stated=stated, record=True)
    rtresnet.evaluate_detector(net, "shapes:2", record=True)
    after = rtresnet.read_sidecar(net)
    assert after is not None and "average_precision" in after.measured


def test_check_and_compare_take_detectors(exported: rtresnet.ExportResult, engines: Path) -> None:
    config = rtresnet.CheckConfig(images=2)
    checked = rtresnet.check(exported.path, "shapes:2", config)
    assert checked == rtresnet.check_detector(exported.path, "shapes:2", config)
    files = (exported.path, exported.onnx[1].path, "shapes:4")
    compared = rtresnet.compare(*files, rtresnet.CompareConfig(split="train"))
    assert compared == rtresnet.compare_detectors(*files, split="train")
    with pytest.raises(rtresnet.InputError, match="batch"):
        rtresnet.compare(*files, rtresnet.CompareConfig(batch=2))
    with pytest.raises(rtresnet.InputError, match="a classifier, which"):
        rtresnet.compare(exported.path, engines / "resnet8.onnx", "shapes:4")


def test_evaluate_of_a_detector_names_the_function_for_it(exported: rtresnet.ExportResult) -> None:
    with pytest.raises(rtresnet.InputError) as caught:
        rtresnet.evaluate(exported.path, "shapes:4")
    assert caught.value.fix == "use evaluate_detector"


@pytest.mark.parametrize("entry", [0, 2])
def test_package_detector_config_states_the_tensors_of_onnx_runtime(
    exported: rtresnet.ExportResult, tmp_path: Path, entry: int
) -> None:
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    import onnxruntime
    from google.protobuf import text_format

    path = exported.onnx[entry].path
    packaged = rtresnet.package(path, tmp_path / "models")
    home = packaged.folder.parent
    config = text_format.Parse((home / "config.pbtxt").read_text(), pb.ModelConfig())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for written, tensors in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [
            (tensor.name, pb.DataType.Name(tensor.data_type), list(tensor.dims))
            for tensor in written
        ] == [(tensor.name, types[tensor.type], tensor.shape) for tensor in tensors]
    assert [tensor.name for tensor in config.input] == ["images", "extent"]
    assert config.max_batch_size == packaged.max_batch == 0
    assert not config.HasField("dynamic_batching")
    sidecar = rtresnet.read_sidecar(path)
    assert sidecar is not None
    assert tuple((home / "labels.txt").read_text().splitlines()) == sidecar.model.classes
    record = {name: value.string_value for name, value in config.parameters.items()}
    assert "canvas of 64 x 96 px" in record["input"] and "224 px" not in record["input"]
    assert "height and width" in record["extent"] and "labels.txt" in record["labels"]
    assert "one image" in packaged.notes[0]


def test_package_detector_scores_are_not_those_of_the_classes(
    exported: rtresnet.ExportResult, tmp_path: Path
) -> None:
    """Even if there are as many detections as classes, as with 20 of VOC's 20 classes."""
    path = exported.path
    sidecar = rtresnet.read_sidecar(path)
    assert sidecar is not None and sidecar.detection is not None
    count = sidecar.detection.detections
    model = dataclasses.replace(sidecar.model, classes=tuple(f"class {i}" for i in range(count)))
    artifacts.publish(
        tmp_path / "many.onnx",
        lambda target: shutil.copy(path, target),
        dataclasses.replace(sidecar, model=model, parent=None),
    )
    packaged = rtresnet.package(tmp_path / "many.onnx", tmp_path / "models")
    config = (packaged.folder.parent / "config.pbtxt").read_text()
    assert f"dims: [ 1, {count} ]" in config and "label_filename" not in config


@pytest.mark.parametrize(
    ("arguments", "noted"),
    [([], False), (["--batch", "1,8"], True)],
)
def test_bench_notes_a_detectors_batch_only_where_others_were_requested(
    exported: rtresnet.ExportResult,
    arguments: list[str],
    noted: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", str(exported.path), "--seconds", "0.05", *arguments]) == 0
    assert ("batch 8 is not measured" in capsys.readouterr().err) == noted


@pytest.mark.parametrize(
    "data", ["voc:none", "voc:FOLDER", "voc:SPLITS", "voc:LONELY", "coco:none", "coco:none:FOLDER"]
)
def test_missing_detection_data_names_a_fix(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    Path("SPLITS/ImageSets/Main").mkdir(parents=True)
    Path("LONELY").mkdir()
    for folder in ("SPLITS", "LONELY"):
        Path(folder, "a.xml").write_text("<annotation/>")
    assert main(["study", "detection", "--data", data]) == 2
    message = capsys.readouterr().err
    assert "; " in message and "Traceback" not in message
    assert not Path("runs/study-detection").exists() or not any(Path("runs").rglob("*.pt"))


def test_export_nms_rounds_are_those_of_the_file(
    run: rtresnet.TrainDetectorResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    arguments = ["export", "--weights", str(run.checkpoint), "--canvas", "64x96", "--no-plan"]
    arguments += ["--fp32", "--out", str(tmp_path)]
    assert main([*arguments, "--nms-rounds", "21"]) == 0
    path = tmp_path / "resnet18-detector.onnx"
    sidecar = rtresnet.read_sidecar(path)
    assert sidecar is not None and sidecar.detection is not None
    assert sidecar.detection.rounds == 21
    names = [node.name for node in onnx.load(path).graph.node]
    assert sum(name.endswith(".hits") for name in names) == 2 * 21  # proposals and detections


def test_commands_say_what_a_weak_or_unsettled_detector_needs(
    exported: rtresnet.ExportResult,
    images: Path,
    changed: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unsettled(outputs: dict[str, np.ndarray]) -> None:
        outputs["unsettled"] += 1

    changed("resnet18-detector.onnx", unsettled)
    path = str(exported.path)
    assert main(["predict", path, str(images)]) == 0
    output = capsys.readouterr().out
    assert "--min-score" in output and "--nms-rounds" in output
    assert main(["compare", path, path, "--data", "shapes:2"]) == 0
    output = capsys.readouterr().out
    assert "neither has a detection" in output and "up to" not in output
    assert main(["check", path, "--data", "shapes:2"]) == 1
    assert "--nms-rounds" in capsys.readouterr().err


def test_train_detector_notes_too_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--task", "detect", "--backbone", "resnet18", "--data", "shapes:4"]
    arguments += ["--epochs", "1", "--out", str(tmp_path / "run")]
    for setting in ("width=0.125", "shorter=64", "longer=64", "anchors=16,32"):
        arguments += ["--set", setting]
    assert main(arguments) == 0
    assert "1 step may be too few" in capsys.readouterr().err


def test_drawn_label_of_a_box_at_the_right_edge_stays_in_the_image() -> None:
    from rtresnet.detection.drawing import drawn

    image = np.zeros((100, 200, 3), np.uint8)
    picture = drawn(image, [((190, 50, 199, 80), "something", 0.5, "#ff0000")])
    label = picture[38:50]  # above the box
    columns = np.flatnonzero((label[..., 0] > 200).any(0))
    complete = drawn(image, [((20, 50, 199, 80), "something", 0.5, "#ff0000")])[38:50]
    width = len(np.flatnonzero((complete[..., 0] > 200).any(0)))
    assert abs(len(columns) - width) <= 1 and columns[-1] == 199


@pytest.mark.parametrize(
    "command", [["data"], ["train", "--data"], ["eval", "CLASSIFIER", "--data"]]
)
def test_commands_for_classifiers_name_what_takes_images_with_boxes(
    command: list[str], engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(engines / "resnet8.onnx") if a == "CLASSIFIER" else a for a in command]
    assert main([*arguments, "shapes:8"]) == 2
    assert "--task detect" in capsys.readouterr().err
