"""The INT8 half of `rtresnet quantize`: calibration, with images or without, and its gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common
from rtresnet.core import serialization
from rtresnet.core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.cli.quantize_gate import Gate
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.core.sidecar import Calibration, Sidecar
    from rtresnet.onnxlib.learned import Learned
    from rtresnet.quantization.calibrate import Calibrated

CALIB = Path("calib")
RANDOM_IMAGES = 32


def scales_path(out: Path) -> Path:
    """Where the scales of an INT8 file go: calib/, or next to it where calib/ is not writable.

    Raises:
        InputError: Neither can be written to.
    """
    from rtresnet.core import atomic_io

    path = CALIB / f"{out.stem}.json"
    try:
        atomic_io.require_place(path)
    except InputError as error:
        path = out.with_name(f"{out.stem}.scales.json")
        atomic_io.require_place(path)
        common.note(f"{error.message}: new scales go to {path}")
    return path


def int8(
    source: Path,
    model: Any,
    sidecar: Sidecar,
    out: Path,
    path: Path,
    calib: str | None,
    calibrator: str,
    images: int,
    gate: Gate | None,
    rest: str,
) -> tuple[Any, Calibration, dict[str, Any]]:
    """Quantizes a model.

    Args:
        source: The FP32 file.
        model: What is in it.
        sidecar: Its record.
        out: Where the INT8 file will go.
        path: Where its scales will go, from `scales_path`.
        calib: Images, None for those in calib/, or "none".
        calibrator: See `calibrate.METHODS`.
        images: How many.
        gate: What must be held, if anything.
        rest: "fp32" or "fp16".

    Returns:
        The quantized model, how it was calibrated, and what was measured.
    """
    from rtresnet.cli import quantize_gate
    from rtresnet.core import atomic_io
    from rtresnet.core.sidecar import Calibration
    from rtresnet.onnxlib import learned
    from rtresnet.quantization import calibrate, qdq, scales, simulate
    from rtresnet.quantization.prepare import prepare

    model = prepare(model)
    learned_scales = learned.of({entry.key: entry.value for entry in model.metadata_props})
    learned.refuse_calibration(source, learned_scales, calib, calibrator)
    if learned_scales is not None:
        if gate is not None:
            raise InputError(
                f"{source}: --eval would leave blocks in float, and its scales were learned with "
                "all of them in INT8",
                fix="leave --eval out, and see: rtresnet compare",
            )
        return _as_learned(model, learned_scales, sidecar, path, rest)
    if calib == "none":
        if gate is not None:
            raise InputError("--eval needs --calib with images, for the noise of each block")
        return _without_images(model, sidecar, path, rest)
    labelled = None
    if gate is not None:
        labelled = quantize_gate.open_labelled(gate, sidecar.model.classes, source)
    batches, name, fingerprint, count = calibration_batches(calib, sidecar.input, images)
    tensors = list(qdq.placement(model))
    if (batch := simulate.fixed_batch(model)) is not None:
        how = "image by image" if batch == 1 else f"{batch} images at a time"
        common.note(f"{source}: takes batches of {batch}; calibrated {how}")
    about = {
        "onnx_sha256": sidecar.sha256,
        "images": name,
        "images_sha256": fingerprint,
        "n": count,
        "preprocessing": serialization.known(dataclasses.asdict(sidecar.input)),
        "calibrator": calibrator,
    }
    kept_at = CALIB / f"{out.stem}.json"  # perhaps in a folder that can be read only
    saved = _saved_scales(kept_at, about)
    if saved is not None:
        path = kept_at
    elif path != kept_at:
        saved = _saved_scales(path, about)
    doing = f"calibrating on {count} images of {name} ({calibrator})"
    with common.progress(doing, total=count) as update:

        def report(phase: str, done: int, total: int | None) -> None:
            update(done, phase, count if total is None else total)

        if saved is not None:
            found = calibrate.repeat(model, tensors, batches, saved, report)
        else:
            found = calibrate.calibrate(model, tensors, batches, calibrator, report)
            scales.write(path, found, about)
    outliers = _tell(found, calibrator)
    kept: tuple[str, ...] = ()
    measured: dict[str, Any] = {}
    finish = functools.partial(_with_rest, rest=rest)
    if gate is None or labelled is None:
        result = finish(found.quantized())
    else:
        held, logits = calibrate.references(model, batches())
        passed = quantize_gate.hold(
            gate, labelled, source, found, held, logits, sidecar.input, finish
        )
        result, kept, measured = passed.model, passed.kept, passed.measured
        labels = labelled.mapping
        measured["drop"] |= {"labels": labels.record(), "assumed": labels.assumptions()}
        common.footer(f"Assumed: {line}." for line in labels.assumptions())
        common.footer(f"Note: {line}." for line in labels.remarks())
    if outliers:
        measured |= {"outliers": outliers}
    calibration = Calibration(
        method=found.method,
        images=name,
        images_sha256=fingerprint,
        n=count,
        scales=path.as_posix(),
        scales_sha256=atomic_io.sha256(path),
        kept=kept,
        rest=rest,
    )
    return result, calibration, measured


def _as_learned(
    model: Any, learned: Learned, sidecar: Sidecar, path: Path, rest: str
) -> tuple[Any, Calibration, dict[str, Any]]:
    """INT8 with the scales that training left in the file."""
    from rtresnet.onnxlib.learned import METHOD
    from rtresnet.quantization import low_bit_scales
    from rtresnet.quantization.calibrate import Calibrated

    found = Calibrated(
        model=model,
        scales={name: low_bit_scales.scale(scale) for name, scale in learned.scales.items()},
        method=METHOD, own={}, ratios={}, outliers=[], mended=[], shifts={}, exactly=True,
        branches=learned.branches,
    )  # fmt: skip
    about = {
        "images": learned.images,
        "images_sha256": learned.images_sha256,
        "n": learned.n,
        "calibrator": METHOD,
    }
    return _uncalibrated(found, about, sidecar, path, rest)


def _without_images(
    model: Any, sidecar: Sidecar, path: Path, rest: str
) -> tuple[Any, Calibration, dict[str, Any]]:
    """INT8 from what the file says of its batch norms."""
    from rtresnet.quantization import calibrate, data_free, qdq

    low, high = (sidecar.input.normalize(_plane(level))[0, :, 0, 0] for level in (0, 255))
    ranges = data_free.ranges(model, list(qdq.placement(model)), low, high)
    about = {
        "images": "none: ranges from the batch norms",
        "images_sha256": "",
        "n": 0,
        "calibrator": "batch norms",
    }
    return _uncalibrated(calibrate.from_ranges(model, ranges), about, sidecar, path, rest)


def _uncalibrated(
    found: Calibrated, about: dict[str, Any], sidecar: Sidecar, path: Path, rest: str
) -> tuple[Any, Calibration, dict[str, Any]]:
    """What is left to do once there are scales that no image was run for."""
    from rtresnet.core import atomic_io
    from rtresnet.core.sidecar import Calibration
    from rtresnet.quantization import scales

    model = _with_rest(found.quantized(), rest)
    more = {
        "onnx_sha256": sidecar.sha256,
        "preprocessing": serialization.known(dataclasses.asdict(sidecar.input)),
    }
    scales.write(path, found, about | more)
    calibration = Calibration(
        method=found.method,
        images=about["images"],
        images_sha256=about["images_sha256"],
        n=about["n"],
        scales=path.as_posix(),
        scales_sha256=atomic_io.sha256(path),
        rest=rest,
    )
    return model, calibration, {}


def _plane(level: int) -> np.ndarray:
    import numpy as np

    return np.full((1, 1, 1, 3), level, np.uint8)


def _with_rest(model: Any, rest: str) -> Any:
    from rtresnet.quantization import fp16

    return fp16.to_half(model) if rest == "fp16" else model


def _saved_scales(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Scales that were found before for just this; says why not, where there are others."""
    from rtresnet.quantization import scales

    if not path.exists():
        return None
    try:
        saved = scales.read(path)
    except ArtifactError as error:
        common.note(f"calibrating anew: {error.message}")
        return None
    other = scales.differences(saved, about)
    if other:
        common.note(f"calibrating anew: {path} was made with other {', '.join(other)}")
        return None
    common.note(f"scales of {path} are used again")
    return saved


