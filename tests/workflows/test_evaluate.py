"""Accuracy of artifacts and ensembles from Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.core import artifacts
from rtresnet.core.errors import DataError, InputError, UnknownNameError
from rtresnet.core.serialization import to_builtins
from rtresnet.core.sidecar import accuracies
from rtresnet.workflows.compare import CompareConfig, compare
from rtresnet.workflows.evaluate import EvaluateConfig, evaluate, record_accuracy
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.quantize import QuantizeConfig, quantize
from tests.reporters import RecordingReporter
from tests.workflows.labelled import TINTS, folders, with_classes


def test_evaluate_one_path_gives_counts_and_writes_nothing(
    copied: Path, tints: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path, reporter = copied / "resnet8.onnx", RecordingReporter()
    before = artifacts.read_sidecar(path)
    result = evaluate(path, tints, reporter=reporter)
    assert result.n == 240 and result.top1 > 200 and result.top5 is None
    assert result.top1_percent == pytest.approx(100 * result.top1 / 240)
    (member,) = result.members
    assert (member.precision, member.views, member.runtime.threads is None) == ("fp32", 1, False)
    assert reporter.completed and reporter.completed == sorted(reporter.completed)
    assert artifacts.read_sidecar(path) == before
    assert capfd.readouterr() == ("", "")
    record_accuracy(result, required=True)
    sidecar = artifacts.read_sidecar(path)
    assert sidecar is not None and accuracies(sidecar.measured)[-1]["top1"] == result.top1


def test_evaluate_result_of_one_artifact_is_written_with_its_members_fields(
    engines: Path, tints: str
) -> None:
    record = to_builtins(evaluate(engines / "resnet8.onnx", tints))
    (member,) = record.pop("members")
    assert record.pop("report") is None
    assert record == member
    assert {"device", "provider", "versions", "input", "labels", "skipped"} <= set(record)


def test_evaluate_several_paths_are_an_ensemble(trained: Path, engines: Path, tints: str) -> None:
    paths = [trained / "best.pt", engines / "resnet8.onnx"]
    result = evaluate(paths, tints, EvaluateConfig(protocol="10-crop", batch=50))
    assert [member.artifact for member in result.members] == [str(path) for path in paths]
    assert result.artifact == "ensemble of 2" and result.only is None
    assert result.top1 == result.members[0].top1 == result.members[1].top1
    assert {member.views for member in result.members} == {10}


def test_evaluate_provider_applies_to_the_onnx_files_of_an_ensemble(
    trained: Path, engines: Path, tints: str
) -> None:
    runtime = RuntimeConfig(provider="cpu")
    result = evaluate([trained / "best.pt", engines / "resnet8.onnx"], tints, runtime=runtime)
    assert [member.runtime.provider for member in result.members] == ["torch", "ONNX Runtime CPU"]
    with pytest.raises(InputError):
        evaluate(trained / "best.pt", tints, runtime=runtime)


def test_record_accuracy_of_other_preprocessing_is_refused_only_if_required(
    copied: Path, tints: str
) -> None:
    path = copied / "resnet8.onnx"
    result = evaluate(path, tints, EvaluateConfig(resize=40))
    before, reporter = artifacts.read_sidecar(path), RecordingReporter()
    record_accuracy(result, reporter=reporter)
    assert artifacts.read_sidecar(path) == before and len(reporter.notes) == 1
    with pytest.raises(InputError) as error:
        record_accuracy(result, required=True)
    assert error.value.fix == "leave out --record"


def test_record_accuracy_without_a_sidecar_is_noted_or_refused(copied: Path, tints: str) -> None:
    path, reporter = copied / "resnet8.onnx", RecordingReporter()
    artifacts.sidecar_path(path).unlink()
    result = evaluate(path, tints)
    record_accuracy(result, reporter=reporter)
    assert len(reporter.notes) == 1 and str(path) in reporter.notes[0]
    with pytest.raises(InputError) as error:
        record_accuracy(result, required=True)
    assert f"rtresnet adopt {path}" in (error.value.fix or "")


def test_record_accuracy_of_a_file_that_was_replaced_is_refused(
    copied: Path, tints: str, tmp_path: Path
) -> None:
    path = copied / "resnet8.onnx"
    result = evaluate(path, tints)
    for suffix in ("", ".json"):
        shutil.copy(f"{copied}/resnet8-int8.onnx{suffix}", f"{path}{suffix}")
    before = artifacts.read_sidecar(path)
    with pytest.raises(InputError, match="replaced"):
        record_accuracy(result, required=True)
    assert artifacts.read_sidecar(path) == before


def test_evaluate_of_no_artifact_is_refused(tints: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate([], tints)
    assert error.value.fix


def test_evaluate_config_unknown_protocol_is_refused_at_construction() -> None:
    with pytest.raises(UnknownNameError):
        EvaluateConfig(protocol="five-crop")  # type: ignore[arg-type]


@pytest.fixture
def best(trained: Path, tmp_path: Path) -> Path:
    """The trained net, where its sidecar may be changed."""
    for name in ("best.pt", "best.pt.json"):
        shutil.copy(trained / name, tmp_path / name)
    return tmp_path / "best.pt"


@pytest.fixture
def named(best: Path, tmp_path: Path) -> Path:
    """The trained net with names for its classes."""
    return with_classes(best, TINTS, tmp_path / "named.pt")


def recorded(path: Path) -> list[tuple[object, object]]:
    """Return data and n of the accuracies in a sidecar."""
    sidecar = artifacts.read_sidecar(path)
    assert sidecar is not None
    return [(entry["data"], entry["n"]) for entry in accuracies(sidecar.measured)]


def test_record_accuracy_keeps_one_entry_for_each_data_set(
    best: Path, tints: str, tmp_path: Path
) -> None:
    other = folders(tmp_path / "data", {"0": 0, "1": 1, "2": 2, "3": 3}, count=4)
    for data in (tints, other, tints):
        record_accuracy(evaluate(best, data))
    moved = tmp_path / "moved.npz"
    shutil.copy(tints.removeprefix("npz:"), moved)
    record_accuracy(evaluate(best, f"npz:{moved}"))  # the same images: replaces its entry
    assert recorded(best) == [(other, 16), (f"npz:{moved}", 240)]


def test_record_accuracy_replaces_the_entry_of_an_earlier_version(best: Path, tints: str) -> None:
    other = {"n": 9, "top1": 8, "top5": None, "data": "digits", "split": "test"}
    artifacts.update_measured(best, {"accuracy": other})
    record_accuracy(evaluate(best, tints))
    assert recorded(best) == [("digits", 9), (tints, 240)]
    artifacts.update_measured(best, {"accuracy": other | {"data": tints, "split": "all"}})
    record_accuracy(evaluate(best, tints))
    assert recorded(best) == [(tints, 240)]


def test_evaluate_dense_of_an_onnx_file_names_its_checkpoint(engines: Path, tints: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate(engines / "resnet8.onnx", tints, EvaluateConfig(protocol="dense"))
    assert "best.pt" in (error.value.fix or "")


def test_evaluate_ten_crops_of_an_onnx_file_equal_its_checkpoint(
    engines: Path, best: Path, tints: str
) -> None:
    ten = EvaluateConfig(protocol="10-crop", resize=36)
    onnx = evaluate(engines / "resnet8.onnx", tints, ten)
    assert onnx.top1 == evaluate(best, tints, ten).top1


def test_evaluate_resize_below_the_size_is_refused(best: Path, tints: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate(best, tints, EvaluateConfig(resize=20))
    assert error.value.fix == "use --resize 32 or more"


def test_evaluate_class_folders_in_another_order_are_matched_by_name(
    named: Path, tmp_path: Path
) -> None:
    data = folders(tmp_path / "data", {name: label for label, name in enumerate(TINTS)})
    result = evaluate(named, data)
    assert result.top1_percent > 90 and result.n == 48
    assert result.labels.matched_by == "name" and result.assumed == ()
    assert "different order" in result.labels.remarks[0]


def test_evaluate_unknown_class_is_refused_with_the_nearest(named: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", {"blau": 2, "grey": 3})
    with pytest.raises(DataError, match=r"'blau'.*nearest: 'blue'") as error:
        evaluate(named, data)
    assert "--classes" in (error.value.fix or "")


def test_evaluate_ensemble_with_classes_in_another_order_is_matched_by_name(
    named: Path, tmp_path: Path
) -> None:
    order = [3, 1, 0, 2]
    names = tuple(TINTS[index] for index in order)
    other = with_classes(named, names, tmp_path / "other.pt", order)
    data = folders(tmp_path / "data", {name: label for label, name in enumerate(TINTS)})
    for protocol in ("center", "dense"):
        result = evaluate([named, other], data, EvaluateConfig(protocol=protocol))  # type: ignore[arg-type]
        first, second = result.members
        assert first.top1 == second.top1 == result.top1 > 40
    compared = compare(named, other, data)
    assert compared.agreement == 1 and compared.relative is not None
    assert compared.relative < 1e-5 and compared.classes.in_order is False


def test_evaluate_nets_of_other_classes_are_no_ensemble(
    best: Path, tints: str, tmp_path: Path
) -> None:
    three = with_classes(best, ("a", "b", "c"), tmp_path / "three.pt")
    with pytest.raises(InputError, match=r"three\.pt has 3 classes"):
        evaluate([best, three], tints)
    letters = with_classes(best, ("a", "b", "c", "d"), tmp_path / "letters.pt")
    other = with_classes(best, ("a", "x", "c", "d"), tmp_path / "other.pt")
    with pytest.raises(DataError, match="no class 'x'"):
        evaluate([letters, other], tints)
    # Numbers in place of names match any other net of as many classes.
    assert len(evaluate([best, letters], tints).members) == 2


def test_evaluate_broken_image_is_left_out_for_every_member_and_reported_once(
    best: Path, engines: Path, tmp_path: Path
) -> None:
    for label in "0123":
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(30):
            pixels = np.full((40, 48, 3), 60 * int(label), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.png")
    (tmp_path / "data" / "1" / "7.png").write_bytes(b"not an image")
    reporter = RecordingReporter()
    result = evaluate([best, engines / "resnet8.onnx"], str(tmp_path / "data"), reporter=reporter)
    assert [entry.n for entry in (*result.members, result)] == [119] * 3
    (note,) = reporter.notes
    assert "7.png" in note and len(result.skipped) == 1


def test_broken_images_above_the_bound_stop_the_work_and_max_broken_allows_them(
    copied: Path, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folders(tmp_path / "data", {"0": 0, "1": 1, "2": 2, "3": 3}, count=25)
    for index in range(3):
        (tmp_path / "data" / "1" / f"{index}.png").write_bytes(b"not an image")
    net = copied / "resnet8.onnx"

    def quantized(max_broken: float) -> int:
        config = QuantizeConfig(
            calib=data, eval_data=data, calibrator="max", max_drop=100, max_broken=max_broken
        )
        sidecar = quantize(net, config).sidecar
        assert sidecar.calibration is not None
        return max(sidecar.measured["drop"]["n"], sidecar.calibration.n)

    for counted_with in (
        lambda share: evaluate(net, data, EvaluateConfig(max_broken=share)).n,
        lambda share: compare(best, net, data, CompareConfig(max_broken=share)).n,
        quantized,
    ):
        with pytest.raises(DataError) as error:
            counted_with(0.02)
        assert "--max-broken" in (error.value.fix or "")
        assert counted_with(0.03) == 97


def test_evaluate_images_of_the_training_names_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without splits is read in full, training images included."""
    import numpy as np
    from PIL import Image

    import rtresnet

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    run = rtresnet.train(rtresnet.TrainConfig(model="resnet8", data="photos", epochs=1))
    exported = rtresnet.export(run.checkpoint, "engines/net.onnx").path
    for net in (run.checkpoint, exported):
        for data in ("photos", "folder:./photos"):
            (remark,) = rtresnet.evaluate(net, data).labels.remarks
            assert remark == (
                f"48 of these 60 images are training images of {net}, so the accuracy is too high; "
                "evaluate the 6 images that its run held out: --data run:runs/resnet8-photos"
            )
    held_out = rtresnet.evaluate(run.checkpoint, "run:runs/resnet8-photos")
    assert (held_out.n, held_out.labels.remarks) == (6, ())
    assert held_out.top1_percent == run.measured.test_top1
    train = EvaluateConfig(split="train")
    assert rtresnet.evaluate(run.checkpoint, "run:runs/resnet8-photos", train).n == 54
    (tmp_path / "photos" / "b" / "3.png").unlink()
    assert rtresnet.evaluate(run.checkpoint, "photos").labels.remarks != (remark,)
    with pytest.raises(DataError, match=r"photos .*changed"):
        rtresnet.evaluate(run.checkpoint, "run:runs/resnet8-photos")
    with pytest.raises(DataError, match="has no split"):
        rtresnet.evaluate(run.checkpoint, "run:engines")
    (tmp_path / "photos").rename("others")
    assert rtresnet.evaluate(run.checkpoint, "others").labels.remarks == ()
