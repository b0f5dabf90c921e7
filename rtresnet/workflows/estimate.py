"""Estimate the minimum latency of a net on a given GPU, from published peak rates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError
from rtresnet.workflows.loading import require_torch

if TYPE_CHECKING:
    from rtresnet.bench.kernels import Counted
    from rtresnet.bench.roofline import GpuSpec, MinimumTime

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(Config):
    """What is estimated.

    Attributes:
        gpus: Names of GPUs; all known ones if empty.
        precision: Precision of the whole net; None for the file's.
        batch: Images per batch.
        size: Side of the input of a named net, in pixels.
    """

    gpus: tuple[str, ...] = option(
        (),
        "GPU, as in 'RTX 4090'; may be repeated.",
        names=("--gpu",),
        metavar="NAME",
        default_text="all known GPUs",
    )
    precision: Literal["fp32", "fp16", "int8"] | None = option(
        None,
        "Estimate as if the whole net had this precision.",
        default_text="the file's; fp16 for a MODEL",
    )
    batch: int = option(1, "Images per batch.", minimum=1)
    size: int | None = option(
        None,
        "Side of the input of a MODEL, in pixels.",
        minimum=1,
        default_text="the model's",
    )


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Minimum times of one stage of the net, in milliseconds.

    Attributes:
        no_faster_than_ms: No implementation is faster.
        through_memory_ms: No implementation that writes every kernel's output to memory is faster.
        compute_ms: Arithmetic at the peak rate.
        memory_ms: All bytes at the memory's bandwidth.
    """

    name: str
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
        source: The document with the GPU's rates.
        stages: The stages of the net.
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


@dataclass(frozen=True, kw_only=True)
class EstimateResult:
    """Lower bounds, never measurements.

    Attributes:
        what: "bound".
        model: The file or the net's name.
        precision: Precision of the estimate.
        batch: Images per batch.
        size: Side of the images, in pixels.
        as_if: Whether `precision` is another one than the file's.
        multiply_adds: Per image.
        kernels: Number of fused kernels.
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
    results: tuple[GpuEstimate, ...]


def estimate(model: str | os.PathLike[str], config: EstimateConfig | None = None) -> EstimateResult:
    """Estimates the minimum latency of a net on GPUs.

    Args:
        model: An ONNX file, or the name of a net.
        config: GPUs, precision, batch and size.

    Returns:
        A bound for each stage, from published peak rates.

    Raises:
        UnknownNameError: No such net or GPU.
        InputError: A quantized file in another precision than its own, or a size for a file.
        ArtifactError: Not a valid ONNX file.
        UnavailableError: The package onnx, or torch for a named net, is not installed.
    """
    from rtresnet.bench import kernels, roofline

    config, model = config or EstimateConfig(), os.fspath(model)
    # Unknown names are reported before anything that takes time.
    gpus = [roofline.find_gpu(name) for name in config.gpus] or list(roofline.GPUS)
    if is_file := Path(model).suffix.lower() in artifacts.SUFFIXES:
        counted = _count_file(model, config.size)
    else:
        counted = _count_named(model, config.size)
    own = kernels.precision_of(counted.kernels)
    precision = config.precision or (own if is_file else "fp16")
    if precision != own and own != "fp32":
        raise InputError(
            f"--precision {precision}: {model} is {own}", fix="name its FP32 file instead"
        )
    used = kernels.at(counted.kernels, precision) if precision != own else counted.kernels
    return EstimateResult(
        model=model,
        precision=precision,
        batch=config.batch,
        size=counted.size,
        as_if=precision != own,
        multiply_adds=sum(kernel.multiply_adds for kernel in used),
        kernels=len(used),
        results=tuple(
            _on_gpu(gpu, roofline.minimum_times(used, gpu, config.batch), config.batch)
            for gpu in gpus
        ),
    )


def _count_file(path: str, size: int | None) -> Counted:
    from rtresnet.bench import kernels

    atomic_io.require_file(path)
    if artifacts.kind_of(path) != "onnx":
        raise InputError(f"{path}: takes an ONNX file or a net's name", fix="rtresnet export")
    artifacts.verify(path)
    if size is not None:
        raise InputError(f"--size {size}: {path} has its own size", fix="leave it out")
    return kernels.count(path)


def _count_named(name: str, size: int | None) -> Counted:
    """Counts a net of the zoo with untrained weights."""
    from rtresnet.models import zoo

    spec = zoo.spec(name)
    require_torch("making a net by its name")
    from rtresnet.bench import kernels
    from rtresnet.exporter.fold import fold
    from rtresnet.exporter.writer import to_onnx

    net = zoo.build(spec).eval()
    return kernels.count(to_onnx(fold(net), size=size or spec.size, name=name))


def _on_gpu(gpu: GpuSpec, bounds: Sequence[MinimumTime], batch: int) -> GpuEstimate:
    stages: dict[str, list[MinimumTime]] = {}
    for bound in bounds:
        stages.setdefault(bound.kernel.stage, []).append(bound)
    whole = _sum("all", bounds)
    return GpuEstimate(
        gpu=gpu.name,
        no_faster_than_ms=whole.no_faster_than_ms,
        no_more_images_per_second=1e3 * batch / whole.no_faster_than_ms,
        through_memory_ms=whole.through_memory_ms,
        compute_ms=whole.compute_ms,
        memory_ms=whole.memory_ms,
        rates={name: gpu.rates.rate(name) for name in PRECISIONS},
        bandwidth=gpu.rates.bandwidth,
        l2=gpu.l2 * 2**20,
        source=gpu.source,
        stages=tuple(_sum(name, members) for name, members in stages.items()),
    )


def _sum(name: str, bounds: Sequence[MinimumTime]) -> StageEstimate:
    return StageEstimate(
        name=name,
        no_faster_than_ms=sum(bound.least for bound in bounds),
        through_memory_ms=sum(bound.through_memory for bound in bounds),
        compute_ms=sum(bound.compute for bound in bounds),
        memory_ms=sum(bound.memory for bound in bounds),
    )
