"""Compare several plans of one net by their bounds, to advise on the precision.

A bound is not a measurement. Two bounds of each plan are compared: one for tensors that stay in the
GPU's L2 cache as far as they fit, one for tensors that all go through memory. The plan that both
favour is expected to be faster; if they disagree, only a measurement decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import artifacts, atomic_io, serialization
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.core.precisions import CALIBRATED, FLOAT, PRECISIONS
from rtresnet.core.serialization import flattened
from rtresnet.core.sidecar import Sidecar, accuracies
from rtresnet.workflows import estimate as estimates
from rtresnet.workflows.estimate import EstimateConfig, EstimateResult, OpenedPlans

if TYPE_CHECKING:
    from rtresnet.bench.roofline import GpuSpec

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARGIN = 1.03
"""Bounds with a smaller ratio than this count as equal."""
MANY_BYTES = 1.1
"""From this ratio on, a narrow type moves too many bytes."""
WIDE = sorted(FLOAT, key=lambda name: PRECISIONS[name].bits)
REPRESENTATIVE = {
    "sm_75": "T4", "sm_80": "A100 80GB", "sm_86": "RTX 3090", "sm_89": "RTX 4090",
    "sm_90": "H100 SXM", "sm_120": "RTX 5090",
}  # fmt: skip
"""The representative GPU of each compute capability in a short table."""


@dataclass(frozen=True, kw_only=True)
class PlanAccuracy:
    """Accuracy in the sidecars of a plan and of its ONNX file, or None.

    Attributes:
        top1_percent: On n images of data.
        drop_points: Percentage points that quantization lost, on drop_n images of drop_data.
        snr_db: Signal to noise at the logits against FP32, in dB, as calibration measured it.
    """

    top1_percent: float | None = None
    n: int | None = None
    data: str | None = None
    drop_points: float | None = None
    drop_n: int | None = None
    drop_data: str | None = None
    snr_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdviceEntry:
    """One plan."""

    estimate: EstimateResult = flattened()
    accuracy: PlanAccuracy


@dataclass(frozen=True, kw_only=True)
class AdviceResult:
    """Plans compared by lower bounds, never by measurements.

    Attributes:
        what: "bound".
        batch: Images per batch.
        plans: In the order of the arguments.
        advice: A sentence on each quantized plan.
    """

    what: str = "bound"
    batch: int
    plans: tuple[AdviceEntry, ...]
    advice: tuple[str, ...]


def advise(
    plans: Sequence[str | os.PathLike[str]], config: EstimateConfig | None = None
) -> AdviceResult:
    """Compare plans of different precisions by the bytes they move and their minimum latency.

    Args:
        plans: Plans of one net; also ONNX files and names of nets, which have no advice.
        config: GPUs, by default one for each compute capability that the plans were built for;
            batch, by default the optimum of the first plan; and measurements.

    Returns:
        The bounds of each plan, and sentences on which to expect to be faster.

    Raises:
        InputError: Nothing to compare, a GPU that no plan can run on, or as `estimate`.
        RtresnetError: As `estimate`.
    """
    if not plans:
        raise InputError("no plans to compare", fix="name plans: rtresnet estimate X.plan Y.plan")
    config = config or EstimateConfig()
    if not config.gpus:
        config = dataclasses.replace(config, gpus=gpus_for((), _targets(plans)))
    opened: OpenedPlans = {}
    results: list[EstimateResult] = []
    for plan in plans:
        result = estimates.estimate_possible(plan, config, every_gpu=False, opened=opened)
        config = dataclasses.replace(config, batch=result.batch)
        results.append(result)
    if not any(result.results for result in results):
        estimates.estimate(plans[0], config)  # raises an error with the reason
    entries = tuple(
        AdviceEntry(estimate=result, accuracy=_accuracy(result.model)) for result in results
    )
    return AdviceResult(
        batch=results[0].batch, plans=entries, advice=tuple(_advice(results, opened))
    )


def _targets(plans: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the compute capabilities of plans; all of the table if none of them is a plan."""
    records = [artifacts.read_sidecar(plan) for plan in plans if str(plan).endswith(".plan")]
    targets = [t for record in records if record and record.plan for t in record.plan.targets]
    return list(dict.fromkeys(targets)) or list(REPRESENTATIVE)


