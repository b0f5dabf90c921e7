from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.errors import DataError, InputError, UnavailableError, UnknownNameError
from rtresnet.data.decode import CorruptImage, decode
from rtresnet.data.formats import CIFAR10, FASHION
from rtresnet.data.sources import (
    Arrays,
    Files,
    Source,
    ignored_files,
    images_under,
    open_images,
    open_source,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    """Write an image file in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(6, 8, 3) if pixels is None else pixels).save(path, **options)
    return path


def folders(root: Path, *names: str) -> Path:
    """Write one PNG file for each name such as `cats/1.png`, each with an image of its own."""
    for seed, name in enumerate(names):
        picture(root / name, noise(4, 4, 3, seed=seed))
    return root


def refusal(spec: str, split: str = "all") -> str:
    """Return the error message with which data is rejected."""
    with pytest.raises(DataError) as caught:
        open_source(spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(source: Source) -> None:
    """Check the properties of every source."""
    assert len(source) == len(source.labels) > 0
    assert source.labels.dtype == np.int64
    assert source.labels.min() >= 0
    assert source.labels.max() < len(source.classes)
    for index in (0, len(source) - 1):
        image = source.image(index)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
    assert len(source.fingerprint()) == 64
    assert source.fingerprint() == source.fingerprint()


# --- names


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("digit", "digits"),
        ("cifar10", "cifar10:DIR"),
        ("fashion_mnist:x", "fashion-mnist:DIR"),
        ("synthetics:8", "synthetic:N"),
        ("npz:", "npz:FILE"),
    ],
)
def test_an_unknown_form_comes_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{nearest}'"):
        open_source(text)


def test_a_form_like_none_comes_with_all_of_them() -> None:
    with pytest.raises(UnknownNameError, match=r"known: digits, .*synthetic:N"):
        open_source("imagenet22k-webdataset")


@pytest.mark.parametrize("spec", ["nowhere/cats", "/nowhere", "cats.tar", "folder:/nowhere"])
def test_a_path_that_is_not_there_is_told_so(spec: str) -> None:
    assert "no such folder" in refusal(spec)


def test_an_unknown_split_comes_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"split 'validation'.*train, test, all"):
        open_source("synthetic:4", "validation")


# --- digits


def test_digits_are_divided_once_and_for_ever() -> None:
    pytest.importorskip("sklearn")
    whole, train, test = (open_source("digits", split) for split in ("all", "train", "test"))
    for source in (whole, train, test):
        check(source)
        assert source.image(0).shape == (32, 32, 3)
        assert source.classes == tuple("0123456789")
        assert source.splits
    assert (len(whole), len(train), len(test)) == (1797, 1438, 359)

    def contents(source: Source) -> list[bytes]:
        return sorted(source.image(index).tobytes() for index in range(len(source)))

    assert contents(whole) == sorted(contents(train) + contents(test))
    assert open_source("digits", "test").fingerprint() == test.fingerprint()
    assert set(test.labels) == set(range(10))


def test_digits_are_grey_and_use_the_whole_range() -> None:
    pytest.importorskip("sklearn")
    image = open_source("digits").image(0)
    assert np.array_equal(image[..., 0], image[..., 1])
    assert np.array_equal(image[..., 0], image[..., 2])
    assert image.min() == 0
    assert image.max() > 200


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UnavailableError, match="scikit-learn"):
        open_source("digits")


# --- synthetic


def test_synthetic_images_are_the_same_every_time() -> None:
    source = open_source("synthetic:25")
    check(source)
    assert len(source) == 25
    assert source.image(0).shape == (32, 32, 3)
    assert np.bincount(source.labels).tolist() == [3] * 5 + [2] * 5
    assert source.fingerprint() == open_source("synthetic:25").fingerprint()
    assert source.fingerprint() != open_source("synthetic:26").fingerprint()


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_synthetic_needs_a_number(count: str) -> None:
    with pytest.raises(InputError, match="synthetic:256"):
        open_source(f"synthetic:{count}")


# --- fashion-mnist


def idx(array: np.ndarray) -> bytes:
    """Encode idx: two zero bytes, the type (8: bytes), the rank, the sizes, the data."""
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def write_idx(folder: Path, prefix: str, count: int, seed: int = 0, packed: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    images = noise(count, 28, 28, seed=seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        path = folder / f"{prefix}-{name}-ubyte"
        if packed:
            Path(f"{path}.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_or_packed(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, "train", 12, seed=1, packed=packed)
    write_idx(tmp_path, "t10k", 5, seed=2, packed=packed)
    spec = f"fashion-mnist:{tmp_path}"
    sizes = {split: len(open_source(spec, split)) for split in ("train", "test", "all")}
    assert sizes == {"train": 12, "test": 5, "all": 17}
    source = open_source(spec, "test")
    check(source)
    assert source.splits
    assert source.classes == tuple(FASHION)
    assert source.labels.tolist() == [0, 1, 2, 3, 4]


def test_28_pixels_get_a_black_border_of_two(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 3, seed=2)
    image = open_source(f"fashion-mnist:{tmp_path}", "test").image(1)
    assert image.shape == (32, 32, 3)
    for channel in range(3):
        assert np.array_equal(image[2:30, 2:30, channel], noise(3, 28, 28, seed=2)[1])
    image = image.copy()
    image[2:30, 2:30] = 0
    assert image.max() == 0


def test_only_the_split_asked_for_must_be_there(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 3)
    assert len(open_source(f"fashion-mnist:{tmp_path}", "test")) == 3
    assert "train-images-idx3-ubyte" in refusal(f"fashion-mnist:{tmp_path}", "train")


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 6, 10, 15, 16, 17, 1000, 2367])
def test_a_truncated_idx_file_is_refused_by_name(tmp_path: Path, length: int) -> None:
    write_idx(tmp_path, "t10k", 3)
    path = tmp_path / "t10k-images-idx3-ubyte"
    assert path.stat().st_size == 16 + 3 * 28 * 28
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(f"fashion-mnist:{tmp_path}", "test")
    assert str(path) in message
    assert "truncated" in message


def test_a_truncated_gz_file_is_refused_by_name(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 3, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:100], b"not gzip", b"", whole[:20] + b"\xff" * 40):
        path.write_bytes(content)
        assert str(path) in refusal(f"fashion-mnist:{tmp_path}", "test")


def test_an_idx_file_of_another_type_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 3)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:])
    assert "not an idx file" in refusal(f"fashion-mnist:{tmp_path}", "test")


def test_more_labels_than_images_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 3)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    assert "labels are" in refusal(f"fashion-mnist:{tmp_path}", "test")


def test_images_and_labels_that_changed_places_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 3)
    images, labels = (tmp_path / f"t10k-{n}-ubyte" for n in ("images-idx3", "labels-idx1"))
    content = images.read_bytes()
    images.write_bytes(labels.read_bytes())
    labels.write_bytes(content)
    assert str(tmp_path) in refusal(f"fashion-mnist:{tmp_path}", "test")


# --- cifar10


def write_cifar(folder: Path, name: str, count: int, seed: int = 0, protocol: int = 2) -> None:
    """Write a Python batch: rows of 3072 bytes, all red first, then green, then blue."""
    folder.mkdir(exist_ok=True, parents=True)
    batch = {
        b"batch_label": b"testing batch",
        b"labels": [index % 10 for index in range(count)],
        b"data": noise(count, 3072, seed=seed),
        b"filenames": [b"cat.png"] * count,
    }
    (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("nested", ["", "cifar-10-batches-py"])
def test_the_python_batches_are_read(tmp_path: Path, nested: str, protocol: int) -> None:
    folder = tmp_path / nested
    for index in range(1, 6):
        write_cifar(folder, f"data_batch_{index}", 4, seed=index, protocol=protocol)
    write_cifar(folder, "test_batch", 3, seed=9, protocol=protocol)
    sizes = {s: len(open_source(f"cifar10:{tmp_path}", s)) for s in ("train", "test", "all")}
    assert sizes == {"train": 20, "test": 3, "all": 23}
    source = open_source(f"cifar10:{tmp_path}", "test")
    check(source)
    assert source.splits
    assert source.classes == tuple(CIFAR10)
    row = noise(3, 3072, seed=9)[2]
    image = source.image(2)
    assert image.shape == (32, 32, 3)
    for channel in range(3):
        plane = row[1024 * channel : 1024 * (channel + 1)]
        assert np.array_equal(image[..., channel].ravel(), plane)


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path: Path) -> None:
    """The published files are protocol 2 with 8-bit strings, which Python 3 no longer writes."""
    pixels = noise(1, 3072)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
        b"I00\nT" + struct.pack("<I", 3072) + pixels.tobytes() + b"tb"
    )
    content = b"\x80\x02}(U\x04data" + array + b"U\x06labels](I7\neu."
    (tmp_path / "test_batch").write_bytes(content)
    source = open_source(f"cifar10:{tmp_path}", "test")
    assert source.labels.tolist() == [7]
    assert np.array_equal(source.image(0).transpose(2, 0, 1).ravel(), pixels[0])


class Call:
    """Calls a function where it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (os.system, "touch {}"),
        (eval, "open('{}', 'w').close()"),
        (open, "{}"),
        (np.save, "{}"),
        (np.testing.measure, "open('{}', 'w').close()"),
    ],
    ids=["os.system", "eval", "open", "numpy.save", "numpy.testing.measure"],
)
def test_a_batch_with_code_in_it_is_refused_and_does_not_run(
    tmp_path: Path, protocol: int, function: Callable[..., object], argument: str
) -> None:
    ran = tmp_path / "ran"
    more = {open: ["w"], np.save: [0]}.get(function, [])
    evil = Call(function, argument.format(ran), *more)
    batch = {b"data": noise(1, 3072), b"labels": [0], b"x": evil}
    content = pickle.dumps(batch, protocol=protocol)
    pickle.loads(content)
    assert function is np.save or ran.exists()  # the bait works
    ran.unlink(missing_ok=True)
    Path(f"{ran}.npy").unlink(missing_ok=True)
    (tmp_path / "test_batch").write_bytes(content)
    message = refusal(f"cifar10:{tmp_path}", "test")
    assert "test_batch: not a CIFAR-10 batch" in message
    assert "not allowed" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["test_batch"]


