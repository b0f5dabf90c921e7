"""Image files to rows of classes and probabilities: the body of `rtresnet predict`.

The same for a few images on the terminal, a folder into a file, and an actor of Ray. Knows neither
files of results nor what is done already; see `predict_bulk.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.cli import opening
from rtresnet.core.errors import DataError, InputError

TOP = 3
GPU_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is on one image, or why that is not known.

    Attributes:
        image: The file as it was named; bytes that are no UTF-8 are escaped.
        top: (class, probability), the most probable first; empty where there is an error.
        error: None, or what is wrong with the image.
    """

    image: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class About:
    """What decides a row beside the artifact's bytes, and where it is made.

    Attributes:
        preprocess: Of the images, as JSON has it.
        top: Classes a row.
        batch: Images at a time.
        where: Device, provider, threads and versions.
        assumed: What the artifact does not state; see `sidecar.Sidecar`.
    """

    precision: str
    preprocess: dict[str, Any]
    top: int
    batch: int
    where: dict[str, Any]
    assumed: tuple[str, ...] = ()

    def decisive(self) -> dict[str, Any]:
        """What must be the same for two rows to belong into one table."""
        return {
            "provider": self.where["provider"],
            "preprocess": self.preprocess,
            "top": self.top,
            "batch": self.batch,
        }


class Predictor:
    """An artifact that reads image files.

    Args:
        artifact: Checkpoint, ONNX file or plan.
        top: Classes a row; by default 3, or as many as the artifact has.
        batch: Images at a time; by default what suits the input's size and the device.
        decoders: Decoding threads; by default one a core.
        options: As `opening.open_artifact` takes them.

    Raises:
        InputError: The artifact gives fewer classes than `top`.
    """

    def __init__(
        self,
        artifact: str,
        *,
        top: int | None = None,
        batch: int | None = None,
        decoders: int | None = None,
        **options: Any,
    ) -> None:
        from rtresnet.core import artifacts
        from rtresnet.data import loader

        self.opened = opening.open_artifact(artifact, **options)
        on_gpu = self.opened.where.get("threads") is None
        self.batch = batch or (GPU_BATCH if on_gpu else loader.batch_size(self.opened.preprocess))
        self.decoders = decoders
        sidecar = artifacts.read_sidecar(artifact)
        given = (sidecar.topk if sidecar else None) or len(self.opened.classes) or None
        self.top = top or min(TOP, given or TOP)
        if given is not None and self.top > given:
            self.close()
            raise InputError(
                f"--top {top}: {artifact} gives {given} classes", fix=f"--top {given} or less"
            )

    @property
    def about(self) -> About:
        """For the record."""
        return About(
            precision=self.opened.precision,
            preprocess=json.loads(json.dumps(dataclasses.asdict(self.opened.preprocess))),
            top=self.top,
            batch=self.batch,
            where=self.opened.where,
            assumed=self.opened.assumed,
        )

    def close(self) -> None:
        """Gives memory back."""
        self.opened.close()

    def batches(self, names: Sequence[str]) -> Iterator[list[Row]]:
        """Rows in the order of the names, a batch at a time; the next images are decoded meanwhile.

        The batches are the same wherever one begins, as long as that is at a multiple of `batch`:
        a broken image leaves its batch smaller.
        """
        from rtresnet.data import loader

        kept: list[tuple[str, np.ndarray | DataError]] = []
        for entry in loader.prefetch_map(self._read, names, self.decoders):
            kept.append(entry)
            if len(kept) == self.batch:
                yield self._rows(kept)
                kept = []
        if kept:
            yield self._rows(kept)

    def _read(self, name: str) -> np.ndarray | DataError:
        """uint8 [S, S, 3], or what is wrong: not an image, damaged, gone, not readable."""
        from rtresnet.data.decode import decode

        try:
            return self.opened.preprocess.crop(decode(name))
        except DataError as error:
            return error

    def _rows(self, entries: Sequence[tuple[str, np.ndarray | DataError]]) -> list[Row]:
        images = [image for _, image in entries if not isinstance(image, DataError)]
        found = iter(self._best(np.stack(images)) if images else ())
        rows = []
        for name, image in entries:
            if isinstance(image, DataError):
                rows.append(Row(image=printable(name), error=printable(image.message)))
                continue
            best = next(found)
            if best:
                rows.append(Row(image=printable(name), top=best))
            else:
                rows.append(Row(image=printable(name), error="the net's output is not finite"))
        return rows

    def _best(self, images: np.ndarray) -> Iterator[tuple[tuple[str, float], ...]]:
        """The best classes of uint8 [N, S, S, 3]; empty where the logits are no numbers."""
        from rtresnet.core import metrics

        found = self.opened.forward(self.opened.preprocess.prepare(images))
        if isinstance(found, tuple):  # the K best, found in the net
            indices, probabilities = (part[:, : self.top] for part in found)
        else:
            with np.errstate(invalid="ignore"):  # an infinity becomes a NaN, and that an error
                every = metrics.softmax(found)
            indices = np.argsort(-every, axis=1, kind="stable")[:, : self.top]
            probabilities = np.take_along_axis(every, indices, axis=1)
        if indices.shape[1] < self.top:
            raise InputError(
                f"{self.opened.path} gives {indices.shape[1]} classes an image",
                fix=f"--top {indices.shape[1]} or less",
            )
        for row, values in zip(indices, probabilities.astype(np.float32), strict=True):
            if not np.isfinite(values).all():
                yield ()
                continue
            # str() of a float32 has the digits that tell it from its neighbours, and no more.
            yield tuple(
                (self._name(int(i)), float(str(v))) for i, v in zip(row, values, strict=True)
            )

    def _name(self, index: int) -> str:
        classes = self.opened.classes
        return classes[index] if index < len(classes) else str(index)


def printable(text: str) -> str:
    """A file's name as UTF-8 can say it: Linux allows any bytes, and formats of tables do not."""
    return text.encode("utf-8", "backslashreplace").decode()
