"""Predict the most probable classes of image files, batch by batch.

`Predictor` serves a few images on the terminal, a folder written to a table, and an actor of Ray.
It is independent of tables and resuming; see `predict.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from rtresnet.core import metrics
from rtresnet.core.config import Config, option
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import plural
from rtresnet.core.serialization import json_name
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, close_on_error, load_artifact

TOP = 3
GPU_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Config):
    """Options of prediction.

    Attributes:
        top: Number of classes for each image.
        batch: Images at a time.
        workers: Threads that decode images.
        model: Architecture of a checkpoint from elsewhere.
    """

    top: int | None = option(
        None,
        "Number of classes to print for each image.",
        minimum=1,
        default_text=f"{TOP}, or all if there are fewer",
    )
    batch: int | None = option(
        None, "Number of images at a time.", minimum=1, default_text="by input size and device"
    )
    workers: int | None = option(
        None, "Number of threads that decode images.", minimum=1, default_text="one for each core"
    )
    model: str | None = option(
        None, "Architecture of a checkpoint from elsewhere.", default_text="recognized"
    )


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """A class and its probability, in [0, 1]."""

    name: str = json_name("class")
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of one image, or why they are unknown.

    Attributes:
        image: The file as it was named; bytes that are not UTF-8 are escaped.
        top: The most probable class first; empty if there is an error.
        error: What is wrong with the image, or None.
    """

    image: str
    top: tuple[ClassProbability, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PredictorInfo:
    """Settings and device that determine a prediction, in addition to the artifact.

    Attributes:
        preprocess: How an image becomes input.
        top: Classes for each image.
        batch: Images at a time.
        assumed: What was assumed of the artifact.
        runtime: Where it runs.
    """

    preprocess: Preprocess
    top: int
    batch: int
    assumed: tuple[str, ...]
    runtime: RuntimeInfo


class Predictor:
    """An artifact that reads image files; use it in a `with` block.

    Args:
        artifact: Checkpoint, ONNX file or plan.
        config: Number of classes, batch and decoding threads.
        runtime: Where the artifact runs.
        stated: Preprocessing that replaces the sidecar's, or of a file without a sidecar.

    Raises:
        InputError: The artifact returns fewer classes than `config.top`.
        RtresnetError: See `loading.load_artifact`.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        config: PredictConfig | None = None,
        *,
        runtime: RuntimeConfig | None = None,
        stated: InputConfig | None = None,
    ) -> None:
        from rtresnet.data import loader

        config, runtime = config or PredictConfig(), runtime or RuntimeConfig()
        place = runtime.for_artifact(str(artifact), [str(artifact)])
        self.session = load_artifact(artifact, place, stated=stated, model=config.model)
        with close_on_error(self.session):
            self.preprocess, self.workers = self.session.preprocess, config.workers
            on_gpu = self.session.backend.threads is None
            default = GPU_BATCH if on_gpu else loader.batch_size(self.preprocess)
            self.batch = config.batch or default
            available = self.session.topk or len(self.session.classes) or None
            self.top = config.top or min(TOP, available or TOP)
            if available is not None and self.top > available:
                raise InputError(
                    f"--top {self.top}: {artifact} has {plural(available, 'class')}",
                    fix=f"use --top {available} or less",
                )

    @property
    def info(self) -> PredictorInfo:
        """Settings and device of a prediction."""
        return PredictorInfo(
            preprocess=self.preprocess,
            top=self.top,
            batch=self.batch,
            assumed=self.session.assumed,
            runtime=self.session.info,
        )

    def close(self) -> None:
        """Free the session."""
        self.session.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def batches(self, names: Sequence[str]) -> Iterator[list[Prediction]]:
        """Predict image files in order, a batch at a time, while the next images are decoded.

        The batches do not depend on where a run begins, if that is at a multiple of `batch`: a
        broken image leaves its batch smaller.

        Args:
            names: Image files.
        """
        from rtresnet.data import loader

        waiting: list[tuple[str, np.ndarray | DataError]] = []
        for entry in loader.prefetch_map(self._read, names, self.workers):
            waiting.append(entry)
            if len(waiting) == self.batch:
                yield self._predict(waiting)
                waiting = []
        if waiting:
            yield self._predict(waiting)

    def _read(self, name: str) -> np.ndarray | DataError:
        """Return uint8 [S, S, 3], or the error: not an image, damaged, missing, not readable."""
        from rtresnet.data.decode import decode

        try:
            return self.preprocess.crop(decode(name))
        except DataError as error:
            return error

    def _predict(self, entries: Sequence[tuple[str, np.ndarray | DataError]]) -> list[Prediction]:
        images = [image for _, image in entries if not isinstance(image, DataError)]
        tops = iter(self._top(np.stack(images)) if images else ())
        predictions = []
        for name, image in entries:
            top = () if isinstance(image, DataError) else next(tops)
            error = None if top else "the net's output is not finite"
            if isinstance(image, DataError):
                error = printable(image.message)
            predictions.append(Prediction(image=printable(name), top=top, error=error))
        return predictions

    def _top(self, images: np.ndarray) -> Iterator[tuple[ClassProbability, ...]]:
        """Return the best classes of uint8 [N, S, S, 3]; empty if the output is not finite."""
        answer = self.session(self.session.prepare(images))
        with np.errstate(invalid="ignore"):  # an infinity becomes a NaN, and that an error
            indices, probabilities = metrics.most_probable(answer, self.top)
        if indices.shape[1] < self.top:
            raise InputError(
                f"{self.session.path} returns {plural(indices.shape[1], 'class')} per image",
                fix=f"use --top {indices.shape[1]} or less",
            )
        for row, values in zip(indices, probabilities.astype(np.float32), strict=True):
            if not np.isfinite(values).all():
                yield ()
                continue
            # str() of a float32 has the digits that distinguish it from its neighbours, no more.
            yield tuple(
                ClassProbability(name=self._name(int(i)), probability=float(str(value)))
                for i, value in zip(row, values, strict=True)
            )

    def _name(self, index: int) -> str:
        classes = self.session.classes
        return classes[index] if index < len(classes) else str(index)


def printable(text: str) -> str:
    """Convert a file name to UTF-8. Linux allows any bytes in names; tables do not."""
    return text.encode("utf-8", "backslashreplace").decode()
