from __future__ import annotations

import numpy as np

from rtresnet.data.sources import Arrays
from rtresnet.workflows import gallery


def test_thumbnails_keep_small_images_and_shrink_large_ones_in_proportion() -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 400, 200, 3), np.uint8)
    source = Arrays("a", images, np.zeros(3), ["x", "y"])
    read = gallery.thumbnails(source, [2, 0])
    assert sorted(read) == [0, 2] and read[2].shape == (gallery.SIDE, gallery.SIDE // 2, 3)
    small = Arrays("a", images[:, :32, :16], np.zeros(3), ["x", "y"])
    assert np.array_equal(gallery.thumbnails(small, [1])[1], images[1, :32, :16])


def test_thumbnails_leave_out_images_that_cannot_be_decoded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    from rtresnet.data.sources import open_source

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "a" / "1.png").write_bytes(b"not an image")
    source = open_source(f"folder:{tmp_path}")
    broken = [i for i in range(3) if source.locate(i).endswith("a/1.png")]
    assert sorted(gallery.thumbnails(source, range(3))) == sorted({0, 1, 2} - set(broken))