def test_a_truncated_batch_is_refused_by_name(tmp_path: Path) -> None:
    write_cifar(tmp_path, "test_batch", 2)
    path = tmp_path / "test_batch"
    whole = path.read_bytes()
    for length in (*range(0, 200, 7), 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(f"cifar10:{tmp_path}", "test")


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"\0" * 100,
        pickle.dumps([1, 2]),
        pickle.dumps(None),
        pickle.dumps({"data": 1}),
        pickle.dumps({b"data": [1, 2], b"labels": [1]}),
        pickle.dumps({b"data": noise(2, 3072), b"labels": None}),
        pickle.dumps(noise(2, 3072)),
        pickle.dumps({b"data": noise(2, 3072), b"labels": 1}),
    ],
    ids=range(9),
)
def test_a_file_that_is_no_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    assert str(tmp_path) in refusal(f"cifar10:{tmp_path}", "test")


def test_a_batch_with_a_damaged_name_in_it_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "test_batch", 2)
    whole = (tmp_path / "test_batch").read_bytes()
    assert b"multiarray" in whole[:400]
    for old, new in ((b"multiarray", b"multXarray"), (b"latin1", b"latinX"), (b"dtype", b"dtypf")):
        assert old in whole
        (tmp_path / "test_batch").write_bytes(whole.replace(old, new, 1))
        assert "test_batch" in refusal(f"cifar10:{tmp_path}", "test")


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "data_batch_1", 2)
    assert "data_batch_2: no such file" in refusal(f"cifar10:{tmp_path}", "train")


