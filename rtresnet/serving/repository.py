"""The models of a server: loading, versions, running, reloading, statistics.

A source of models is an ONNX file or a plan with its sidecar, or the folder of a Triton repository
with NAME/VERSION/model.onnx or model.plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from rtresnet.core import artifacts, detector_preprocess
from rtresnet.core.errors import (
    ArtifactError,
    CheckFailedError,
    InputError,
    QueueFullError,
    RtresnetError,
    UnavailableError,
)
from rtresnet.runtime.backend import TOPK
from rtresnet.runtime.batcher import Answer, Batcher
from rtresnet.runtime.detector_rows import DetectorRows
from rtresnet.runtime.session import Session
from rtresnet.serving import protocol
from rtresnet.serving.config import ServeConfig
from rtresnet.serving.prometheus import Metrics
from rtresnet.serving.protocol import DATATYPES, InferRequest, InferTensor, RequestError

log = logging.getLogger("rtresnet.serve")

SUFFIXES = (".onnx", ".plan")
POLL_SECONDS = 1.0
FAILURES_IN_A_ROW = 3  # batches that fail before a device counts as lost


class Connection(Protocol):
    """A client's connection; `on_lost` is called once it is closed."""

    on_lost: Callable[[], None] | None


class Answered(NamedTuple):
    """The answer of a model to a batch.

    Attributes:
        values: An array [N, ...] for each output of the model.
        queue_seconds: The longest wait of an image.
        compute_seconds: The longest call of a batch with one of the images.
    """

    values: tuple[np.ndarray, ...]
    queue_seconds: float
    compute_seconds: float


