"""Reports on data sets, from Python and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core.preprocess import Preprocess
from rtresnet.workflows.data import DataInspectConfig, augmented_batch, inspect_data
from rtresnet.workflows.evaluate import EvaluateConfig, evaluate
from rtresnet.workflows.train_job import TrainConfig
from tests.workflows.test_duplicates import scenes


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes in two splits: a broken file, a copy, a resized and a recompressed copy."""
    root = tmp_path / "photographs"
    for split, first, count in (("train", 0, 20), ("test", 20, 8)):
        for number, pixels in enumerate(scenes(28, side=64)[first : first + count]):
            folder = root / split / ("cats" if number % 2 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    train, test = root / "train" / "dogs", root / "test" / "cats"
    shutil.copy(train / "00.png", train / "copy.png")
    Image.open(train / "02.png").resize((48, 48)).save(test / "small.png")
    Image.open(train / "04.png").save(test / "recompressed.jpg", quality=60)
    (test / "01.png").write_bytes(b"no image")
    return root


def test_inspect_data_finds_what_was_planted(photographs: Path) -> None:
    result = inspect_data(str(photographs), DataInspectConfig(samples=3))
    train, test = result.splits
    assert result.classes == ("cats", "dogs")
    assert (train.name, train.images, train.counts) == ("train", 21, (10, 11))
    assert (test.name, test.images, test.counts) == ("test", 9, (5, 4))
    assert len(test.broken) == 1 and "01.png" in test.broken[0]
    assert (test.widths[0], test.widths[-1]) == (48, 64)
    assert len(train.samples) == 6 and {image.label for image in train.samples} == {"cats", "dogs"}
    pairs = {
        (Path(pair.first.place).name, Path(pair.second.place).name, pair.exact)
        for pair in result.duplicates
    }
    assert pairs == {
        ("00.png", "copy.png", True),
        ("02.png", "small.png", False),
        ("04.png", "recompressed.jpg", False),
    }
    assert {Path(pair.second.place).name for pair in result.across()} == {
        "small.png", "recompressed.jpg",
    }  # fmt: skip


def test_data_command_prints_and_writes_the_same(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data.json"
    assert main(["data", str(photographs), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 duplicate pairs, 2 of them across splits" in printed and "01.png" in printed
    result = json.loads(out.read_text())["result"]
    assert [split["images"] for split in result["splits"]] == [21, 9]
    assert main(["data", str(photographs), "--no-near"]) == 0
    assert "1 duplicate pair, 0 of them" in capsys.readouterr().out


def test_augmented_batch_shows_the_images_as_the_net_receives_them(tints: str) -> None:
    plain = ("padding=0", "flip=none", "progressive=", "ema=0")
    config = TrainConfig(model="resnet8", data=tints, settings=plain)
    batch = augmented_batch(config, images=12)
    assert batch.pixels.shape == (12, 32, 32, 3) and batch.pixels.dtype == np.uint8
    originals = [image.tobytes() for image in np.load(tints.removeprefix("npz:"))["images"]]
    assert {image.tobytes() for image in batch.pixels} <= set(originals)
    assert set(batch.labels) == {"0", "1", "2", "3"} and batch.mixed == batch.labels
    augmented = augmented_batch(TrainConfig(model="resnet8", data=tints, recipe="modern"))
    assert augmented.mixed != augmented.labels or augmented.share == 1
    assert any("mixup" in line for line in augmented.recipe)


def test_augmented_batch_of_photographs_has_the_nets_size(photographs: Path) -> None:
    (photographs / "test" / "cats" / "01.png").unlink()
    config = TrainConfig(model="resnet18", data=str(photographs), settings=("train_scale=1",))
    assert augmented_batch(config, images=4).pixels.shape == (4, 224, 224, 3)
    assert Preprocess.for_size(224).size == 224


def test_evaluate_details_agree_with_the_accuracy(trained: Path, tints: str) -> None:
    result = evaluate(trained / "best.pt", tints, EvaluateConfig(details=True, split="all"))
    assert result.report is not None and result.only is not None
    assert (result.report.n, result.report.top1.count) == (result.n, result.top1)
    assert np.trace(result.report.matrix()) == result.top1
    assert evaluate(trained / "best.pt", tints).report is None


def test_data_report_writes_a_page_with_duplicates_and_an_augmented_batch(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page"
    assert main(["data", str(photographs), "--report", str(out), "--samples", "1"]) == 0
    page = (out / "index.html").read_text()
    assert f"page: {out / 'index.html'}" in capsys.readouterr().out
    assert "recompressed.jpg" in page and "An augmented batch" in page and "01.png" in page
