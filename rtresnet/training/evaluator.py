"""A net's accuracy during training, over all processes and where the images already lie."""

from __future__ import annotations

import math

import numpy as np
import torch

from rtresnet.core import metrics
from rtresnet.data import augment, loader
from rtresnet.data.sources import Source
from rtresnet.data.transfer import to_device
from rtresnet.models.reference import TorchBackend
from rtresnet.training.distributed import World
from rtresnet.training.evaluate import evaluate
from rtresnet.training.train_loader import TrainLoader

BATCH = 512  # of small images on the device


class Evaluator:
    """Counts hits.

    Args:
        feed: The training images; those held out lie among them.
        world: Over which the images are shared out.
    """

    def __init__(self, feed: TrainLoader, world: World) -> None:
        self.held, self.pixels, self.preprocess = feed.source, feed.pixels, feed.preprocess
        self.device, self.world, self.tally = feed.device, world, feed.tally

    def accuracy(
        self, net: torch.nn.Module, source: Source, indices: np.ndarray | None
    ) -> metrics.Accuracy:
        """Over all processes, each image counted once, single centre crop.

        Args:
            net: Put into evaluation mode.
            source: The images.
            indices: Which of them; all by default.
        """
        self.world.align_buffers(net)
        mine = self.world.shard(np.arange(len(source)) if indices is None else indices)
        n = top1 = top5 = 0
        if len(mine) and self.pixels is not None and source is self.held:
            n, top1, top5 = self._count_held(net, mine)
        elif len(mine):
            known = self.tally
            tally = loader.DecodeErrors(
                len(source), known.warn, tolerated=known.tolerated, fix=known.fix
            )
            found = evaluate(TorchBackend(net), source, self.preprocess, indices=mine, tally=tally)
            n, top1, top5 = found.n, found.top1, found.top5 or 0
        n, top1, top5 = (
            int(v) for v in self.world.sums(np.array([n, top1, top5], float), self.device)
        )
        return metrics.Accuracy(n=n, top1=top1, top5=top5 if len(source.classes) > 5 else None)

    def _count_held(self, net: torch.nn.Module, indices: np.ndarray) -> tuple[int, int, int]:
        """The same for images that lie on the device."""
        assert self.pixels is not None
        net.eval()
        counts = np.zeros(3, int)
        for chosen in np.array_split(indices, math.ceil(len(indices) / BATCH)):
            with torch.inference_mode():
                where = to_device(chosen, self.device)
                images = self.pixels[where].permute(0, 3, 1, 2)
                logits = net(augment.normalize(images, self.preprocess)).cpu().numpy()
            found = metrics.accuracy(logits, self.held.labels[chosen])
            counts += (found.n, found.top1, found.top5 or 0)
        return int(counts[0]), int(counts[1]), int(counts[2])
