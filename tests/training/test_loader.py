from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.loader import Cached, DecodeErrors
from rtresnet.data.sources import Arrays, Files, Subset
from rtresnet.training import loader
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import World

PLAIN = {"epochs": 3, "batch": 10, "padding": 0, "flip": "none"}


def numbered(count: int, *, splits: bool = False, size: int = 8) -> Arrays:
    """Return images whose pixels are their own number."""
    numbers = np.arange(count, dtype=np.uint8)[:, None, None, None]
    images = numbers * np.ones((1, size, size, 3), np.uint8)
    return Arrays(
        "numbered", images, np.arange(count), [str(i) for i in range(count)], splits=splits
    )


def fed(
    world: World = World(),  # noqa: B008
    count: int = 100,
    size: int = 8,
    **fields: object,
) -> loader.TrainLoader:
    recipe = Recipe(**(PLAIN | fields))  # type: ignore[arg-type]
    contract = Preprocess.for_size(size, mean=(0, 0, 0), std=(1, 1, 1))
    return loader.TrainLoader(
        numbered(count, size=size), np.arange(count), contract, recipe, world=world,
        tally=DecodeErrors(count),
    )  # fmt: skip


def labels(feed: loader.TrainLoader, first: int, end: int) -> list[int]:
    steps = feed.steps(first, end)
    return [int(label) for _, micros in steps for micro in micros for label in micro.labels]


def test_every_image_comes_once_an_epoch_in_a_new_order() -> None:
    first, second = labels(fed(), 0, 10), labels(fed(), 10, 20)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second != list(range(100))


def test_an_image_keeps_its_label() -> None:
    for _, micros in fed(flip="random", padding=2, padding_mode="reflect").steps(0, 10):
        for micro in micros:
            assert torch.equal((micro.inputs[:, 0, 4, 4] * 255).round().long(), micro.labels)


def test_what_a_step_gets_follows_from_its_number_alone() -> None:
    fields = {"flip": "random", "padding": 2, "mixup": 0.2, "cutmix": 1.0, "erasing": 0.5,
              "trivial_augment": True, "colour": 0.1}  # fmt: skip
    whole = dict(fed(**fields).steps(0, 10))
    for start in (0, 3, 9):
        for step, micros in fed(**fields).steps(start, 10):
            assert torch.equal(micros[0].inputs, whole[step][0].inputs)
            assert micros[0].share == whole[step][0].share
    other = fed(seed=1, **fields)
    assert not torch.equal(next(other.steps(0, 1))[1][0].inputs, whole[0][0].inputs)


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (1, 2), (2, 5), (5, 2)])
def test_processes_and_parts_share_the_very_same_batch(size: int, accumulate: int) -> None:
    fields = {"flip": "random", "padding": 2, "erasing": 0.5, "trivial_augment": True}
    (_, (whole,)) = next(fed(**fields).steps(3, 4))
    pieces: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for rank in range(size):
        _, micros = next(fed(World(rank, size), accumulate=accumulate, **fields).steps(3, 4))
        assert len(micros) == accumulate
        for number, micro in enumerate(micros):
            pieces.append((number * size + rank, micro.inputs, micro.labels))
    pieces.sort(key=lambda piece: piece[0])
    assert torch.equal(torch.cat([inputs for _, inputs, _ in pieces]), whole.inputs)
    assert torch.equal(torch.cat([truth for *_, truth in pieces]), whole.labels)


def test_a_last_partial_batch_is_left_out() -> None:
    feed = fed(batch=30)
    assert (feed.steps_per_epoch, feed.total) == (3, 9)
    assert len(labels(feed, 0, 3)) == 90


def test_mirroring_in_alternate_epochs_shows_each_image_both_ways() -> None:
    feed = fed(flip="alternate")
    flipped = [feed._mirrored(step, slice(0, 10), np.arange(100)) for step in (0, 10, 20)]
    assert (flipped[0] != flipped[1]).all() and (flipped[0] == flipped[2]).all()
    assert 30 < flipped[0].sum() < 70


