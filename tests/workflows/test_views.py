from __future__ import annotations

import typing
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rtresnet.core import metrics
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.decode import CorruptImage
from rtresnet.data.loader import DecodeErrors
from rtresnet.data.sources import Arrays
from rtresnet.models import zoo
from rtresnet.models.nets import DenseBackend, TorchBackend
from rtresnet.models.resnet import ResNet
from rtresnet.training.evaluate import evaluate
from rtresnet.workflows.views import (
    ProtocolName,
    Views,
    dense_scales,
    evaluate_views,
    mean_probabilities,
)

CORNERS = {"top left": 10, "top right": 20, "bottom left": 30, "bottom right": 40, "centre": 50}


@dataclass
class Net:
    """What a protocol measures, from any function."""

    scores: metrics.Forward
    preprocess: Preprocess


@pytest.fixture
def net() -> ResNet:
    torch.manual_seed(0)
    made = zoo.build(zoo.spec("resnet8"), 7)
    with torch.no_grad():
        made.train()(torch.randn(8, 3, 32, 32))
    return made.eval()


def noise(count: int, height: int = 32, width: int = 32, classes: int = 7) -> Arrays:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Arrays("noise", images, np.arange(count) % classes, [str(i) for i in range(classes)])


def painted() -> np.ndarray:
    """Return 60 x 100 pixels, a spot of its own value in every corner and in the centre."""
    image = np.zeros((60, 100, 3), np.uint8)
    for name, (top, left) in {
        "top left": (0, 0), "top right": (0, 99), "bottom left": (59, 0),
        "bottom right": (59, 99), "centre": (30, 50),
    }.items():  # fmt: skip
        image[top, left] = CORNERS[name]
    image[:, :50, 0] += 100
    return image


def test_views_ten_crops_are_corners_centre_and_mirror_images() -> None:
    preprocess = Preprocess(size=40, resize=60)
    ten = Views(protocol="10-crop")
    views = ten.of(painted(), preprocess)
    assert len(views) == ten.count(preprocess) == 10
    assert all(view.shape == (40, 40, 3) for view in views)
    green = [view[..., 1] for view in views]
    assert [int(view.max()) for view in green] == 2 * list(CORNERS.values())
    places = [(0, 0), (0, 39), (39, 0), (39, 39), (20, 20)]
    for number, (row, column) in enumerate(places):
        assert green[number].argmax() == 40 * row + column
        assert green[number + 5].argmax() == 40 * row + 39 - column
        np.testing.assert_array_equal(views[number + 5], views[number][:, ::-1])
    np.testing.assert_array_equal(views[4], preprocess.crop(painted()))


def test_mean_probabilities_ten_crops_average_the_softmax(net: ResNet) -> None:
    preprocess = Preprocess(size=32, resize=40)
    source = noise(3, 50, 44)
    shown = [Views(protocol="10-crop").of(image, preprocess) for image in source.images]
    probabilities = mean_probabilities(Net(TorchBackend(net), preprocess), shown)
    for image, scores in zip(shown, probabilities, strict=True):
        views = preprocess.normalize(np.stack(image))
        by_hand = metrics.softmax(TorchBackend(net)(views)).mean(axis=0)
        np.testing.assert_allclose(scores, by_hand, atol=1e-6)
    assert probabilities.sum(axis=1) == pytest.approx(1)


def test_dense_backend_at_the_nets_size_equals_the_net(net: ResNet) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    dense = DenseBackend(net)(images)
    assert dense.shape == (3, 7, 8, 8)
    np.testing.assert_allclose(dense.mean(axis=(2, 3)), TorchBackend(net)(images), atol=1e-5)


def test_dense_backend_applies_the_fc_at_every_position(net: ResNet) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 40, 56)).astype(np.float32)
    dense = DenseBackend(net)(images)
    with torch.inference_mode():
        features = net.features(torch.from_numpy(images))
        assert dense.shape[2:] == features.shape[2:] == (10, 14)
        each = [net.fc(features[:, :, row, column]) for row in range(10) for column in range(14)]
    assert torch.stack(each).mean(0).numpy() == pytest.approx(dense.mean(axis=(2, 3)), abs=1e-5)
    np.testing.assert_allclose(dense[:, :, 3, 5], each[3 * 14 + 5].numpy(), atol=1e-5)


