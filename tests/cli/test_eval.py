"""`rtresnet eval`: its options, output and exit codes, on the small trained net."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.artifacts import read_sidecar
from rtresnet.core.sidecar import accuracies
from tests.workflows.labelled import TINTS, folders, with_classes


@pytest.fixture
def best(trained: Path, tmp_path: Path) -> Path:
    """The trained net, where its sidecar may be changed."""
    for name in ("best.pt", "best.pt.json"):
        shutil.copy(trained / name, tmp_path / name)
    return tmp_path / "best.pt"


def evaluate(*arguments: object, data: str, out: Path) -> dict:  # type: ignore[type-arg]
    file = out / "result.json"
    assert main(["eval", *map(str, arguments), "--data", data, "--json", str(file)]) == 0
    result: dict = json.loads(file.read_text())["result"]  # type: ignore[type-arg]
    return result


def refused(*arguments: object, data: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["eval", *map(str, arguments), "--data", data]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_eval_center_prints_how_it_measured_and_records_it(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(best, data=tints, out=tmp_path)
    shown = {name: result[name] for name in ("protocol", "size", "resize", "scales", "views", "n")}
    assert shown == {
        "protocol": "center", "size": 32, "resize": 32, "scales": None, "views": 1, "n": 240,
    }  # fmt: skip
    assert "center, 32 of 32 px, 1 view]" in capsys.readouterr().out
    sidecar = read_sidecar(best)
    assert sidecar is not None
    (recorded,) = accuracies(sidecar.measured)
    assert (recorded["top1"], recorded["n"], recorded["data"]) == (result["top1"], 240, tints)
    assert recorded["protocol"] == "center" and len(recorded["data_sha256"]) == 64


def test_eval_ten_crops_are_printed_and_not_recorded(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_sidecar(best)
    result = evaluate(best, "--protocol", "10-crop", "--resize", 40, data=tints, out=tmp_path)
    assert (result["views"], result["size"], result["resize"], result["n"]) == (10, 32, 40, 240)
    assert result["top1_percent"] > 90
    captured = capsys.readouterr()
    assert "10-crop, 32 of 40 px, 10 views]" in captured.out
    assert "not recorded" in captured.err and "preprocessing" not in captured.err
    assert read_sidecar(best) == before


def test_eval_prints_its_result_where_the_sidecar_cannot_be_written(
    best: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = read_sidecar(best)

    def refuse(path: object, record: object, *, sha256: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(artifacts, "record_accuracy", refuse)
    assert evaluate(best, data=tints, out=tmp_path)["n"] == 240
    captured = capsys.readouterr()
    assert "top-1" in captured.out and "not recorded" in captured.err
    file = tmp_path / "again.json"
    arguments = ["eval", str(best), "--data", tints, "--json", str(file)]
    assert main([*arguments, "--record"]) == 2
    assert "top-1" in capsys.readouterr().out and file.exists()
    assert main([*arguments, "--no-record"]) == 0
    assert "not recorded" not in capsys.readouterr().err
    assert read_sidecar(best) == before


def test_eval_no_record_leaves_the_sidecar_as_it_is(best: Path, tints: str, tmp_path: Path) -> None:
    before = read_sidecar(best)
    evaluate(best, "--no-record", data=tints, out=tmp_path)
    assert read_sidecar(best) == before


def test_eval_another_resize_is_not_recorded(best: Path, tints: str, tmp_path: Path) -> None:
    before = read_sidecar(best)
    assert evaluate(best, "--resize", 40, data=tints, out=tmp_path)["resize"] == 40
    assert read_sidecar(best) == before
    assert main(["eval", str(best), "--resize", "40", "--data", tints, "--record"]) == 2


def test_eval_dense_takes_the_papers_scales_in_proportion(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(best, "--protocol", "dense", data=tints, out=tmp_path)
    assert result["scales"] == [32, 37, 55, 69, 91] and result["views"] == 10
    assert result["n"] == 240
    assert "dense, shorter side 32, 37, 55, 69, 91 px, 10 views]" in capsys.readouterr().out
    one = evaluate(best, "--protocol", "dense", "--resize", 40, data=tints, out=tmp_path)
    assert one["scales"] == [40] and one["views"] == 2


def test_eval_ensemble_prints_each_net_and_their_mean(
    best: Path, engines: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(best, engines / "resnet8.onnx", data=tints, out=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        str(best), str(engines / "resnet8.onnx"), "ensemble of 2",
    ]  # fmt: skip
    assert "by position" in lines[3]  # neither npz nor net has names
    assert all("training images" in line for line in lines[4:6])  # of both files
    assert "training images of" in lines[4]  # an npz file has no splits
    single = evaluate(best, data=tints, out=tmp_path)
    assert [entry["top1"] for entry in result["members"]] == [single["top1"]] * 2
    assert result["top1"] == single["top1"] and result["n"] == 240


@pytest.fixture
def named(best: Path, tmp_path: Path) -> Path:
    """The trained net with names for its classes."""
    return with_classes(best, TINTS, tmp_path / "named.pt")


def test_eval_subset_of_the_classes_is_measured_and_printed(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders(tmp_path / "data", {"blue": 2, "grey": 3})
    result = evaluate(named, data=data, out=tmp_path)
    assert result["top1_percent"] > 90 and result["n"] == 24
    assert (result["labels"]["data_classes"], result["labels"]["model_classes"]) == (2, 4)
    assert "2 of the model's 4 classes" in capsys.readouterr().out


def test_eval_classes_from_a_file_name_the_data_or_the_model(
    named: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_data = tmp_path / "data.txt"
    of_data.write_text("blue\ngreen\ngrey\nred\n")
    data = folders(tmp_path / "data", {"b": 2, "c": 1, "d": 3, "e": 0})
    result = evaluate(named, "--classes", of_data, data=data, out=tmp_path)
    assert result["top1_percent"] > 90 and result["labels"]["matched_by"] == "file"
    of_model = tmp_path / "model.json"
    of_model.write_text(json.dumps(TINTS))
    data = folders(tmp_path / "named", {"grey": 3, "green": 1})
    result = evaluate(best, "--classes", of_model, data=data, out=tmp_path)
    assert result["top1_percent"] > 90 and result["labels"]["matched_by"] == "file"
    assert result["assumed"] == []
    refused(best, data=data, capsys=capsys)  # two names, and four classes without names


def test_eval_broken_image_is_named_once_and_counted(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders(tmp_path / "data", {name: n for n, name in enumerate(TINTS)}, count=30)
    (tmp_path / "data" / "green" / "7.png").write_bytes(b"not an image")
    assert evaluate(named, data=data, out=tmp_path)["n"] == 119
    captured = capsys.readouterr()
    assert captured.err.count("7.png") == 1 and "1 skipped" in captured.out


def test_eval_report_writes_a_page_with_the_numbers_of_the_json_result(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    result = evaluate(best, "--report", tmp_path / "page", data=tints, out=tmp_path)
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"page: {tmp_path / 'page' / 'index.html'}" in capsys.readouterr().out
    report = result["report"]
    assert report["n"] == result["n"] and report["top1"]["count"] == result["top1"]
    assert f"{result['top1_percent']:.2f} %" in page and f"{100 * report['ece']:.2f} points" in page
    assert page.count("<img ") == len(report["mistakes"]) + len(report["uncertain"])


def test_eval_report_on_a_file_is_refused_before_the_work(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("text")
    message = refused(best, "--report", tmp_path / "file", data=tints, capsys=capsys)
    assert "not a folder" in message and (tmp_path / "file").read_text() == "text"
