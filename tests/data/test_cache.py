from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.core import hardware
from rtresnet.data.decode import CorruptImage
from rtresnet.data.loader import Cached, cached_or_same, default_budget
from rtresnet.data.sources import Arrays, Files


class Counting(Files):
    decoded = 0

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        self.decoded += 1
        return super().image(index, at_least)


@pytest.fixture
def photographs(tmp_path: Path) -> Counting:
    paths = [tmp_path / f"{index}.jpg" for index in range(40)]
    rng = np.random.default_rng(0)
    for path in paths:
        noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 240)).save(path)
    return Counting("photographs", paths, np.arange(40) % 4, ["a", "b", "c", "d"], splits=True)


def test_an_image_is_decoded_once_and_stays_the_same(photographs: Counting) -> None:
    cached = Cached(photographs, at_least=100, budget=1 << 30)
    plain = [photographs.image(index, 100) for index in range(40)]
    photographs.decoded = 0
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            again = list(pool.map(lambda index: cached.image(index, 100), range(40)))
        assert all(np.array_equal(one, two) for one, two in zip(plain, again, strict=True))
    assert photographs.decoded == 40
    assert plain[0].shape == (120, 160, 3)


def test_an_evaluation_gets_the_whole_image(photographs: Counting) -> None:
    cached = Cached(photographs, at_least=100, budget=1 << 30)
    cached.image(0, 100)
    assert cached.image(0).shape == (240, 320, 3)
    assert cached.image(0, 100).shape == (120, 160, 3)


def test_it_is_the_source_in_everything_else(photographs: Counting) -> None:
    cached = Cached(photographs, at_least=100, budget=1 << 30)
    assert (cached.name, cached.classes, cached.splits) == (
        "photographs",
        ("a", "b", "c", "d"),
        True,
    )
    assert cached.fingerprint() == photographs.fingerprint() and len(cached) == 40
    assert np.array_equal(cached.labels, photographs.labels)


def test_a_broken_image_is_broken_every_time(photographs: Counting) -> None:
    photographs.paths[3].write_bytes(b"no image")
    cached = Cached(photographs, at_least=100, budget=1 << 30)
    for _ in range(2):
        with pytest.raises(CorruptImage):
            cached.image(3, 100)


def test_only_what_fits_is_kept(photographs: Counting) -> None:
    needed = 40 * 120 * 160 * 3
    assert isinstance(cached_or_same(photographs, 100, budget=needed), Cached)
    assert cached_or_same(photographs, 100, budget=needed - 1) is photographs


def test_a_budget_that_was_estimated_too_low_is_held(photographs: Counting) -> None:
    one = 120 * 160 * 3
    cached = Cached(photographs, at_least=100, budget=7 * one + 1)
    for _ in range(2):
        for index in range(40):
            assert np.array_equal(cached.image(index, 100), photographs.image(index, 100))
    assert cached.used == 7 * one


def test_threads_that_ask_at_once_get_the_same_array(photographs: Counting) -> None:
    cached = Cached(photographs, at_least=100, budget=10**9)
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(lambda _: cached.image(5, 100), range(64)))
    assert len({id(image) for image in result}) == 1
    assert cached.used == result[0].nbytes


def test_nobody_can_change_what_others_will_see(photographs: Counting) -> None:
    cached = Cached(photographs, at_least=100, budget=10**9)
    for image in (cached.image(0, 100), cached.image(0, 100)):
        with pytest.raises(ValueError, match="read-only"):
            image[0] = 0


def test_default_budget_is_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory", lambda: 4_000)
    assert default_budget() == 1_000
    monkeypatch.setattr(hardware, "available_memory", lambda: None)
    assert default_budget() == 10**9


def test_what_is_in_memory_already_is_not_kept_twice() -> None:
    arrays = Arrays("a", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3), ["a", "b", "c"])
    assert cached_or_same(arrays, 8, budget=0) is arrays


def test_broken_probes_are_left_to_the_run(photographs: Counting) -> None:
    for path in photographs.paths:
        path.write_bytes(b"")
    assert cached_or_same(photographs, 100, budget=0) is photographs