def test_dense_backend_sliding_window_is_the_nets_pooling_at_every_position(net: ResNet) -> None:
    images = np.random.default_rng(1).standard_normal((2, 3, 40, 48)).astype(np.float32)
    dense = DenseBackend(net, 32, sliding=True)(images)
    with torch.inference_mode():
        maps = net.features(torch.from_numpy(images))
        assert maps.shape[2:] == (10, 12) and dense.shape[2:] == (3, 5)
        window = net.fc(maps[:, :, 1:9, 2:10].mean((2, 3)))
    np.testing.assert_allclose(dense[:, :, 1, 2], window.numpy(), atol=1e-5)
    whole = DenseBackend(net, 32)(images).mean(axis=(2, 3))
    assert np.abs(dense.mean(axis=(2, 3)) - whole).max() > 1e-4
    at_size = DenseBackend(net, 32, sliding=True)(images[:, :, :32, :32])
    np.testing.assert_allclose(at_size[:, :, 0, 0], TorchBackend(net)(images[:, :, :32, :32]),
                               atol=1e-5)  # fmt: skip


def test_mean_probabilities_dense_average_scales_and_mirror_images(net: ResNet) -> None:
    preprocess = Preprocess.for_size(32)
    source = noise(3, 40, 60)
    dense = Views(protocol="dense", scales=(32, 40))
    views = [dense.of(image, preprocess) for image in source.images]
    assert [view.shape[:2] for view in views[0]] == [(32, 48), (40, 60), (32, 48), (40, 60)]
    np.testing.assert_array_equal(views[0][3], source.images[0][:, ::-1])
    probabilities = mean_probabilities(Net(DenseBackend(net), preprocess), views)
    by_hand = [
        metrics.softmax(TorchBackend(net)(preprocess.normalize(view[None]))) for view in views[1]
    ]
    np.testing.assert_allclose(probabilities[1], np.mean(by_hand, axis=0)[0], atol=1e-6)


def test_dense_scales_are_proportional_to_the_size() -> None:
    assert dense_scales(224) == (224, 256, 384, 480, 640)
    assert dense_scales(32) == (32, 37, 55, 69, 91)


@pytest.mark.parametrize("batch", [1, 4, None])
@pytest.mark.parametrize("protocol", typing.get_args(ProtocolName))
def test_evaluate_views_counts_every_image_once(
    net: ResNet, protocol: ProtocolName, batch: int | None
) -> None:
    source = noise(10, 36, 40)
    backend = DenseBackend(net) if protocol == "dense" else TorchBackend(net)
    member = Net(backend, Preprocess.for_size(32))
    views = Views(protocol=protocol, scales=(32, 40))
    done: list[int] = []
    result = evaluate_views([member], source, views, batch=batch, on_images=done.append)
    assert result.ensemble.n == 10 and result.ensemble == result.members[0]
    assert done == sorted(done)


def test_evaluate_views_center_equals_evaluate(net: ResNet) -> None:
    preprocess, source = Preprocess(size=32, resize=36), noise(50, 40, 48)
    member = Net(TorchBackend(net), preprocess)
    expected = evaluate(TorchBackend(net), source, preprocess)
    assert evaluate_views([member], source).ensemble == expected


def forward_of(table: np.ndarray) -> metrics.Forward:
    """Return a net that knows each image by the number painted into it and answers from a table."""

    def forward(images: np.ndarray) -> np.ndarray:
        numbers = np.rint(images[:, 0, 0, 0] * 255).astype(int)
        answers: np.ndarray = np.log(table[numbers]).astype(np.float32)
        return answers

    return forward


def test_evaluate_views_ensemble_averages_probabilities() -> None:
    first = np.array([[0.60, 0.40], [0.90, 0.10], [0.45, 0.55]])
    second = np.array([[0.45, 0.55], [0.80, 0.20], [0.60, 0.40]])
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images += np.arange(3, dtype=np.uint8)[:, None, None, None]
    source = Arrays("numbers", images, np.array([0, 0, 0]), ["a", "b"])
    plain = Preprocess.for_size(8, mean=(0, 0, 0), std=(1, 1, 1))
    members = [Net(forward_of(table), plain) for table in (first, second)]
    result = evaluate_views(members, source)
    assert [accuracy.top1 for accuracy in result.members] == [2, 2]
    assert result.ensemble.top1 == 3  # the means for class a are 0.525, 0.85 and 0.525


