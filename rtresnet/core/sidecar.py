"""The fields of a sidecar, the JSON file next to every artifact.

`artifacts.py` writes it, `serialization.py` converts it to JSON and back.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from rtresnet.core.preprocess import Preprocess
from rtresnet.core.serialization import from_json, nonfinite_to_none

SCHEMA = 1
UNKNOWN_INPUT = "input"  # in `assumed`: `input` has the size, but mean and std are unknown


@dataclass(frozen=True, kw_only=True)
class Model:
    """The net: its name in the zoo, its variants, and the classes of its outputs."""

    architecture: str
    classes: tuple[str, ...]
    shortcut: str
    stride_in: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Origin of the weights.

    Attributes:
        origin: untrained, trained, imagenet, huggingface or file.
        source: Data set, file or repository.
        license: License of published weights, and of weights trained from them; None if not stated.
    """

    origin: str
    sha256: str | None = None
    source: str | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class Link:
    """The artifact this one was made from; `file` is relative to the sidecar's folder."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Origin of the activation scales of an INT8 or FP8 file.

    Attributes:
        images: The data's name.
        n: Number of images that were decoded.
        kept: Nodes left in float to meet the accuracy bound, and in FP8 the stem.
        rest: Data type of all other nodes: "fp32" or "fp16".
        int8: Nodes of an FP8 file that are in INT8 to meet the accuracy bound.
    """

    method: str
    images: str
    images_sha256: str
    n: int
    scales: str
    scales_sha256: str
    kept: tuple[str, ...] = ()
    rest: str = "fp32"
    int8: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimization profile: smallest, best and largest batch."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, kw_only=True)
class Attestation:
    """Facts on the engine from the builder's layer dump. None: not recorded by that version.

    Attributes:
        convolutions: Number of the net's convolutions.
        dtypes: Input type (Int8, Half, Float) to the number of convolutions taking it.
        layers: Number of layers after fusion.
        stages: `dtypes` of each stage (stem, layer1, ...).
        adds: Number of residual Adds.
        unfused_adds: Names of the Adds that run as separate layers.
        requantizes: Layers that only convert a wider type to int8.
        reformats: Layers that only move or convert.
        rounds: Quantizers whose int8 no layer writes: they cost accuracy without a speed-up.
        activations: Bytes of activation memory for each profile.
    """

    convolutions: int
    dtypes: dict[str, int]
    layers: int
    stages: dict[str, dict[str, int]] | None = None
    adds: int | None = None
    unfused_adds: tuple[str, ...] | None = None
    requantizes: int | None = None
    reformats: int | None = None
    rounds: tuple[str, ...] | None = None
    activations: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Build settings and targets of a serialized engine.

    Attributes:
        layers: The file with the engine's fused layers.
        tf32: Whether the builder may multiply FP32 as TF32, with a mantissa of 10 bits; None in
            older sidecars, which did not record it; it was always allowed then.
    """

    builder: str
    version: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    seconds: float
    attested: Attestation | None = None
    layers: Link | None = None
    tf32: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Settings of a detector (Faster R-CNN on the maps of `Model.architecture`).

    Attributes:
        shorter: The shorter side of an image is resized to this, in pixels.
        longer: The longer side becomes at most this.
        canvas: Height and width of a file's input, whose upper left part an image fills;
            None for a checkpoint, which accepts any.
        anchors: Square roots of the anchors' areas, in pixels; each has three ratios.
        anchor_offset: Centre of the first anchors, in strides.
        pool: Side of a region's features after RoIAlign; at 7 the last stage of a residual net has
            stride 1, at 14 stride 2.
        width: Factor on the number of channels of every layer.
        candidates: Boxes of the region proposal network before non-maximum suppression.
        regions: Regions after it, which the head classifies.
        detections: Largest number of returned boxes.
        region_iou: IoU above which a region suppresses another one.
        class_iou: The same for detections of one class.
        least_score: Lowest score of returned detections.
        rounds: Iterations of non-maximum suppression in a file, which is a fixed point.
    """

    shorter: int = 600
    longer: int = 1000
    canvas: tuple[int, int] | None = None
    anchors: tuple[float, ...] = (128.0, 256.0, 512.0)
    anchor_offset: float = 0.5
    pool: int = 14
    width: float = 1.0
    candidates: int = 1000
    regions: int = 300
    detections: int = 100
    region_iou: float = 0.7
    class_iou: float = 0.3
    least_score: float = 0.05
    rounds: int = 16


# Fields named "with" need the functional form of TypedDict.
Parity = TypedDict(
    "Parity",
    {"n": int, "largest": float, "relative": float, "rounding": float, "with": str},
    total=False,
)
"""Difference of the FP32 ONNX file's logits from torch's; `rounding` is that of torch's float32."""

EmbeddingParity = TypedDict(
    "EmbeddingParity", {"n": int, "relative": float, "with": str}, total=False
)
"""Difference of a file with embedded input or output from the plain one."""


class LabelRecord(TypedDict, total=False):
    """Match of a data set's labels with a model's classes: see `core.labels`."""

    matched_by: str
    in_order: bool
    data_classes: int
    model_classes: int
    remarks: list[str]


class AccuracyRecord(TypedDict, total=False):
    """Accuracy on one data set: counts and percentages as in `workflows.evaluate`."""

    n: int
    top1: int
    top5: int | None
    top1_percent: float
    top5_percent: float | None
    data: str
    split: str
    data_sha256: str
    protocol: str
    labels: LabelRecord
    assumed: list[str]


class DropRecord(TypedDict, total=False):
    """Accuracy lost by quantization: see `core.metrics.Drop`."""

    n: int
    lost: int
    won: int
    points: float
    low: float
    high: float
    data: str
    labels: LabelRecord
    assumed: list[str]


