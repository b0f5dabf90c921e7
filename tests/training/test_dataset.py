"""Checks and preparation of a run's images before its first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data import loader
from rtresnet.data.sources import Arrays, open_source
from rtresnet.models import zoo
from rtresnet.training import dataset
from rtresnet.training.config import Recipe, TrainJob
from rtresnet.training.dataset import DataReport, prepare
from rtresnet.workflows.train_text import data_warnings

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """folder(broken=["train/a/03.jpg"]): 30 training images of two classes, and 6 test images."""

    def make(broken: tuple[str, ...] = ()) -> Path:
        root, rng = tmp_path / "photographs", np.random.default_rng(0)
        for split, count in (("train", 15), ("test", 3)):
            for label in ("a", "b"):
                (root / split / label).mkdir(parents=True)
                for index in range(count):
                    pixels = rng.integers(0, 256, (90, 100, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / label / f"{index:02}.jpg")
        for name in broken:
            (root / name).write_bytes(b"\xff\xd8\xff and no more")
        return root

    return make


def job(data: Path | str, tmp_path: Path, size: int = 32, **options: object) -> TrainJob:
    source = open_source(str(data), "train")
    test = open_source(str(data), "test") if source.splits else None
    contract = Preprocess.for_size(size)
    recipe = Recipe(name="speed", epochs=1, batch=8, lr=0.1)
    return TrainJob(
        spec=zoo.spec("resnet8"), source=source, test=test, preprocess=contract, recipe=recipe,
        out=tmp_path / "run", **options,  # type: ignore[arg-type]
    )  # fmt: skip


WAYS = {
    "small": {"size": 32},
    "cached": {"size": 72},
    "files": {"size": 72, "cached": False},
    "all": {"size": 72, "cached": False, "decode_all": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_prepare_with_broken_files_names_every_one_before_the_run(
    way: str, folder: Folder, tmp_path: Path
) -> None:
    broken = tuple(f"train/{label}/{index:02}.jpg" for label in "ab" for index in range(12))
    broken += ("test/b/01.jpg",)
    lines: list[str] = []
    with pytest.raises(DataError) as caught:
        prepare(job(folder(broken=broken), tmp_path, **WAYS[way]), warn=lines.append)  # type: ignore[arg-type]
    assert "24 of 30 training images" in caught.value.message
    assert caught.value.fix is not None and "--max-broken 80%" in caught.value.fix
    assert len(lines) == dataset.LISTED + 1 and "5 more" in lines[-1]
    listed = (tmp_path / "run" / "broken.txt").read_text().splitlines()
    assert len(listed) == 25
    for name in broken:
        assert any(name in line for line in listed), name


def test_prepare_with_broken_file_of_any_name_lists_it_on_one_line(
    folder: Folder, tmp_path: Path
) -> None:
    names = [b"new\nline.jpg", b"caf\xe9.jpg", b"\x1b]0;title\x07.jpg"]
    root, lines = folder(), list[str]()
    for name in names:
        (root / "train" / "a" / os.fsdecode(name)).touch()
    with pytest.raises(DataError):
        prepare(job(root, tmp_path), warn=lines.append)
    assert len(lines) == 3 and not any("\n" in line or "\x1b" in line for line in lines)
    assert len((tmp_path / "run" / "broken.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("way", WAYS)
def test_prepare_with_enough_tolerance_leaves_the_broken_images_out(
    way: str, folder: Folder, tmp_path: Path
) -> None:
    root = folder(broken=("train/a/03.jpg", "train/b/00.jpg", "test/b/01.jpg"))
    # One of six test images is more than two of thirty.
    proposed = job(root, tmp_path, **WAYS[way])  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        prepare(proposed)
    assert caught.value.fix is not None and "--max-broken 17%" in caught.value.fix
    prepared = prepare(job(root, tmp_path, max_broken=0.17, **WAYS[way]))  # type: ignore[arg-type]
    assert len(prepared.source) == 28 and prepared.test is not None and len(prepared.test) == 5
    assert prepared.report.broken == {"train": [3, 15], "test": [4]}
    assert {split: sum(counts) for split, counts in prepared.report.counts.items()} == {
        "train": 25, "val": 3, "test": 5,
    }  # fmt: skip
    for index in range(28):
        prepared.source.image(index)


@pytest.mark.parametrize("way", WAYS)
def test_prepare_of_a_resumed_run_leaves_out_the_same_images(
    way: str, folder: Folder, tmp_path: Path
) -> None:
    root = folder(broken=("train/a/03.jpg",))
    options = WAYS[way] | {"max_broken": 0.05}
    first = prepare(job(root, tmp_path, **options))  # type: ignore[arg-type]
    again = prepare(job(root, tmp_path, **options), report=first.report)  # type: ignore[arg-type]
    assert again.report == first.report
    assert np.array_equal(again.source.labels, first.source.labels)
    assert np.array_equal(again.parts.train, first.parts.train)
    for index in (0, 3, 28):
        assert np.array_equal(again.source.image(index), first.source.image(index))


def test_prepare_of_a_resumed_run_with_an_image_broken_since_is_refused(
    folder: Folder, tmp_path: Path
) -> None:
    root = folder()
    first = prepare(job(root, tmp_path))
    (root / "train" / "a" / "05.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"05\.jpg"):
        prepare(job(root, tmp_path), report=first.report)


@pytest.mark.parametrize(("way", "check"), [("small", "decoded"), ("cached", "decoded"),
                                            ("files", "files"), ("all", "decoded")])  # fmt: skip
def test_prepare_records_how_the_images_were_checked(
    way: str, check: str, folder: Folder, tmp_path: Path
) -> None:
    prepared = prepare(job(folder(), tmp_path, **WAYS[way]))  # type: ignore[arg-type]
    assert prepared.report.check == check
    assert isinstance(prepared.source, loader.Cached) == (way == "cached")


def test_prepare_of_photographs_that_fit_decodes_each_once(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, decoded = job(folder(), tmp_path, size=72), 0
    original = made.source.image

    def image(index: int, at_least: int | None = None) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return original(index, at_least)

    monkeypatch.setattr(made.source, "image", image)
    prepared = prepare(made)
    for index in range(30):  # as the first epoch asks for them
        prepared.source.image(index, prepared.source.at_least)  # type: ignore[attr-defined]
    assert decoded == 30


def test_prepare_of_small_files_crops_them_as_evaluation_does(
    folder: Folder, tmp_path: Path
) -> None:
    made = job(folder(), tmp_path)
    prepared = prepare(made)
    assert isinstance(prepared.source, Arrays)
    for index in (0, 7, 29):
        expected = made.preprocess.crop(made.source.image(index))
        assert np.array_equal(prepared.source.images[index], expected)


def test_prepare_keeps_arrays_of_the_nets_size_as_they_are(tints: str, tmp_path: Path) -> None:
    made = job(tints, tmp_path)
    prepared = prepare(made)
    assert prepared.source is made.source and prepared.report.check == "arrays"


def test_prepare_with_identical_images_in_two_splits_reports_both_names(
    folder: Folder, tmp_path: Path
) -> None:
    root = folder()
    shutil.copy(root / "train/a/01.jpg", root / "test/b/copy.jpg")
    for index in range(15):  # each once more: some of the pairs are torn apart by holding out
        shutil.copy(root / f"train/b/{index:02}.jpg", root / f"train/b/again{index}.jpg")
    report = prepare(job(root, tmp_path)).report
    ((trained, tested),) = report.examples["test"]
    assert trained.endswith("a/01.jpg") and tested.endswith("b/copy.jpg")
    assert report.identical["val"]
    assert len([line for line in data_warnings(report) if "too high" in line]) == 2
    assert report.identical["test"] == 1


def test_prepare_counts_images_with_transparency_of_every_split(
    folder: Folder, tmp_path: Path
) -> None:
    root = folder()
    for name in ("train/a/x.png", "train/b/y.png", "test/a/z.png"):
        Image.new("RGBA", (40, 40), (1, 2, 3, 100)).save(root / name)
    assert prepare(job(root, tmp_path)).report.transparent == 3


def report(train: list[int], val: list[int], test: list[int]) -> DataReport:
    return DataReport(
        classes=tuple("abcd"[: len(train)]), counts={"train": train, "val": val, "test": test},
        check="decoded", broken={}, identical={}, examples={}, transparent=0, max_broken=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (([300, 300], [60, 60], [60, 60]), ()),
        (([150, 150], [9, 8], [60, 60]), ("validation split has 17 images", "24 points")),
        (([300, 300], [60, 60], [90, 9]), ("test split has 99 images", "10 points")),
        (([300, 300], [119, 1], [60, 60]), ("fewer than 2 images of class b",)),
        (([300, 300], [0, 0], [60, 60]), ()),  # the recipe holds nothing out
        (([300, 1], [60, 60], [60, 60]), ("class b (1)", "300:1")),
        (([300, 30], [60, 60], [60, 60]), ("10:1",)),
        (([300, 31], [60, 60], [60, 60]), ()),
        (([300, 0], [60, 60], [60, 60]), ("no training image of class b",)),
        (([90, 9, 8, 7], [30] * 4, [30] * 4), ("3 classes (b (9), c (8), d (7))", "13:1")),
    ],
)
def test_warnings_name_what_is_doubtful_and_nothing_else(
    counts: tuple[list[int], list[int], list[int]], words: tuple[str, ...]
) -> None:
    result = data_warnings(report(*counts))
    assert bool(result) == bool(words)
    for word in words:
        assert any(word in line for line in result), result
