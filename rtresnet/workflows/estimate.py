"""Estimate the minimum latency of a net on a given GPU, from published peak rates.

The kernels of a net or of an ONNX file are those that an ideal builder would fuse. The kernels of a
plan are those that the builder did fuse, from the file of layers next to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import artifacts, atomic_io, gpu_targets
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError
from rtresnet.core.precisions import BY_TENSORRT_TYPE, PRECISIONS, PrecisionName
from rtresnet.workflows import measured_latency
from rtresnet.workflows.detect import require_classifier
from rtresnet.workflows.loading import require_torch
from rtresnet.workflows.measured_latency import MeasuredLatency

if TYPE_CHECKING:
    from rtresnet.bench.kernels import Kernel
    from rtresnet.bench.roofline import GpuSpec, MinimumTime
    from rtresnet.builder.layers import Layer, Layers, LayerTensor
    from rtresnet.core.sidecar import Sidecar


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(Config):
    """Options of an estimate.

    Attributes:
        gpus: Names of GPUs; by default all known ones, of a plan those that it was built for.
        precision: Precision of the whole net; None for the file's.
        batch: Images per batch; by default 1, of a plan the optimum of its first profile.
        size: Side of the input of a named net, in pixels.
        measured: Results of `benchmark`, to be shown next to the bounds of the same plans.
    """

    gpus: tuple[str, ...] = option(
        (),
        "GPU, as in 'RTX 4090'; may be repeated.",
        names=("--gpu",),
        metavar="NAME",
        default_text="all known GPUs; for a plan, its targets",
    )
    precision: PrecisionName | None = option(
        None,
        "Precision to assume for the whole net.",
        default_text="the file's; fp16 for a MODEL",
    )
    batch: int | None = option(
        None, "Images per batch.", minimum=1, default_text="1; the optimum of a plan"
    )
    size: int | None = option(
        None,
        "Side of the input of a MODEL, in pixels.",
        minimum=1,
        default_text="the model's",
    )
    measured: tuple[Path, ...] = option(
        (),
        "Results of `rtresnet bench --json`, to show next to the bounds; may be repeated.",
        metavar="FILE",
        default_text="none",
    )


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Minimum times of one stage of the net, in milliseconds.

    Attributes:
        bytes: Read and written by its kernels for the batch.
        no_faster_than_ms: No implementation is faster.
        through_memory_ms: No implementation that writes every kernel's output to memory is faster.
        compute_ms: Arithmetic at the peak rate.
        memory_ms: All bytes at the memory's bandwidth.
    """

    name: str
    bytes: int
    no_faster_than_ms: float
    through_memory_ms: float
    compute_ms: float
    memory_ms: float


