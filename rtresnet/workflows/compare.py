"""Measure how far two artifacts agree on the same images."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rtresnet.core import metrics, reporter
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.flips import Answers, Flip, flips
from rtresnet.core.labels import LabelMatch
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows.detect import is_detector
from rtresnet.workflows.evaluate import DataConfig
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact, states_input

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.runtime.backend import TopK
    from rtresnet.runtime.session import Session
    from rtresnet.workflows.detect_compare import CompareDetectorsResult


@dataclass(frozen=True, kw_only=True)
class CompareConfig(DataConfig):
    """Which images two artifacts are compared on."""


@dataclass(frozen=True, kw_only=True)
class ComparedArtifact:
    """One of two artifacts.

    Attributes:
        artifact: The file.
        precision: Data type of the net.
        assumed: What was assumed of the file.
        runtime: Where it ran.
    """

    artifact: str
    precision: str
    assumed: tuple[str, ...]
    runtime: RuntimeInfo = flattened()


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """Result of `compare`: the agreement of two artifacts.

    Attributes:
        n: Images compared.
        largest: Largest absolute difference of any logit; None if a file gives no logits.
        relative: Norm of the difference over the norm of the reference; None as `largest`.
        agreement: Share of images with the same top-1, in [0, 1].
        data: The images as they were named.
        reference: The first artifact.
        candidate: The second artifact.
        classes: How the candidate's classes were matched with the reference's.
        assumed: What was assumed of the classes.
        changed: Number of images for which the nets predict different classes.
        flips: Some of these images; see `core.flips`.
    """

    n: int
    largest: float | None
    relative: float | None
    agreement: float
    data: str
    reference: ComparedArtifact
    candidate: ComparedArtifact
    classes: LabelMatch
    assumed: tuple[str, ...]
    changed: int
    flips: tuple[Flip, ...]


def compare(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    data: str,
    config: CompareConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> CompareResult | CompareDetectorsResult:
    """Compare top-1 and logits of two artifacts; top-K files by top-1 only.

    Two detectors are compared by `compare_detectors`.

    Args:
        reference: Checkpoint, ONNX file or plan.
        candidate: Another one of the same classes.
        data: Labelled images, as in "digits" or "folder:DIR"; for detectors images with boxes.
        config: Part of the data and batch; for detectors only `split` applies.
        runtime: Where the artifacts run.
        stated: Preprocessing of the artifacts without a sidecar.
        reporter: Receives progress and notes on broken images.

    Returns:
        Agreement of top-1, and the differences of the logits.

    Raises:
        InputError: A file that does not exist or whose preprocessing is unknown, artifacts of
            different classes or tasks, or `stated` although both sidecars state it.
        DataError: The data cannot be read.
        ArtifactError: An artifact does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    config, runtime = config or CompareConfig(), runtime or RuntimeConfig()
    stated = stated or InputConfig()
    names = [str(reference), str(candidate)]
    classifiers = [name for name in names if not is_detector(name)]
    if not classifiers:
        from rtresnet.workflows.detect_compare import compare_detectors

        return compare_detectors(
            reference, candidate, data, split=config.detector_split(), runtime=runtime,
            stated=stated, reporter=reporter,
        )  # fmt: skip
    if len(classifiers) == 1:
        raise InputError(
            f"{classifiers[0]}: a classifier, which cannot be compared with a detector",
            fix="name two detectors",
        )
    return _compare_classifiers(names, data, config, runtime, stated, reporter)


def _compare_classifiers(
    names: Sequence[str],
    data: str,
    config: CompareConfig,
    runtime: RuntimeConfig,
    stated: InputConfig,
    reporter: Reporter,
) -> CompareResult:
    from rtresnet.data.sources import open_source

    if not stated.empty and all(map(states_input, names)):
        raise InputError(
            "both sidecars state the preprocessing", fix="leave out --size, --mean and --std"
        )
    source = open_source(data, config.split)
    with contextlib.ExitStack() as stack:
        sessions = []
        for name in names:
            place = runtime.for_artifact(name, names)
            session = load_artifact(name, place, stated=None if states_input(name) else stated)
            sessions.append(session)
            stack.callback(session.close)
        first, second = sessions
        second, mapping = second.matched(first, config.classes)
        (one, indices), (other, _) = (
            _answers(session, source, config, reporter) for session in (first, second)
        )
        changed, listed = flips(
            _best(one, indices), _best(other, indices), first.classes or _numbers(one, other),
            label=lambda index: _label(source, index), locate=source.locate,
        )  # fmt: skip
        about = [
            ComparedArtifact(
                artifact=name, precision=session.precision, assumed=session.assumed,
                runtime=session.info,
            )
            for name, session in zip(names, (first, second), strict=True)
        ]  # fmt: skip
    return CompareResult(
        **_measured(one, other),
        changed=changed,
        flips=listed,
        data=data,
        reference=about[0],
        candidate=about[1],
        classes=mapping.summary(),
        assumed=tuple(mapping.assumptions()),
    )


def _answers(
    session: Session, source: Source, config: CompareConfig, reporter: Reporter
) -> tuple[np.ndarray | TopK, np.ndarray]:
    """Return an artifact's predictions for every decodable image, and the images' indices."""
    from rtresnet.data import loader

    preprocess = session.preprocess
    tally = config.decode_errors(source, reporter)
    batches = loader.batches(
        source, preprocess, config.batch or loader.batch_size(preprocess), tally=tally
    )
    with reporter.progress(f"running {session.path}"):
        answers = [session(images) for images, _ in batches]
    if not answers:
        raise DataError(f"{source.name}: no image could be decoded")
    decoded = np.setdiff1d(np.arange(len(source)), list(tally.skipped))
    if isinstance(answers[0], tuple):
        indices, probabilities = (np.concatenate(part) for part in zip(*answers, strict=True))
        return (indices, probabilities), decoded
    return np.concatenate(answers), decoded


def _best(answer: np.ndarray | TopK, indices: np.ndarray) -> Answers:
    """Return the most probable class of each image."""
    shares = answer[1] if isinstance(answer, tuple) else metrics.softmax(answer)
    return Answers(indices=indices, classes=_top1(answer), probabilities=shares.max(axis=1))


def _numbers(*answers: np.ndarray | TopK) -> list[str]:
    """Return class numbers as names, for files with an unknown number of classes."""
    return [str(number) for number in range(1 + max(int(_top1(a).max()) for a in answers))]


def _label(source: Source, index: int) -> str | None:
    label = int(source.labels[index])
    return source.classes[label] if label >= 0 else None


def _measured(reference: np.ndarray | TopK, candidate: np.ndarray | TopK) -> dict[str, Any]:
    """Return fields of the result: n, largest, relative, agreement."""
    if not isinstance(reference, tuple) and not isinstance(candidate, tuple):
        return dataclasses.asdict(metrics.parity(reference, candidate))
    first, second = _top1(reference), _top1(candidate)
    agreement = float(((first == second) & (first >= 0)).mean())
    return {"n": len(first), "largest": None, "relative": None, "agreement": agreement}


def _top1(answer: np.ndarray | TopK) -> np.ndarray:
    """Return the best class of each row, int64 [N]; -1 if an output is not a number."""
    values = answer[1] if isinstance(answer, tuple) else answer
    best = answer[0][:, 0] if isinstance(answer, tuple) else answer.argmax(axis=1)
    return np.where(np.isnan(values).any(axis=1), -1, best)
