"""`rtresnet quantize --eval`: what INT8 costs in accuracy, and which blocks to leave in float."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.data.sources import Source
    from rtresnet.metrics import Drop
    from rtresnet.preprocess import Preprocess
    from rtresnet.quantize.calibrate import Calibrated
    from rtresnet.quantize.sensitivity import Block


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a quantized net has to hold.

    Attributes:
        data: Labelled images, as `--data` takes them.
        max_drop: Points of top-1 that may be lost.
    """

    data: str
    max_drop: float


@dataclass(frozen=True, kw_only=True)
class Passed:
    """The net that holds it.

    Attributes:
        model: Quantized.
        kept: Nodes that stay in float.
        measured: For the sidecar.
    """

    model: Any
    kept: tuple[str, ...]
    measured: dict[str, Any]


def open_labelled(gate: Gate) -> Source:
    """The images that the gate is held on; opened before the work, which is long.

    Raises:
        DataError: There are none, or they carry no labels.
    """
    from rtresnet.data.sources import open_source
    from rtresnet.train.evaluate import require_labels

    source = open_source(gate.data, "test")
    require_labels(source)
    return source


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
    """Quantizes everything; then, as long as too much is lost, all but the most harmful blocks.

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
        GateMissed: With every block but one in float still too much is lost.
    """
    from rtresnet.errors import GateMissed
    from rtresnet.metrics import paired_drop
    from rtresnet.quantize.sensitivity import sensitivity

    with common.progress(f"measuring FP32 on {len(labelled)} images of {gate.data}"):
        base = _hits(reference, labelled, preprocess)
    with common.progress("measuring the noise of each block"):
        ranked = sensitivity(found, held, logits)
    tried: list[tuple[int, Drop]] = []
    for count in range(len(ranked)):
        kept = tuple(node for block in ranked[:count] for node in block.nodes)
        model = finish(found.quantized(kept))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            path.write_bytes(model.SerializeToString())
            drop = paired_drop(base, _hits(path, labelled, preprocess))
        tried.append((count, drop))
        if drop.points <= gate.max_drop:
            _show(ranked, count)
            common.out_console().print(_words(drop, count, gate), soft_wrap=True)
            measured = {
                "drop": dataclasses.asdict(drop) | {"data": gate.data},
                "blocks": [
                    {"name": block.name, "alone_db": block.alone, "gain_db": block.gain,
                     "weights": block.weights, "runs_in": _runs_in(number, count)}
                    for number, block in enumerate(ranked)
                ],
            }  # fmt: skip
            return Passed(model=model, kept=kept, measured=measured)
    _show(ranked, len(ranked) - 1)
    count, drop = tried[-1]
    raise GateMissed(
        f"{_words(drop, count, gate)}, more than the {gate.max_drop:g} that --max-drop allows",
        fix="calibrate on more images like those it will see, or keep FP16",
    )


def _hits(path: Path, source: Source, preprocess: Preprocess) -> np.ndarray:
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
        found = [
            logits(backend.infer(images), path).argmax(1) == labels
            for images, labels in loader.batches(source, preprocess, size)
        ]
    return np.concatenate(found)


def _words(drop: Drop, count: int, gate: Gate) -> str:
    floats = f" with {count} block{'s' if count > 1 else ''} left in float" if count else ""
    return (
        f"INT8{floats} loses {drop.points:.2f} points of top-1 "
        f"(95 %: {drop.low:.2f} to {drop.high:.2f}) on {drop.n} images of {gate.data}"
    )


def _runs_in(number: int, floats: int) -> str:
    """The most harmful blocks come first, and are the first to stay in float."""
    return "float" if number < floats else "int8"


def _show(ranked: Sequence[Block], count: int) -> None:
    from rtresnet.report import tables

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
