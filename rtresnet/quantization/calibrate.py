"""Choose the scale of each quantized tensor, from images or from the statistics of batch norm.

One pass of the FP32 model over the images, with the tensors of `qdq.placement` as outputs, fills a
histogram per tensor; each method of `calibrators.py` turns histograms into scales. `auto` compares
the methods by the noise in the logits of held-out images, with and without bias correction, keeps
the best one for the net, and then tries other scales for single tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from rtresnet.core.errors import ArtifactError, DataError, UnknownNameError
from rtresnet.core.preprocess import pieces
from rtresnet.onnxlib import metadata
from rtresnet.onnxlib.graph import GraphIndex
from rtresnet.quantization import calibrators, qdq
from rtresnet.quantization.calibrators import Histogram
from rtresnet.quantization.equalization import (
    Outlier,
    bias_corrections,
    equalize,
    find_outliers,
)
from rtresnet.quantization.number_formats import INT8, NumberFormat
from rtresnet.quantization.placement import residual_branches
from rtresnet.quantization.simulate import Simulation, fixed_batch, make_session, noise_ratio

if TYPE_CHECKING:
    from rtresnet.quantization.scales import SavedScales

METHODS = ("auto", *calibrators.METHODS)

Batches = Callable[[], Iterable[np.ndarray]]
"""Called once per pass; returns float32 batches [N, 3, S, S], the same ones each time."""

Report = Callable[[str, int, int | None], None]
"""Called with the phase, the number of steps done, and how many there are. None: a step is an
image, and the phase goes through all of them."""

# The share of the images that is held out to choose by. A run of a net of 224 pixels takes a
# hundred times as long as one of 32, and the choice must not take longer than the calibration.
HELD_OUT = 1 / 4
SMALL, SMALL_HELD_OUT, MAX_HELD_OUT = 64, 128, 16
FACTORS = (0.85, 1.2)  # tried on single tensors, relative to the method's scale
SMALL_TRIALS, TRIALS = 40, 8
DATA_FREE_METHOD = "mse"
OBSERVING, EQUALIZED = "observing activations", "observing activations after equalization"
CHOOSING = "comparing ranges by their noise"
GAIN = 0.02  # dB that another scale of a single tensor must gain
DATA_FREE_SAMPLES = 4096  # values per channel
LOGISTIC_UNIT = np.sqrt(3) / np.pi  # scale of a logistic distribution of deviation 1


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Scales, and how they were chosen.

    Attributes:
        model: The model to quantize: the input model, with outliers scaled down if that helped.
        scales: Tensor to scale.
        method: The requested method, or the one that "auto" chose.
        overrides: Tensors whose scale differs from the method's, with the factor.
        ratios: Signal-to-noise ratio of the logits in dB, for each candidate.
        outliers: Tensors whose range a few channels determine.
        equalized: Those of them that were scaled down.
        bias_corrections: See `qdq.insert`; empty if they did not help.
        low_bit: See `qdq.insert`.
        number_format: INT8 or FP8.
        float_nodes: Nodes that always stay in float: the stem in FP8.
        branches: Range of the tensor added to each shortcut (`onnxlib/metadata.py`).
    """

    model: onnx.ModelProto
    scales: dict[str, float]
    method: str
    overrides: dict[str, float] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    outliers: list[Outlier] = dataclasses.field(default_factory=list)
    equalized: list[Outlier] = dataclasses.field(default_factory=list)
    bias_corrections: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    low_bit: bool = False
    number_format: NumberFormat = INT8
    float_nodes: tuple[str, ...] = ()
    branches: metadata.BranchRanges = dataclasses.field(default_factory=dict)

    def quantized(
        self, nodes_to_exclude: Collection[str] = (), int8_nodes: Collection[str] = ()
    ) -> onnx.ModelProto:
        """Return the quantized model with some nodes left in float, and some of FP8 in INT8."""
        result = qdq.insert(
            self.model, self.scales, (*self.float_nodes, *nodes_to_exclude), self.bias_corrections,
            self.low_bit, self.number_format, int8_nodes,
        )  # fmt: skip
        if self.branches and self.number_format is INT8:  # only integer kernels of CPUs need them
            metadata.BRANCH_RANGES.set(result, self.branches)
        return result


