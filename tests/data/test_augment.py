from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rtresnet.core.preprocess import Preprocess
from rtresnet.data import augment


def uint8_images(count: int, height: int = 8, width: int = 8) -> Tensor:
    """Return uint8 [N, H, W, 3] without a zero, as a whole set lies on the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, height, width, 3), generator=generator).to(torch.uint8)


def gathered(
    images: Tensor, padding: int, offsets: np.ndarray, mode: str = "zeros",
    mirrored: np.ndarray | None = None, chosen: np.ndarray | None = None,
) -> Tensor:  # fmt: skip
    chosen = np.arange(len(images)) if chosen is None else chosen
    mirrored = np.zeros(len(chosen), bool) if mirrored is None else mirrored
    return augment.gather(
        images, chosen, offsets=offsets, mirrored=mirrored, padding=padding, mode=mode
    )


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 4), (32, 32, 4), (5, 9, 1)])
@pytest.mark.parametrize(("mode", "numpys"), [("zeros", "constant"), ("reflect", "reflect")])
def test_a_crop_is_that_window_of_its_padded_image(
    height: int, width: int, padding: int, mode: str, numpys: str
) -> None:
    images = uint8_images(30, height, width)
    rng = np.random.default_rng(0)
    offsets = rng.integers(0, 2 * padding + 1, (2, 30))
    mirrored = rng.random(30) < 0.5
    crops = gathered(images, padding, offsets, mode, mirrored)
    assert (crops.shape, crops.dtype) == ((30, 3, height, width), torch.uint8)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    around = ((padding, padding), (padding, padding), (0, 0))
    for index in range(30):
        padded = np.pad(images[index].numpy(), around, mode=numpys)  # type: ignore[call-overload]
        top, left = offsets[:, index]
        window = padded[top : top + height, left : left + width]
        expected = window[:, ::-1] if mirrored[index] else window
        assert np.array_equal(crops[index].permute(1, 2, 0).numpy(), expected)


def test_the_images_chosen_come_in_their_order_and_stay_as_they_are() -> None:
    images = uint8_images(10)
    before = images.clone()
    picked = gathered(images, 0, np.zeros((2, 3), int), chosen=np.array([7, 0, 7]))
    assert torch.equal(picked.permute(0, 2, 3, 1), images[[7, 0, 7]])
    gathered(images, 4, np.zeros((2, 10), int))
    assert torch.equal(images, before)


def test_only_the_images_named_are_mirrored() -> None:
    images = uint8_images(4, 4, 6).permute(0, 3, 1, 2)
    named = np.array([True, False, False, True])
    result = augment.mirror(images, named)
    for index, flag in enumerate(named):
        assert torch.equal(result[index], images[index].flip(2) if flag else images[index])


def test_normalizing_on_the_device_is_the_input_contracts() -> None:
    contract = Preprocess(size=16, resize=16, mean=(0.1, 0.5, 0.9), std=(0.3, 1.0, 0.2))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    ours = augment.normalize(levels, contract)
    expected = contract.normalize(levels.permute(0, 2, 3, 1).numpy())
    assert (ours.shape, ours.dtype) == ((1, 3, 16, 16), torch.float32)
    assert np.allclose(ours.numpy(), expected, rtol=1e-6, atol=2e-6)


def test_shrinking_keeps_a_plane_a_plane_and_the_same_size_untouched() -> None:
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    small = augment.shrink(ramp, 16)
    inner = small[..., 2:-2]
    assert small.shape == (2, 3, 16, 16)
    assert torch.allclose(inner.diff(dim=3), torch.full_like(inner.diff(dim=3), 2 / 31), atol=1e-5)
    assert augment.shrink(ramp, 32) is ramp


def test_colours_move_along_the_principal_components() -> None:
    images = torch.full((2, 3, 4, 4), 100.0)
    shifted = augment.shift_colours(images, np.array([[1.0, 0, 0], [0, 0, 0]]))
    moved = (shifted[0, :, 0, 0] - 100) / 255
    # The first component is nearly grey: all three channels move alike, by its value.
    assert torch.allclose(moved, torch.tensor([-0.5675, -0.5808, -0.5836]) * 0.2175, atol=1e-5)
    assert torch.equal(shifted[1], images[1])


def test_the_rectangles_erased_are_inside_of_the_size_and_share_asked_for() -> None:
    boxes = augment.erasing_boxes(np.random.default_rng(0), 4000, 32, 0.25)
    erased = boxes[boxes[:, 2] > 0]
    assert 900 < len(erased) < 1100
    assert (erased[:, :2] + erased[:, 2:] <= 32).all() and (erased >= [0, 0, 1, 1]).all()
    area = erased[:, 2] * erased[:, 3] / 32**2
    assert 0.01 < area.min() < 0.05 and 0.28 < area.max() < 0.36


def test_erasing_sets_the_rectangle_to_the_mean_and_nothing_else() -> None:
    images = torch.ones(3, 3, 8, 8)
    augment.erase(images, np.array([[1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 8, 8]]))
    assert (images[0, :, 1:4, 2:6] == 0).all()
    assert images[0].sum() == 3 * (64 - 12)
    assert (images[1] == 1).all() and (images[2] == 0).all()


def test_mixup_weighs_an_image_and_its_neighbour() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    mixed = augment.mixup(images, 0.75)
    assert mixed[:, 0, 0, 0].tolist() == pytest.approx([0.25 * 2, 0.75, 1.5 + 0.25])


def test_cutmix_puts_the_neighbour_into_the_rectangle_and_says_what_is_left() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    mixed, share = augment.cutmix(images, np.array([2, 0, 4, 4]))
    assert share == pytest.approx(1 - 16 / 64)
    assert (mixed[1, :, 2:6, 0:4] == 0).all() and (mixed[1, :, :, 4:] == 1).all()


def test_the_rectangle_of_cutmix_is_inside_and_has_the_share_where_nothing_is_cut_off() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([augment.cutmix_box(rng, 32, 0.75) for _ in range(500)])
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 32).all()
    assert (boxes[:, 2] * boxes[:, 3]).max() == pytest.approx(0.25 * 32**2, rel=0.15)
