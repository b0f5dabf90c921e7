"""Readers of images with boxes, and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.errors import DataError, InputError, UnknownNameError
from rtresnet.detection.data import open_detection, report_invalid


def voc_folder(root: Path, *, lists: bool = True) -> Path:
    """Return two images: one with a valid, a difficult and an empty box, one without objects."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    objects = [
        ("dog", 0, (1, 1, 30, 20)), ("cat", 1, (5, 6, 15, 16)), ("dog", 0, (9, 9, 8, 30)),
    ]  # fmt: skip
    for stem, rows in (("000001", objects), ("000002", [])):
        Image.new("RGB", (40, 30), (10, 20, 30)).save(root / "JPEGImages" / f"{stem}.jpg")
        inner = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in
                      zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            + "</bndbox></object>"
            for name, difficult, box in rows
        )  # fmt: skip
        text = f"<annotation><filename>{stem}.jpg</filename>{inner}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(text)
    if lists:
        (root / "ImageSets/Main/trainval.txt").write_text("000001\n")
        (root / "ImageSets/Main/test.txt").write_text("000002\n")
    return root


def coco_file(root: Path) -> tuple[Path, Path]:
    """Return one image, category numbers with a gap, a crowd and a box without an area."""
    folder = root / "images"
    folder.mkdir()
    Image.new("RGB", (50, 40)).save(folder / "a.png")
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 10, 20], "area": 77.5,
         "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0, 0, 30, 30], "area": 900,
         "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 9, "bbox": [1, 1, 0, 5], "area": 0},
    ]  # fmt: skip
    path = root / "a.json"
    categories = [{"id": 9, "name": "b"}, {"id": 3, "name": "a"}]
    images = [{"id": 7, "file_name": "a.png"}]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path, folder


def test_voc_boxes_become_continuous_and_difficult_is_kept(tmp_path: Path) -> None:
    source = open_detection(f"voc:{voc_folder(tmp_path)}")
    assert source.splits and len(source) == 1
    (entry,) = source.targets
    assert entry.boxes.tolist() == [[0, 0, 30, 20], [4, 5, 15, 16]]
    assert [source.classes[label] for label in entry.labels] == ["dog", "cat"]
    assert entry.ignored.tolist() == [False, True]
    assert source.read(0).shape == (30, 40, 3)
    assert len(source.classes) == 20  # the names are VOC's, so all of them are


def test_voc_invalid_boxes_are_named_and_counted(tmp_path: Path) -> None:
    source = open_detection(f"voc:{voc_folder(tmp_path)}:trainval")
    (line,) = report_invalid(source)
    assert "000001.xml" in line and "8, 8, 8, 30" in line


def test_voc_test_split_and_an_image_without_objects(tmp_path: Path) -> None:
    source = open_detection(f"voc:{voc_folder(tmp_path)}", "test")
    assert len(source) == 1 and len(source.targets[0].boxes) == 0


def test_voc_folder_of_xml_files_without_lists(tmp_path: Path) -> None:
    folder = voc_folder(tmp_path, lists=False)
    (folder / "ImageSets/Main").rmdir()
    source = open_detection(f"voc:{folder}")
    assert not source.splits and len(source) == 2


@pytest.mark.parametrize("break_it", ["image", "xml", "list"])
def test_voc_broken_folder_is_refused(tmp_path: Path, break_it: str) -> None:
    folder = voc_folder(tmp_path)
    if break_it == "image":
        (folder / "JPEGImages/000001.jpg").unlink()
    elif break_it == "xml":
        (folder / "Annotations/000001.xml").write_text("<annotation><object>")
    else:
        (folder / "ImageSets/Main/trainval.txt").write_text("000009\n")
    with pytest.raises(DataError):
        open_detection(f"voc:{folder}")


def test_coco_boxes_crowd_and_categories(tmp_path: Path) -> None:
    path, folder = coco_file(tmp_path)
    source = open_detection(f"coco:{path}:{folder}")
    (entry,) = source.targets
    assert source.classes == ("a", "b")
    assert entry.boxes.tolist() == [[2, 3, 12, 23], [0, 0, 30, 30]]
    assert entry.labels.tolist() == [0, 1]
    assert entry.crowd.tolist() == entry.ignored.tolist() == [False, True]
    assert entry.areas.tolist() == [77.5, 900]
    assert len(source.invalid) == 1 and "annotation 3" in source.invalid[0]


@pytest.mark.parametrize(
    "change",
    [{"categories": None}, {"images": [{"id": 1}]}, {"annotations": [{"bbox": [1, 2]}]}],
)
def test_coco_broken_file_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path, folder = coco_file(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError):
        open_detection(f"coco:{path}:{folder}")


@pytest.mark.parametrize("spec", ["shapes", "shapes:0", "shapes:x", "coco:a.json", "jpeg:x", ""])
def test_open_detection_unknown_source_is_refused(spec: str) -> None:
    with pytest.raises((InputError, UnknownNameError)):
        open_detection(spec)


def test_shapes_are_reproducible_and_splits_differ() -> None:
    train, test = open_detection("shapes:6"), open_detection("shapes:6", "test")
    assert train.fingerprint() == open_detection("shapes:6").fingerprint() != test.fingerprint()
    assert not np.array_equal(train.read(0), test.read(0))
    for source in (train, test):
        for index, entry in enumerate(source.targets):
            image = source.read(index)
            assert image.dtype == np.uint8 and len(entry.boxes) >= 1
            assert (entry.boxes >= 0).all() and (entry.boxes <= image.shape[0]).all()
            assert (entry.boxes[:, 2:] - entry.boxes[:, :2] >= 15).all()


def test_joined_sources_need_the_same_classes(tmp_path: Path) -> None:
    both = open_detection("shapes:3,shapes:2")
    assert len(both) == 5 and np.array_equal(both.read(3), open_detection("shapes:2").read(0))
    with pytest.raises(DataError):
        open_detection(f"shapes:3,voc:{voc_folder(tmp_path)}")


def test_fingerprint_changes_with_flags_and_areas(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "voc")
    before = open_detection(f"voc:{root}").fingerprint()
    file = root / "Annotations" / "000001.xml"
    file.write_text(file.read_text().replace("<difficult>1", "<difficult>0"))
    assert open_detection(f"voc:{root}").fingerprint() != before
    path, folder = coco_file(tmp_path)
    before = open_detection(f"coco:{path}:{folder}").fingerprint()
    path.write_text(path.read_text().replace("77.5", "78.5"))
    assert open_detection(f"coco:{path}:{folder}").fingerprint() != before


def test_voc_annotation_broken_in_another_split_is_reported_there_only(tmp_path: Path) -> None:
    root = voc_folder(tmp_path)
    (root / "Annotations" / "000002.xml").write_text("<annotation>")
    assert len(open_detection(f"voc:{root}")) == 1
    with pytest.raises(DataError, match=r"000002\.xml"):
        open_detection(f"voc:{root}", "test")
