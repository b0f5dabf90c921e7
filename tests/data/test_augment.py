from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rtresnet.data.augment import flip, normalize, pad_and_crop
from rtresnet.preprocess import Preprocess


def noise(count: int, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, height, width), generator=generator).to(torch.uint8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offsets(image: Tensor, crop: Tensor, padding: int) -> list[tuple[int, int]]:
    """Every (top, left) at which a window of the padded image is the crop, by trying them all."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return [
        (top, left)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        if torch.equal(padded[:, top : top + height, left : left + width], crop)
    ]


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 4), (32, 32, 4), (5, 9, 1)])
def test_every_crop_is_a_window_of_its_own_padded_image(
    height: int, width: int, padding: int
) -> None:
    images = noise(40, height, width)
    crops = pad_and_crop(images, padding, seeded(1))
    assert (crops.shape, crops.dtype) == (images.shape, torch.uint8)
    for image, crop in zip(images, crops, strict=True):
        assert len(offsets(image, crop, padding)) == 1


def test_each_image_has_offsets_of_its_own_that_reach_everywhere() -> None:
    images = noise(400)
    crops = pad_and_crop(images, 2, seeded(1))
    found = [offsets(image, crop, 2)[0] for image, crop in zip(images, crops, strict=True)]
    assert set(found) == {(top, left) for top in range(5) for left in range(5)}
    counts = np.bincount([5 * top + left for top, left in found])
    assert counts.max() < 3 * 400 / 25


def test_no_padding_changes_nothing() -> None:
    images = noise(5)
    assert torch.equal(pad_and_crop(images, 0, seeded(1)), images)


def test_the_padding_is_black() -> None:
    white = torch.full((200, 3, 4, 4), 255, dtype=torch.uint8)
    crops = pad_and_crop(white, 4, seeded(1))
    assert set(crops.unique().tolist()) == {0, 255}
    assert (crops.flatten(1).max(dim=1).values == 0).any()  # a crop of nothing but padding


@pytest.mark.parametrize("change", [lambda x, g: pad_and_crop(x, 4, g), flip])
def test_the_generator_decides(change) -> None:  # type: ignore[no-untyped-def]
    images = noise(64)
    torch.manual_seed(0)
    first = change(images, seeded(1))
    torch.manual_seed(99)
    assert torch.equal(first, change(images, seeded(1)))
    assert not torch.equal(first, change(images, seeded(2)))
    generator = seeded(1)
    change(images, generator)
    assert not torch.equal(first, change(images, generator))


@pytest.mark.parametrize("change", [lambda x, g: pad_and_crop(x, 4, g), flip])
def test_the_images_given_stay_as_they_are(change) -> None:  # type: ignore[no-untyped-def]
    images = noise(16)
    before = images.clone()
    change(images, seeded(1))
    assert torch.equal(images, before)


def test_a_flip_mirrors_left_to_right_about_half_of_the_images() -> None:
    images = noise(1000, 4, 6)
    flipped = flip(images, seeded(1))
    assert flipped.dtype == torch.uint8
    mirrored = 0
    for image, result in zip(images, flipped, strict=True):
        if torch.equal(result, image):
            continue
        assert torch.equal(result, image[:, :, [5, 4, 3, 2, 1, 0]])
        mirrored += 1
    assert 430 < mirrored < 570


def test_normalizing_on_the_device_is_the_input_contracts() -> None:
    contract = Preprocess(size=8, resize=8, mean=(0.1, 0.5, 0.9), std=(0.3, 1.0, 0.2))
    images = noise(6)
    ours = normalize(images, contract)
    expected = contract.normalize(images.permute(0, 2, 3, 1).numpy())
    assert (ours.shape, ours.dtype) == ((6, 3, 8, 8), torch.float32)
    assert np.allclose(ours.numpy(), expected, rtol=1e-6, atol=2e-6)


def test_every_level_of_every_channel_is_normalized_alike() -> None:
    contract = Preprocess.for_size(32)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    expected = contract.normalize(levels.permute(0, 2, 3, 1).numpy())
    assert np.allclose(normalize(levels, contract).numpy(), expected, rtol=1e-6, atol=2e-6)
