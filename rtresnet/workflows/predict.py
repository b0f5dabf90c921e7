"""Predict the classes of a few images, or of any number of images into a table.

A table is computed batch by batch, here or on Ray, and every batch is written immediately: memory
does not grow with the number of images, and an interrupted run can be resumed
(`prediction_table.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rtresnet.core import atomic_io, hardware, locks, provenance, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.serialization import flattened
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.prediction_table import Journal, TableHead, check_table_path
from rtresnet.workflows.predictor import PredictConfig, Prediction, Predictor, PredictorInfo

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

NAMED_ERRORS = 20  # broken images that are reported by name; the table names every one
NAMED_MODELS = 8  # number of models that the message lists


@dataclass(frozen=True, kw_only=True)
class TableConfig(Config):
    """Settings of a table of predictions.

    Attributes:
        excel_safe: Whether names in a CSV are written so that a spreadsheet runs no formula.
        resume: Whether an interrupted run is continued.
        ray: Whether Ray Data makes the predictions.
        actors: Processes of Ray.
    """

    excel_safe: bool = option(
        False,
        "CSV: put an apostrophe before names that a spreadsheet would run as a formula (that start "
        "with = + - @, tab or carriage return). Without it, do not open a CSV with names of "
        "unknown origin in a spreadsheet.",
    )
    resume: bool = option(False, "Resume an interrupted run with the same --out.")
    ray: bool = option(False, "Run on Ray Data, in the cluster of RAY_ADDRESS or a local one.")
    actors: int | None = option(
        None,
        "Number of Ray processes.",
        minimum=1,
        default_text="one for each GPU, or one for each machine",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actors and not self.ray:
            raise InputError("--actors needs --ray", fix="add --ray, or leave out --actors")


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Predictions of a few images.

    Attributes:
        artifact: What predicted.
        images: A prediction for each image that could be decoded.
        skipped: Errors of the other images.
        assumed: What was assumed of the artifact.
        runtime: Where it ran.
    """

    artifact: str
    images: tuple[Prediction, ...]
    skipped: tuple[str, ...]
    assumed: tuple[str, ...]
    runtime: RuntimeInfo = flattened()


@dataclass(frozen=True, kw_only=True)
class PredictTableResult:
    """A table of predictions that was written.

    Attributes:
        artifact: What predicted.
        out: The table.
        images: Number of images, and rows.
        broken: Rows with an error.
        resumed_at: Images that an earlier run had predicted.
        seconds: Duration of this run.
        images_per_second: Images per second of this run.
        batch: Images at a time.
        top: Classes for each image.
        assumed: What was assumed of the artifact.
        runtime: Where it ran.
    """

    artifact: str
    out: Path
    images: int
    broken: int
    resumed_at: int
    seconds: float
    images_per_second: float
    batch: int
    top: int
    assumed: tuple[str, ...]
    runtime: RuntimeInfo = flattened()


class BatchPredictor(Protocol):
    """A `Predictor`, or many of them on Ray."""

    @property
    def info(self) -> PredictorInfo:
        """Settings and device of a prediction."""
        ...

    def batches(self, names: Sequence[str]) -> Iterator[list[Prediction]]:
        """Predict image files in order, `info.batch` at a time."""
        ...

    def close(self) -> None:
        """Free memory."""
        ...


