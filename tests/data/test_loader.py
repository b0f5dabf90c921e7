from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.decode import CorruptImage
from rtresnet.data.loader import DecodeErrors, batch_size, batches, indexed, sample
from rtresnet.data.sources import Arrays, Files

IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EIGHT = Preprocess(size=8, resize=8, **IDENTITY)  # type: ignore[arg-type]


def arrays(count: int, side: int = 8, classes: int = 3) -> Arrays:
    """Return noise, each image with its number in the first pixel."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return Arrays("a", images, np.arange(count) % classes, [str(i) for i in range(classes)])


def files(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Files:
    """Return PNG files of 8 by 8 pixels in the grey of their number, some of them cut short."""
    paths = []
    for index in range(count):
        path = folder / f"{index:04}.png"
        Image.new("RGB", (8, 8), (index % 256,) * 3).save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:40])
        paths.append(path)
    return Files("f", paths, np.arange(count) % 2, ("even", "odd"))


# --- batches


@pytest.mark.parametrize("size", [1, 7, 64, 300, 1000])
def test_batches_keep_the_order_and_end_with_a_partial_one(size: int) -> None:
    source = arrays(300)
    loaded = list(batches(source, EIGHT, size))
    full, rest = divmod(300, size)
    assert [len(images) for images, _ in loaded] == [size] * full + [rest] * bool(rest)
    assert np.concatenate([labels for _, labels in loaded]).tolist() == source.labels.tolist()
    images = np.concatenate([images for images, _ in loaded])
    assert np.array_equal(images, EIGHT.normalize(source.images))


def test_a_batch_is_float32_nchw_with_int64_labels() -> None:
    images, labels = next(iter(batches(arrays(10), EIGHT, 4)))
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), np.float32)
    assert images.flags.c_contiguous
    assert (labels.shape, labels.dtype) == ((4,), np.int64)


def test_a_batch_holds_what_the_input_contract_says() -> None:
    contract = Preprocess(size=16, resize=20)
    source = arrays(5, side=30)
    expected = contract.normalize(np.stack([contract.crop(image) for image in source.images]))
    ((images, _),) = batches(source, contract, 8)
    assert np.array_equal(images, expected)


def test_images_of_any_size_share_a_batch(tmp_path: Path) -> None:
    paths = []
    for index, size in enumerate([(8, 8), (20, 9), (9, 31), (1, 1)]):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", size, (index + 1,) * 3).save(paths[-1])
    ((images, _),) = batches(Files("f", paths, np.arange(4), "abcd"), EIGHT, 4)
    assert np.rint(images * 255)[:, 0].reshape(4, -1).tolist() == [[i] * 64 for i in (1, 2, 3, 4)]


def test_chosen_images_come_in_the_order_asked_for() -> None:
    source = arrays(50)
    chosen = np.array([49, 0, 7, 7, 3])
    ((images, labels),) = batches(source, EIGHT, 10, indices=chosen)
    assert np.array_equal(images, EIGHT.normalize(source.images[chosen]))
    assert labels.tolist() == source.labels[chosen].tolist()


def test_no_images_are_no_batches() -> None:
    assert list(batches(arrays(10), EIGHT, 4, indices=[])) == []


def test_a_reader_may_stop_early() -> None:
    loaded = batches(arrays(200), EIGHT, 4)
    images, _ = next(loaded)
    loaded.close()
    assert len(images) == 4
    assert list(loaded) == []


def test_an_error_that_is_not_about_one_image_stops_everything(tmp_path: Path) -> None:
    source = files(tmp_path, 20)
    source.paths[3].unlink()
    with pytest.raises(DataError, match=r"0003\.png") as caught:
        list(batches(source, EIGHT, 4))
    assert not isinstance(caught.value, CorruptImage)


# --- broken images


def test_broken_images_are_left_out_named_and_counted(tmp_path: Path) -> None:
    source = files(tmp_path, 200, broken=(5, 117))
    output: list[str] = []
    tally = DecodeErrors(200, output.append)
    loaded = list(batches(source, EIGHT, 64, tally=tally))
    assert [len(images) for images, _ in loaded] == [64, 64, 64, 6]
    good = [index for index in range(200) if index not in (5, 117)]
    values = np.rint(np.concatenate([images for images, _ in loaded])[:, 0, 0, 0] * 255)
    assert values.tolist() == good
    labels = np.concatenate([labels for _, labels in loaded])
    assert labels.tolist() == [index % 2 for index in good]
    assert sorted(tally.skipped) == [5, 117]
    assert [line.split(":")[0] for line in output] == [
        f"skipped {source.paths[5]}",
        f"skipped {source.paths[117]}",
    ]


def test_a_broken_image_is_counted_once_however_often_it_is_met(tmp_path: Path) -> None:
    source = files(tmp_path, 100, broken=(5,))
    output: list[str] = []
    tally = DecodeErrors(100, output.append)
    for _ in range(3):
        assert sum(len(images) for images, _ in batches(source, EIGHT, 32, tally=tally)) == 99
    assert len(output) == len(tally.skipped) == 1


def test_more_than_one_percent_broken_is_refused_with_the_count(tmp_path: Path) -> None:
    source = files(tmp_path, 200, broken=(5, 50, 117))
    with pytest.raises(DataError) as caught:
        list(batches(source, EIGHT, 64))
    message = str(caught.value)
    assert "3 of 200 images" in message
    assert "more than 1%" in message
    assert "0117.png" in message


def test_a_small_set_with_one_broken_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 10 images"):
        list(batches(files(tmp_path, 10, broken=(9,)), EIGHT, 4))


def test_exactly_one_percent_is_tolerated() -> None:
    tally = DecodeErrors(300)
    for index in range(3):
        tally.skip(index, CorruptImage(f"{index}.png: damaged"))
    with pytest.raises(DataError, match=r"4 of 300.*3\.png"):
        tally.skip(3, CorruptImage("3.png: damaged"))


# --- indexed


def test_indexed_hands_every_image_with_its_number_to_the_transform() -> None:
    source = arrays(100)
    order = np.random.default_rng(1).permutation(100)

    def stamp(index: int, image: np.ndarray) -> np.ndarray:
        assert image[0, 0, 0] == index
        return np.full((2, 2, 3), index, np.uint8)

    result = list(indexed(source, order, stamp, DecodeErrors(100)))
    assert [index for index, _ in result] == order.tolist()
    assert all((image == index).all() for index, image in result)


# --- sample


@pytest.mark.parametrize("n", [1, 10, 37, 50])
def test_a_sample_is_balanced_over_the_classes(n: int) -> None:
    labels = np.repeat(np.arange(5), [400, 300, 100, 150, 50])
    source = Arrays("a", np.zeros((1000, 1, 1, 3), np.uint8), labels, "abcde")
    chosen = sample(source, n)
    assert len(set(chosen.tolist())) == n
    counts = np.bincount(source.labels[chosen], minlength=5)
    assert counts.max() - counts.min() <= 1


def test_a_small_class_gives_all_it_has() -> None:
    labels = np.repeat(np.arange(2), [97, 3])
    source = Arrays("a", np.zeros((100, 1, 1, 3), np.uint8), labels, "ab")
    assert np.bincount(labels[sample(source, 20)]).tolist() == [17, 3]


def test_sample_is_the_same_every_time() -> None:
    source = arrays(200)
    assert sample(source, 50).tolist() == sample(source, 50).tolist()


def test_a_smaller_sample_begins_a_larger_one() -> None:
    source = arrays(200)
    assert sample(source, 20).tolist() == sample(source, 60)[:20].tolist()


def test_more_than_there_are_is_all_of_them() -> None:
    assert sorted(sample(arrays(12), 100).tolist()) == list(range(12))


def test_images_without_labels_are_sampled_too() -> None:
    source = Arrays("a", np.zeros((30, 1, 1, 3), np.uint8), np.full(30, -1), ())
    assert len(set(sample(source, 10).tolist())) == 10


# --- batch size


@pytest.mark.parametrize(("side", "expected"), [(8, 128), (32, 128), (64, 32), (224, 4), (480, 4)])
def test_the_batch_shrinks_as_images_grow(side: int, expected: int) -> None:
    assert batch_size(Preprocess(size=side, resize=side)) == expected


def test_decode_errors_of_several_processes_count_together() -> None:
    """Each process meets other broken images; together they are more than tolerated."""
    first, second = (DecodeErrors(100, tolerated=0.02) for _ in range(2))
    for tally, indices in ((first, (1, 2)), (second, (2, 3))):
        for index in indices:
            tally.skip(index, CorruptImage(f"{index}.jpg"))
    shared = [dict(tally.skipped) for tally in (first, second)]
    with pytest.raises(DataError, match="3 of 100 images"):
        first.merge(shared)
    tolerant = DecodeErrors(100, tolerated=0.03)
    tolerant.merge(shared)
    assert sorted(tolerant.skipped) == [1, 2, 3]
    DecodeErrors(100, tolerated=0, known=3).merge([{}])  # those were tolerated before