def test_images_are_smaller_where_the_recipe_says_so() -> None:
    feed = fed(size=16, progressive=((0.0, 0.5), (0.5, 1.0)))
    sides = [micros[0].inputs.shape[2] for step in (0, 14, 15, 29)
             for _, micros in feed.steps(step, step + 1)]  # fmt: skip
    assert sides == [8, 8, 16, 16]


def test_split_random_is_disjoint_and_complete() -> None:
    parts = loader.split(numbered(100), Recipe(epochs=1))
    assert parts.test is not None
    together = np.concatenate([parts.train, parts.val, parts.test])
    assert sorted(together) == list(range(100))
    assert (len(parts.train), len(parts.val), len(parts.test)) == (80, 10, 10)


def test_split_with_own_test_images_holds_out_validation_only() -> None:
    parts = loader.split(numbered(100, splits=True), Recipe(epochs=1))
    assert parts.test is None
    assert (len(parts.train), len(parts.val)) == (90, 10)


def test_split_without_holdout_trains_on_all_images() -> None:
    parts = loader.split(numbered(100, splits=True), Recipe(epochs=1, holdout=0.0))
    assert (len(parts.train), len(parts.val)) == (100, 0)


def test_split_too_few_images_is_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        loader.split(numbered(19), Recipe(epochs=1))


def test_split_of_older_runs_stays_the_same() -> None:
    """Runs that stored no kind of split are resumed with the split they started with."""
    parts = loader.split(numbered(40), Recipe(epochs=1, seed=3))
    assert parts.val.tolist() == [23, 32, 30, 17]
    assert parts.test is not None and parts.test.tolist() == [20, 11, 33, 2]


def of_classes(*counts: int, splits: bool = False) -> Arrays:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    return Arrays("classes", images, labels, [str(i) for i in range(len(counts))], splits=splits)


def by_class(source: Arrays, indices: np.ndarray | None) -> list[int]:
    assert indices is not None
    return np.bincount(source.labels[indices], minlength=len(source.classes)).tolist()


def test_split_by_class_takes_the_same_share_of_each_class() -> None:
    source = of_classes(500, 100, 20, 6, 3, 2, 1, 0)
    for seed in range(3):
        parts = loader.split(source, Recipe(epochs=1, split="class", seed=seed))
        assert by_class(source, parts.val) == [50, 10, 2, 1, 1, 0, 0, 0]
        assert by_class(source, parts.test) == [50, 10, 2, 1, 1, 1, 0, 0]
        assert by_class(source, parts.train) == [400, 80, 16, 4, 1, 1, 1, 0]
        assert parts.test is not None
        together = np.concatenate([parts.train, parts.val, parts.test])
        assert sorted(together) == list(range(len(source)))


def test_split_by_class_with_own_test_images_validates_every_class() -> None:
    source = of_classes(40, 2, 1, splits=True)
    parts = loader.split(source, Recipe(epochs=1, split="class", holdout=0.5))
    assert by_class(source, parts.val) == [20, 1, 0] and parts.test is None
    nothing = loader.split(source, Recipe(epochs=1, split="class", holdout=0.0))
    assert len(nothing.val) == 0 and len(nothing.train) == len(source)


