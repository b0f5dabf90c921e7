"""Models that a server answers for: loading, versions, reloading, statistics.

A model is an ONNX file or a plan with its sidecar. It can also be a Triton repository's folder,
NAME/VERSION/model.onnx or model.plan. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError, RtresnetError
from rtresnet.runtime.backend import TOPK
from rtresnet.runtime.batcher import Answer, Batcher
from rtresnet.runtime.session import Session
from rtresnet.serving.metrics import Metrics

log = logging.getLogger("rtresnet.serve")

SUFFIXES = (".onnx", ".plan")
POLL_SECONDS = 1.0
FAILURES_IN_A_ROW = 3  # batches that fail before a device counts as lost
DTYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64"}


class UnknownModelError(InputError):
    """A model or version that this server does not have."""


class ServerBusyError(RtresnetError):
    """The queue is full; the same request may succeed after `retry_after` seconds."""

    retry_after = 1


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Name, protocol data type and shape of an input or output; -1 is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(kw_only=True)
class Statistics:
    """Counts and seconds since the model was loaded."""

    requests: int = 0
    failures: int = 0
    images: int = 0
    batches: int = 0
    request_seconds: float = 0.0
    failure_seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(eq=False)
class Model:
    """One version of a model, loaded and warm.

    Attributes:
        healthy: False once batches fail one after another: the device is lost.
    """

    name: str
    version: str
    session: Session
    batcher: Batcher
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch: int
    stamp: tuple[Any, ...]
    statistics: Statistics = field(default_factory=Statistics)
    healthy: bool = True
    failed_in_a_row: int = 0

    @property
    def platform(self) -> str:
        """Triton's name of what runs it."""
        plan = self.session.path.suffix.lower() == ".plan"
        return "tensorrt_plan" if plan else "onnxruntime_onnx"

    def submit(self, images: np.ndarray) -> list[Answer]:
        """Puts every image of a batch into the queue.

        Raises:
            ServerBusyError: The queue has no room for all of them.
            InputError: The images are not what the model takes.
        """
        from rtresnet.core.errors import QueueFullError

        answers: list[Answer] = []
        try:
            for image in images:
                answers.append(self.batcher.submit(image))
        except BaseException as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, QueueFullError):
                raise ServerBusyError(f"{self.name}: {error.message}") from None
            raise
        return answers


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How models are batched and what a request may ask for.

    Attributes:
        max_batch: Images in a batch, and in a request.
        max_wait_ms: How long the first image of a batch waits for others.
        queue: Images that may wait.
    """

    max_batch: int = 32
    max_wait_ms: float = 2.0
    queue: int = 1024


class Repository:
    """Loads models, answers for them by name and version, and reloads files that changed.

    Args:
        sources: ONNX files, plans, or folders of a Triton repository.
        load: Opens an artifact and verifies its sidecar.
        limits: Batching and queue.
        metrics: Receives every batch.
    """

    def __init__(
        self,
        sources: Sequence[Path],
        load: Callable[[Path], Session],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._sources, self._load, self._limits, self._metrics = sources, load, limits, metrics
        self._models: dict[str, dict[str, Model]] = {}
        self._lock = threading.Lock()
        self._changed: dict[Path, tuple[Any, ...]] = {}
        self._refused: dict[Path, tuple[Any, ...]] = {}

    def load_all(self) -> None:
        """Loads every model and warms it up.

        Raises:
            InputError: Nothing to serve, or two models of one name and version.
        """
        for name, version, path in self._files():
            if version in self._models.get(name, {}):
                raise InputError(f"{path}: a second model {name}, version {version}")
            self._models.setdefault(name, {})[version] = self._open(name, version, path)
        if not self._models:
            places = ", ".join(map(str, self._sources))
            raise InputError(f"{places}: no ONNX file or plan to serve", fix="rtresnet export")

    def _files(self) -> list[tuple[str, str, Path]]:
        """(name, version, file) of every model."""
        files = []
        for source in self._sources:
            if not source.is_dir():
                files.append((source.stem, "1", source))
                continue
            for path in sorted(source.glob("*/*/model.*")) or sorted(source.glob("*/model.*")):
                if path.suffix in SUFFIXES and path.parent.name.isdecimal():
                    files.append((path.parent.parent.name, path.parent.name, path))
        return files

    def _open(self, name: str, version: str, path: Path) -> Model:
        stamp = _stamp(path)
        session = self._load(path)
        try:
            inputs, outputs, largest = _self_check(session, self._limits.max_batch)
        except BaseException:
            session.close()
            raise
        model: Model

        def on_batch(size: int, seconds: float, failure: BaseException | None) -> None:
            self._observe(model, size, seconds, failure)

        batcher = Batcher(
            session,
            max_batch=largest,
            max_wait_ms=self._limits.max_wait_ms,
            queue_limit=self._limits.queue,
            on_batch=on_batch,
        )
        model = Model(
            name, version, session, batcher, inputs, outputs, self._limits.max_batch, stamp
        )
        return model

    def _observe(
        self, model: Model, size: int, seconds: float, failure: BaseException | None
    ) -> None:
        with self._lock:
            model.statistics.batches += 1
            model.statistics.images += size
            model.statistics.compute_seconds += seconds
            lost = failure is not None and not isinstance(failure, InputError)
            model.failed_in_a_row = model.failed_in_a_row + 1 if lost else 0
            if model.failed_in_a_row >= FAILURES_IN_A_ROW and model.healthy:
                model.healthy = False
                log.error("model %s fails: %s", model.name, failure)
        self._metrics.batch(model.name, model.version, size, seconds)

    def finished(
        self, model: Model, seconds: float, answers: Sequence[Answer], *, ok: bool
    ) -> None:
        """Counts a request."""
        with self._lock:
            if ok:
                model.statistics.requests += 1
                model.statistics.request_seconds += seconds
                model.statistics.queue_seconds += sum(a.queue_seconds for a in answers)
            else:
                model.statistics.failures += 1
                model.statistics.failure_seconds += seconds

    def get(self, name: str | None, version: str = "") -> Model:
        """The model of a name; without a name the only one, without a version the newest.

        Raises:
            UnknownModelError: There is none.
        """
        models = self._models
        if name is None and len(models) == 1:
            name = next(iter(models))
        if name is None or name not in models:
            known = ", ".join(sorted(models))
            what = "name a model" if name is None else f"unknown model {name[:80]!r}"
            raise UnknownModelError(what, fix=f"known: {known}")
        versions = models[name]
        chosen = version or max(versions, key=int)
        if chosen not in versions:
            raise UnknownModelError(
                f"{name}: unknown version {version[:20]!r}", fix=f"known: {', '.join(versions)}"
            )
        return versions[chosen]

    def versions(self, name: str) -> list[str]:
        """The versions of a model, oldest first."""
        return sorted(self._models[name], key=int)

    def all(self) -> list[Model]:
        """Every version of every model."""
        return [self._models[n][v] for n in sorted(self._models) for v in self.versions(n)]

    @property
    def healthy(self) -> bool:
        """Whether no device is lost."""
        return all(model.healthy for model in self.all())

    async def watch(self) -> None:
        """Reloads files whose content changed, until it is cancelled.

        A file is reloaded once it was the same for two looks, its sidecar was verified and the
        self-check passed; the old version serves until then, and finishes what it has.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for model in self.all():
                path, stamp = model.session.path, _stamp(model.session.path)
                settled = self._changed.get(path) == stamp
                self._changed[path] = stamp
                if stamp == model.stamp or not settled or self._refused.get(path) == stamp:
                    continue
                try:
                    new = await asyncio.to_thread(self._open, model.name, model.version, path)
                except Exception as error:  # the old version keeps serving, whatever it is
                    self._refused[path] = stamp
                    log.error("not reloaded: %s", error)
                    continue
                self._models[model.name][model.version] = new
                log.info("reloaded %s version %s", model.name, model.version)
                await asyncio.to_thread(_close, model)

    def close(self) -> None:
        """Finishes what is queued and gives memory back."""
        for model in self.all():
            _close(model)