class MinMaxObserver:
    """Records the range of each residual branch, for `metadata.BRANCH_RANGES`.

    Two reductions per tensor are computed in the graph; the tensor never leaves the session.

    Args:
        model: Folded FP32 model.

    Attributes:
        nodes: The reductions, to be added to the graph.
        outputs: Their results; `add` takes the values in this order.
        ranges: Tensor to its lowest and highest value so far, including 0.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        names = residual_branches(model.graph.node, GraphIndex(model).initializers)
        self.outputs = [f"{name}.{end}" for name in names for end in ("lowest", "highest")]
        self.nodes = [
            helper.make_node(operation, [name], [f"{name}.{end}"], keepdims=0)
            for name in names
            for operation, end in (("ReduceMin", "lowest"), ("ReduceMax", "highest"))
        ]
        self.ranges = dict.fromkeys(names, (0.0, 0.0))

    def add(self, values: Sequence[np.ndarray]) -> None:
        """Add the results of one batch."""
        for index, (name, (low, high)) in enumerate(self.ranges.items()):
            lowest, highest = (float(value) for value in values[2 * index : 2 * index + 2])
            self.ranges[name] = min(low, lowest), max(high, highest)


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[np.ndarray],
    observer: MinMaxObserver | None = None,
) -> dict[str, Histogram]:
    """Fill a histogram per tensor in one pass.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: float32 [N, 3, S, S] each.
        observer: Observer that also receives the images.

    Raises:
        DataError: No images, or an activation that is not finite.
    """
    source = model.graph.input[0].name
    inner = [name for name in tensors if name != source]
    nodes, ends = (observer.nodes, observer.outputs) if observer else ([], [])
    outputs = [*inner, *ends]
    session, batch = make_session(model, outputs, nodes), fixed_batch(model)
    histograms = {name: Histogram(name) for name in tensors}
    count = 0
    for images in batches:
        for part, rows in pieces(images, batch):
            values = session.run(outputs, {source: part})
            if observer:
                observer.add(values[len(inner) :])
                del values[len(inner) :]
            for name in reversed(inner):  # frees each tensor before the next one is processed
                histograms[name].add(values.pop()[:rows])
        if source in histograms:
            histograms[source].add(images)
        count += len(images)
    if count == 0:
        raise DataError("no calibration images")
    return histograms


def ignore_progress(phase: str, done: int, total: int | None) -> None:
    """Report nothing."""


def _counted(batches: Iterable[np.ndarray], phase: str, report: Report) -> Iterator[np.ndarray]:
    """Report the images of a pass as they are read."""
    done = 0
    for images in batches:
        yield images
        done += len(images)
        report(phase, done, None)


def calibrate(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Batches,
    method: str = "auto",
    report: Report = ignore_progress,
    *,
    number_format: NumberFormat = INT8,
    float_nodes: tuple[str, ...] = (),
) -> Calibrated:
    """Choose a scale for each tensor from images.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: The calibration images, preprocessed.
        method: One of METHODS. Only "auto" may change the model.
        report: Called with progress.
        number_format: INT8 or FP8.
        float_nodes: Nodes that stay in float.

    Raises:
        DataError: No images, or an activation that is not finite.
        UnknownNameError: Unknown method, or one that does not support this number format.
    """
    possible = ("auto", *calibrators.methods(number_format))
    if method not in possible:
        raise UnknownNameError("calibrator", method, possible)
    observer = MinMaxObserver(model)
    if method != "auto":
        histograms = observe(model, tensors, _counted(batches(), OBSERVING, report), observer)
        return Calibrated(
            model=model,
            scales=scales_by(method, histograms, number_format),
            method=method,
            outliers=find_outliers(histograms),
            number_format=number_format,
            float_nodes=float_nodes,
            branches=observer.ranges,
        )
    held_out, others = hold_out(_counted(batches(), OBSERVING, report))
    histograms = observe(model, tensors, others, observer)
    outliers, (changed, equalized) = find_outliers(histograms), equalize(model, histograms)
    if equalized:  # equalization does not change the branches
        _, others = hold_out(_counted(batches(), EQUALIZED, report))
        histograms = observe(changed, tensors, others)
    reference = _reference(model, held_out, observer)
    chosen = choose(
        changed, histograms, held_out, reference, report, number_format=number_format,
        float_nodes=float_nodes,
    )  # fmt: skip
    return dataclasses.replace(
        chosen, outliers=outliers, equalized=equalized, branches=observer.ranges
    )


def repeat(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Batches,
    saved: SavedScales,
    report: Report = ignore_progress,
    *,
    number_format: NumberFormat = INT8,
    float_nodes: tuple[str, ...] = (),
) -> Calibrated:
    """Repeat an earlier calibration of the same model on the same images without its search.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: The calibration images, preprocessed.
        saved: From `scales.read`.
        report: Called with progress.
        number_format: As for `calibrate`.
        float_nodes: As for `calibrate`.
    """
    equalized, corrections = list[Outlier](), dict[str, np.ndarray]()
    if saved.equalized or saved.biases_corrected:
        _, others = hold_out(_counted(batches(), OBSERVING, report))
        # Use the same outputs, because another graph rounds differently, which changes the biases.
        histograms = observe(model, tensors, others, MinMaxObserver(model))
        if saved.equalized:
            model, equalized = equalize(model, histograms)
            _, others = hold_out(_counted(batches(), EQUALIZED, report))
            histograms = observe(model, tensors, others)
        if saved.biases_corrected:
            corrections = bias_corrections(model, histograms, number_format)
    return Calibrated(
        model=model,
        scales=saved.scales,
        method=saved.method,
        overrides=saved.overrides,
        ratios=saved.ratios,
        outliers=saved.outliers,
        equalized=equalized,
        bias_corrections=corrections,
        number_format=number_format,
        float_nodes=float_nodes,
        branches=saved.branches,
    )


def calibrate_data_free(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    low: np.ndarray,
    high: np.ndarray,
    *,
    number_format: NumberFormat = INT8,
    float_nodes: tuple[str, ...] = (),
) -> Calibrated:
    """Choose a scale for each tensor without images; biases are corrected.

    Args:
        model: Folded FP32 model that has batch norm statistics (`onnxlib/metadata.py`).
        tensors: From `qdq.placement`.
        low: Smallest value of the input per channel.
        high: Largest value of the input per channel.
        number_format: As for `calibrate`.
        float_nodes: As for `calibrate`.

    Raises:
        ArtifactError: As `sample_activations`.
    """
    histograms = sample_activations(model, tensors, low, high)
    return Calibrated(
        model=model,
        scales=scales_by(DATA_FREE_METHOD, histograms, number_format),
        method=DATA_FREE_METHOD,
        outliers=find_outliers(histograms),
        bias_corrections=bias_corrections(model, histograms, number_format),
        number_format=number_format,
        float_nodes=float_nodes,
    )


def scales_by(
    method: str, histograms: Mapping[str, Histogram], number_format: NumberFormat = INT8
) -> dict[str, float]:
    """Return the scale of every tensor by one method."""
    limit = calibrators.METHODS[method]
    return {
        name: calibrators.scale(limit(histogram, number_format), number_format)
        for name, histogram in histograms.items()
    }


def hold_out(batches: Iterable[np.ndarray]) -> tuple[list[np.ndarray], Iterable[np.ndarray]]:
    """Hold out a share of the images until there are enough; yield the others.

    The last images of each batch are held out, and the others are read first. A single image serves
    both purposes.
    """
    held_out: list[np.ndarray] = []

    def others() -> Iterable[np.ndarray]:
        for number, images in enumerate(batches):
            left = _most_held_out(images) - sum(map(len, held_out))
            count = min(math.ceil(len(images) * HELD_OUT), left)
            split = len(images) - max(0, count)
            if split < len(images):
                held_out.append(images[split:])
            if split or number == 0:
                yield images[:split] if split else images

    return held_out, others()


def _most_held_out(images: np.ndarray) -> int:
    return SMALL_HELD_OUT if images.shape[-1] <= SMALL else MAX_HELD_OUT


def choose(
    model: onnx.ModelProto,
    histograms: Mapping[str, Histogram],
    held_out: Sequence[np.ndarray],
    reference: np.ndarray,
    report: Report = ignore_progress,
    *,
    number_format: NumberFormat = INT8,
    float_nodes: tuple[str, ...] = (),
) -> Calibrated:
    """Choose the scales with the least noise in the logits of the held-out images.

    First every method for the whole net, with and without bias correction; then other scales for
    single tensors, beginning with those that have the most noise themselves.
    """
    ratios: dict[str, float] = {}
    candidates = {
        name: scales_by(name, histograms, number_format)
        for name in calibrators.methods(number_format)
    }
    corrections = bias_corrections(model, histograms, number_format)
    simulations = {
        "": Simulation(model, float_nodes, None, number_format),
        ", biases corrected": Simulation(model, float_nodes, corrections, number_format),
    }
    trials = SMALL_TRIALS if held_out[0].shape[-1] <= SMALL else TRIALS
    steps = len(simulations) * len(candidates)
    best_ratio, method, biases = -math.inf, "", ""
    for corrected, simulation in simulations.items():
        for name, scales in candidates.items():
            ratio = noise_ratio(reference, simulation.logits(held_out, scales))
            ratios[name + corrected] = ratio
            report(CHOOSING, len(ratios), steps + trials)
            if ratio > best_ratio:
                best_ratio, method, biases = ratio, name, corrected
    simulation, scales = simulations[biases], candidates[method]
    overrides: dict[str, float] = {}
    left = trials
    noises = {
        name: calibrators.noise(histograms[name], scale, number_format)
        for name, scale in scales.items()
    }
    for name in sorted(noises, key=lambda name: -noises[name]):
        for factor in FACTORS:
            if left <= 0:
                break
            left -= 1
            changed = scales | {name: scales[name] * factor}
            ratio = noise_ratio(reference, simulation.logits(held_out, changed))
            report(CHOOSING, steps + trials - left, steps + trials)
            if ratio > best_ratio + GAIN:
                scales, best_ratio, overrides[name] = changed, ratio, factor
                break
    ratios["kept"] = best_ratio
    return Calibrated(
        model=model,
        scales=scales,
        method=method,
        overrides=overrides,
        ratios=ratios,
        bias_corrections=corrections if biases else {},
        number_format=number_format,
        float_nodes=float_nodes,
    )


def references(
    model: onnx.ModelProto, batches: Iterable[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the images that `calibrate` holds out, and the float net's logits on them."""
    held_out, others = hold_out(batches)
    for images in others:  # reads no more images than it needs
        if sum(map(len, held_out)) >= _most_held_out(images):
            break
    return held_out, _reference(model, held_out)