def test_split_by_class_depends_on_the_seed_alone() -> None:
    source = of_classes(30, 30)
    first, again, other = (
        loader.split(source, Recipe(epochs=1, split="class", seed=seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.val, again.val) and np.array_equal(first.train, again.train)
    assert not np.array_equal(first.val, other.val)


def photographs(folder: Path, broken: tuple[int, ...] = ()) -> Files:
    from PIL import Image

    paths = []
    for index in range(20):
        paths.append(folder / f"{index:02d}.png")
        level = np.full((90, 120, 3), 10 * index, np.uint8)
        Image.fromarray(level).save(paths[-1])
        if index in broken:
            paths[-1].write_bytes(paths[-1].read_bytes()[:40])
    return Files("photographs", paths, np.arange(20), [str(i) for i in range(20)])


def photo_feed(source: Files | Subset, **fields: object) -> loader.TrainLoader:
    recipe = Recipe(**(PLAIN | {"crop": "area"} | fields))  # type: ignore[arg-type]
    contract = Preprocess.for_size(72, mean=(0, 0, 0), std=(1, 1, 1))
    return loader.TrainLoader(source, np.arange(20), contract, recipe, tally=DecodeErrors(20))


@pytest.mark.parametrize("crop", ["area", "scale"])
def test_photographs_are_cut_to_size_and_keep_their_labels(tmp_path: Path, crop: str) -> None:
    for _, (micro,) in photo_feed(photographs(tmp_path), crop=crop).steps(0, 2):
        assert micro.inputs.shape == (10, 3, 72, 72)
        assert torch.equal((micro.inputs[:, 0, 0, 0] * 255 / 10).round().long(), micro.labels)


def test_a_broken_photograph_leaves_every_other_step_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = photo_feed(photographs(tmp_path / "whole"), batch=2)
    broken = photo_feed(photographs(tmp_path / "broken", broken=(7,)), batch=2)
    broken.tally.total = 10_000  # one of twenty would be too many
    met = 0
    for (_, (first,)), (_, (second,)) in zip(whole.steps(0, 10), broken.steps(0, 10), strict=True):
        if 7 in first.labels:
            met += 1
            label = next(int(label) for label in first.labels if label != 7)
            assert second.labels.tolist() == [label, label]
        else:
            assert torch.equal(first.inputs, second.inputs)
    assert met == 1 and list(broken.tally.skipped) == [7]


def test_a_batch_without_any_readable_image_stops_the_run(tmp_path: Path) -> None:
    feed = photo_feed(photographs(tmp_path, broken=tuple(range(20))))
    feed.tally.total = 10_000
    with pytest.raises(DataError, match="no image of step 0"):
        list(feed.steps(0, 2))


def test_what_goes_wrong_in_a_thread_comes_out(tmp_path: Path) -> None:
    source = photographs(tmp_path)
    source.paths[3].unlink()
    with pytest.raises(DataError, match=r"03\.png"):
        list(photo_feed(source).steps(0, 2))


AUGMENTED = {"flip": "random", "padding": 2, "colour": 0.1, "erasing": 0.5, "cutmix": 1.0}


class Calls(TorchFunctionMode):
    """Records the devices of index tensors and counts the tensors made from Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[str] = []
        self.created = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.indices += [index.device.type for index in where if torch.is_tensor(index)]
        self.created += function is torch.tensor
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("photos", [False, True])
def test_feed_indexes_with_tensors_on_its_own_device(tmp_path: Path, photos: bool) -> None:
    recipe = Recipe(**(PLAIN | AUGMENTED | {"crop": "area"}))  # type: ignore[arg-type]
    source = photographs(tmp_path) if photos else numbered(20)
    contract = Preprocess.for_size(72 if photos else 8)
    # "meta" computes shapes only, and keeps apart what lies on the device and what does not.
    feed = loader.TrainLoader(
        source, np.arange(20), contract, recipe, device="meta", tally=DecodeErrors(20)
    )
    with Calls() as calls:
        assert len(list(feed.steps(0, 2))) == 2
    assert set(calls.indices) == {"meta"}


def test_feed_creates_no_constants_after_the_first_step() -> None:
    feed = fed(trivial_augment=True, **AUGMENTED)
    list(feed.steps(0, 10))  # all operations come up
    with Calls() as calls:
        list(feed.steps(0, 10))
    assert calls.created == 0


def test_decode_rate_counts_the_photographs_since_the_last_call(tmp_path: Path) -> None:
    feed = photo_feed(photographs(tmp_path))
    assert feed.decode_rate() is None
    list(feed.steps(0, 2))
    assert feed.decoded == 20 and feed.decode_seconds > 0
    rate = feed.decode_rate()
    assert rate is not None and rate > 0
    assert feed.decode_rate() is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_decode_rate_cached_photographs_are_not_counted(tmp_path: Path, wrapped: bool) -> None:
    source: Subset = Cached(
        photographs(tmp_path), at_least=loader.decode_size(72), budget=1_000_000_000
    )
    feed = photo_feed(Subset(source, np.arange(20)) if wrapped else source)
    list(feed.steps(0, 2))
    assert feed.decoded == 20
    assert feed.decode_rate() is not None
    list(feed.steps(2, 4))
    assert feed.decode_rate() is None