def test_evaluate_views_ensemble_of_equal_nets_equals_the_net(net: ResNet) -> None:
    member = Net(TorchBackend(net), Preprocess.for_size(32))
    result = evaluate_views([member, member], noise(40))
    assert result.members[0] == result.members[1] == result.ensemble


def test_evaluate_views_nets_of_other_sizes_form_an_ensemble(net: ResNet) -> None:
    sizes = [Preprocess.for_size(size) for size in (32, 48)]
    members = [Net(TorchBackend(net), preprocess) for preprocess in sizes]
    source = noise(9, 50, 60)
    result = evaluate_views(members, source)
    for preprocess, accuracy in zip(sizes, result.members, strict=True):
        assert accuracy == evaluate(TorchBackend(net), source, preprocess)
    both = [metrics.softmax(TorchBackend(net)(p.normalize(
        np.stack([p.crop(image) for image in source.images])))) for p in sizes]  # fmt: skip
    assert result.ensemble.top1 == int((np.mean(both, axis=0).argmax(1) == source.labels).sum())


class Broken(Arrays):
    """The image number 4 cannot be decoded."""

    def image(self, index: int, *_: object, **__: object) -> np.ndarray:
        if index == 4:
            raise CorruptImage("4.jpg")
        return super().image(index)


def test_evaluate_views_broken_image_is_left_out_for_every_net(net: ResNet) -> None:
    member = Net(TorchBackend(net), Preprocess.for_size(32))
    whole = noise(120)
    source = Broken("noise", whole.images, whole.labels, whole.classes)
    tally = DecodeErrors(120)
    result = evaluate_views([member, member], source, tally=tally)
    assert [accuracy.n for accuracy in (*result.members, result.ensemble)] == [119] * 3
    assert list(tally.skipped) == [4]


def test_evaluate_views_unknown_or_missing_labels_are_refused(net: ResNet) -> None:
    member = Net(TorchBackend(net), Preprocess.for_size(32))
    with pytest.raises(DataError, match="label 8"):
        evaluate_views([member], noise(9, classes=9))
    unlabelled = Arrays("u", np.zeros((3, 32, 32, 3), np.uint8), np.full(3, -1), ())
    with pytest.raises(DataError, match="no labels"):
        evaluate_views([member], unlabelled)


def numbered(count: int, classes: int) -> Arrays:
    images = np.zeros((count, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return Arrays("s", images, np.arange(count) % classes, [str(i) for i in range(classes)])


def oracle(classes: int, wrong: set[int] = frozenset()):  # type: ignore[no-untyped-def, assignment]
    """Read the number painted into the first pixel, so that it can be right or wrong at will."""
    preprocess = Preprocess.for_size(8, mean=(0, 0, 0), std=(1, 1, 1))

    def forward(images: np.ndarray) -> np.ndarray:
        numbers = np.rint(images[:, 0, 0, 0] * 255).astype(int)
        labels = np.where(np.isin(numbers, list(wrong)), numbers + 1, numbers) % classes
        return np.eye(classes, dtype=np.float32)[labels]

    return forward, preprocess


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_evaluate_any_batch_counts_every_image_once(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtresnet.data.loader.batch_size", lambda preprocess: batch)
    forward, preprocess = oracle(10, wrong={3, 50})
    result = evaluate(forward, numbered(100, 10), preprocess)
    assert (result.n, result.top1) == (100, 98)


def test_evaluate_five_classes_have_no_top5() -> None:
    forward, preprocess = oracle(5)
    assert evaluate(forward, numbered(10, 5), preprocess).top5 is None


def test_evaluate_indices_select_the_images() -> None:
    forward, preprocess = oracle(10, wrong={1})
    result = evaluate(forward, numbered(100, 10), preprocess, indices=np.array([1, 2, 3]))
    assert (result.n, result.top1) == (3, 2)


def test_evaluate_label_beyond_the_classes_is_refused() -> None:
    forward, preprocess = oracle(4)
    with pytest.raises(DataError, match="label 9"):
        evaluate(forward, numbered(10, 10), preprocess)


def test_evaluate_images_without_labels_are_refused() -> None:
    forward, preprocess = oracle(4)
    unlabelled = Arrays("u", np.zeros((3, 8, 8, 3), np.uint8), np.full(3, -1), ())
    with pytest.raises(DataError, match="no labels"):
        evaluate(forward, unlabelled, preprocess)
