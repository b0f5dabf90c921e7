from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from rtresnet.data.augment import LARGEST_SCALE, area_box, crop_and_resize, scale_box


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 375), (10, 900), (1, 1), (224, 224)]
)
def test_boxes_lie_inside_of_the_image(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        for top, left, high, wide in (
            scale_box(height, width, 224, rng),
            area_box(height, width, rng),
        ):
            assert top >= 0 and left >= 0 and high > 0 and wide > 0
            assert top + high <= height and left + wide <= width


def test_the_papers_crop_is_the_share_that_its_resize_would_leave() -> None:
    rng = np.random.default_rng(0)
    sides = [scale_box(480, 640, 224, rng)[2] for _ in range(2000)]
    # A crop of 224 out of a shorter side resized to 256 ... 480.
    assert min(sides) == pytest.approx(480 * 224 / 480, abs=2)
    assert max(sides) == pytest.approx(480 * 224 / 256, abs=3)


def test_areas_and_aspects_are_spread_over_what_is_allowed() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([area_box(400, 400, rng) for _ in range(3000)])
    area = boxes[:, 2] * boxes[:, 3] / 400**2
    aspect = boxes[:, 3] / boxes[:, 2]
    assert 0.07 < area.min() < 0.1 and area.max() > 0.95
    assert aspect.min() == pytest.approx(3 / 4, abs=0.03)
    assert aspect.max() == pytest.approx(4 / 3, abs=0.05)
    centres = (boxes[:, 1] + boxes[:, 3] / 2) / 400
    assert 0.45 < centres.mean() < 0.55 and centres.std() > 0.1


def test_a_strip_gets_the_largest_centred_box_of_an_aspect_allowed() -> None:
    assert area_box(10, 900, np.random.default_rng(0), area=(1, 1)) == (0, 443, 10, 13)
    assert area_box(900, 10, np.random.default_rng(0), area=(1, 1)) == (443, 0, 13, 10)


def test_a_crop_is_pillows_antialiased_resize_of_that_box() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for box in ((3, 5, 200, 190), (0, 0, 300, 400), (100, 100, 40, 60)):
        top, left, height, width = box
        ours = crop_and_resize(image, box, 96)
        assert ours.shape == (96, 96, 3) and ours.flags.c_contiguous
        region = (left, top, left + width, top + height)
        theirs = Image.fromarray(image).crop(region).resize((96, 96), Image.Resampling.BILINEAR)
        difference = np.abs(ours.astype(int) - np.asarray(theirs))
        assert difference.max() <= 2 and difference.mean() < 0.1


def test_a_read_only_image_is_neither_warned_about_nor_changed() -> None:
    image = np.full((40, 40, 3), 9, np.uint8)
    image.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (crop_and_resize(image, (0, 0, 40, 40), 8) == 9).all()


def test_photographs_are_decoded_large_enough_for_the_papers_smallest_crop() -> None:
    size = 224
    short = round(LARGEST_SCALE * size)
    rng = np.random.default_rng(0)
    assert min(scale_box(short, short, size, rng)[2] for _ in range(1000)) >= size