def predict(
    images: Paths,
    artifact: str | os.PathLike[str],
    config: PredictConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> PredictResult:
    """Predict the most probable classes of a few images.

    Args:
        images: An image file or a folder of them, or several.
        artifact: Checkpoint, ONNX file or plan.
        config: Number of classes, batch and decoding threads.
        runtime: Where the artifact runs.
        stated: Preprocessing that replaces the sidecar's, or of a file without a sidecar.
        reporter: Receives a note on every broken image.

    Returns:
        The most probable classes of each image.

    Raises:
        InputError: A file that does not exist, unknown preprocessing, or too many classes.
        DataError: A folder without images, or no image can be decoded.
        ArtifactError: The artifact does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    names = image_files(images)
    predictions: list[Prediction] = []
    skipped: list[str] = []
    with Predictor(artifact, config, runtime=runtime, stated=stated) as predictor:
        for batch in predictor.batches(names):
            for prediction in batch:
                if prediction.error is None:
                    predictions.append(prediction)
                else:
                    skipped.append(prediction.error)
                    reporter.note(f"skipped {prediction.error}")
        info = predictor.info
    if not predictions:
        raise all_broken(names)
    return PredictResult(
        artifact=str(artifact),
        images=tuple(predictions),
        skipped=tuple(skipped),
        assumed=info.assumed,
        runtime=info.runtime,
    )


def predict_table(
    images: Paths,
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PredictConfig | None = None,
    *,
    table: TableConfig | None = None,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> PredictTableResult:
    """Predict the classes of any number of images into a table with a row for each image.

    Rows are collected in `OUT.part`, which an interrupted run leaves behind for `table.resume`.

    Args:
        images: An image file or a folder of them, or several.
        artifact: Checkpoint, ONNX file or plan.
        out: The table: *.parquet, *.csv or *.jsonl. A completed table is overwritten.
        config: Number of classes, batch and decoding threads.
        table: Resuming, Ray, and the CSV's form.
        runtime: Where the artifact runs.
        stated: Preprocessing that replaces the sidecar's, or of a file without a sidecar.
        reporter: Receives progress and notes on broken images.

    Returns:
        Numbers of images that were classified and skipped, and the table's path.

    Raises:
        InputError: As for `predict`; or `out` cannot be written; or an interrupted run is there
            and `resume` is False, or was made with different options or images.
        LockedError: Another process writes the same table.
        DataError: A folder without images, or no image can be decoded.
        ArtifactError: The artifact does not match its sidecar.
        UnavailableError: The device, the provider, Ray, pyarrow or another package is missing.
    """
    out, table = Path(out), table or TableConfig()
    check_table_path(out)
    if table.excel_safe and out.suffix.lower() != ".csv":
        raise InputError("--excel-safe needs --out FILE.csv", fix="leave out --excel-safe")
    names = image_files(images)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.hold_file(out, warn=reporter.note))
        predictor = _predictor(artifact, config, table, runtime, stated)
        stack.callback(predictor.close)
        info = predictor.info
        head = TableHead(
            model=atomic_io.sha256(artifact),
            provider=info.runtime.provider,
            preprocess=info.preprocess,
            top=info.top,
            batch=info.batch,
            images=len(names),
            list_of_images=_digest(names),
        )
        journal = stack.enter_context(Journal(out, head, resume=table.resume))
        done_before = journal.done
        _fill(journal, predictor, names, reporter)
        if journal.broken == len(names):
            journal.discard()
            raise all_broken(names)
        journal.finish(excel_safe=table.excel_safe)
    seconds = time.perf_counter() - begin
    return PredictTableResult(
        artifact=str(artifact),
        out=out,
        images=len(names),
        broken=journal.broken,
        resumed_at=done_before,
        seconds=seconds,
        images_per_second=(len(names) - done_before) / seconds,
        batch=info.batch,
        top=info.top,
        assumed=info.assumed,
        runtime=info.runtime,
    )


def _predictor(
    artifact: str | os.PathLike[str],
    config: PredictConfig | None,
    table: TableConfig,
    runtime: RuntimeConfig | None,
    stated: InputConfig | None,
) -> BatchPredictor:
    if not table.ray:
        return Predictor(artifact, config, runtime=runtime, stated=stated)
    from rtresnet.workflows.prediction_ray import RayPredictor

    return RayPredictor(artifact, config, actors=table.actors, runtime=runtime, stated=stated)


def all_broken(names: Sequence[str]) -> DataError:
    """Return the error for images none of which can be decoded."""
    if len(names) == 1:
        return DataError(f"{names[0]}: cannot be decoded")
    return DataError(f"none of the {len(names):,} images could be decoded")


def _digest(names: Sequence[str]) -> str:
    """Return the sha256 of the images' names, sizes and times, which change with contents."""

    def version(name: str) -> str:
        try:
            stat = Path(name).stat()
        except OSError:
            return name
        return f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}"

    text = "\n".join(map(version, names))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _fill(
    journal: Journal, predictor: BatchPredictor, names: Sequence[str], reporter: Reporter
) -> None:
    """Predict the images that are not in the journal."""
    total = len(names)
    if journal.done:
        reporter.note(f"resuming at image {journal.done:,} of {total:,}")
    if journal.done == total:
        return
    try:
        with reporter.progress(f"{plural(total, 'image')} to {journal.out}", total=total) as update:
            update(completed=journal.done)
            for predictions in predictor.batches(names[journal.done :]):
                broken = [entry for entry in predictions if entry.error is not None]
                for entry in broken[: max(NAMED_ERRORS - journal.broken, 0)]:
                    error = entry.error or ""
                    named = error if entry.image in error else f"{entry.image}: {error}"
                    reporter.note(f"broken: {named}")
                journal.add(predictions)
                update(completed=journal.done)
    except BaseException:
        command = [word for word in provenance.command.get() if word != "--resume"]
        reporter.note(
            f"{journal.done:,} of {plural(total, 'image')} are in {journal.path}"
            + (f"; resume with: {shlex.join(command)} --resume" if command else "")
        )
        raise


def image_files(images: Paths) -> list[str]:
    """List image files: the files as they are named, and all images under the folders.

    Raises:
        InputError: No such file.
        DataError: A folder without images.
    """
    from rtresnet.data.sources import IMAGE_SUFFIXES, images_under

    names: list[str] = []
    for entry in [images] if isinstance(images, str | os.PathLike) else images:
        path = Path(entry)
        if path.is_dir():
            # Strings, because a million Path objects need ten times the memory.
            inside = [os.fspath(image) for image in images_under(path)]
            if not inside:
                raise DataError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
            names += inside
        else:
            if not path.is_file():  # a file that cannot be read or is empty gets a result
                atomic_io.require_file(path, fix="check the path")
            names.append(os.fspath(path))
    return names


def find_model() -> Path:
    """Find the one artifact under engines/ and runs/ that runs on this machine.

    Raises:
        InputError: There is none, or there are several.
    """
    patterns = [("engines", "*.plan")] if hardware.gpus() else []
    patterns += [("engines", "*.onnx"), ("runs", "**/best.pt")]
    models = [path for folder, pattern in patterns for path in sorted(Path(folder).glob(pattern))]
    if not models:
        raise InputError("no model under engines/ or runs/", fix="name one: --with FILE")
    if len(models) > 1:
        rest = len(models) - NAMED_MODELS
        more = f" and {rest} more" if rest > 0 else ""
        raise InputError(
            f"{len(models)} models to choose from: "
            f"{', '.join(map(str, models[:NAMED_MODELS]))}{more}",
            fix=f"name one, as in --with {models[0]}",
        )
    return models[0]
