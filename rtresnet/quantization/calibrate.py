"""Activation ranges from images: which scale each quantized tensor gets.

One pass of the FP32 model over the images, with the tensors of `qdq.placement` as extra outputs,
fills a histogram a tensor (`histogram.py`); each method makes limits of them (`limits.py`). `auto`
compares the methods by the noise that they cause in the logits of images that were held back, keeps
the best for the net, and then tries other limits for single tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from rtresnet.core.errors import DataError, UnknownNameError
from rtresnet.core.preprocess import pieces
from rtresnet.onnxlib import metadata
from rtresnet.quantization import calibrators, qdq
from rtresnet.quantization.bias_correction import bias_shifts
from rtresnet.quantization.equalization import Outlier, equalize, outliers
from rtresnet.quantization.histogram import Histogram
from rtresnet.quantization.minmax_observer import Extents
from rtresnet.quantization.simulate import Simulation, fixed_batch, noise_ratio, session

METHODS = ("auto", *calibrators.METHODS)

Batches = Callable[[], Iterable[np.ndarray]]
"""Called once a pass; gives float32 batches [N, 3, S, S], the same ones each time."""

Report = Callable[[str, int, int | None], None]
"""Called with progress: the phase, how many steps of it are done, and of how many; None: a step is
an image, and the phase goes through all of them."""

# Of the images, how many are held back to choose by; a run of a net of 224 pixels takes a hundred
# times as long as one of 32, and the choice must not outweigh the calibration.
HELD_BACK = 1 / 4
SMALL, SMALL_HELD, MOST_HELD = 64, 128, 16
FACTORS = (0.85, 1.2)  # tried on single tensors, times the limit they have
SMALL_TRIES, TRIES = 40, 8
WITHOUT_IMAGES = "mse"  # there is nothing to choose by
OBSERVING, EQUALIZED = "observing activations", "observing activations after equalization"
CHOOSING = "comparing ranges by their noise"
GAIN = 0.02  # dB that a single tensor's other limit must bring


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Scales, and how they came about.

    Attributes:
        model: To be quantized: the one given, perhaps with outliers brought down.
        scales: Tensor to scale, float32 units a step.
        method: Asked for, or chosen by "auto".
        own: Tensors whose limit is not the method's, with the factor between them.
        ratios: What was tried, with the signal-to-noise of the logits in dB.
        outliers: Tensors whose range a few channels set.
        mended: Those of them that were brought down.
        shifts: Node to what is to be taken off its bias; empty where that did not help.
        exactly: See `qdq.insert`.
        branches: What adds to each shortcut, lowest and highest value seen (`onnxlib/metadata.py`).
    """

    model: onnx.ModelProto
    scales: dict[str, float]
    method: str
    own: dict[str, float]
    ratios: dict[str, float]
    outliers: list[Outlier]
    mended: list[Outlier]
    shifts: dict[str, np.ndarray]
    exactly: bool = False
    branches: metadata.BranchRanges = dataclasses.field(default_factory=dict)

    def quantized(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        """The INT8 model, but for the nodes to keep in float."""
        result = qdq.insert(self.model, self.scales, keep, self.shifts, self.exactly)
        if self.branches:
            metadata.BRANCH_RANGES.set(result, self.branches)
        return result


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[np.ndarray],
    extents: Extents | None = None,
) -> dict[str, Histogram]:
    """What the tensors' values are like, in one pass.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: float32 [N, 3, S, S] each.
        extents: Shown the same images, if they are wanted.

    Raises:
        DataError: No images, or an activation that is not finite.
    """
    source = model.graph.input[0].name
    inner = [name for name in tensors if name != source]
    nodes, ends = (extents.nodes, extents.outputs) if extents else ([], [])
    outputs = [*inner, *ends]
    running, batch = session(model, outputs, nodes), fixed_batch(model)
    found = {name: Histogram(name) for name in tensors}
    count = 0
    for images in batches:
        for part, rows in pieces(images, batch):
            values = running.run(outputs, {source: part})
            if extents:
                extents.see(values[len(inner) :])
                del values[len(inner) :]
            for name in reversed(inner):  # each let go of when it was seen, before the next runs
                found[name].add(values.pop()[:rows])
        if source in found:
            found[source].add(images)
        count += len(images)
    if count == 0:
        raise DataError("no calibration images")
    return found


def _silent(phase: str, done: int, total: int | None) -> None:
    """No report."""


def _counted(batches: Iterable[np.ndarray], phase: str, report: Report) -> Iterator[np.ndarray]:
    """Reports the images of a pass as they go by."""
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
    report: Report = _silent,
) -> Calibrated:
    """Finds a scale for each tensor.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: The calibration images, preprocessed.
        method: One of METHODS. All but "auto" take the model as it is.
        report: Called with progress.

    Raises:
        DataError: No images, or an activation that is not finite.
        UnknownNameError: No such method.
    """
    if method not in METHODS:
        raise UnknownNameError("calibrator", method, METHODS)
    if method != "auto":
        extents = Extents(model)
        found = observe(model, tensors, _counted(batches(), OBSERVING, report), extents)
        return Calibrated(
            model=model, scales=scales_by(method, found), method=method, own={}, ratios={},
            outliers=outliers(found), mended=[], shifts={}, branches=extents.found,
        )  # fmt: skip
    extents = Extents(model)
    held, others = hold_back(_counted(batches(), OBSERVING, report))
    found = observe(model, tensors, others, extents)
    seen, (equal, mended) = outliers(found), equalize(model, found)
    if mended:  # which leaves the branches as they were
        _, others = hold_back(_counted(batches(), EQUALIZED, report))
        found = observe(equal, tensors, others)
    chosen = choose(equal, found, held, _reference(model, held, extents), report)
    return dataclasses.replace(chosen, outliers=seen, mended=mended, branches=extents.found)