class ServedModel:
    """One version of a model, loaded, checked and warm.

    Args:
        name: Its name in requests.
        version: Its number, as text.
        path: An ONNX file or a plan.
        load: Opens an artifact and verifies its sidecar.
        config: Batching and queue.
        metrics: Receives every batch.

    Attributes:
        healthy: False after several batches in a row failed: the device is lost.
        detector: Converts images and results of a detector; None for a classifier.
        inputs, outputs: Names, types and shapes, with -1 for the batch.

    Raises:
        CheckFailedError: An answer is not finite, or depends on its batch.
    """

    def __init__(
        self,
        name: str,
        version: str,
        path: Path,
        load: Callable[[Path], Session],
        config: ServeConfig,
        metrics: Metrics,
    ) -> None:
        self.name, self.version, self.max_batch = name, version, config.max_batch
        self.stamp = stamp(path)
        self.healthy, self._failed_in_a_row, self._metrics = True, 0, metrics
        self._closing = False
        self.session = load(path)
        try:
            self.detector = DetectorRows(self.session) if self.session.detection else None
            self.batcher = Batcher(
                self.detector or self.session,
                max_batch=self._check(),
                max_wait_ms=config.max_wait_ms,
                queue_limit=config.queue,
                on_batch=self._on_batch,
            )
        except BaseException:
            self.session.close()
            raise

    def _check(self) -> int:
        """Warm the session up and check its answers; returns the largest batch it computes."""
        session, detector, backend = self.session, self.detector, self.session.backend
        check = f"find the cause with: rtresnet check {session.path}"
        if detector is not None:  # takes one image at a time
            noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            images = detector.prepare(noise)
            values = detector(images)
            shapes = dict(zip(detector_preprocess.INPUTS, (detector.shape, (2,)), strict=True))
            names: Sequence[str] = detector_preprocess.OUTPUTS
        else:
            fixed = session.batch
            images = session.example(fixed if fixed is not None and fixed > 1 else self.max_batch)
            first, values = _arrays(session(images[:1])), _arrays(session(images))
            spread = max(float(np.ptp(values[-1])), 1e-6)
            if float(np.abs(first[-1][0] - values[-1][0]).max()) > 0.05 * spread:
                problem = "an image's answer depends on its batch"
                raise CheckFailedError(f"{session.path}: {problem}", fix=check)
            shapes = {getattr(backend, "input_name", "images"): session.image_shape}
            names = TOPK if len(values) > 1 else getattr(backend, "output_names", ["logits"])
        if not all(np.isfinite(value).all() for value in values):
            raise CheckFailedError(f"{session.path}: outputs are not finite", fix=check)
        datatype = DATATYPES[backend.input_dtype.name]
        self.inputs = [InferTensor(name, datatype, [-1, *shape]) for name, shape in shapes.items()]
        self.outputs = [
            InferTensor(name, DATATYPES[value.dtype.name], [-1, *value.shape[1:]])
            for name, value in zip(names, values, strict=True)
        ]
        return len(images)

    @property
    def task(self) -> str:
        """The operation for encoded images: "classify" or "detect"."""
        return "classify" if self.detector is None else "detect"

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return the input [1, ...] for an image uint8 RGB [H, W, 3] of any size."""
        if self.detector is not None:
            return self.detector.prepare(image)
        return self.session.prepare([image])

    async def infer(
        self, request: InferRequest, limit: float, connection: Connection | None = None
    ) -> dict[str, np.ndarray]:
        """Answer a request.

        Args:
            request: Inputs, names of outputs, and the client's time limit.
            limit: Longest time to answer, in seconds.
            connection: When it is lost, the images are removed from the queue.

        Returns:
            The requested outputs by name; text for those requested as classes.

        Raises:
            InputError: The inputs or outputs do not match the model's, or are too large.
            RequestError: The queue is full, the time is over, the client is gone, or an output is
                not finite.
            UnavailableError: The device failed.
        """
        counts = protocol.requested(request, self.outputs)
        images, *extent = protocol.inputs(request, self.inputs, self.max_batch)
        if self.detector is not None:
            images = self.detector.pack(images, *extent)
        if microseconds := request.parameters.timeout:
            limit = min(limit, microseconds / 1e6)
        answered = await self.run(images, limit, connection)
        values = dict(zip((output.name for output in self.outputs), answered.values, strict=True))
        return {
            name: protocol.classified(values[name], self.session.classes, classes)
            if classes
            else values[name]
            for name, classes in counts.items()
        }

    async def run(
        self, images: np.ndarray, limit: float, connection: Connection | None = None
    ) -> Answered:
        """Run a batch of inputs [N, ...]; arguments and errors are those of `infer`."""
        began = time.monotonic()
        answers: list[Answer] = []
        queue = None
        try:
            for image in images:
                answers.append(self.batcher.submit(image))
            await _done(answers[-1], limit, connection)  # answers come in their order
            rows = [_arrays(_result(answer)) for answer in answers]
            values = tuple(np.stack(column) for column in zip(*rows, strict=True))
            self._require_finite(images, values)
            queue = max(answer.queue_seconds for answer in answers)
        except QueueFullError as error:
            raise RequestError(503, f"{self.name}: {error.message}") from None
        except InputError:
            if not self._closing:
                raise
            message = f"{self.name}: its file was reloaded during the request"
            raise RequestError(503, message, fix="send it again") from None
        finally:
            for answer in answers:
                answer.cancel()  # does nothing to those that are done
            self._metrics.run(self.name, self.version, time.monotonic() - began, queue)
        return Answered(values, queue, max(answer.compute_seconds for answer in answers))

    def _require_finite(self, images: np.ndarray, values: tuple[np.ndarray, ...]) -> None:
        """Raise if an output is not finite: JSON has no such numbers, and no client expects them.

        Raises:
            InputError: Neither are the inputs.
            RequestError: The model computes it from finite inputs.
        """
        for output, array in zip(self.outputs, values, strict=True):
            if not np.isfinite(array).all():
                if not np.isfinite(images).all():
                    names = ", ".join(tensor.name for tensor in self.inputs)
                    raise InputError(f"{self.name}: NaN or infinity in {names}")
                raise RequestError(
                    500,
                    f"{self.name}: NaN or infinity in output {output.name}",
                    fix="find the cause with: rtresnet check",
                )

    def _on_batch(self, size: int, seconds: float, failure: BaseException | None) -> None:
        self._metrics.batch(self.name, self.version, size, seconds)
        lost = failure is not None and not isinstance(failure, InputError)
        self._failed_in_a_row = self._failed_in_a_row + 1 if lost else 0
        if self._failed_in_a_row >= FAILURES_IN_A_ROW and self.healthy:
            self.healthy = False
            log.error("model %s fails: %s", self.name, failure)

    def close(self) -> None:
        """Finish queued requests and free the memory."""
        self._closing = True
        try:
            self.batcher.close()
        finally:
            self.session.close()

    @property
    def platform(self) -> str:
        """Triton's name for the runtime."""
        plan = self.session.path.suffix.lower() == ".plan"
        return "tensorrt_plan" if plan else "onnxruntime_onnx"

    def metadata(self, versions: list[str]) -> dict[str, object]:
        """Return its metadata in the protocol's format."""
        return {"name": self.name, "versions": versions, "platform": self.platform,
                "inputs": msgspec.to_builtins(self.inputs),
                "outputs": msgspec.to_builtins(self.outputs)}  # fmt: skip

    def config(self) -> dict[str, object]:
        """Return its configuration in Triton's format."""
        layouts = {"UINT8": {"format": "FORMAT_NHWC"}, "FP32": {"format": "FORMAT_NCHW"}}

        def entry(tensor: InferTensor) -> dict[str, object]:
            datatype = f"TYPE_{tensor.datatype}"
            return {"name": tensor.name, "data_type": datatype, "dims": tensor.shape[1:]}

        return {"name": self.name, "platform": self.platform, "max_batch_size": self.max_batch,
                "input": [
                    entry(tensor) | (layouts[tensor.datatype] if len(tensor.shape) == 4 else {})
                    for tensor in self.inputs
                ],
                "output": list(map(entry, self.outputs))}  # fmt: skip

    def statistics(self) -> dict[str, object]:
        """Return its statistics in Triton's format."""
        return self._metrics.statistics(self.name, self.version)


