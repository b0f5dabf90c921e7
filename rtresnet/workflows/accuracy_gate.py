"""The accuracy gate of `quantize`: the loss of INT8 or FP8, and which blocks stay in float."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core.errors import CheckFailedError, DataError
from rtresnet.core.flips import Answers, Flip, flips
from rtresnet.core.labels import LabelMatch
from rtresnet.core.metrics import Drop
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.serialization import flattened, to_builtins
from rtresnet.core.sidecar import Measurements
from rtresnet.workflows.evaluate import ALLOW_BROKEN

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from rtresnet.core.preprocess import Preprocess
    from rtresnet.data.sources import Relabelled, Source
    from rtresnet.quantization.calibrate import Calibrated
    from rtresnet.quantization.sensitivity import BlockSensitivity
    from rtresnet.runtime.cpu_rewrite import CpuModel


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The bound on the loss of accuracy, and how it is judged.

    Attributes:
        data: Labelled images, as for `--data`.
        max_drop: Points of top-1 that may be lost.
        rule: "point": the measured loss must be within `max_drop`. "upper": the upper limit of
            its 95 % interval must be. "point" is the default because a few hundred images, which
            is what most people have, cannot show half a point even for two equal nets.
        classes: Names from --classes, of the net or the images.
        max_broken: Allowed share of broken images, which are ignored.
    """

    data: str
    max_drop: float
    rule: str = "point"
    classes: tuple[str, ...] | None = None
    max_broken: float = 0.01


@dataclass(frozen=True, kw_only=True)
class BlockNoise:
    """The cost of quantizing one block, and how it runs in the file.

    Attributes:
        alone_db: Signal to noise at the logits with only this block quantized.
        gain_db: Gain from leaving this block in float.
        weights: Its share of the net's weights.
        runs_in: "int8", "fp8" or "float".
        int8_gain_db: Gain from INT8 instead of FP8 in this block; None in an INT8 file.
    """

    name: str
    alone_db: float
    gain_db: float
    weights: float
    runs_in: str
    int8_gain_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class GateDrop:
    """The measured loss of accuracy, and on which images.

    Attributes:
        labels: How the images' labels were matched with the net's classes.
        assumed: Assumptions on the labels.
    """

    drop: Drop = flattened()
    data: str
    labels: LabelMatch
    assumed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """The gate's rule and bound, with the verdict.

    Attributes:
        images_needed: Images that would show whether the bound holds; infinite if none suffice.
    """

    rule: str
    bound: float
    passed: bool
    verdict: str
    images_needed: float


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Measurements of the gate.

    Attributes:
        passed: Whether the rule is satisfied.
        drop: The measured loss with its interval.
        gate: Rule, bound and verdict.
        blocks: The most harmful first.
        summary: Two sentences on the loss and the verdict.
        fix: Instruction if the gate did not pass.
        remarks: Remarks on the labels.
        changed: Number of images for which FP32 and the quantized net predict different classes.
        flips: Some of these images; see `core.flips`.
    """

    passed: bool
    drop: GateDrop
    gate: GateVerdict
    blocks: tuple[BlockNoise, ...]
    summary: tuple[str, str]
    fix: str
    remarks: tuple[str, ...] = ()
    changed: int = 0
    flips: tuple[Flip, ...] = ()

    def measured(self) -> Measurements:
        """Return the content of the sidecar's `measured`."""
        return {
            "drop": to_builtins(self.drop),
            "gate": to_builtins(self.gate),
            "blocks": to_builtins(self.blocks),
        }


class AccuracyCheckFailedError(CheckFailedError):
    """The quantized net lost too much accuracy, or was not shown to lose little enough.

    Attributes:
        result: Measurements of the last net that was tried.
    """

    def __init__(self, result: GateResult) -> None:
        super().__init__(" ".join(result.summary), fix=result.fix)
        self.result = result


def open_labelled(gate: Gate, classes: Sequence[str], net: Path) -> Relabelled:
    """Open the gate's images before the work, which is long.

    Args:
        gate: Names the images.
        classes: The net's class names.
        net: For messages.

    Returns:
        The images, labelled with the net's class numbers.

    Raises:
        DataError: There are none, they have no labels or labels of other classes, or they are too
            few for the rule "upper".
    """
    from rtresnet.core.metrics import fewest_images
    from rtresnet.data.sources import for_model, open_source
    from rtresnet.training.evaluate import require_labels

    source = open_source(gate.data, "test")
    require_labels(source)
    fewest = fewest_images(gate.max_drop)
    if gate.rule == "upper" and len(source) < fewest:
        needed = f"at least {fewest:,.0f}" if math.isfinite(fewest) else "a bound above 0"
        raise DataError(
            f"{gate.data}: {plural(len(source), 'image')} cannot prove that the loss is within "
            f"{gate.max_drop:g} points, even if both nets agree on all of them; --gate upper needs "
            f"{needed}",
            fix="use more images, a larger --max-drop, or --gate point",
        )
    return for_model(source, classes, names=gate.classes, model_name=str(net))