def _reference(
    model: onnx.ModelProto, held_out: Sequence[np.ndarray], observer: MinMaxObserver | None = None
) -> np.ndarray:
    """Return the float net's logits; `observer` also receives the images."""
    source, output = model.graph.input[0].name, model.graph.output[0].name
    nodes, ends = (observer.nodes, observer.outputs) if observer else ([], [])
    session, batch = make_session(model, [output, *ends], nodes), fixed_batch(model)
    logits = []
    for part, rows in (piece for images in held_out for piece in pieces(images, batch)):
        first, *values = session.run(None, {source: part})
        logits.append(first[:rows])
        if observer:
            observer.add(values)
    if not all(np.isfinite(batch).all() for batch in logits):
        raise DataError(f"{output} is not finite on the calibration images")
    return np.concatenate(logits)


def sample_activations(
    model: onnx.ModelProto, tensors: Sequence[str], low: np.ndarray, high: np.ndarray
) -> dict[str, Histogram]:
    """Draw activations from the statistics of batch norm (Nagel et al., 2019, section 4.1).

    Each channel of a convolution's output has the mean and deviation of its batch norm and is
    treated as independent of the others. The distribution is logistic, not normal: outputs of
    trained convolutions have longer tails, and ranges from normal values clip too much of them.
    ReLU clips a channel at zero, an addition adds means and variances, and pooling is assumed
    to have no effect, which overestimates the range.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        low: Smallest value of the input per channel.
        high: Largest value of the input per channel.

    Raises:
        ArtifactError: The file has no batch norm statistics, or an operator that is not one of a
            residual net.
    """
    statistics = metadata.NORM_STATISTICS.read(metadata.properties_of(model))
    if statistics is None:
        raise ArtifactError(
            f"{model.graph.name}: has no batch norm statistics, so calibration needs images",
            fix="use images: --calib SPEC",
        )
    index, rng = GraphIndex(model), np.random.default_rng(0)
    values = {model.graph.input[0].name: rng.uniform(low, high, (DATA_FREE_SAMPLES, len(low)))}
    for node in index.nodes:
        inputs = [values[name] for name in node.input if name in values]
        if node.op_type == "Conv":
            mean, std = statistics[node.name]
            size = (DATA_FREE_SAMPLES, len(mean))
            result = mean + std * rng.logistic(scale=LOGISTIC_UNIT, size=size)
        elif node.op_type == "Relu":
            result = np.maximum(inputs[0], 0)
        elif node.op_type == "Add":
            # Shuffled: both inputs may have been drawn from the same samples.
            result = inputs[0] + rng.permutation(inputs[1])
        elif node.op_type == "Pad":
            pads = index.constant(node.input[1])
            assert pads is not None
            result = np.pad(inputs[0], ((0, 0), (int(pads[1]), int(pads[5]))))
        elif node.op_type in ("MaxPool", "Slice", "GlobalAveragePool", "Flatten", "Reshape"):
            result = inputs[0]
        elif node.op_type == "Gemm":
            continue
        else:
            raise ArtifactError(
                f"{node.name}: {node.op_type} is not an operator of a residual net",
                fix="use images: --calib SPEC",
            )
        values[node.output[0]] = result
    histograms = {name: Histogram(name) for name in tensors}
    for name, histogram in histograms.items():
        histogram.add(values[name].astype(np.float32))
    return histograms
