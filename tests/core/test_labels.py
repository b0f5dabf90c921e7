from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rtresnet.core.errors import DataError, InputError
from rtresnet.core.labels import LabelMatch, match, numbered, read_classes

ANIMALS = ("cat", "dog", "horse", "zebra")
NUMBERS = ("0", "1", "2", "3")


def test_match_same_names_in_another_order_maps_by_name() -> None:
    matched = match(ANIMALS, ("zebra", "cat", "horse", "dog"))
    assert matched.by == "name" and matched.indices == (3, 0, 2, 1)
    assert matched.is_permutation and not matched.in_order
    assert matched.assumptions() == [] and len(matched.remarks()) == 1
    assert matched.apply(np.array([0, 1, 2, 3, -1])).tolist() == [3, 0, 2, 1, -1]
    scores = np.array([[10, 11, 12, 13]])  # of zebra, cat, horse, dog
    assert matched.reorder(scores).tolist() == [[11, 13, 12, 10]]


def test_match_subset_is_reported() -> None:
    matched = match(ANIMALS, ("dog", "zebra"))
    assert matched.indices == (1, 3) and not matched.is_permutation
    assert "2 of the model's 4 classes" in matched.remarks()[0]
    assert matched.summary() == LabelMatch(
        matched_by="name", in_order=False, data_classes=2, model_classes=4,
        remarks=tuple(matched.remarks()),
    )  # fmt: skip


def test_match_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'catt' \(nearest: 'cat'\).*'xyz'") as caught:
        match(ANIMALS, ("catt", "dog", "xyz"), model_name="a.onnx", data_name="folder:d")
    assert "a.onnx" in str(caught.value) and "folder:d" in str(caught.value)
    assert caught.value.fix is not None and "--classes" in caught.value.fix


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [(ANIMALS, NUMBERS, False), (NUMBERS, ANIMALS, True), (NUMBERS, NUMBERS, False)],
)
def test_match_a_side_without_names_is_matched_by_position_and_says_so(
    model: tuple[str, ...], data: tuple[str, ...], named: bool
) -> None:
    matched = match(model, data, data_named=named)
    assert matched.by == "position" and matched.in_order and len(matched.assumptions()) == 1


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [(ANIMALS, NUMBERS[:3], False), (NUMBERS, ANIMALS[:3], True), (NUMBERS, NUMBERS[:2], False)],
)
def test_match_by_position_needs_equal_counts(
    model: tuple[str, ...], data: tuple[str, ...], named: bool
) -> None:
    with pytest.raises(DataError) as caught:
        match(model, data, data_named=named)
    assert caught.value.fix is not None and "--classes" in caught.value.fix


def test_match_folders_called_like_numbers_have_names() -> None:
    # Sorted as text, as class folders are: by position 10 would become 2.
    folders = ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    model = tuple(str(index) for index in range(11))
    assert match(model, folders).indices == tuple(int(name) for name in folders)
    assert match(NUMBERS, ("3", "1")).by == "name"
    with pytest.raises(DataError):
        match(NUMBERS, ("1", "2", "3", "4"))
    with pytest.raises(DataError):
        match(ANIMALS, NUMBERS)
    assert match(("n01440764", "n01443537"), ("n01443537", "n01440764")).indices == (1, 0)


def test_match_names_from_a_file_name_the_side_that_has_none() -> None:
    of_model = match(NUMBERS, ("dog", "cat", "zebra"), names=ANIMALS)
    assert of_model.by == "file" and of_model.indices == (1, 0, 3)
    of_data = match(ANIMALS, NUMBERS[:2], data_named=False, names=("zebra", "cat", "dog"))
    assert of_data.by == "file" and of_data.indices == (3, 0)
    of_both = match(NUMBERS, NUMBERS[:2], data_named=False, names=("a", "a", "b", "c"))
    assert of_both.indices == (0, 1) and of_both.assumptions() == []
    translated = match(ANIMALS, ("gatto", "cane"), names=("cat", "dog"))
    assert translated.indices == (0, 1)


@pytest.mark.parametrize(
    ("model", "data", "named", "names"),
    [
        (NUMBERS, ANIMALS, True, ("cat", "dog", "horse")),
        (ANIMALS, NUMBERS, False, ("cat", "dog", "horse")),
        (ANIMALS, ("gatto", "cane"), True, ("cat", "dog", "horse")),
        (ANIMALS, NUMBERS[:2], False, ("cat", "dgo")),
    ],
)
def test_match_names_from_a_file_that_do_not_fit_are_refused(
    model: tuple[str, ...], data: tuple[str, ...], named: bool, names: tuple[str, ...]
) -> None:
    with pytest.raises(InputError):
        match(model, data, data_named=named, names=names)


def test_match_names_that_stand_twice_are_ambiguous() -> None:
    cranes = ("crane", "dog", "crane")
    assert match(cranes, cranes).in_order
    assert match(cranes, ("dog",)).indices == (1,)
    with pytest.raises(DataError, match="2 classes named 'crane'"):
        match(cranes, ("crane", "dog"))
    with pytest.raises(DataError, match="two classes named 'dog'"):
        match(ANIMALS, ("dog", "dog"))


def test_numbered_is_a_model_without_names() -> None:
    assert numbered(NUMBERS) and not numbered(("1", "0")) and not numbered(ANIMALS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "cat\ndog \nzebra, Grevy's\n"),
        ("names.txt", "\ufeffcat\r\ndog\r\nzebra, Grevy's\r\n\r\n"),
        ("names.json", '["cat", "dog", "zebra, Grevy\'s"]'),
    ],
)
def test_read_classes_takes_lines_or_a_json_list(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_classes(tmp_path / name) == ("cat", "dog", "zebra, Grevy's")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("names.txt", b""),
        ("names.txt", b"cat\n\ndog\n"),
        ("names.txt", b"\xff\xfe\x00"),
        ("names.json", b"{}"),
        ("names.json", b'["cat", 3]'),
        ("names.json", b"[]"),
        ("names.json", b"[" * 5000),
        ("gone.txt", None),
    ],
)
def test_read_classes_anything_else_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes | None
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        read_classes(tmp_path / name)