@dataclass(frozen=True, kw_only=True)
class GpuEstimate:
    """Minimum times of a net on one GPU; see `StageEstimate`.

    Attributes:
        no_more_images_per_second: Throughput at the minimum time.
        rates: Peak operations per second by data type.
        bandwidth: Bytes per second.
        l2: Size of the L2 cache in bytes.
        source: The document with the GPU's rates, and how they were entered.
        stages: The stages of the net.
        measured: Measurements, which no bound exceeds.
    """

    gpu: str
    no_faster_than_ms: float
    no_more_images_per_second: float
    through_memory_ms: float
    compute_ms: float
    memory_ms: float
    rates: Mapping[str, float]
    bandwidth: float
    l2: float
    source: str
    stages: tuple[StageEstimate, ...]
    measured: tuple[MeasuredLatency, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EstimateResult:
    """Lower bounds, never measurements.

    Attributes:
        what: "bound".
        model: The file or the net's name.
        precision: Precision of the estimate.
        batch: Images per batch.
        size: Side of the images, in pixels.
        as_if: Whether `precision` differs from the file's.
        multiply_adds: Per image.
        kernels: Number of fused kernels.
        unknown_types: Number of kernels whose data type is unknown; their bound assumes the GPU's
            fastest rate.
        bytes: Read and written by all kernels for the batch, weights included.
        builder: Builder of a plan, as in "TensorRT-RTX 1.7"; None if the kernels are those that an
            ideal builder would fuse.
        results: One for each GPU.
    """

    what: str = "bound"
    model: str
    precision: str
    batch: int
    size: int
    as_if: bool
    multiply_adds: int
    kernels: int
    unknown_types: int = 0
    bytes: int
    builder: str | None
    results: tuple[GpuEstimate, ...]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The kernels to estimate, at one batch size.

    Attributes:
        own: Precision of the file; None for a net by its name, which has any.
        targets: Compute capabilities of a plan; empty if anything may run it.
        sha256: Hash of a plan.
    """

    name: str
    kernels: list[Kernel]
    batch: int
    size: int
    own: str | None = None
    builder: str | None = None
    targets: tuple[str, ...] = ()
    sha256: str = ""


OpenedPlans = dict[str, "tuple[Sidecar, Layers]"]
"""Plans that were read in this command, by path, with their layers."""


def estimate(model: str | os.PathLike[str], config: EstimateConfig | None = None) -> EstimateResult:
    """Estimate the minimum latency of a net on GPUs.

    Args:
        model: A plan, an ONNX file, or the name of a net.
        config: GPUs, precision, batch and size.

    Returns:
        A bound for each stage, from published peak rates.

    Raises:
        UnknownNameError: No such net or GPU.
        InputError: A precision that contradicts the file, a size for a file, a batch that a plan
            does not accept, a GPU without a type that the kernels need, or a plan whose layers are
            not known.
        ArtifactError: Not a valid ONNX file, or a file that does not match its sidecar.
        UnavailableError: The package onnx, or torch for a named net, is not installed.
    """
    return estimate_possible(model, config or EstimateConfig(), every_gpu=True)


def estimate_possible(
    model: str | os.PathLike[str],
    config: EstimateConfig,
    *,
    every_gpu: bool,
    opened: OpenedPlans | None = None,
) -> EstimateResult:
    """Estimate the bounds of one model as `estimate` does, for many models in one call.

    Args:
        model: As for `estimate`.
        config: As for `estimate`.
        every_gpu: Whether a named GPU that the plan cannot run on is an error; otherwise it is
            left out.
        opened: Plans that were read before; this one is added.
    """
    from rtresnet.bench import kernels, roofline

    name = os.fspath(model)
    # Report unknown names before slow work.
    gpus = [roofline.find_gpu(gpu) for gpu in config.gpus]
    benchmarks = [measured_latency.read(path) for path in config.measured]
    subject = _subject(name, config, {} if opened is None else opened)
    own = subject.own or "fp32"
    precision = config.precision or (subject.own or "fp16")
    if precision != own and (own != "fp32" or subject.builder):
        raise InputError(
            f"--precision {precision}: {name} is {own}",
            fix="name its FP32 ONNX file instead",
        )
    used = kernels.at(subject.kernels, precision) if precision != own else subject.kernels
    return EstimateResult(
        model=name,
        precision=precision,
        batch=subject.batch,
        size=subject.size,
        as_if=precision != own,
        multiply_adds=sum(kernel.multiply_adds for kernel in used),
        kernels=len(used),
        unknown_types=sum(kernel.dtype == kernels.UNKNOWN for kernel in used),
        bytes=sum(kernel.moved(subject.batch) for kernel in used),
        builder=subject.builder,
        results=tuple(
            replace(
                _on_gpu(gpu, roofline.minimum_times(used, gpu, subject.batch), subject.batch),
                measured=tuple(
                    measured_latency.matching(benchmarks, subject.sha256, subject.batch, gpu)
                ),
            )
            for gpu in _chosen(gpus, subject, used, every_gpu=every_gpu)
        ),
    )


def _subject(name: str, config: EstimateConfig, opened: OpenedPlans) -> Subject:
    kind = artifacts.kind_of(name) if Path(name).suffix.lower() in artifacts.SUFFIXES else None
    if kind is None:
        return _named(name, config)
    if config.size is not None:
        raise InputError(f"--size {config.size}: {name} has a fixed size", fix="leave --size out")
    if kind == "plan":
        return read_plan(name, config.batch, opened)
    return _onnx_file(name, config.batch)


def _onnx_file(path: str, batch: int | None) -> Subject:
    from rtresnet.bench import kernels

    atomic_io.require_file(path, fix="create it with: rtresnet export")
    require_classifier(path, "estimate")
    if artifacts.kind_of(path) != "onnx":
        raise InputError(
            f"{path}: not a plan, an ONNX file or a net's name",
            fix="list the nets with: rtresnet models",
        )
    artifacts.verify(path)
    counted = kernels.count(path)
    own = kernels.precision_of(counted.kernels)
    return Subject(name=path, kernels=counted.kernels, batch=batch or 1, size=counted.size, own=own)


def _named(name: str, config: EstimateConfig) -> Subject:
    """Count a net of the zoo with untrained weights."""
    from rtresnet.models import zoo

    spec = zoo.spec(name)
    require_torch("making a net by its name")
    from rtresnet.bench import kernels
    from rtresnet.exporter.fold import fold
    from rtresnet.exporter.writer import to_onnx

    net = zoo.build(spec).eval()
    counted = kernels.count(
        to_onnx(fold(net, config.size), size=config.size or spec.size, name=name)
    )
    return Subject(name=name, kernels=counted.kernels, batch=config.batch or 1, size=counted.size)


def read_plan(path: str, batch: int | None, opened: OpenedPlans) -> Subject:
    """Read the kernels that the builder fused, at the profile that runs the batch."""
    from rtresnet.builder import layers
    from rtresnet.core.trt_loading import MODULES
    from rtresnet.runtime.io_spec import split_batch

    if path not in opened:
        verified = artifacts.verify(path)
        engine = layers.load(path, verified)
        assert verified is not None
        opened[path] = verified, engine
    sidecar, engine = opened[path]
    plan = sidecar.plan
    assert plan is not None
    again = f"build it again: {sidecar.made_by.get('command') or 'rtresnet build MODEL.onnx'}"
    if any(layer.multiply_adds is None for layer in engine.layers):
        raise InputError(
            f"{path}: built by an earlier version, which recorded no multiply-adds", fix=again
        )
    batch = batch or plan.profiles[0].opt
    fitting = [profile for profile in plan.profiles if profile.min <= batch <= profile.max]
    if not fitting:
        profiles = ", ".join(map(str, plan.profiles))
        raise InputError(f"--batch {batch}: {path} accepts batches of {profiles}", fix=again)
    profile = split_batch(batch, plan.profiles)[0].profile
    kernels = [
        kernel_of(layer, plan.profiles[profile].opt)
        for layer in engine.layers
        if layer.profile == profile and layer.role != "idle"
    ]
    return Subject(
        name=path,
        kernels=kernels,
        batch=batch,
        size=sidecar.input.size,
        own=sidecar.precision,
        builder=f"{MODULES[plan.builder]} {plan.version}",
        targets=plan.targets,
        sha256=sidecar.sha256,
    )


def kernel_of(layer: Layer, batch: int) -> Kernel:
    """Describe a layer as a kernel.

    Args:
        layer: A layer.
        batch: The optimal batch of its profile, which shapes without an open side are for.
    """
    from rtresnet.bench.kernels import UNKNOWN, Kernel

    def per_image(tensor: LayerTensor) -> int:
        size = tensor.bytes(1) or 0  # 0 if the width of its type is unknown: still a bound
        return size if -1 in tensor.shape else size // batch

    read = [per_image(tensor) for tensor in layer.inputs]
    if layer.operation.startswith("conv 1x1") and layer.outputs:
        # With a stride of 2 it reads every fourth pixel.
        pixels, written = (prod(side[0].shape[2:]) for side in (layer.inputs, layer.outputs))
        read[0] = read[0] * min(pixels, written) // pixels
    return Kernel(
        name=layer.name,
        block=layer.block,
        stage=layer.stage,
        op=layer.kind,
        nodes=layer.nodes,
        dtype=BY_TENSORRT_TYPE.get(layer.dtype, UNKNOWN) if layer.multiply_adds else "fp32",
        multiply_adds=layer.multiply_adds or 0,
        weights=layer.weights,
        read=tuple(read),
        written=sum(map(per_image, layer.outputs)),
    )


def _chosen(
    gpus: Sequence[GpuSpec], subject: Subject, kernels: Iterable[Kernel], *, every_gpu: bool
) -> list[GpuSpec]:
    """Return the named GPUs, or all that can run the kernels."""
    from rtresnet.bench import roofline

    used = {kernel.dtype for kernel in kernels if kernel.dtype in PRECISIONS}
    possible = [
        gpu
        for gpu in roofline.GPUS
        if not subject.targets or gpu_targets.target_of(gpu.name) in subject.targets
    ]
    for gpu in gpus:
        if every_gpu and gpu not in possible:
            target = gpu_targets.target_of(gpu.name) or "that GPU"
            rtx = gpu_targets.served_by_rtx(target)
            raise InputError(
                f"--gpu {gpu.name}: {subject.name} was built for {', '.join(subject.targets)}, not "
                f"for {target}",
                fix=f"build it again with --target {target}"
                if rtx
                else "build it on that GPU's machine with --builder tensorrt",
            )
        if every_gpu and (lacking := sorted(used - gpu.dtypes)):
            name = lacking[0].upper()
            having = ", ".join(gpu.name for gpu in roofline.GPUS if lacking[0] in gpu.dtypes)
            raise InputError(
                f"--gpu {gpu.name}: the GPU does not support {name}",
                fix=f"use a GPU with {name}: {having}",
            )
    possible = [gpu for gpu in possible if used <= gpu.dtypes]
    return [gpu for gpu in gpus if gpu in possible] if gpus else possible


def _on_gpu(gpu: GpuSpec, bounds: Sequence[MinimumTime], batch: int) -> GpuEstimate:
    stages: dict[str, list[MinimumTime]] = {}
    for bound in bounds:
        stages.setdefault(bound.kernel.stage, []).append(bound)
    whole = _sum("all", bounds, batch)
    return GpuEstimate(
        gpu=gpu.name,
        no_faster_than_ms=whole.no_faster_than_ms,
        no_more_images_per_second=1e3 * batch / whole.no_faster_than_ms,
        through_memory_ms=whole.through_memory_ms,
        compute_ms=whole.compute_ms,
        memory_ms=whole.memory_ms,
        rates={name: gpu.rates.rate(name) for name in PRECISIONS if name in gpu.dtypes},
        bandwidth=gpu.rates.bandwidth,
        l2=gpu.l2 * 2**20,
        source=gpu.described,
        stages=tuple(_sum(name, members, batch) for name, members in stages.items()),
    )


def _sum(name: str, bounds: Sequence[MinimumTime], batch: int) -> StageEstimate:
    return StageEstimate(
        name=name,
        bytes=sum(bound.kernel.moved(batch) for bound in bounds),
        no_faster_than_ms=sum(bound.least for bound in bounds),
        through_memory_ms=sum(bound.through_memory for bound in bounds),
        compute_ms=sum(bound.compute for bound in bounds),
        memory_ms=sum(bound.memory for bound in bounds),
    )