def _close(model: Model) -> None:
    model.batcher.close()
    model.session.close()


def _stamp(path: Path) -> tuple[Any, ...]:
    """What changes when a file or its sidecar is replaced."""
    entries = []
    for file in (path, artifacts.sidecar_path(path)):
        try:
            status = file.stat()
            entries.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            entries.append((0, 0, 0))
    return tuple(entries)


def _self_check(
    session: Session, max_batch: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
    """Warms a session up and checks its answers; returns inputs, outputs and the largest batch.

    Raises:
        CheckFailedError: An answer is not finite, or depends on its batch.
    """
    fixed = session.batch
    largest = fixed if fixed is not None and fixed > 1 else max_batch
    images = session.example(largest)
    single, together = session(images[:1]), session(images)
    first, batch = (np.asarray(a[1] if isinstance(a, tuple) else a) for a in (single, together))
    if not np.isfinite(batch).all():
        raise CheckFailedError(f"{session.path}: answers are not finite", fix="rtresnet check")
    spread = max(float(np.ptp(batch)), 1e-6)
    if float(np.abs(first[0] - batch[0]).max()) > 0.05 * spread:
        raise CheckFailedError(
            f"{session.path}: an image's answer depends on its batch",
            fix=f"rtresnet check {session.path}",
        )
    backend = session.backend
    name = getattr(backend, "input_name", "images")
    inputs = (Tensor(name=name, datatype=DTYPES[backend.input_dtype.name],
                     shape=(-1, *session.image_shape)),)  # fmt: skip
    values = together if isinstance(together, tuple) else (together,)
    names = TOPK if isinstance(together, tuple) else getattr(backend, "output_names", ["logits"])
    outputs = tuple(
        Tensor(name=name, datatype=DTYPES[value.dtype.name], shape=(-1, *value.shape[1:]))
        for name, value in zip(names, values, strict=True)
    )
    return inputs, outputs, largest


def chain(path: Path) -> list[dict[str, str]]:
    """The artifacts that a file came from, for the page: file, kind, sha256 and state."""
    try:
        return [
            {
                "file": place.name,
                "kind": artifacts.kind_of(place),
                "precision": sidecar.precision if sidecar else "unknown",
                "sha256": sidecar.sha256 if sidecar else "",
                "state": state,
            }
            for place, sidecar, state in artifacts.chain(path)
        ]
    except ArtifactError:
        return []


def statistics_of(model: Model) -> dict[str, Any]:
    """The statistics as a dict."""
    return dataclasses.asdict(model.statistics)
