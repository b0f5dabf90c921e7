"""Accuracy on labelled images: single crop, or the paper's test protocols (section 3.4).

    center    one crop of the resized image
    10-crop   four corners and the centre, and their mirror images
    dense     the whole image at several scales, and its mirror image, by a fully convolutional net

Probabilities are averaged over crops, mirror images, scales and the nets of an ensemble, as in
AlexNet, whose ten crops the paper refers to. Over the positions of a dense score map the logits
are averaged, before the softmax.

Evaluates torch nets, ONNX files and plans; imports no torch.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rtresnet.core import metrics
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess, resize_shorter
from rtresnet.data import loader
from rtresnet.data.decode import CorruptImage
from rtresnet.data.sources import Source
from rtresnet.training.evaluate import require_labels

ProtocolName = Literal["center", "10-crop", "dense"]
Scores = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
PAPER_SIZE, PAPER_SCALES = 224, (224, 256, 384, 480, 640)


class Classifier(typing.Protocol):
    """A net that a protocol can measure; `runtime.session.Session` is one."""

    @property
    def preprocess(self) -> Preprocess:
        """The input contract."""
        ...

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Run prepared images; returns logits [N, classes] or a dense map [N, classes, h, w]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of an image that a net is run on.

    Attributes:
        protocol: "center", "10-crop" or "dense".
        scales: Shorter sides under the dense protocol, in pixels; by default the paper's five,
            in proportion to the net's size.
    """

    protocol: ProtocolName = "center"
    scales: tuple[int, ...] = ()

    def scales_for(self, preprocess: Preprocess) -> tuple[int, ...]:
        """Return the shorter sides under the dense protocol; empty for other protocols."""
        return () if self.protocol != "dense" else self.scales or dense_scales(preprocess.size)

    def count(self, preprocess: Preprocess) -> int:
        """Return the number of views of an image, over which probabilities are averaged."""
        dense = 2 * len(self.scales_for(preprocess))
        return {"center": 1, "10-crop": 10, "dense": dense}[self.protocol]

    def of(self, image: np.ndarray, preprocess: Preprocess) -> list[np.ndarray]:
        """Make the views of a uint8 image [H, W, 3], the mirror images last."""
        if self.protocol == "center":
            return [preprocess.crop(image)]
        if self.protocol == "10-crop":
            views = five_crops(image, preprocess)
        else:
            views = [
                resize_shorter(image, scale, preprocess.interpolation)
                for scale in self.scales_for(preprocess)
            ]
        return views + [view[:, ::-1] for view in views]


def dense_scales(size: int) -> tuple[int, ...]:
    """Return the paper's five shorter sides, in proportion to the net's size."""
    return tuple(round(scale * size / PAPER_SIZE) for scale in PAPER_SCALES)


def five_crops(image: np.ndarray, preprocess: Preprocess) -> list[np.ndarray]:
    """Crop the four corners and the centre: uint8 [size, size, 3] each."""
    side = preprocess.size
    image = resize_shorter(image, preprocess.resize, preprocess.interpolation)
    bottom, right = image.shape[0] - side, image.shape[1] - side
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = [image[top : top + side, left : left + side] for top, left in corners]
    return [*crops, preprocess.crop(image)]


def mean_probabilities(
    net: Classifier, images: Sequence[Sequence[np.ndarray]], batch: int | None = None
) -> np.ndarray:
    """Run the views of images.

    Args:
        net: The net.
        images: For each image its views, uint8 [H, W, 3].
        batch: Images of the net's own size per batch, and as many pixels of larger ones; None
            uses a default.

    Returns:
        Mean probabilities over an image's views, float64 [N, classes].
    """
    preprocess = net.preprocess
    by_shape: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for index, views in enumerate(images):
        for view in views:
            by_shape.setdefault(view.shape, []).append((index, view))
    pixels = (batch or loader.batch_size(preprocess)) * preprocess.size**2
    total: np.ndarray | None = None
    for (height, width, _), entries in by_shape.items():
        length = max(1, pixels // (height * width))
        for start in range(0, len(entries), length):
            chunk = entries[start : start + length]
            prepared = preprocess.prepare(np.stack([view for _, view in chunk]))
            logits = net.scores(prepared).astype(np.float64)
            shares = metrics.softmax(logits.mean(axis=(2, 3)) if logits.ndim == 4 else logits)
            if total is None:
                total = np.zeros((len(images), shares.shape[1]))
            np.add.at(total, [index for index, _ in chunk], shares)
    assert total is not None
    return total / len(images[0])


@dataclass(frozen=True, kw_only=True)
class EnsembleAccuracy:
    """Accuracies on the same images.

    Attributes:
        members: One accuracy per net.
        ensemble: Result of the mean of their probabilities; with one net, its own result.
    """

    members: tuple[metrics.Accuracy, ...]
    ensemble: metrics.Accuracy


def evaluate_views(
    nets: Sequence[Classifier],
    source: Source,
    views: Views | None = None,
    *,
    batch: int | None = None,
    tally: loader.DecodeErrors | None = None,
    on_images: Callable[[int], None] = lambda done: None,
    on_scores: Scores = lambda indices, labels, probabilities: None,
) -> EnsembleAccuracy:
    """Measure nets on the same images; an image that cannot be decoded is skipped for all.

    Args:
        nets: Nets of the same classes.
        source: Labelled images.
        views: The views of an image; by default one centre crop.
        batch: See `mean_probabilities`.
        tally: Receives the broken images.
        on_images: Called with the number of images done.
        on_scores: Called with indices, labels and the ensemble's probabilities [N, classes].

    Raises:
        DataError: No labels, no decodable image, or more broken images than `tally` tolerates.
    """
    require_labels(source)
    views = views or Views()
    tally = tally or loader.DecodeErrors(len(source))
    per_batch = batch or min(loader.batch_size(net.preprocess) for net in nets)

    def load(index: int) -> list[list[np.ndarray]] | CorruptImage:
        try:
            image = source.image(index)
        except CorruptImage as error:
            return error
        return [views.of(image, net.preprocess) for net in nets]

    counts: list[list[metrics.Accuracy]] = []
    ready: list[tuple[int, list[list[np.ndarray]]]] = []

    def finish() -> None:
        indices = np.array([index for index, _ in ready])
        labels = source.labels[indices]
        scores = [
            mean_probabilities(net, [entry[position] for _, entry in ready], batch)
            for position, net in enumerate(nets)
        ]
        scores.append(np.mean(scores, axis=0))
        counts.append([metrics.accuracy(entry, labels) for entry in scores])
        on_scores(indices, labels, scores[-1])
        ready.clear()

    for index, entry in loader.prefetch_map(load, range(len(source))):
        if isinstance(entry, CorruptImage):
            tally.skip(index, entry)
        else:
            ready.append((index, entry))
        if len(ready) == per_batch:
            finish()
            on_images(index + 1)
    if ready:
        finish()
    if not counts:
        raise DataError(f"{source.name}: no image could be decoded")
    *members, ensemble = (metrics.together(column) for column in zip(*counts, strict=True))
    return EnsembleAccuracy(members=tuple(members), ensemble=ensemble)
