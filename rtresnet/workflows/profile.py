"""Profile an ONNX file or a plan: time and bottleneck of each block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io, hardware, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened, json_name
from rtresnet.workflows.detect import require_classifier

if TYPE_CHECKING:
    from rtresnet.bench import profile as profiles
    from rtresnet.bench.environment import ChainLink, EnvironmentReport
    from rtresnet.bench.roofline import PeakRates
    from rtresnet.core.sidecar import Sidecar


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Config):
    """Options of `profile`.

    Attributes:
        batch: Images per run.
        seconds: Duration of all runs together.
        threads: CPU threads, for ONNX files.
        remeasure_roof: Whether to ignore the cached peak rates of this machine.
    """

    batch: int | None = option(
        None, "Images per run.", metavar="N", minimum=1, default_text="1, or the file's fixed batch"
    )
    seconds: float = option(5.0, "Total duration of the runs, in seconds.")
    threads: int | None = option(
        None, "Number of CPU threads.", minimum=1, default_text="all cores"
    )
    remeasure_roof: bool = option(
        False,
        "Measure the peak rates of this machine again.",
        names=("--remeasure-peak",),
        hidden_names=("--new-roof",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"--seconds {self.seconds:g}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """Times by layer, block and stage, with device and versions.

    Attributes:
        path: The artifact.
        precision: From the sidecar, or the data type of most multiply-adds.
        batch: Images per run.
        fixed_batch: The only batch that the file accepts; None if it accepts any.
        size: Side of the images, in pixels.
        profile: The times.
        roof: Peak rates; None for a GPU whose rates are unknown.
        environment: What the machine did meanwhile.
        chain: The artifact and its ancestors.
    """

    path: str = json_name("artifact")
    precision: str
    batch: int
    fixed_batch: int | None
    size: int
    profile: profiles.NetProfile = flattened()
    roof: PeakRates | None
    environment: EnvironmentReport
    chain: tuple[ChainLink, ...]
    device: str
    provider: str
    threads: int | None
    versions: Mapping[str, str]


def profile(
    path: str | os.PathLike[str],
    config: ProfileConfig | None = None,
    *,
    reporter: Reporter = reporter.DEFAULT,
) -> ProfileResult:
    """Profile an ONNX file in ONNX Runtime's CPU provider, or a plan on the GPU.

    Args:
        path: The artifact. A plan also needs the ONNX file it was built from.
        config: Batch, duration and threads.
        reporter: Receives progress.

    Returns:
        Time of each layer, block and stage, with the machine's peak rates.

    Raises:
        InputError: Not an ONNX file or a plan, or the ONNX file of a plan is missing.
        ArtifactError: Not a valid ONNX file, or one that does not match its sidecar.
        UnavailableError: A plan without a GPU, or a missing package.
    """
    import numpy as np

    from rtresnet.bench import environment, kernels
    from rtresnet.bench import profile as profiles
    from rtresnet.onnxlib import io

    config = config or ProfileConfig()
    path = str(atomic_io.require_file(path, fix="create it with: rtresnet export"))
    sidecar = _verify(path)
    graph_path = _graph_of(path, sidecar)
    graph = io.load(graph_path)
    counted = kernels.count(graph, str(graph_path))
    if config.batch is not None and counted.batch not in (None, config.batch):
        raise InputError(
            f"{path}: its batch is fixed at {counted.batch}, not {config.batch}",
            fix=f"use --batch {counted.batch}",
        )
    batch = config.batch or counted.batch or 1
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 3, counted.size, counted.size)).astype(np.float32)
    is_plan = artifacts.kind_of(path) == "plan"
    with (
        environment.Watch(hardware.gpus()[0] if is_plan else None) as watch,
        reporter.progress(f"profiling {path} at batch {batch}", total=config.seconds) as update,
    ):
        from rtresnet.runtime import profilers

        shared: dict[str, Any] = {"seconds": config.seconds, "on_progress": update}
        recorded: Any
        if is_plan:
            recorded = profilers.record_plan(path, images, **shared)
        else:
            recorded = profilers.record_onnx(
                path, images, graph=graph, threads=config.threads, **shared
            )
    if not is_plan:
        from rtresnet.runtime.providers import openvino

        if openvino() is not None:
            reporter.note(
                "NOTE: profiled on ONNX Runtime's CPU provider, which times each node; bench "
                "prefers OpenVINO here, so its times differ"
            )
    roof = _roof(recorded, config, reporter)
    blocks = counted.blocks
    if is_plan:
        blocks = blocks | profiles.engine_blocks(_nodes_of_layers(path, sidecar), blocks)
    result = profiles.profile(
        recorded.runs, recorded.whole, counted.kernels, blocks,
        batch=batch, roof=roof,
    )  # fmt: skip
    return ProfileResult(
        path=path,
        precision=sidecar.precision if sidecar else kernels.precision_of(counted.kernels),
        batch=batch,
        fixed_batch=counted.batch,
        size=counted.size,
        profile=result,
        roof=roof,
        environment=watch.report,
        chain=environment.chain_of(path),
        device=hardware.cpu() if recorded.device == "cpu" else recorded.device,
        provider=recorded.provider,
        threads=recorded.threads,
        versions=hardware.versions(("rtresnet", "numpy")) | dict(recorded.versions),
    )


def _verify(path: str) -> Sidecar | None:
    """Check that a file can be profiled here, and return its sidecar."""
    kind = artifacts.kind_of(path)
    require_classifier(path, "profile")
    if kind == "checkpoint":
        raise InputError(
            f"{path}: only ONNX files and plans can be profiled", fix="rtresnet export"
        )
    sidecar = artifacts.verify(path)
    if kind == "plan" and not hardware.gpus():
        from rtresnet.runtime.compatibility import plan_needs_gpu

        raise plan_needs_gpu(path, sidecar)
    return sidecar


def _graph_of(path: str, sidecar: Sidecar | None) -> Path:
    """Return the ONNX file with the graph of an artifact: itself, or the parent of a plan."""
    if artifacts.kind_of(path) == "onnx":
        return Path(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    if parent is None or not parent.exists():
        raise InputError(
            f"{path}: the operations of its layers are unknown, because its ONNX file is missing",
            fix="copy the ONNX file next to the plan",
        )
    return parent


def _nodes_of_layers(path: str, sidecar: Sidecar | None) -> dict[str, tuple[str, ...]]:
    """Return the ONNX nodes of each layer of a plan; empty if the build recorded no layers."""
    from rtresnet.builder import layers

    if sidecar is None or sidecar.plan is None or sidecar.plan.layers is None:
        return {}
    return {layer.name: layer.nodes for layer in layers.load(path, sidecar).layers}


def _roof(recorded: Any, config: ProfileConfig, reporter: Reporter) -> PeakRates | None:
    """Return measured rates of this CPU, or published ones of the GPU; None if unknown."""
    from rtresnet.bench import roofline

    if recorded.device != "cpu":
        try:
            return roofline.find_gpu(recorded.device).rates
        except UnknownNameError:
            return None
    with (
        reporter.progress("measuring this machine's peak rates")
        if config.remeasure_roof
        else contextlib.nullcontext()
    ):
        return roofline.of_this_machine(recorded.threads, remeasure=config.remeasure_roof)
