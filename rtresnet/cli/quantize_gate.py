"""The accuracy gate of `rtresnet quantize --eval`: what INT8 loses, which blocks stay in float."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common
from rtresnet.core.errors import CheckFailedError, DataError

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.core.metrics import Drop
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.data.sources import Relabelled, Source
    from rtresnet.quantization.calibrate import Calibrated
    from rtresnet.quantization.sensitivity import Block


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The bound on the accuracy that quantization may cost, and how it is judged.

    Attributes:
        data: Labelled images, as `--data` takes them.
        max_drop: Points of top-1 that may be lost.
        rule: "point": the measured loss must be within `max_drop`. "upper": the upper limit of
            its 95 % interval must be. "point" is the default because a few hundred images, which
            is what most people have, cannot show half a point even for two equal nets.
        classes: Names from --classes, of the net or the images.
    """

    data: str
    max_drop: float
    rule: str = "point"
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A net that passed the gate.

    Attributes:
        model: Quantized.
        kept: Nodes that stay in float.
        measured: For the sidecar.
    """

    model: Any
    kept: tuple[str, ...]
    measured: dict[str, Any]


class AccuracyCheckFailedError(CheckFailedError):
    """The quantized net lost too much accuracy, or was not shown to lose little enough.

    Attributes:
        measured: As in `Passed`, of the last net that was tried.
    """

    def __init__(self, message: str, *, fix: str, measured: dict[str, Any]) -> None:
        super().__init__(message, fix=fix)
        self.measured = measured


def open_labelled(gate: Gate, classes: Sequence[str], net: Path) -> Relabelled:
    """Opens the gate's images before the work, which is long.

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
            f"{gate.data}: {len(source)} images cannot show that the loss is within "
            f"{gate.max_drop:g} points, even if INT8 answers as FP32 does: --gate upper needs "
            f"{needed}",
            fix="give more images, a larger --max-drop, or --gate point",
        )
    return for_model(source, classes, names=gate.classes, model_name=str(net))


def hold(
    gate: Gate,
    labelled: Source,
    reference: Path,
    found: Calibrated,
    held: Sequence[np.ndarray],
    logits: np.ndarray,
    preprocess: Preprocess,
    finish: Callable[[Any], Any],
) -> Passed:
    """Quantizes everything, then leaves the most harmful blocks in float until the gate passes.

    The interval is that of one file on these images. Where several files were tried, the one that
    passes was chosen on the same images, which makes its interval somewhat too favourable.

    Args:
        gate: The bound.
        labelled: Its images.
        reference: The FP32 file.
        found: From calibration.
        held: Images for the noise of each block.
        logits: The FP32 net's on them.
        preprocess: The net's input contract.
        finish: Takes a quantized model, gives what will be written; that is what is measured.

    Raises:
        AccuracyCheckFailedError: The gate does not pass even with every block but one in float.
    """
    from rtresnet.core.metrics import paired_drop
    from rtresnet.quantization.sensitivity import sensitivity

    images = f"on {len(labelled)} images of {gate.data}"
    with common.progress(f"measuring FP32 {images}", total=len(labelled)) as update:
        base = _hits(reference, labelled, preprocess, update)
    with common.progress("measuring the noise of each block"):
        ranked = sensitivity(found, held, logits)
    for count in range(len(ranked)):
        kept = tuple(node for block in ranked[:count] for node in block.nodes)
        model = finish(found.quantized(kept))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            path.write_bytes(model.SerializeToString())
            floats = f", {count} blocks in float," if count else ""
            doing = f"measuring INT8{floats} {images}"
            with common.progress(doing, total=len(labelled)) as update:
                drop = paired_drop(base, _hits(path, labelled, preprocess, update))
        if passes(drop, gate):
            break
    _show(ranked, count)
    measured = {
        "drop": dataclasses.asdict(drop) | {"data": gate.data},
        "gate": judged(drop, gate),
        "blocks": [
            {"name": block.name, "alone_db": block.alone, "gain_db": block.gain,
             "weights": block.weights, "runs_in": _runs_in(number, count)}
            for number, block in enumerate(ranked)
        ],
    }  # fmt: skip
    if passes(drop, gate):
        console = common.out_console()
        for line in (_measurement(drop, count, gate), _judgement(drop, gate)):
            console.print(line, soft_wrap=True, markup=False)
        return Passed(model=model, kept=kept, measured=measured)
    more = "give more images, or accept the measured loss with --gate point"
    raise AccuracyCheckFailedError(
        f"{_measurement(drop, count, gate)} {_judgement(drop, gate)}",
        fix=more
        if drop.points <= gate.max_drop
        else "calibrate on more images like those it will see, or keep FP16",
        measured=measured,
    )