def test_cifar_labels_beyond_ten_are_refused(tmp_path: Path) -> None:
    batch = {b"data": noise(2, 3072), b"labels": [0, 10]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    assert "0 to 10" in refusal(f"cifar10:{tmp_path}", "test")


# --- folders


def test_a_folder_of_class_folders_is_a_data_set(tmp_path: Path) -> None:
    folders(tmp_path, "dogs/b.png", "cats/2.png", "cats/1.png", "dogs/deep/er/a.png")
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("nor this")
    for spec in (f"folder:{tmp_path}", str(tmp_path)):
        source = open_source(spec)
        check(source)
        assert source.name == spec
        assert source.classes == ("cats", "dogs")
        assert source.labels.tolist() == [0, 0, 1, 1]
        assert not source.splits
        assert np.array_equal(source.image(0), noise(4, 4, 3, seed=2))
        assert np.array_equal(source.image(2), noise(4, 4, 3, seed=0))


def test_a_set_that_came_undivided_is_all_of_it_for_every_split(tmp_path: Path) -> None:
    folders(tmp_path, "a/1.png", "b/1.png")
    assert {len(open_source(str(tmp_path), split)) for split in ("train", "test", "all")} == {2}


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders_are_splits(tmp_path: Path, held_out: str) -> None:
    folders(
        tmp_path,
        *("train/a/1.png", "train/a/2.png", "train/b/1.png"),
        *(f"{held_out}/a/3.png", f"{held_out}/b/4.png"),
    )
    sizes = {}
    for split in ("train", "test", "all"):
        source = open_source(str(tmp_path), split)
        check(source)
        assert source.splits
        assert source.classes == ("a", "b")
        sizes[split] = source.labels.tolist()
    assert sizes == {"train": [0, 0, 1], "test": [0, 1], "all": [0, 0, 1, 0, 1]}


def test_a_train_folder_alone_is_an_undivided_set(tmp_path: Path) -> None:
    folders(tmp_path, "train/a/1.png", "train/b/1.png")
    source = open_source(str(tmp_path), "test")
    assert (source.classes, len(source), source.splits) == (("a", "b"), 2, False)


def test_a_class_may_be_absent_from_the_test_set_and_keeps_its_label(tmp_path: Path) -> None:
    folders(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/2.png")
    source = open_source(str(tmp_path), "test")
    assert source.labels.tolist() == [2]
    assert source.classes == ("a", "b", "c")


def test_a_class_only_in_the_test_set_is_refused_by_name(tmp_path: Path) -> None:
    folders(tmp_path, "train/a/1.png", "train/b/1.png", "test/zebra/2.png")
    assert "'zebra'" in refusal(str(tmp_path), "test")
    assert len(open_source(str(tmp_path), "train")) == 2


def test_a_class_without_images_is_refused_by_name(tmp_path: Path) -> None:
    folders(tmp_path, "cats/1.png")
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "notes.txt").touch()
    assert f"{tmp_path / 'dogs'}: the class has no image" in refusal(str(tmp_path))


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    folders(tmp_path, "cats/1.png", "cats/2.png")
    message = refusal(str(tmp_path))
    assert "only one class (cats)" in message
    assert "two or more" in message and "--data" not in message


def test_open_source_of_the_folder_above_the_classes_names_the_one_to_use(tmp_path: Path) -> None:
    folders(tmp_path, "photos/cat/1.png", "photos/dog/1.png")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path))
    assert f"--data {tmp_path / 'photos'}" in (caught.value.fix or "")


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    assert "folder for each class" in refusal(str(tmp_path))


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    folders(tmp_path, "a/1.png", "b/1.png", ".thumbnails/1.png")
    assert open_source(str(tmp_path)).classes == ("a", "b")
    folders(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/.cache/1.png")
    assert len(open_source(str(tmp_path), "test")) == 1


def test_hidden_files_and_folders_within_a_class_are_no_images(tmp_path: Path) -> None:
    """Notebooks leave copies in .ipynb_checkpoints, macOS leaves ._NAME next to every file."""
    folders(tmp_path, "a/1.png", "b/1.png", "a/.ipynb_checkpoints/1-checkpoint.png")
    (tmp_path / "b" / "._1.png").write_bytes(b"\0\5\x16\7")
    assert len(open_source(str(tmp_path))) == 2


def test_a_hidden_folder_above_the_data_hides_nothing(tmp_path: Path) -> None:
    root = folders(tmp_path / ".cache" / "data", "a/1.png", "b/1.png")
    assert len(open_source(str(root))) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """It could not be written into a sidecar, hours later."""
    folders(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    message = refusal(str(tmp_path))
    message.encode()
    assert "caf" in message


def test_every_image_suffix_counts_whatever_its_case(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.JPEG", "3.png", "4.bmp", "5.webp", "6.gif", "7.tif", "8.ppm"):
        picture(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "9.txt").touch()
    assert [path.name[0] for path in images_under(tmp_path)] == list("12345678")


def test_open_source_names_and_counts_ignored_files(tmp_path: Path) -> None:
    root = folders(tmp_path, "a/1.png", "b/1.png", "loose.jpg", ".hidden.png")
    for name in ("a/1.CR2", "a/2.nef", "b/3.jxl", "b/4.svg", "b/._5.cr2", "b/notes.txt"):
        (root / name).touch()
    source = open_source(str(root))
    assert len(source) == 2
    unreadable, outside = ignored_files(source)
    assert unreadable.startswith("4 files in formats that cannot be read (convert to JPEG or PNG)")
    assert f"{root}/a/1.CR2, {root}/a/2.nef, {root}/b/3.jxl, ..." in unreadable
    assert outside == f"1 file outside the class folders ignored: {root}/loose.jpg"
    assert ignored_files(open_source("synthetic:4")) == []


def test_open_source_with_test_and_val_folders_names_the_unused_images(tmp_path: Path) -> None:
    root = folders(
        tmp_path, *(f"{part}/{c}/1.png" for part in ("train", "test", "val") for c in "ab")
    )
    source = open_source(str(root), "test")
    assert len(source) == 2
    (ignored,) = ignored_files(source)
    assert ignored.startswith("2 files in val/") and f"{root}/val/a/1.png" in ignored
    (root / "test").rename(root / "unused")
    assert ignored_files(open_source(str(root), "test")) == []


# --- npz


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_arrays_are_a_data_set(tmp_path: Path) -> None:
    images, labels = noise(5, 9, 7, 3), np.array([0, 1, 2, 1, 0], np.uint8)
    source = open_source(npz(tmp_path / "a.npz", images=images, labels=labels))
    check(source)
    assert source.classes == ("0", "1", "2")
    assert source.labels.tolist() == [0, 1, 2, 1, 0]
    assert np.array_equal(source.image(3), images[3])


def test_grey_arrays_become_rgb(tmp_path: Path) -> None:
    images = noise(4, 6, 6)
    source = open_source(npz(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 0, 1])))
    assert np.array_equal(source.image(2), np.repeat(images[2][..., None], 3, axis=2))


def test_arrays_may_name_their_classes(tmp_path: Path) -> None:
    spec = npz(
        tmp_path / "a.npz",
        images=noise(2, 4, 4, 3),
        labels=np.array([0, 1]),
        classes=np.array(["cat", "dog", "fox"]),
    )
    assert open_source(spec).classes == ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": noise(2, 4, 4, 3).astype(np.float32)}, "float32"),
        ({"images": noise(2, 4, 4, 4)}, r"[2, 4, 4, 4]"),
        ({"images": noise(2, 3, 4, 4)}, r"[2, 3, 4, 4]"),
        ({"images": noise(4, 4)}, r"[4, 4]"),
        ({"images": noise(0, 4, 4, 3), "labels": np.zeros(0, int)}, r"[0, 4, 4, 3]"),
        ({"images": np.uint8(3)}, "uint8 []"),
        ({"labels": np.array([0, 1, 2])}, r"[3]"),
        ({"labels": np.array([0.0, 1.0])}, "float64"),
        ({"labels": np.array(["a", "b"])}, "<U1"),
        ({"labels": np.array([[0], [1]])}, r"[2, 1]"),
        ({"labels": np.int64(1)}, "int64 []"),
        ({"labels": np.array([0, -1])}, "from -1 to 0"),
        ({"classes": np.array(["a"])}, "from 0 to 1"),
        ({"labels": np.array([None, 1])}, "allow_pickle"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    arrays = {"images": noise(2, 4, 4, 3), "labels": np.array([0, 1])} | change
    message = refusal(npz(tmp_path / "a.npz", **arrays))
    assert "a.npz" in message
    assert says in message


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_an_npz_file_without_one_of_the_arrays_is_refused(tmp_path: Path, missing: str) -> None:
    arrays = {"images": noise(2, 4, 4, 3), "labels": np.array([0, 1])}
    del arrays[missing]
    message = refusal(npz(tmp_path / "a.npz", **arrays))
    assert missing in message
    assert "`images` and `labels`" in message


def test_class_names_that_are_no_list_are_refused(tmp_path: Path) -> None:
    arrays = {"images": noise(2, 4, 4, 3), "labels": np.array([0, 1]), "classes": "cat"}
    assert "a.npz" in refusal(npz(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps({"images": 1})])
def test_a_file_that_is_no_npz_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    assert "a.npz: not an npz file" in refusal(f"npz:{tmp_path / 'a.npz'}")


def test_a_truncated_or_damaged_npz_file_is_refused_by_name(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", images=noise(2, 16, 16, 3), labels=np.array([0, 1]))
    whole = (tmp_path / "a.npz").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:-1], whole[:middle], whole[:100], flipped):
        (tmp_path / "a.npz").write_bytes(content)
        assert "a.npz: not an npz file" in refusal(f"npz:{tmp_path / 'a.npz'}")


def test_a_single_array_is_no_npz_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(2, 4, 4, 3))
    assert "a.npy" in refusal(f"npz:{tmp_path / 'a.npy'}")