def gpus_for(names: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """Return the GPUs of a short table: those requested, else one per compute capability.

    Args:
        names: GPUs or compute capabilities as a user named them.
        targets: Compute capabilities of a plan.
    """
    from rtresnet.bench import roofline

    named = []
    for text in names:
        with contextlib.suppress(UnknownNameError):  # a compute capability, or not in the table
            named.append(roofline.find_gpu(text).name)
    chosen = [REPRESENTATIVE[target] for target in targets if target in REPRESENTATIVE]
    return tuple(dict.fromkeys(named or chosen))


def _accuracy(path: str) -> PlanAccuracy:
    """Read the latest accuracy of a plan or of the files of its precision that it came from."""
    for sidecar in _same_precision(path):
        records = [
            record for record in accuracies(sidecar.measured)
            if record.get("n") and isinstance(record.get("top1"), int)
        ]  # fmt: skip
        drop = sidecar.measured.get("drop")
        lost = drop if isinstance(drop, dict) and {"points", "n"} <= drop.keys() else {}
        snr = _signal_to_noise(sidecar)
        if sidecar.weights.origin == "untrained" or not (records or lost or snr is not None):
            continue
        best = records[-1] if records else {}
        return PlanAccuracy(
            top1_percent=100 * best["top1"] / best["n"] if best else None,
            n=best.get("n"),
            data=best.get("data"),
            drop_points=lost.get("points"),
            drop_n=lost.get("n"),
            drop_data=lost.get("data"),
            snr_db=snr,
        )
    return PlanAccuracy()


def _signal_to_noise(sidecar: Sidecar) -> float | None:
    """Return the ratio that calibration measured, if the file of scales is unchanged."""
    calibration = sidecar.calibration
    if calibration is None or not Path(calibration.scales).is_file():
        return None
    if atomic_io.sha256(calibration.scales) != calibration.scales_sha256:
        return None
    measured = serialization.load(calibration.scales).get("signal_to_noise_db") or {}
    value = measured.get("kept")
    return float(value) if isinstance(value, int | float) else None


def _same_precision(path: str) -> Iterator[Sidecar]:
    if not path.endswith(".plan"):
        return
    sidecar = artifacts.read_sidecar(path)
    place, precision = path, sidecar.precision if sidecar else ""
    while sidecar is not None and sidecar.precision == precision:
        yield sidecar
        link, parent = sidecar.parent, artifacts.parent_path(place, sidecar)
        if link is None or parent is None:
            return
        place, sidecar = str(parent), artifacts.read_sidecar(parent)
        if sidecar is not None and sidecar.sha256 != link.sha256:  # the file has changed
            return


def _advice(results: Sequence[EstimateResult], opened: OpenedPlans) -> Iterator[str]:
    """Return a sentence on each plan of a narrow type compared to the best plan of a wide one."""
    wide = [r for name in WIDE for r in results if r.precision == name and r.builder]
    for narrow in results:
        if narrow.precision in CALIBRATED and narrow.builder and wide:
            yield _sentence(narrow, wide[0], opened)


def _sentence(narrow: EstimateResult, wide: EstimateResult, opened: OpenedPlans) -> str:
    left, right = narrow.precision.upper(), wide.precision.upper()
    builder = str(narrow.builder).partition(" ")[0]
    ratio = narrow.bytes / wide.bytes
    text = (
        f"{left} moves {ratio:.1f} times the bytes of {right} on {builder} "
        f"({_megabytes(narrow)} against {_megabytes(wide)} MB at batch {narrow.batch})."
    )
    both = {result.gpu for result in wide.results}
    gpus: dict[str, list[str]] = {}
    for result in narrow.results:
        if result.gpu in both:
            expected = _expected(narrow, wide, result.gpu, opened)
            gpus.setdefault(expected, []).append(result.gpu)
    for expected, names in gpus.items():
        text += f" {', '.join(names)}: {expected}."
    text += "".join(f" {line}" for line in _measured(narrow, wide))
    if ratio > MANY_BYTES and builder == "TensorRT-RTX":
        text += (
            f" {left} built with --builder tensorrt on the GPU's machine is expected to move fewer "
            "bytes (not measured)."
        )
    return text


def _measured(narrow: EstimateResult, wide: EstimateResult) -> Iterator[str]:
    """Yield a sentence for each GPU on which both were measured."""
    others = {result.gpu: result.measured for result in wide.results}
    for result in narrow.results:
        if result.measured and others.get(result.gpu):
            times = [
                f"{estimate.precision.upper()} {entry.compute_ms or entry.median_ms:.3g} ms"
                for estimate, entry in (
                    (narrow, result.measured[-1]), (wide, others[result.gpu][-1])
                )
            ]  # fmt: skip
            yield f"Measured on {result.gpu} at batch {narrow.batch}: {', '.join(times)}."


def _megabytes(result: EstimateResult) -> str:
    return f"{result.bytes / 1e6:,.{1 if result.bytes < 1e8 else 0}f}"


def _expected(narrow: EstimateResult, wide: EstimateResult, gpu: str, opened: OpenedPlans) -> str:
    """Return a sentence such as "expect FP16 to be faster at batch 32; ... measure"."""
    from rtresnet.bench import roofline

    spec, batches = roofline.find_gpu(gpu), _common(narrow, wide)
    winners = [(batch, _winners(narrow, wide, batch, spec, opened)) for batch in batches]
    parts = []
    for (cached, through), members in groupby(winners, key=lambda entry: entry[1]):
        inside = [batch for batch, _ in members]
        at = f"at batch {inside[0]}" + (f" to {inside[-1]}" if len(inside) > 1 else "")
        if cached == through:
            which = f"expect {cached} to be faster" if cached else "no clear difference is expected"
            which += ", by both bounds,"
            parts.append(f"{which} {at}")
        else:
            parts.append(
                f"{at} {cached or 'neither'} if tensors stay in the L2 cache, "
                f"{through or 'neither'} if they go through memory; measure to decide"
            )
    return "; ".join(parts)


def _common(narrow: EstimateResult, wide: EstimateResult) -> list[int]:
    """Return the batch sizes that both plans accept."""
    profiles = [artifacts.read_sidecar(result.model) for result in (narrow, wide)]
    fitting = []
    for batch in BATCHES:
        if all(
            sidecar is not None
            and sidecar.plan is not None
            and any(profile.min <= batch <= profile.max for profile in sidecar.plan.profiles)
            for sidecar in profiles
        ):
            fitting.append(batch)
    return fitting or [narrow.batch]


def _winners(
    narrow: EstimateResult, wide: EstimateResult, batch: int, gpu: GpuSpec, opened: OpenedPlans
) -> tuple[str, str]:
    """Return the precisions with the lower bound: with and without the L2 cache; "" if close."""
    from rtresnet.bench import roofline

    bounds = []
    for result in (narrow, wide):
        kernels = estimates.read_plan(result.model, batch, opened).kernels
        times = roofline.minimum_times(kernels, gpu, batch)
        bounds.append((sum(t.least for t in times), sum(t.through_memory for t in times)))

    def faster(one: float, other: float) -> str:
        if max(one, other) <= MARGIN * min(one, other):
            return ""
        return (narrow if one < other else wide).precision.upper()

    (cached, through) = (faster(*pair) for pair in zip(*bounds, strict=True))
    return cached, through