@dataclass(frozen=True, kw_only=True)
class GatedModel:
    """A quantized model that passes the gate.

    Attributes:
        float_nodes: Nodes that stay in float for it.
        int8: Nodes of an FP8 model that are in INT8 for it.
    """

    model: onnx.ModelProto
    float_nodes: tuple[str, ...]
    int8: tuple[str, ...]
    result: GateResult


def quantize_within(
    gate: Gate,
    labelled: Relabelled,
    source: Path,
    calibrated: Calibrated,
    held_out: Sequence[np.ndarray],
    logits: np.ndarray,
    preprocess: Preprocess,
    finish: Callable[[onnx.ModelProto], onnx.ModelProto],
    reporter: Reporter,
) -> GatedModel:
    """Quantize everything, then leave the most harmful blocks in float until the gate passes.

    In FP8, blocks with less noise in INT8 are tried in INT8 before float.

    The interval is that of one file on these images. Where several files were tried, the one that
    passes was chosen on the same images, which makes its interval somewhat too favourable.

    Args:
        gate: The bound.
        labelled: Its images.
        source: The FP32 file.
        calibrated: From calibration.
        held_out: Images for the noise of each block.
        logits: The FP32 net's on them.
        preprocess: The net's input contract.
        finish: Converts a quantized model to the form that is written and measured.
        reporter: Receives progress.

    Raises:
        AccuracyCheckFailedError: The gate does not pass even with every block but one in float.
    """
    from rtresnet.core.metrics import paired_drop
    from rtresnet.quantization.sensitivity import sensitivity
    from rtresnet.runtime.cpu_rewrite import CpuModel

    def measured(name: str, path: Path, rewritten: CpuModel | None = None) -> Answers:
        doing = f"measuring {name} on {plural(len(labelled), 'image')} of {gate.data}"
        with reporter.progress(doing, total=len(labelled)) as update:
            return _answers(path, labelled, preprocess, update, gate, rewritten)

    # The float file needs no rewriting for the CPU.
    reference = measured("FP32", source, CpuModel(model=os.fspath(source)))
    correct = reference.classes == labelled.labels[reference.indices]
    with reporter.progress("measuring the noise of each block"):
        ranked = sensitivity(calibrated, held_out, logits)
    precision = calibrated.number_format.name
    for fallbacks in _fallbacks(ranked):
        float_nodes, int8 = (
            tuple(n for block in ranked for n in block.nodes if fallbacks.get(block.name) == kind)
            for kind in ("float", "int8")
        )
        model = finish(calibrated.quantized(float_nodes, int8))
        name = precision.upper() + _described(fallbacks)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{precision}.onnx"
            path.write_bytes(model.SerializeToString())
            answers = measured(name, path)
        drop = paired_drop(correct, answers.classes == labelled.labels[answers.indices])
        if passes(drop, gate):
            break
    blocks = tuple(
        BlockNoise(
            name=block.name,
            alone_db=block.alone,
            gain_db=block.gain,
            weights=block.weights,
            runs_in=fallbacks.get(block.name, precision),
            int8_gain_db=block.int8_gain,
        )
        for block in ranked
    )
    result = _result(gate, labelled, name, drop, blocks, reference, answers)
    if not result.passed:
        raise AccuracyCheckFailedError(result)
    return GatedModel(model=model, float_nodes=float_nodes, int8=int8, result=result)


def _result(
    gate: Gate,
    labelled: Relabelled,
    name: str,
    drop: Drop,
    blocks: tuple[BlockNoise, ...],
    reference: Answers,
    answers: Answers,
) -> GateResult:
    labels = labelled.mapping
    changed, listed = flips(
        reference, answers, labelled.classes,
        label=lambda index: labelled.classes[labelled.labels[index]], locate=labelled.locate,
    )  # fmt: skip
    fix = "calibrate on more images of the same kind as in use, or keep FP16"
    if drop.points <= gate.max_drop:
        fix = "use more images, or accept the measured loss with --gate point"
    return GateResult(
        passed=passes(drop, gate),
        drop=GateDrop(
            drop=drop,
            data=gate.data,
            labels=labels.summary(),
            assumed=tuple(labels.assumptions()),
        ),
        gate=judged(drop, gate),
        blocks=blocks,
        summary=(_measurement(drop, name, gate), _judgement(drop, gate)),
        remarks=tuple(labels.remarks()),
        changed=changed,
        flips=listed,
        fix=fix,
    )


