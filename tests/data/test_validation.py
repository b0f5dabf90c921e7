"""Unreadable, duplicate and transparent images of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.data import sources, validation
from rtresnet.data.decode import FileEnds
from rtresnet.data.sources import Arrays, Files, Source, Subset, open_source
from rtresnet.workflows.pack import pack


def noise(seed: int, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (40, 50, channels), dtype=np.uint8))


def files_of(*paths: Path) -> Files:
    return Files("files", paths, np.zeros(len(paths)), ("a", "b"))


def scan(source: Source, **options: object) -> validation.Scan:
    return validation.scan(source, np.arange(len(source)), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("decode", [True, False])
def test_scan_of_cut_file_names_it_and_passes_the_whole_one(
    tmp_path: Path, form: str, decode: bool
) -> None:
    whole, cut = tmp_path / f"whole.{form}", tmp_path / f"cut.{form}"
    noise(0).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    source = files_of(whole, cut)
    result = scan(source, decode=(lambda index: source.image(index, 1)) if decode else None)
    assert list(result.broken) == [1] and str(cut) in result.broken[1]


@pytest.mark.parametrize("decode", [True, False])
def test_scan_names_empty_missing_and_mislabelled_files(tmp_path: Path, decode: bool) -> None:
    good, empty, page, dangling = (tmp_path / f"{name}.jpg" for name in ("a", "b", "c", "d"))
    noise(0).save(good)
    empty.touch()
    page.write_text("<html>404</html>")
    dangling.symlink_to(tmp_path / "nowhere")
    source = files_of(good, empty, page, dangling)
    result = scan(source, decode=(lambda index: source.image(index, 1)) if decode else None)
    assert [text.partition(":")[0] for text in result.broken.values()] == [
        str(path) for path in (empty, page, dangling)
    ]


def test_scan_of_damage_inside_a_file_needs_decoding(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(0).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    source = files_of(path)
    assert not scan(source).broken
    assert list(scan(source, decode=lambda index: source.image(index, 1)).broken) == [0]


def test_scan_without_decoding_reads_only_the_ends_of_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{index}.jpg" for index in range(5)]
    for index, path in enumerate(paths):
        noise(index).save(path)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(sources, "decode", fail)
    monkeypatch.setattr(Files, "content", fail)
    assert not scan(files_of(*paths)).broken


@pytest.mark.parametrize("extra", [b"", b"\0" * 300, b"appended by a camera"])
def test_ends_of_jpeg_with_bytes_behind_its_end_are_complete(tmp_path: Path, extra: bytes) -> None:
    noise(0).save(tmp_path / "a.jpg")
    assert FileEnds.of((tmp_path / "a.jpg").read_bytes() + extra).complete()


def test_scan_counts_images_that_declare_transparency(tmp_path: Path) -> None:
    names = ("a.png", "b.png", "c.webp", "d.tif", "e.gif", "f.png", "g.jpg", "h.png")
    paths = [tmp_path / name for name in names]
    noise(0).save(paths[0])
    for path in paths[1:4]:
        noise(1, channels=4).save(path)
    noise(2).quantize(16).save(paths[4], transparency=3)
    noise(3).quantize(16).save(paths[5], transparency=3)
    noise(4).save(paths[6])
    # The colour type lies beyond the bytes that are read of a file's beginning.
    noise(5, channels=4).save(paths[7], icc_profile=bytes(50_000), compress_level=0)
    assert scan(files_of(*paths)).transparent == 6


def test_identical_finds_copies_under_other_names_and_nothing_else(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for label in ("a", "b"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for index in range(count):
                seed = 100 * (split == "test") + 10 * (label == "b") + index
                noise(seed).save(tmp_path / "set" / split / label / f"{index}.jpg")
    root = tmp_path / "set"
    shutil.copy(root / "train/b/4.jpg", root / "test/a/copy.jpg")
    bitmaps = [root / f"{name}.bmp" for name in ("train/a/x", "test/a/y")]
    for path in bitmaps:  # same size, same end, another beginning
        Image.new("RGB", (40, 50), "white").save(path)
    changed = Image.new("RGB", (40, 50), "white")
    changed.putpixel((20, 10), (1, 2, 3))
    changed.save(bitmaps[1])
    pack(str(root), tmp_path / "pack")
    for data in (str(root), f"shards:{tmp_path / 'pack'}"):
        train, test = open_source(data, "train"), open_source(data, "test")
        pairs = validation.identical(train, scan(train), test, scan(test))
        assert [(train.locate(a)[-7:], test.locate(b)[-10:]) for a, b in pairs] == [
            ("b/4.jpg", "a/copy.jpg")
        ]


def test_identical_of_arrays_compares_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    images[13] = images[2]
    source = Arrays("a", images, np.zeros(20), ("a", "b"))
    whole = scan(source)
    first, second = whole.of(np.arange(10)), whole.of(np.arange(10, 20))
    assert validation.identical(source, first, source, second) == [(2, 13)]
    assert not whole.broken and not whole.transparent


def test_subset_shows_the_chosen_images_of_its_source(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for index, path in enumerate(paths):
        Image.new("RGB", (3, 3), (index,) * 3).save(path)
    source = Files("f", paths, np.arange(4) % 2, ("a", "b"))
    part = Subset(source, np.array([3, 1]))
    assert len(part) == 2 and part.labels.tolist() == [1, 1]
    assert [int(part.image(index)[0, 0, 0]) for index in range(2)] == [3, 1]
    assert part.locate(0) == str(paths[3]) and part.content(1) == paths[1].read_bytes()
    assert part.ends(1) == source.ends(1)
    assert part.fingerprint() != source.fingerprint()
