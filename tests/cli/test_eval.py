"""`rtresnet eval` under the paper's protocols, for real, on the small trained net."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.artifacts import read_sidecar, update_measured
from rtresnet.core.sidecar import accuracies
from rtresnet.models import checkpoint
from tests.conftest import tinted_noise


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


def test_the_plain_protocol_says_what_it_is_and_is_remembered(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(best, data=tints, out=tmp_path)
    said = {name: result[name] for name in ("protocol", "size", "resize", "scales", "views", "n")}
    assert said == {
        "protocol": "center", "size": 32, "resize": 32, "scales": None, "views": 1, "n": 240,
    }  # fmt: skip
    assert "center, 32 of 32 px, 1 view]" in capsys.readouterr().out
    sidecar = read_sidecar(best)
    assert sidecar is not None
    (recorded,) = accuracies(sidecar.measured)
    assert (recorded["top1"], recorded["n"], recorded["data"]) == (result["top1"], 240, tints)
    assert recorded["protocol"] == "center" and len(recorded["data_sha256"]) == 64


def test_ten_crops_of_a_larger_image_are_said_and_not_remembered(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_sidecar(best)
    result = evaluate(best, "--protocol", "10-crop", "--resize", 40, data=tints, out=tmp_path)
    assert (result["views"], result["size"], result["resize"], result["n"]) == (10, 32, 40, 240)
    assert result["top1_percent"] > 90
    assert "10-crop, 32 of 40 px, 10 views]" in capsys.readouterr().out
    assert read_sidecar(best) == before


def test_eval_keeps_one_accuracy_for_each_data_set(best: Path, tints: str, tmp_path: Path) -> None:
    other = folders(tmp_path / "data", {"0": 0, "1": 1, "2": 2, "3": 3}, count=4)
    for data in (tints, other, tints):
        evaluate(best, data=data, out=tmp_path)
    moved = tmp_path / "moved.npz"
    shutil.copy(tints.removeprefix("npz:"), moved)
    evaluate(best, data=f"npz:{moved}", out=tmp_path)  # the same images: replaces its record
    sidecar = read_sidecar(best)
    assert sidecar is not None
    found = [(record["data"], record["n"]) for record in accuracies(sidecar.measured)]
    assert found == [(other, 16), (f"npz:{moved}", 240)]


def test_eval_replaces_the_record_of_an_earlier_version_of_the_same_data(
    best: Path, tints: str, tmp_path: Path
) -> None:
    other = {"n": 9, "top1": 8, "top5": None, "data": "digits", "split": "test"}
    update_measured(best, accuracy=other)
    evaluate(best, data=tints, out=tmp_path)
    sidecar = read_sidecar(best)
    assert sidecar is not None
    assert [r["data"] for r in accuracies(sidecar.measured)] == ["digits", tints]
    update_measured(best, accuracy=other | {"data": tints, "split": "all"})
    evaluate(best, data=tints, out=tmp_path)
    sidecar = read_sidecar(best)
    assert sidecar is not None and len(accuracies(sidecar.measured)) == 1


def test_eval_prints_its_result_where_the_sidecar_cannot_be_written(
    best: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = read_sidecar(best)

    def refuse(path: object, record: object) -> None:
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


def test_another_resize_is_not_remembered(best: Path, tints: str, tmp_path: Path) -> None:
    before = read_sidecar(best)
    assert evaluate(best, "--resize", 40, data=tints, out=tmp_path)["resize"] == 40
    assert read_sidecar(best) == before
    assert main(["eval", str(best), "--resize", "40", "--data", tints, "--record"]) == 2


def test_dense_takes_the_papers_scales_in_proportion(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(best, "--protocol", "dense", data=tints, out=tmp_path)
    assert result["scales"] == [32, 37, 55, 69, 91] and result["views"] == 10
    assert result["n"] == 240
    assert "dense, shorter side 32, 37, 55, 69, 91 px, 10 views]" in capsys.readouterr().out
    one = evaluate(best, "--protocol", "dense", "--resize", 40, data=tints, out=tmp_path)
    assert one["scales"] == [40] and one["views"] == 2


def test_dense_of_an_onnx_file_names_the_checkpoint_it_was_made_from(
    engines: Path, trained: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = engines / "resnet8.onnx"
    message = refused(file, "--protocol", "dense", data=tints, capsys=capsys)
    assert "images of one size" in message and "best.pt" in message


def test_ten_crops_work_with_an_onnx_file(
    engines: Path, best: Path, tints: str, tmp_path: Path
) -> None:
    ten = ("--protocol", "10-crop", "--resize", 36)
    onnx = evaluate(engines / "resnet8.onnx", *ten, data=tints, out=tmp_path)
    assert onnx["top1"] == evaluate(best, *ten, data=tints, out=tmp_path)["top1"]


def test_a_resize_below_the_size_is_refused(
    best: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(best, "--resize", 20, data=tints, capsys=capsys)
    assert "--resize 20" in message and "--resize 32 or more" in message


def test_an_ensemble_prints_each_net_and_their_mean(
    best: Path, engines: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(best, engines / "resnet8.onnx", data=tints, out=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        str(best), str(engines / "resnet8.onnx"), "ensemble of 2",
    ]  # fmt: skip
    assert len(lines) == 4 and "by position" in lines[3]  # neither npz nor net has names
    single = evaluate(best, data=tints, out=tmp_path)
    assert [entry["top1"] for entry in result["members"]] == [single["top1"]] * 2
    assert result["top1"] == single["top1"] and result["n"] == 240


def with_classes(path: Path, names: tuple[str, ...], out: Path) -> Path:
    import dataclasses

    loaded = checkpoint.load(path)
    state = dict(loaded.state)
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][: len(names)]
    model = dataclasses.replace(loaded.model, classes=names)
    checkpoint.save(out, dataclasses.replace(loaded, model=model, state=state))
    return out


TINTS = ("red", "green", "blue", "grey")  # of the labels of `tints`


@pytest.fixture
def named(best: Path, tmp_path: Path) -> Path:
    """The trained net with names for its classes."""
    return with_classes(best, TINTS, tmp_path / "named.pt")


def folders(place: Path, names: dict[str, int], count: int = 12) -> str:
    """A data set of class folders, each with images of one of the four tints."""
    from PIL import Image

    images, labels = tinted_noise(4 * count, seed=3)
    for name, label in names.items():
        (place / name).mkdir(parents=True)
        for index, image in enumerate(images[labels == label]):
            Image.fromarray(image).save(place / name / f"{index}.png")
    return str(place)


def test_eval_class_folders_in_another_order_are_matched_by_name(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders(tmp_path / "data", {name: label for label, name in enumerate(TINTS)})
    result = evaluate(named, data=data, out=tmp_path)
    assert result["top1_percent"] > 90 and result["n"] == 48
    assert result["labels"]["matched_by"] == "name" and result["assumed"] == []
    assert "another order" in capsys.readouterr().out


def test_eval_a_subset_of_the_classes_is_measured_and_said(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders(tmp_path / "data", {"blue": 2, "grey": 3})
    result = evaluate(named, data=data, out=tmp_path)
    assert result["top1_percent"] > 90 and result["n"] == 24
    assert (result["labels"]["data_classes"], result["labels"]["model_classes"]) == (2, 4)
    assert "2 of the model's 4 classes" in capsys.readouterr().out


def test_eval_an_unknown_class_is_refused_with_the_nearest(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders(tmp_path / "data", {"blau": 2, "grey": 3})
    message = refused(named, data=data, capsys=capsys)
    assert "'blau'" in message and "nearest: 'blue'" in message and "--classes" in message


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


def test_eval_an_ensemble_of_nets_with_classes_in_another_order_is_matched_by_name(
    named: Path, tmp_path: Path
) -> None:
    import dataclasses

    loaded = checkpoint.load(named)
    order, state = [3, 1, 0, 2], dict(loaded.state)
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][order]
    model = dataclasses.replace(loaded.model, classes=tuple(TINTS[index] for index in order))
    other = tmp_path / "other.pt"
    checkpoint.save(other, dataclasses.replace(loaded, model=model, state=state))
    data = folders(tmp_path / "data", {name: label for label, name in enumerate(TINTS)})
    for protocol in ("center", "dense"):
        result = evaluate(named, other, "--protocol", protocol, data=data, out=tmp_path)
        first, second = result["members"]
        assert first["top1"] == second["top1"] == result["top1"] > 40
    file = tmp_path / "compare.json"
    arguments = ["compare", str(named), str(other), "--data", data, "--json", str(file)]
    assert main(arguments) == 0
    compared = json.loads(file.read_text())["result"]
    assert compared["agreement"] == 1 and compared["relative"] < 1e-5
    assert compared["classes"]["in_order"] is False


def test_nets_of_other_classes_are_no_ensemble(
    best: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = with_classes(best, ("a", "b", "c"), tmp_path / "three.pt")
    message = refused(best, three, data=tints, capsys=capsys)
    assert "three.pt has 3 classes" in message
    letters = with_classes(best, ("a", "b", "c", "d"), tmp_path / "letters.pt")
    other = with_classes(best, ("a", "x", "c", "d"), tmp_path / "other.pt")
    message = refused(letters, other, data=tints, capsys=capsys)
    assert "no class 'x'" in message
    # Numbers for names say nothing: such a net agrees with any other of as many classes.
    assert len(evaluate(best, letters, data=tints, out=tmp_path)["members"]) == 2


def test_broken_images_are_left_out_for_all(
    best: Path, engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for label in "0123":
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(30):
            pixels = np.full((40, 48, 3), 60 * int(label), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.png")
    (tmp_path / "data" / "1" / "7.png").write_bytes(b"not an image")
    data = str(tmp_path / "data")
    result = evaluate(best, engines / "resnet8.onnx", data=data, out=tmp_path)
    assert [entry["n"] for entry in (*result["members"], result)] == [119] * 3
    captured = capsys.readouterr()
    assert captured.err.count("7.png") == 1 and "1 skipped" in captured.out