def _fallbacks(ranked: Sequence[BlockSensitivity]) -> Iterator[dict[str, str]]:
    """Yield which blocks run in "float" or "int8" instead, the fewest first.

    At least one block stays quantized.
    """
    for count in range(len(ranked)):
        worst = ranked[:count]
        if any((block.int8_gain or 0) > 0 for block in worst):
            yield {b.name: "int8" if (b.int8_gain or 0) > 0 else "float" for b in worst}
        yield {block.name: "float" for block in worst}


def _described(fallbacks: Mapping[str, str]) -> str:
    counts = Counter(fallbacks.values())
    parts = []
    if counts["int8"]:
        parts.append(f"{plural(counts['int8'], 'block')} in INT8")
    if counts["float"]:
        parts.append(f"{plural(counts['float'], 'block')} left in float")
    return f" with {' and '.join(parts)}" if parts else ""


def passes(drop: Drop, gate: Gate) -> bool:
    """Return whether a measured drop satisfies the gate's rule."""
    return (drop.high if gate.rule == "upper" else drop.points) <= gate.max_drop


def judged(drop: Drop, gate: Gate) -> GateVerdict:
    """Return the gate with its verdict on a measured drop."""
    from rtresnet.core.metrics import images_needed, verdict

    return GateVerdict(
        rule=gate.rule,
        bound=gate.max_drop,
        passed=passes(drop, gate),
        verdict=verdict(drop, gate.max_drop),
        images_needed=images_needed(drop, gate.max_drop),
    )


def _answers(
    path: Path,
    source: Source,
    preprocess: Preprocess,
    update: Callable[[int], None],
    gate: Gate,
    rewritten: CpuModel | None = None,
) -> Answers:
    """Return a file's predictions for every image that can be decoded."""
    import numpy as np

    from rtresnet.core.metrics import softmax
    from rtresnet.data import loader
    from rtresnet.runtime.backend import logits
    from rtresnet.runtime.ort import OrtBackend

    # Measure the file as it is written, not as it is rewritten for a CPU.
    backend = OrtBackend(path, preserve_numerics=True, rewritten=rewritten)
    with contextlib.closing(backend):
        size = loader.batch_size(preprocess)
        outputs: list[np.ndarray] = []
        tally = loader.DecodeErrors(len(source), tolerated=gate.max_broken, fix=ALLOW_BROKEN)
        for images, _ in loader.batches(source, preprocess, size, tally=tally):
            outputs.append(logits(backend.infer(images), path))
            update(sum(map(len, outputs)))
    scores = np.concatenate(outputs)
    return Answers(
        indices=np.setdiff1d(np.arange(len(source)), list(tally.skipped)),
        classes=scores.argmax(axis=1),
        probabilities=softmax(scores).max(axis=1),
    )


def _measurement(drop: Drop, name: str, gate: Gate) -> str:
    return (
        f"{name} {'gains' if drop.points < 0 else 'loses'} {abs(drop.points):.2f} points of "
        f"top-1 on {plural(drop.n, 'image')} of {gate.data} (95 % interval of the loss: "
        f"{drop.low:.2f} to {drop.high:.2f})."
    )


def _judgement(drop: Drop, gate: Gate) -> str:
    """Return, for example, "Passed (--gate point): measured loss 0.25 points, ...: held"."""
    from rtresnet.core.metrics import images_needed, verdict

    outcome = verdict(drop, gate.max_drop)
    line = (
        f"{'Passed' if passes(drop, gate) else 'Failed'} (--gate {gate.rule}): measured "
        f"{'gain' if drop.points < 0 else 'loss'} {abs(drop.points):.2f} points, upper "
        f"limit of the loss {drop.high:.2f} (95 %, {plural(drop.n, 'image')}), bound "
        f"{gate.max_drop:g}: "
    )
    if outcome != "not shown to hold":
        return line + outcome
    line += "within the bound as measured, but not shown to hold"
    needed = images_needed(drop, gate.max_drop)
    if math.isfinite(needed):
        line += f"; to show it with 95 %, about {_rounded_up(needed):,} images would be needed"
    return line


def _rounded_up(number: float) -> int:
    """Round up to two significant digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