def passes(drop: Drop, gate: Gate) -> bool:
    """Whether a measured drop satisfies the gate's rule."""
    return (drop.high if gate.rule == "upper" else drop.points) <= gate.max_drop


def judged(drop: Drop, gate: Gate) -> dict[str, Any]:
    """The gate and its verdict for the sidecar; `images_needed` is infinite where none suffice."""
    from rtresnet.core.metrics import images_needed, verdict

    return {
        "rule": gate.rule,
        "bound": gate.max_drop,
        "passed": passes(drop, gate),
        "verdict": verdict(drop, gate.max_drop),
        "images_needed": images_needed(drop, gate.max_drop),
    }


def _hits(
    path: Path, source: Source, preprocess: Preprocess, update: Callable[[int], None]
) -> np.ndarray:
    """Which images a file classifies as labelled, bool [N]; broken ones count for no file."""
    import numpy as np

    from rtresnet.data import loader
    from rtresnet.runtime.backend import logits
    from rtresnet.runtime.ort import OrtBackend

    backend = OrtBackend(
        path, preserve_numerics=True
    )  # the file is promised, not what a CPU makes of it
    with contextlib.closing(backend):
        size = loader.batch_size(preprocess)
        found: list[np.ndarray] = []
        for images, labels in loader.batches(source, preprocess, size):
            found.append(logits(backend.infer(images), path).argmax(1) == labels)
            update(sum(map(len, found)))
    return np.concatenate(found)


def _measurement(drop: Drop, count: int, gate: Gate) -> str:
    floats = f" with {count} block{'s' if count > 1 else ''} left in float" if count else ""
    return (
        f"INT8{floats} {'gains' if drop.points < 0 else 'loses'} {abs(drop.points):.2f} points of "
        f"top-1 on {drop.n} images of {gate.data} (95 % interval of the loss: {drop.low:.2f} to "
        f"{drop.high:.2f})."
    )


def _judgement(drop: Drop, gate: Gate) -> str:
    """As in "Measured loss 0.25 points, upper limit 0.94 ..., bound 0.5: not shown to hold"."""
    from rtresnet.core.metrics import images_needed, verdict

    found = verdict(drop, gate.max_drop)
    line = (
        f"Measured {'gain' if drop.points < 0 else 'loss'} {abs(drop.points):.2f} points, upper "
        f"limit of the loss {drop.high:.2f} (95 %, {drop.n} images), bound {gate.max_drop:g}: "
        f"{found}"
    )
    needed = images_needed(drop, gate.max_drop)
    if found == "not shown to hold" and math.isfinite(needed):
        line += f"; about {_rounded_up(needed):,} images would be needed"
    return line


def _rounded_up(number: float) -> int:
    """To two digits: an estimate has no more."""
    unit: int = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _runs_in(number: int, floats: int) -> str:
    """The most harmful blocks come first, and are the first to stay in float."""
    return "float" if number < floats else "int8"


def _show(ranked: Sequence[Block], count: int) -> None:
    from rtresnet.reporting import tables

    rows = [
        (
            block.name,
            f"{block.alone:.1f}",
            f"{block.gain:.2f}",
            f"{100 * block.weights:.1f}",
            _runs_in(number, count),
        )
        for number, block in enumerate(ranked)
    ]
    headings = ("block", "SNR alone, dB", "in float, dB gained", "% of weights", "runs in")
    tables.show(common.out_console(), headings, rows)