class GateRecord(TypedDict, total=False):
    """The accuracy gate and its verdict; no `images_needed` if no number of images is enough."""

    rule: str
    bound: float
    passed: bool
    verdict: str
    images_needed: float | None


class BlockRecord(TypedDict, total=False):
    """Noise of one quantized block: see `workflows.accuracy_gate.BlockNoise`."""

    name: str
    alone_db: float
    gain_db: float
    weights: float
    runs_in: str
    int8_gain_db: float | None


class OutlierRecord(TypedDict, total=False):
    """Channels that alone determine the range of a tensor, and the remedy."""

    tensor: str
    channels: int
    times: float
    remedy: str


class AveragePrecisionRecord(TypedDict, total=False):
    """Average precision of a detector in %: see `detection.average_precision.DetectionAccuracy`."""

    n: int
    objects: int
    voc07: float | None
    voc: float | None
    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None
    classes: dict[str, float | None]
    data: str
    split: str
    data_sha256: str


class DetectionParityRecord(TypedDict, total=False):
    """Difference of two runs of a detector: see `detection.parity.DetectionParity`."""

    n: int
    detections: int
    unmatched: int
    score: float
    box: float
    unsettled: int


class Measurements(TypedDict, total=False):
    """Measurements of an artifact, and of the run that trained its weights."""

    epoch: int
    val_top1: float | None
    val_n: int | None
    test_top1: float
    test_top5: float
    test_n: int
    bn_images: int
    parity: Parity
    ends: EmbeddingParity
    accuracy: list[AccuracyRecord]
    drop: DropRecord
    gate: GateRecord
    blocks: list[BlockRecord]
    outliers: list[OutlierRecord]
    average_precision: AveragePrecisionRecord
    detection_parity: DetectionParityRecord


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The record next to an artifact. Unknown is None.

    Attributes:
        topk: Number of classes that a file outputs, with probabilities; None if it outputs logits.
        detection: Settings of a detector; None for a classifier.
        assumed: Facts that the file does not state, but a person or a default did: one entry each,
            as in "input: mean 0.5,0.5,0.5 and std 0.5,0.5,0.5 (preset half)". Results print them.
            The bare entries "input" and "model" mean that these are unknown.
        measured: Not checked when a sidecar is read, because other versions may write other
            content.
    """

    kind: str
    file: str
    model: Model
    input: Preprocess
    weights: Weights
    precision: str
    topk: int | None = None
    detection: Detection | None = None
    assumed: tuple[str, ...] = ()
    parent: Link | None = None
    calibration: Calibration | None = None
    plan: Plan | None = None
    measured: Measurements = field(default_factory=lambda: Measurements())
    made_by: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    bytes: int = 0
    schema: int = SCHEMA

    @property
    def input_known(self) -> bool:
        """Whether images can be preprocessed by `input`, stated or assumed."""
        return UNKNOWN_INPUT not in self.assumed


def description(sidecar: Sidecar) -> Mapping[str, object]:
    """Return what an artifact records about itself in its own bytes, ready for JSON.

    It omits the facts that only the sidecar's file has: hash, size, measurements and
    provenance. The parent is named without its folder, because folder names are private.
    """
    parent = sidecar.parent
    if parent is not None:
        parent = dataclasses.replace(parent, file=parent.file.rpartition("/")[2])
    facts = dataclasses.replace(
        sidecar, parent=parent, measured=Measurements(), made_by={}, sha256="", bytes=0
    )
    described: Mapping[str, object] = nonfinite_to_none(dataclasses.asdict(facts))
    return described


def from_description(record: Any) -> Sidecar:
    """Read the result of `description`.

    Raises:
        ValueError, TypeError, AttributeError: The record is damaged, or has another schema.
    """
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"schema {record.get('schema')}, but this version of rtresnet reads {SCHEMA}"
        )
    return parse_sidecar(record)


def parse_sidecar(record: Mapping[str, Any]) -> Sidecar:
    """Build a sidecar from parsed JSON.

    Raises:
        TypeError: A field is missing, unknown, or not of the declared type.
    """
    measured = record.get("measured", {})
    if not isinstance(measured, dict):
        raise TypeError("Sidecar: measured: not an object")
    facts = {name: value for name, value in record.items() if name != "measured"}
    return dataclasses.replace(
        from_json(Sidecar, facts), measured=typing.cast(Measurements, measured)
    )


def accuracies(measured: Mapping[str, Any]) -> list[AccuracyRecord]:
    """Return the accuracy records in a sidecar's `measured`, the latest last.

    There is one for each data set: n, top1, data, split, data_sha256, protocol and others.
    Earlier versions kept one only, not in a list and without a hash.
    """
    accuracy = measured.get("accuracy")
    listed = accuracy if isinstance(accuracy, list) else [accuracy]
    return [typing.cast(AccuracyRecord, record) for record in listed if isinstance(record, dict)]


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two accuracy records belong to the same images under the same protocol."""
    key = "data_sha256" if one.get("data_sha256") and other.get("data_sha256") else "data"
    return one.get(key) == other.get(key) and all(
        (one.get(name) or default) == (other.get(name) or default)
        for name, default in (("split", "all"), ("protocol", "center"))
    )


def restated(
    assumed: tuple[str, ...], own: Preprocess | None, stated: Preprocess
) -> tuple[str, ...]:
    """Return `assumed` of an artifact whose input contract `own` is replaced by a stated one."""
    if stated == own:
        return assumed
    others = [entry for entry in assumed if entry.partition(":")[0] != UNKNOWN_INPUT]
    return (*others, *stated.assumptions())