def _arrays(answer: Any) -> tuple[np.ndarray, ...]:
    """Return logits, or indices and probabilities, as a tuple."""
    return answer if isinstance(answer, tuple) else (np.asarray(answer),)


def _result(answer: Answer) -> Any:
    try:
        return answer.result()
    except (RtresnetError, MemoryError):
        raise
    except Exception as error:
        raise UnavailableError(f"the device failed: {error}") from error


async def _done(answer: Answer, limit: float, connection: Connection | None) -> None:
    """Wait for an answer, or until the client is gone."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def finish(answered: bool) -> None:
        if not done.done():
            done.set_result(answered)

    def wake(answer: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, True)

    answer.add_done_callback(wake)
    if connection is not None:
        connection.on_lost = lambda: finish(False)
    try:
        if not await asyncio.wait_for(done, limit):
            raise RequestError(499, "the client closed the connection")
    except asyncio.TimeoutError:
        raise RequestError(
            504, f"no answer within {limit:g} s", fix="send a longer timeout"
        ) from None
    finally:
        if connection is not None:
            connection.on_lost = None


class Repository:
    """Loads models, finds them by name and version, and reloads files that changed.

    Args:
        sources: ONNX files, plans, or folders of a Triton repository.
        load: Opens an artifact and verifies its sidecar.
        config: The options of the server.

    Attributes:
        ready: Whether the server accepts requests.
        operations: The protocol's reading operations by their names in gRPC: functions of a model's
            name and version that return the fields of gRPC's response.
    """

    def __init__(
        self, sources: Sequence[Path], load: Callable[[Path], Session], config: ServeConfig
    ) -> None:
        self.config, self.metrics, self.ready = config, Metrics(), False
        self._sources, self._load = sources, load
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._last_stamps: dict[Path, Any] = {}
        self._rejected_stamps: dict[Path, Any] = {}
        self.operations: dict[str, Callable[..., dict[str, Any]]] = {
            "ServerLive": lambda *_: {"live": self.healthy},
            "ServerReady": lambda *_: {"ready": self.ready and self.healthy},
            "ServerMetadata": lambda *_: protocol.server(),
            "ModelReady": lambda *model: {"ready": self.ready and self.get(*model).healthy},
            "ModelMetadata": self._metadata,
            "ModelConfig": lambda *model: {"config": self.get(*model).config()},
            "ModelStatistics": lambda *model: {
                "model_stats": [
                    entry.statistics() for entry in ([self.get(*model)] if model[0] else self.all())
                ]
            },
            "RepositoryIndex": lambda *_: {
                "models": [
                    {"name": model.name, "version": model.version,
                     "state": "READY" if model.healthy else "UNAVAILABLE", "reason": ""}
                    for model in self.all()
                ]
            },
        }  # fmt: skip

    def load_all(self) -> None:
        """Load and warm up all models; if one fails, the others are closed.

        Raises:
            InputError: Nothing to serve, or two models of one name and version.
        """
        try:
            for source in self._sources:
                for name, version, path in model_files(source):
                    if version in self._models.get(name, {}):
                        raise InputError(f"{path}: duplicate model {name}, version {version}")
                    self._models.setdefault(name, {})[version] = self._open(name, version, path)
        except BaseException:
            self.close()
            raise
        if not self._models:
            sources = ", ".join(map(str, self._sources))
            raise InputError(
                f"{sources}: no ONNX file or plan to serve", fix="create one: rtresnet export"
            )

    def _open(self, name: str, version: str, path: Path) -> ServedModel:
        return ServedModel(name, version, path, self._load, self.config, self.metrics)

    def get(self, name: str | None, version: str = "") -> ServedModel:
        """Return a model; without a name the only one, without a version the newest.

        Raises:
            RequestError: The model or the version does not exist.
        """
        models = self._models
        if name is None and len(models) == 1:
            name = next(iter(models))
        if name is None or name not in models:
            problem = "name a model" if name is None else f"unknown model {name[:80]!r}"
            raise RequestError(404, problem, fix=f"known: {', '.join(sorted(models))}")
        versions = models[name]
        chosen = version or max(versions, key=int)
        if chosen not in versions:
            raise RequestError(
                404,
                f"{name}: unknown version {version[:20]!r}",
                fix=f"known: {', '.join(versions)}",
            )
        return versions[chosen]

    def _metadata(self, name: str | None, version: str) -> dict[str, object]:
        model = self.get(name, version)
        return model.metadata(sorted(self._models[model.name], key=int))

    def all(self) -> list[ServedModel]:
        """Return every version of every model."""
        return [
            versions[v] for _, versions in sorted(self._models.items())
            for v in sorted(versions, key=int)
        ]  # fmt: skip

    @property
    def healthy(self) -> bool:
        """Whether no device is lost."""
        return all(model.healthy for model in self.all())

    async def watch(self) -> None:
        """Reload files whose content changed, until it is cancelled.

        A file is reloaded when it did not change between two checks, its sidecar is valid and the
        self-check passes. The old version serves until then, and finishes its requests.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for model in self.all():
                try:
                    await self._reload_if_changed(model)
                except Exception:  # other files must still be watched
                    log.exception("reloading %s failed", model.name)

    async def _reload_if_changed(self, model: ServedModel) -> None:
        path, now = model.session.path, stamp(model.session.path)
        settled = self._last_stamps.get(path) == now
        self._last_stamps[path] = now
        if now in (model.stamp, self._rejected_stamps.get(path)) or not settled:
            return
        try:
            new = await asyncio.to_thread(self._open, model.name, model.version, path)
        except Exception as error:  # the old version keeps serving after any error
            self._rejected_stamps[path] = now
            log.error("not reloaded: %s", error)
            return
        self._models[model.name][model.version] = new
        log.info("reloaded %s version %s", model.name, model.version)
        await asyncio.to_thread(model.close)

    def close(self) -> None:
        """Finish queued requests and free the memory of every model, also if one fails to close."""
        with contextlib.ExitStack() as stack:
            for model in self.all():
                stack.callback(model.close)


def model_files(source: Path) -> list[tuple[str, str, Path]]:
    """Return (name, version, file) of the models in a file or a Triton repository's folder."""
    if not source.is_dir():
        return [(source.stem, "1", source)]
    paths = sorted(source.glob("*/*/model.*")) or sorted(source.glob("*/model.*"))
    return [
        (path.parent.parent.name, path.parent.name, path)
        for path in paths
        if path.suffix in SUFFIXES and path.parent.name.isdecimal()
    ]


def stamp(path: Path) -> list[Any]:
    """Return a value that changes when a file or its sidecar is replaced."""
    stamps = []
    for file in (path, artifacts.sidecar_path(path)):
        with contextlib.suppress(OSError):
            status = file.stat()
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return stamps


def chain(path: Path) -> list[dict[str, str]]:
    """Return the artifacts that a file was made from: file, kind, sha256 and state."""
    try:
        return [
            {"file": file.name, "kind": artifacts.kind_of(file), "state": state,
             "precision": sidecar.precision if sidecar else "unknown",
             "sha256": sidecar.sha256 if sidecar else ""}
            for file, sidecar, state in artifacts.chain(path)
        ]  # fmt: skip
    except ArtifactError:
        return []