def _tell(found: Calibrated, calibrator: str) -> list[dict[str, Any]]:
    """Says what was found; returns the outliers with what was done about them."""
    if found.ratios:
        tried = [ratio for name, ratio in found.ratios.items() if name != "kept"]
        biases = ", biases corrected" if found.shifts else ""
        own = f", {len(found.own)} tensors with a range of their own" if found.own else ""
        common.note(
            f"ranges by {found.method}{biases}{own}: {found.ratios['kept']:.1f} dB signal to noise "
            f"at the logits (tried: {min(tried):.1f} to {max(tried):.1f})"
        )
    mended = {outlier.tensor for outlier in found.mended}
    told = []
    for outlier in found.outliers:
        if outlier.tensor in mended:
            remedy = "brought down, with the next convolution's weights raised"
        elif calibrator != "auto":
            remedy = (
                f"left as it is: {calibrator} takes the net as it is, --calibrator auto may not"
            )
        else:
            remedy = "left as it is: it does not go from one convolution to one other alone"
        count = len(outlier.channels)
        common.note(
            f"{outlier.tensor}: {count} of its channels set the range, up to {outlier.times:.0f} "
            f"times the median; {remedy}"
        )
        told.append({"tensor": outlier.tensor, "channels": count, "times": outlier.times,
                     "remedy": remedy})  # fmt: skip
    return told


def calibration_batches(
    spec: str | None, preprocess: Preprocess, images: int
) -> tuple[Callable[[], Iterator[np.ndarray]], str, str, int]:
    """The calibration images as repeatable batches, with their name, hash and number.

    Without a spec, the images in calib/; without those, noise and a warning.
    """
    from rtresnet.data import loader, sources

    found = CALIB.is_dir() and bool(sources.images_under(CALIB))
    lists = sorted(CALIB.glob("*.txt")) if CALIB.is_dir() else []
    if spec is None and not found and lists:
        spec = str(lists[0])
    if spec is None and not found:
        common.warn_loudly(
            "no calibration images",
            "calib/ holds none, so the INT8 scales come from random noise. "
            "Latency is meaningful, accuracy is not. Give real images: --calib SPEC",
        )
        spec, images = f"synthetic:{RANDOM_IMAGES}", RANDOM_IMAGES
        name = "noise"
    else:
        spec = spec or str(CALIB)
        name = spec
    source = sources.open_images(spec)
    chosen = loader.sample(source, images)
    tally = loader.DecodeErrors(len(chosen), common.note)
    size = loader.batch_size(preprocess)

    def batches() -> Iterator[np.ndarray]:
        for pixels, _ in loader.batches(source, preprocess, size, indices=chosen, tally=tally):
            yield pixels

    return batches, name, source.fingerprint(), len(chosen)