def repeat(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Batches,
    saved: Mapping[str, Any],
    report: Report = _silent,
) -> Calibrated:
    """What an earlier calibration of the same model and images came to, without its search.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: The calibration images, preprocessed.
        saved: From `scales.read`.
        report: Called with progress.
    """
    mended, shifts = list[Outlier](), dict[str, np.ndarray]()
    if saved["brought_down"] or saved["biases_corrected"]:
        _, others = hold_back(_counted(batches(), OBSERVING, report))
        # Looked at in the same way: another graph rounds otherwise, and biases with it.
        found = observe(model, tensors, others, Extents(model))
        if saved["brought_down"]:
            model, mended = equalize(model, found)
            _, others = hold_back(_counted(batches(), EQUALIZED, report))
            found = observe(model, tensors, others)
        if saved["biases_corrected"]:
            shifts = bias_shifts(model, found)
    return Calibrated(
        model=model, scales=saved["scales"], method=saved["method"],
        own=saved.get("own_factors", {}), ratios=saved.get("signal_to_noise_db", {}),
        outliers=saved["outliers"], mended=mended, shifts=shifts, branches=saved["branches"],
    )  # fmt: skip


def from_ranges(model: onnx.ModelProto, found: Mapping[str, Histogram]) -> Calibrated:
    """Scales of histograms that no image made (`data_free.py`); biases are corrected."""
    return Calibrated(
        model=model, scales=scales_by(WITHOUT_IMAGES, found), method=WITHOUT_IMAGES, own={},
        ratios={}, outliers=outliers(found), mended=[], shifts=bias_shifts(model, found),
    )  # fmt: skip


def scales_by(method: str, found: Mapping[str, Histogram]) -> dict[str, float]:
    """Every tensor's scale by one method."""
    limit = calibrators.METHODS[method]
    return {name: calibrators.scale(limit(seen)) for name, seen in found.items()}


def hold_back(
    batches: Iterable[np.ndarray],
) -> tuple[list[np.ndarray], Iterable[np.ndarray]]:
    """Splits a share of the images off until there are enough; the rest streams on.

    A batch gives its last images. The list fills while the rest is read; a single image serves as
    both.
    """
    held: list[np.ndarray] = []

    def others() -> Iterable[np.ndarray]:
        for number, images in enumerate(batches):
            most = SMALL_HELD if images.shape[-1] <= SMALL else MOST_HELD
            wanted = max(0, min(math.ceil(len(images) * HELD_BACK), most - sum(map(len, held))))
            rest = len(images) - wanted
            if wanted:
                held.append(images[rest:])
            if rest or number == 0:
                yield images[:rest] if rest else images

    return held, others()


def choose(
    model: onnx.ModelProto,
    found: Mapping[str, Histogram],
    held: Sequence[np.ndarray],
    reference: np.ndarray,
    report: Report = _silent,
) -> Calibrated:
    """The scales of least noise in the logits of the images held back.

    Every method for the whole net first, with and without corrected biases; then other limits for
    single tensors, those with most noise of their own first.
    """
    ratios: dict[str, float] = {}
    candidates = {name: scales_by(name, found) for name in calibrators.METHODS}
    shifts = bias_shifts(model, found)
    simulations = {"": Simulation(model), ", biases corrected": Simulation(model, (), shifts)}
    tries = SMALL_TRIES if held[0].shape[-1] <= SMALL else TRIES
    steps = len(simulations) * len(candidates)
    reached, best, biases = -math.inf, "", ""
    for corrected, simulation in simulations.items():
        for name, scales in candidates.items():
            ratio = noise_ratio(reference, simulation.logits(held, scales))
            ratios[name + corrected] = ratio
            report(CHOOSING, len(ratios), steps + tries)
            if ratio > reached:
                reached, best, biases = ratio, name, corrected
    simulation, scales = simulations[biases], candidates[best]
    own: dict[str, float] = {}
    left = tries
    for name in sorted(scales, key=lambda name: -calibrators.noise(found[name], scales[name])):
        for factor in FACTORS:
            if left <= 0:
                break
            left -= 1
            changed = scales | {name: scales[name] * factor}
            ratio = noise_ratio(reference, simulation.logits(held, changed))
            report(CHOOSING, steps + tries - left, steps + tries)
            if ratio > reached + GAIN:
                scales, reached, own[name] = changed, ratio, factor
                break
    ratios["kept"] = reached
    return Calibrated(
        model=model, scales=scales, method=best, own=own, ratios=ratios, outliers=[], mended=[],
        shifts=shifts if biases else {},
    )  # fmt: skip


def references(
    model: onnx.ModelProto, batches: Iterable[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The images that `calibrate` holds back, and the float net's logits on them."""
    held, others = hold_back(batches)
    for _ in others:
        continue
    return held, _reference(model, held)


def _reference(
    model: onnx.ModelProto, held: Sequence[np.ndarray], extents: Extents | None = None
) -> np.ndarray:
    """The float net's logits; `extents` is shown the images too, if they are wanted."""
    source, output = model.graph.input[0].name, model.graph.output[0].name
    nodes, ends = (extents.nodes, extents.outputs) if extents else ([], [])
    running, batch = session(model, [output, *ends], nodes), fixed_batch(model)
    logits = []
    for part, rows in (piece for images in held for piece in pieces(images, batch)):
        first, *values = running.run(None, {source: part})
        logits.append(first[:rows])
        if extents:
            extents.see(values)
    if not all(np.isfinite(some).all() for some in logits):
        raise DataError(f"{output} is not finite on the calibration images")
    return np.concatenate(logits)
