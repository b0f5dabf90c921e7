"""The paper's ways to test a net (section 3.4): one crop, ten crops, dense; and ensembles.

    center    one crop of the resized image
    10-crop   four corners and the centre, and their mirror images
    dense     the whole image at several scales, and its mirror image, by a fully convolutional net

What is averaged over crops, mirror images, scales and the nets of an ensemble is the softmax's
probabilities, as AlexNet did, whose ten crops the paper refers to. Over the positions of a dense
score map it is the logits, before the softmax: then a map of one view is the net's own answer.

Imports no torch, as `evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.core import metrics
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess, resize_shorter
from rtresnet.data import loader
from rtresnet.data.decode import CorruptImage
from rtresnet.data.sources import Source
from rtresnet.training import evaluate

PROTOCOLS = ("center", "10-crop", "dense")
PAPER_SIZE, PAPER_SCALES = 224, (224, 256, 384, 480, 640)


def dense_scales(size: int) -> tuple[int, ...]:
    """The paper's five shorter sides, in proportion for a net of another size than 224."""
    return tuple(round(scale * size / PAPER_SIZE) for scale in PAPER_SCALES)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A net and how it is shown an image.

    Attributes:
        forward: float32 [N, 3, H, W] to float32 logits [N, classes]; under the dense protocol to
            a map of them, [N, classes, h, w].
        preprocess: Its input contract.
        protocol: One of PROTOCOLS.
        scales: Shorter sides under the dense protocol, in pixels.
    """

    forward: metrics.Forward
    preprocess: Preprocess
    protocol: str = "center"
    scales: tuple[int, ...] = ()

    @property
    def views_an_image(self) -> int:
        """How many views are averaged."""
        return {"center": 1, "10-crop": 10, "dense": 2 * len(self.scales)}[self.protocol]

    def views(self, image: np.ndarray) -> list[np.ndarray]:
        """What the net is shown of a uint8 image [H, W, 3], the mirror images last."""
        if self.protocol == "center":
            return [self.preprocess.crop(image)]
        if self.protocol == "10-crop":
            views = five_crops(image, self.preprocess)
        else:
            views = [resize_shorter(image, scale) for scale in self.scales]
        return views + [view[:, ::-1] for view in views]

    def scores(self, images: Sequence[Sequence[np.ndarray]], batch: int | None) -> np.ndarray:
        """Probabilities float64 [N, classes], each the mean over an image's views.

        Args:
            images: The views of each image.
            batch: Images of the net's own size at a time, and as many pixels of larger ones;
                None takes what fits.
        """
        alike: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for index, views in enumerate(images):
            for view in views:
                alike.setdefault(view.shape, []).append((index, view))
        pixels = (batch or loader.batch_size(self.preprocess)) * self.preprocess.size**2
        total: np.ndarray | None = None
        for (height, width, _), entries in alike.items():
            length = max(1, pixels // (height * width))
            for start in range(0, len(entries), length):
                part = entries[start : start + length]
                found = self._probabilities(np.stack([view for _, view in part]))
                if total is None:
                    total = np.zeros((len(images), found.shape[1]))
                np.add.at(total, [index for index, _ in part], found)
        assert total is not None
        return total / len(images[0])

    def _probabilities(self, views: np.ndarray) -> np.ndarray:
        logits = self.forward(self.preprocess.prepare(views)).astype(np.float64)
        return metrics.softmax(logits.mean(axis=(2, 3)) if logits.ndim == 4 else logits)


def five_crops(image: np.ndarray, preprocess: Preprocess) -> list[np.ndarray]:
    """Top left, top right, bottom left, bottom right and centre: uint8 [size, size, 3] each."""
    side, image = preprocess.size, resize_shorter(image, preprocess.resize)
    bottom, right = image.shape[0] - side, image.shape[1] - side
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = [image[top : top + side, left : left + side] for top, left in corners]
    return [*crops, preprocess.crop(image)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracies over the same images.

    Attributes:
        members: Of each net by itself.
        ensemble: Of the mean of their scores; with one net its own.
    """

    members: tuple[metrics.Accuracy, ...]
    ensemble: metrics.Accuracy


def measure(
    members: Sequence[Member],
    source: Source,
    *,
    batch: int | None = None,
    tally: loader.DecodeErrors | None = None,
    on_images: Callable[[int], None] = lambda done: None,
) -> Result:
    """Shows every image to every net once; one that cannot be decoded is left out for all.

    Args:
        members: Nets of the same classes.
        source: Labelled images.
        batch: See `Member.scores`.
        tally: Takes the broken images.
        on_images: Told how many images are done.

    Raises:
        DataError: No labels, none decodable, or more than 1 % broken.
    """
    evaluate.require_labels(source)
    tally = tally or loader.DecodeErrors(len(source))
    together = batch or min(loader.batch_size(member.preprocess) for member in members)

    def views(index: int) -> list[list[np.ndarray]] | CorruptImage:
        try:
            image = source.image(index)
        except CorruptImage as error:
            return error
        return [member.views(image) for member in members]

    counts: list[list[metrics.Accuracy]] = []
    ready: list[tuple[int, list[list[np.ndarray]]]] = []

    def finish() -> None:
        labels = source.labels[[index for index, _ in ready]]
        scores = [
            member.scores([views[place] for _, views in ready], batch)
            for place, member in enumerate(members)
        ]
        scores.append(np.mean(scores, axis=0))
        counts.append([evaluate.count(entry, labels, source) for entry in scores])
        ready.clear()

    for index, found in loader.prefetch_map(views, range(len(source))):
        if isinstance(found, CorruptImage):
            tally.skip(index, found)
        else:
            ready.append((index, found))
        if len(ready) == together:
            finish()
            on_images(index + 1)
    if ready:
        finish()
    if not counts:
        raise DataError(f"{source.name}: no image could be evaluated")
    *each, ensemble = (metrics.together(column) for column in zip(*counts, strict=True))
    return Result(members=tuple(each), ensemble=ensemble)