def test_a_missing_npz_file_is_told_so(tmp_path: Path) -> None:
    assert "gone.npz: no such file" in refusal(f"npz:{tmp_path / 'gone.npz'}")


# --- decoding


def test_a_lossless_image_comes_back_to_the_bit(tmp_path: Path) -> None:
    pixels = noise(11, 7, 3)
    assert np.array_equal(decode(picture(tmp_path / "a.png", pixels)), pixels)
    assert np.array_equal(decode("from memory", (tmp_path / "a.png").read_bytes()), pixels)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p, 1)),
    ],
)
def test_images_are_upright_as_their_exif_says(
    tmp_path: Path, orientation: int, turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    pixels, exif = noise(6, 9, 3), Image.Exif()
    exif[0x0112] = orientation
    path = picture(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(decode(path), turn(pixels))


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    pixels = noise(5, 6)
    decoded = decode(picture(tmp_path / "a.png", pixels))
    assert np.array_equal(decoded, np.repeat(pixels[..., None], 3, axis=2))


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    pixels = noise(5, 6) > 127
    decoded = decode(picture(tmp_path / "a.png", pixels))
    assert np.array_equal(decoded[..., 1], pixels * np.uint8(255))


@pytest.mark.parametrize(
    ("transparency", "alpha"),
    [(1, [255, 0, 255]), (bytes([255, 0, 128]), [255, 0, 128])],
    ids=["index", "bytes"],
)
def test_decode_of_palette_with_transparency_composites_on_white(
    tmp_path: Path, transparency: int | bytes, alpha: list[int]
) -> None:
    colours = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]], np.uint8)
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.frombytes("P", (3, 2), indices.tobytes())
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path / "a.png", transparency=transparency)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P"
        assert "transparency" in saved.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(tmp_path / "a.png")
    assert decoded.dtype == np.uint8
    share = np.array(alpha)[:, None] / 255
    expected = (colours * share + 255 * (1 - share))[indices]
    assert np.abs(decoded - expected).max() <= 1


