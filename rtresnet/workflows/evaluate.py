"""Measure the accuracy of checkpoints, ONNX files and plans on labelled images.

Several artifacts form an ensemble: their probabilities are averaged, image by image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import artifacts, atomic_io, metrics, reporter, serialization
from rtresnet.core.classification import ClassificationReport, Collector
from rtresnet.core.config import Config, option, parse_percentage
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.labels import LabelMatch, read_classes
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.serialization import flattened
from rtresnet.core.sidecar import AccuracyRecord
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact
from rtresnet.workflows.training_overlap import trained_on

if TYPE_CHECKING:
    from rtresnet.data.loader import DecodeErrors
    from rtresnet.data.sources import Relabelled, Source
    from rtresnet.runtime.session import Session
    from rtresnet.workflows.views import Views


MAX_BROKEN = 0.01
OTHER_PREPROCESSING = "the preprocessing differs from the sidecar's"
ALLOW_BROKEN = "repair or remove them, or allow a share, as in --max-broken 5%"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which of the labelled images are used, and how.

    Attributes:
        split: Part of the data.
        batch: Images at a time.
        classes: Class names of the side that has none.
        max_broken: Allowed share of broken images in [0, 1], which are ignored.
    """

    split: Literal["train", "test", "all"] = option(
        "test", "Part of the data; datasets without a split are evaluated in full."
    )
    batch: int | None = option(
        None, "Number of images at a time.", minimum=1, default_text="by the input's size"
    )
    classes: tuple[str, ...] | None = option(
        None,
        "Class names, one per line or a JSON list: of the model's outputs if it has no names, "
        "else of the data's labels.",
        metavar="FILE",
        parse=read_classes,
        default_text="from the model and the data",
    )
    max_broken: float = option(
        MAX_BROKEN,
        "Allowed share of broken images, which are ignored; with more, the command fails.",
        metavar="N%",
        parse=parse_percentage,
        default_text="1%",
        minimum=0,
        maximum=1,
    )

    def decode_errors(self, source: Source, reporter: Reporter) -> DecodeErrors:
        """Count the broken images of a source; raise DataError if there are too many."""
        from rtresnet.data.loader import DecodeErrors

        return DecodeErrors(len(source), reporter.note, tolerated=self.max_broken, fix=ALLOW_BROKEN)

    def detector_split(self, *allowed: str) -> Literal["train", "test"]:
        """Return the split to run a detector on; of the other fields only `allowed` apply to it.

        Raises:
            InputError: Another field is set, or the split is "all".
        """
        for field in dataclasses.fields(self):
            if field.name not in ("split", *allowed) and getattr(self, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise InputError(f"--{name} does not apply to detectors", fix="leave it out")
        if self.split == "all":
            raise InputError(
                "--split all does not apply to detectors", fix="use --split train or test"
            )
        return self.split


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Options of `eval`.

    Attributes:
        protocol: The paper's test protocol; "dense" is for checkpoints only.
        resize: Shorter side before the crop, in pixels; under "dense" the only scale.
        dense_pooling: How "dense" averages the last map. "map" pools it whole. "window" slides
            the net's own pooling of 7x7 over it with stride 1, and then averages the scores:
            pixels near the border count less, because fewer windows contain them.
        model: Architecture of a checkpoint from elsewhere.
        details: Whether the result has `report`.
    """

    protocol: Literal["center", "10-crop", "dense"] = option(
        "center",
        "Views of an image: the centre crop, ten crops, or (checkpoints only) the complete image "
        "at five scales.",
    )
    resize: int | None = option(
        None,
        "Shorter side of the image before the crop, in pixels; with dense, its only scale.",
        minimum=1,
        default_text="from the artifact",
    )
    dense_pooling: Literal["map", "window"] = option(
        "map",
        "Pooling of the dense test: the complete map at once, or a sliding window of the net's "
        "size (7x7).",
    )
    model: str | None = option(
        None, "Architecture of a checkpoint from elsewhere.", default_text="recognized"
    )
    details: bool = option(
        False,
        "Add the confusion matrix, precision and recall per class, calibration error, confident "
        "mistakes and least certain images to the JSON result.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_pooling != "map" and self.protocol != "dense":
            raise InputError(
                f"--dense-pooling {self.dense_pooling}: applies only to --protocol dense",
                fix="add --protocol dense",
            )


@dataclass(frozen=True, kw_only=True)
class AccuracyResult:
    """Accuracy on one data set, as counts and in percent.

    Attributes:
        artifact: What was measured.
        protocol: How images were shown.
        assumed: What was assumed of the files and of their classes.
        n: Images counted.
        top1: Images whose most probable class is the label.
        top5: Images whose label is among the five most probable; None with five classes or fewer.
        top1_percent: Share of `n`.
        top5_percent: Share of `n`.
        data: The data as it was named.
        split: The part of it that was used.
        data_sha256: Fingerprint of its images.
        labels: How its labels were matched with the classes.
        skipped: Errors of the images that cannot be decoded.
    """

    artifact: str
    protocol: str
    assumed: tuple[str, ...]
    n: int
    top1: int
    top5: int | None
    top1_percent: float
    top5_percent: float | None
    data: str
    split: str
    data_sha256: str
    labels: LabelMatch
    skipped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MemberResult(AccuracyResult):
    """Accuracy of one artifact.

    Attributes:
        artifact_sha256: Hash of the file; None without a sidecar.
        precision: Data type of the net.
        input: Preprocessing that was used.
        size: Side of the input, in pixels.
        resize: Shorter side before the crop; None under the dense protocol.
        scales: Shorter sides under the dense protocol, else None.
        views: Views an image.
        shown: The same in words.
        runtime: Where it ran.
    """

    artifact_sha256: str | None
    precision: str
    input: Preprocess
    size: int
    resize: int | None
    scales: tuple[int, ...] | None
    views: int
    shown: str
    runtime: RuntimeInfo = flattened()


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(AccuracyResult):
    """Accuracy of one artifact or of an ensemble.

    Attributes:
        members: Members of each artifact.
        report: Results for each class and calibration, if the config asks for details.
        only: The single member, if there is one; its fields are written as the result's own.
    """

    members: tuple[MemberResult, ...]
    report: ClassificationReport | None = None
    only: MemberResult | None = flattened(default=None)


def evaluate(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    data: str,
    config: EvaluateConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> EvaluateResult:
    """Measure top-1 and top-5 accuracy.

    Nothing is written; `record_accuracy` writes the result into the sidecars.

    Args:
        paths: An artifact, or several of the same classes, which form an ensemble.
        data: Labelled images, as in "digits", "folder:DIR" or "npz:FILE".
        config: Part of the data, protocol and batch.
        runtime: Where the artifacts run.
        stated: Preprocessing that replaces the sidecars', or of files without a sidecar.
        reporter: Receives progress and notes on broken images.

    Returns:
        Counts and percentages, of each artifact and of the ensemble.

    Raises:
        InputError: A file that does not exist, whose preprocessing is unknown, or that does not
            suit the protocol; or artifacts of other classes.
        DataError: The data cannot be read, its labels do not match the classes, or more
            images are broken than the config allows.
        ArtifactError: An artifact does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    from rtresnet.data import sources
    from rtresnet.workflows.views import Views, evaluate_views

    config, runtime, data = config or EvaluateConfig(), runtime or RuntimeConfig(), str(data)
    names = [str(paths)] if isinstance(paths, str | os.PathLike) else [str(path) for path in paths]
    if not names:
        raise InputError("no artifact to evaluate", fix="name a checkpoint, ONNX file or plan")
    scales = (config.resize,) if config.resize and config.protocol == "dense" else ()
    views = Views(protocol=config.protocol, scales=scales)
    with contextlib.ExitStack() as stack:
        sessions, assumed = _opened(names, config, runtime, stated, stack)
        source = sources.for_model(
            sources.open_source(data, config.split), sessions[0].classes, names=config.classes,
            model_name=names[0],
        )  # fmt: skip
        tally = config.decode_errors(source, reporter)
        collector = Collector(source.classes) if config.details else None
        hooks: dict[str, Any] = {"on_scores": collector.add} if collector else {}
        with reporter.progress(f"evaluating {', '.join(names)}", total=len(source)) as update:
            measured = evaluate_views(
                sessions, source, views, batch=config.batch, tally=tally, on_images=update, **hooks
            )
        about = _about(sessions, source, data, config) | {"skipped": tuple(tally.skipped.values())}
        assumed = (*assumed, *source.mapping.assumptions())
        members = tuple(
            MemberResult(
                artifact=name, assumed=(*session.assumed, *assumed), precision=session.precision,
                artifact_sha256=session.sidecar.sha256 if session.sidecar else None,
                runtime=session.info, **_counts(accuracy, session.topk), **about,
                **_described(views, session.preprocess, config.dense_pooling),
            )
            for name, session, accuracy in zip(names, sessions, measured.members, strict=True)
        )  # fmt: skip
    report = collector.report(source.locate) if collector else None
    if len(members) == 1:
        (only,) = members
        shared = {field.name: getattr(only, field.name) for field in fields(AccuracyResult)}
        return EvaluateResult(**shared, members=members, report=report, only=only)
    return EvaluateResult(
        artifact=f"ensemble of {len(members)}", assumed=assumed, members=members, report=report,
        **_counts(measured.ensemble), **about,
    )  # fmt: skip


def _opened(
    names: Sequence[str],
    config: EvaluateConfig,
    runtime: RuntimeConfig,
    stated: InputConfig | None,
    stack: contextlib.ExitStack,
) -> tuple[list[Session], tuple[str, ...]]:
    """Return the artifacts as the protocol needs them, with classes in one order.

    Returns:
        The sessions, which `stack` closes, and what was assumed of their classes.
    """
    if config.protocol == "dense":
        for name in names:
            _require_checkpoint(name)
    sessions = []
    for name in names:
        place = runtime.for_artifact(name, names)
        session = load_artifact(name, place, stated=stated, model=config.model)
        sessions.append(session)
        stack.callback(session.close)
        if session.detection is not None:
            raise InputError(f"{name}: is a detector", fix="use evaluate_detector")
    _require_all_probabilities(sessions, config.protocol)
    sessions, assumed = _in_one_order(sessions, config.classes)
    return [_shown(session, config) for session in sessions], assumed


def record_accuracy(
    result: EvaluateResult, *, required: bool = False, reporter: Reporter = reporter.DEFAULT
) -> None:
    """Write each artifact's accuracy into its sidecar, or note why it is not written.

    An accuracy belongs to the artifact only if it was measured as the sidecar states: with one
    centre crop and the sidecar's preprocessing.

    Args:
        result: From `evaluate`.
        required: Whether an accuracy that cannot be recorded is an error.
        reporter: Receives a note if it is not recorded.

    Raises:
        InputError: `required`, and there is no sidecar, it cannot be written, or the accuracy is
            not the artifact's own.
    """
    for member in result.members:
        path, reason = member.artifact, None
        sidecar = artifacts.read_sidecar(path)
        if member.protocol != "center":
            reason = f"the accuracy of protocol {member.protocol} is not that of one centre crop"
        elif sidecar is not None and member.input != sidecar.input:
            reason = OTHER_PREPROCESSING
        entries = serialization.to_builtins(member)
        entry = {name: entries[name] for name in AccuracyRecord.__annotations__}
        record = functools.partial(
            artifacts.record_accuracy, path, typing.cast(AccuracyRecord, entry),
            sha256=member.artifact_sha256,
        )  # fmt: skip
        write_measured(path, reason, record, required=required, reporter=reporter)


def write_measured(
    path: str | os.PathLike[str],
    reason: str | None,
    write: Callable[[], None],
    *,
    required: bool,
    reporter: Reporter,
) -> None:
    """Write a measurement into an artifact's sidecar, or say why it is not written.

    Args:
        path: The artifact.
        reason: Why the measurement is not the artifact's own; None if it is.
        write: Writes it.
        required: Whether a measurement that cannot be written is an error.
        reporter: Receives the reason otherwise.

    Raises:
        InputError: `required`, and it cannot be written.
    """
    fix = "leave out --record"
    if reason is None and not artifacts.sidecar_path(path).exists():
        reason, fix = "there is no sidecar", f"rtresnet adopt {path}, or leave out --record"
    if reason is None:
        try:
            write()
            return
        except (InputError, ArtifactError, OSError) as error:
            reason = str(error)
    if required:
        raise InputError(f"{path}: accuracy not recorded: {reason}", fix=fix)
    reporter.note(f"{path}: accuracy not recorded: {reason}")


def _require_checkpoint(name: str) -> None:
    """Raise InputError if an artifact takes images of one size only."""
    path = atomic_io.require_file(name, fix="create it with: rtresnet export")
    if artifacts.kind_of(path) == "checkpoint":
        return
    origin, _, state = list(artifacts.chain(path))[-1]
    verified = state == "ok" and artifacts.kind_of(origin) == "checkpoint"
    raise InputError(
        f"{path}: its input size is fixed, but --protocol dense needs any size",
        fix="evaluate its checkpoint" + (f", {origin}" if verified else ""),
    )


def _require_all_probabilities(sessions: Sequence[Session], protocol: str) -> None:
    """Raise InputError if a mean needs probabilities that a top-K file does not give."""
    for session in sessions:
        if session.topk is not None and (len(sessions) > 1 or protocol != "center"):
            path, sidecar = session.path, session.sidecar
            parent = artifacts.parent_path(path, sidecar) if sidecar else None
            raise InputError(
                f"{path}: outputs only the {session.topk} most probable classes, but an ensemble "
                "or several crops need the probabilities of all classes",
                fix=f"use {parent or 'the file it was made from'}",
            )


def _in_one_order(
    sessions: Sequence[Session], names: Sequence[str] | None
) -> tuple[list[Session], tuple[str, ...]]:
    """Return the nets of an ensemble in the order of the first one's classes, and what was assumed.

    Raises:
        InputError: The classes differ, or one net does not return scores of all classes.
    """
    first, *others = sessions
    first.require_classes()
    matched = [other.matched(first, names) for other in others]
    assumed = [line for _, mapping in matched for line in mapping.assumptions()]
    return [first, *(session for session, _ in matched)], tuple(assumed)


def _shown(session: Session, config: EvaluateConfig) -> Session:
    """Return the session as the protocol needs it: with another resize, or as a dense net."""
    preprocess, resize = session.preprocess, config.resize
    if resize is not None and resize < preprocess.size:
        raise InputError(
            f"--resize {resize}: smaller than the input of {session.path}, "
            f"{preprocess.size} x {preprocess.size} pixels",
            fix=f"use --resize {preprocess.size} or more",
        )
    if config.protocol != "dense":
        preprocess = dataclasses.replace(preprocess, resize=resize or preprocess.resize)
        return session.restated(preprocess, session.assumed)
    from rtresnet.models.nets import DenseBackend, Net, TorchBackend

    assert isinstance(session.backend, TorchBackend)
    assert isinstance(session.backend.net, Net)
    return session.with_backend(
        DenseBackend(
            session.backend.net, session.preprocess.size, sliding=config.dense_pooling == "window"
        )
    )


def _about(
    sessions: Sequence[Session], source: Relabelled, data: str, config: EvaluateConfig
) -> dict[str, Any]:
    labels = source.mapping.summary()
    nets = [(s.path, s.sidecar.weights if s.sidecar else None) for s in sessions]
    remarks = (*labels.remarks, *trained_on(nets, source, config.split))
    return {
        "protocol": config.protocol,
        "data": data,
        "split": config.split if source.splits else "all",
        "data_sha256": source.fingerprint(),
        "labels": dataclasses.replace(labels, remarks=remarks),
    }


def _counts(accuracy: metrics.Accuracy, topk: int | None = None) -> dict[str, Any]:
    if topk is not None and topk < 5:
        accuracy = dataclasses.replace(accuracy, top5=None)
    return dataclasses.asdict(accuracy) | {
        "top1_percent": accuracy.top1_percent,
        "top5_percent": accuracy.top5_percent,
    }


def _described(views: Views, preprocess: Preprocess, pooling: str) -> dict[str, Any]:
    """Return how the images were shown, as fields and in words."""
    size, resize, count = preprocess.size, preprocess.resize, views.count(preprocess)
    scales = views.scales_for(preprocess)
    pixels = f"shorter side {', '.join(map(str, scales))}" if scales else f"{size} of {resize}"
    sliding = ", pooled in a sliding window" if pooling == "window" else ""
    return {
        "input": preprocess,
        "size": size,
        "resize": None if scales else resize,
        "scales": scales or None,
        "views": count,
        "shown": f"{views.protocol}, {pixels} px, {plural(count, 'view')}{sliding}",
    }