def test_decode_of_alpha_channel_composites_on_white(tmp_path: Path) -> None:
    pixels = noise(5, 6, 4)
    share = pixels[..., 3:] / 255
    expected = pixels[..., :3] * share + 255 * (1 - share)
    assert np.abs(decode(picture(tmp_path / "a.png", pixels)) - expected).max() <= 1


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    decoded = decode(tmp_path / "a.jpg")
    assert decoded.shape == (8, 16, 3)
    assert decoded.dtype == np.uint8
    assert decoded[..., 0].min() > 220
    assert decoded[..., 1:].max() < 40


def png16(pixels: np.ndarray) -> bytes:
    """Return a 16-bit PNG, grey [H, W] or RGB [H, W, 3], written by hand."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    colour = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("shape", [(9, 13), (9, 13, 3)], ids=["grey", "rgb"])
def test_sixteen_bits_are_scaled_to_eight(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << 16, shape, dtype=np.uint16)
    decoded = decode("a.png", png16(pixels))
    assert decoded.shape == (9, 13, 3)
    assert decoded.dtype == np.uint8
    expected = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    assert np.abs(decoded - expected / 257).max() <= 1


def test_the_first_frame_of_an_animation_is_the_image(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (5, 4), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    decoded = decode(tmp_path / "a.gif")
    assert decoded.shape == (4, 5, 3)
    assert (decoded == [255, 0, 0]).all()


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 50, 3)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.9])
def test_a_truncated_image_is_corrupt(tmp_path: Path, format: str, keep: float) -> None:
    content = encoded(format)
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CorruptImage, match=str(path)):
        decode(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello, I am text", b"\xff\xd8\xff", b"GIF89a", b"\0" * 5000]
)
def test_a_file_that_is_no_image_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(CorruptImage, match=str(path)):
        decode(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_damaged_bytes_are_an_image_or_corrupt_but_nothing_else(format: str) -> None:
    content, rng = encoded(format), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, rng.choice([40, len(content)]), 3):
            damaged[position] = rng.integers(256)
        try:
            assert decode("a", bytes(damaged)).shape[2] == 3
        except CorruptImage as error:
            assert "\n" not in str(error)


def test_an_image_that_unpacks_to_gigabytes_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptImage, match="exceeds limit"):
        decode("bomb.png", encoded("PNG"))


def test_a_file_that_cannot_be_opened_is_not_called_corrupt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png") as caught:
        decode(tmp_path / "gone.png")
    assert not isinstance(caught.value, CorruptImage)


def test_opening_a_folder_decodes_nothing(tmp_path: Path) -> None:
    folders(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "2.jpg").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert len(source) == 3
    with pytest.raises(CorruptImage, match=r"2\.jpg"):
        source.image(1)


# --- images without labels


def test_any_folder_of_images_will_do_where_no_label_is_needed(tmp_path: Path) -> None:
    folders(tmp_path, "1.png", "deep/2.png")
    for spec in (str(tmp_path), f"folder:{tmp_path}"):
        source = open_images(spec)
        assert len(source) == 2
        assert source.labels.tolist() == [-1, -1]
        assert source.classes == ()
        assert np.array_equal(source.image(1), noise(4, 4, 3, seed=1))


def test_a_list_names_images_relative_to_itself(tmp_path: Path) -> None:
    folders(tmp_path, "pictures/1.png", "pictures/2.png", "pictures/3.png")
    (tmp_path / "lists").mkdir()
    chosen = tmp_path / "lists" / "calibration.txt"
    absolute = tmp_path / "pictures" / "1.png"
    chosen.write_text(f"# twenty would be better\n\n  ../pictures/3.png  \n{absolute}\n")
    source = open_images(str(chosen))
    assert len(source) == 2
    assert np.array_equal(source.image(0), noise(4, 4, 3, seed=2))
    assert np.array_equal(source.image(1), noise(4, 4, 3, seed=0))


def test_a_list_with_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(DataError, match=r"list\.txt: lists .*gone\.png"):
        open_images(str(tmp_path / "list.txt"))


def test_a_list_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    with pytest.raises(DataError, match=r"list\.txt"):
        open_images(str(tmp_path / "list.txt"))


def test_an_empty_list_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# nothing\n")
    for spec in (str(tmp_path / "list.txt"), str(tmp_path)):
        with pytest.raises(DataError, match="no images"):
            open_images(spec)


def test_a_labelled_source_gives_its_training_images(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 12)
    source = open_images(f"fashion-mnist:{tmp_path}")
    assert (len(source), source.classes) == (12, tuple(FASHION))


# --- fingerprints


def test_a_fingerprint_changes_with_a_pixel_or_a_label() -> None:
    images, labels = noise(4, 5, 5, 3), np.array([0, 1, 0, 1])

    def fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
        return Arrays("a", images, labels, "ab").fingerprint()

    pixel, label = images.copy(), labels.copy()
    pixel[3, 4, 4, 2] ^= 1
    label[0] = 1
    results = {
        fingerprint(images, labels),
        fingerprint(pixel, labels),
        fingerprint(images, label),
        fingerprint(images[::-1], labels),
        fingerprint(images[:3], labels[:3]),
    }
    assert len(results) == 5
    assert fingerprint(images.copy(), labels.astype(np.uint8)) == fingerprint(images, labels)


def test_a_fingerprint_does_not_depend_on_the_layout_in_memory() -> None:
    images, labels = noise(4, 5, 5, 3), np.arange(4)
    view = np.asfortranarray(images)
    assert Arrays("a", view, labels, "ab").fingerprint() == (
        Arrays("b", images, labels, "ab").fingerprint()
    )


def test_a_folders_fingerprint_changes_with_names_sizes_and_labels(tmp_path: Path) -> None:
    root = folders(tmp_path / "one", "a/1.png", "a/2.png", "b/1.png")
    results = [open_source(str(root)).fingerprint()]
    picture(root / "a" / "1.png", noise(40, 40, 3))
    results.append(open_source(str(root)).fingerprint())
    (root / "a" / "2.png").rename(root / "b" / "2.png")
    results.append(open_source(str(root)).fingerprint())
    (root / "b" / "2.png").rename(root / "b" / "3.png")
    results.append(open_source(str(root)).fingerprint())
    (root / "b" / "3.png").unlink()
    results.append(open_source(str(root)).fingerprint())
    assert len(set(results)) == len(results)


def test_a_folders_fingerprint_stays_when_the_folder_is_moved(tmp_path: Path) -> None:
    root = folders(tmp_path / "one", "a/1.png", "b/1.png")
    before = open_source(str(root)).fingerprint()
    root.rename(tmp_path / "two")
    assert open_source(str(tmp_path / "two")).fingerprint() == before


def test_a_label_of_a_file_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = picture(tmp_path / "1.png")
    results = {Files("f", [path], np.array([label]), "ab").fingerprint() for label in (0, 1)}
    assert len(results) == 2


def test_a_divided_folder_gives_its_training_images_to_calibration_and_no_others(
    tmp_path: Path,
) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            picture(tmp_path / split / label / f"{split}.png")
    result = open_images(str(tmp_path))
    assert isinstance(result, Files)
    assert {path.name for path in result.paths} == {"train.png"} and len(result) == 2


def test_no_name_is_not_the_current_folder() -> None:
    with pytest.raises(InputError):
        open_source("")


def test_the_same_bytes_in_another_shape_are_other_images() -> None:
    pixels = noise(2, 4, 8, 3)
    labels = np.zeros(2, int)
    wide, tall = (
        Arrays("a", pixels, labels, "ab"),
        Arrays("a", pixels.reshape(2, 8, 4, 3), labels, "ab"),
    )
    assert wide.fingerprint() != tall.fingerprint()


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in images_under(tmp_path)] == ["gone.png"]


def test_npz_huge_label_without_class_names_is_refused_at_once(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 2**62]))
    with pytest.raises(DataError, match="labels range from 0"):
        open_source(f"npz:{tmp_path / 'a.npz'}")
