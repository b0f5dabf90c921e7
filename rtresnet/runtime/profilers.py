"""Record the time of every node or layer: ONNX Runtime's profiler, and TensorRT's IProfiler.

`rtresnet profile` uses this module.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.core import artifacts, hardware, trt_loading
from rtresnet.runtime.cpu_rewrite import rewrite_for_cpu
from rtresnet.runtime.ort import OrtBackend
from rtresnet.runtime.trt import TrtBackend

WARM_UP = 3  # runs that are not recorded
MIN_RUNS = 5

Run = list[tuple[str, str, float]]
"""(node's name after fusion, operator or "", milliseconds) in the order of execution."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Runs with the profiler, alternating with runs of a second session without it.

    Attributes:
        runs: One entry for each run with the profiler.
        whole: Milliseconds of each run without it: wall time on a CPU, computation on a GPU.
        device: The GPU's name, or "cpu".
        provider: Name of the provider or library.
        threads: CPU threads; None on a GPU.
        versions: Name and version of each library that ran the net.
    """

    runs: list[Run]
    whole: list[float]
    device: str
    provider: str
    threads: int | None
    versions: dict[str, str]


def record_onnx(
    path: str | os.PathLike[str],
    images: np.ndarray,
    *,
    seconds: float,
    graph: Any = None,
    threads: int | None = None,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> Recorded:
    """Profile an ONNX file on ONNX Runtime's CPU provider, the only one that times every node.

    Args:
        path: An ONNX file.
        images: float32 [N, 3, S, S].
        seconds: Time for both kinds of runs together; there are at least five of each.
        graph: Its content, if it has been read; `rewrite_for_cpu` changes it.
        threads: Intra-op threads; all cores by default.
        on_progress: Called with the elapsed seconds.

    Raises:
        UnavailableError: onnxruntime is not installed.
        ArtifactError: The file cannot be loaded.
        InputError: The images have the wrong shape.
    """
    with tempfile.TemporaryDirectory(prefix="rtresnet-profile-") as folder:
        rewritten = rewrite_for_cpu(path, graph, saturates=hardware.int8_sums_saturate())
        plain = OrtBackend(path, provider="cpu", threads=threads, rewritten=rewritten)
        profiled = OrtBackend(
            path, provider="cpu", threads=threads, profile=str(Path(folder) / "nodes"),
            rewritten=rewritten,
        )  # fmt: skip
        images = converted(images, plain.input_dtype, plain.layout)
        whole: list[float] = []
        for _ in range(WARM_UP):
            plain.infer(images)
            profiled.infer(images)
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or len(whole) < MIN_RUNS:
            start = time.perf_counter()
            plain.infer(images)
            whole.append(1e3 * (time.perf_counter() - start))
            profiled.infer(images)
            on_progress(elapsed)
        runs = parse(json.loads(Path(profiled.end_profile()).read_text(encoding="utf-8")))
        plain.close()
        profiled.close()
    return Recorded(
        runs=runs[WARM_UP:], whole=whole, device=plain.device, provider=plain.provider,
        threads=plain.threads, versions=plain.versions,
    )  # fmt: skip


def record_plan(
    path: str | os.PathLike[str],
    images: np.ndarray,
    *,
    seconds: float,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> Recorded:
    """Profile a plan on this machine's GPU, without its copies.

    Args:
        path: A plan.
        images: float32 [N, 3, S, S]; N at most the plan's largest batch.
        seconds: Time for both kinds of runs together; there are at least five of each.
        on_progress: Called with the elapsed seconds.

    Raises:
        UnavailableError: There is no GPU or no TensorRT, or TensorRT does not accept the plan.
        ArtifactError: Version or target do not match.
    """
    sidecar = artifacts.verify(path)
    name = sidecar.plan.builder if sidecar and sidecar.plan else "tensorrt_rtx"
    with ExitStack() as stack:
        # IProfiler reports no layers inside CUDA graphs. Both run without graphs, to be comparable.
        plain = TrtBackend(path, sidecar, graphs=False, timings=True)
        stack.callback(plain.close)
        profiled = TrtBackend(path, sidecar, graphs=False)
        stack.callback(profiled.close)
        images = converted(images, plain.input_dtype, plain.layout)
        collector = profiler(trt_loading.load_tensorrt(name))
        profiled.watch(collector)
        runs: list[Run] = []
        whole: list[float] = []
        for _ in range(WARM_UP):
            plain.infer(images)
            profiled.infer(images)
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or len(whole) < MIN_RUNS:
            plain.infer(images)
            whole.append(plain.timings()["compute"])
            collector.layers = []
            profiled.infer(images)
            runs.append(collector.layers)
            on_progress(elapsed)
        return Recorded(
            runs=runs, whole=whole, device=plain.device, provider=plain.provider,
            threads=None, versions=plain.versions,
        )  # fmt: skip


def profiler(trt: Any) -> Any:
    """Create an IProfiler that collects (layer, "", milliseconds) in `layers`.

    TensorRT calls `report_layer_time(layer_name, ms)` for each layer after each enqueue.
    """

    class Collector(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.layers: Run = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, "", float(ms)))

    return Collector()


def converted(images: np.ndarray, dtype: np.dtype[Any], layout: str) -> np.ndarray:
    """Convert standard normal float32 [N, 3, S, S] to a file's type and layout.

    For uint8 they become pixels.
    """
    if dtype == np.uint8:
        images = np.clip(128 + 64 * images, 0, 255)
    images = images.transpose(0, 2, 3, 1) if layout == "nhwc" else images
    return np.ascontiguousarray(images, dtype)


def parse(events: Iterable[Mapping[str, Any]]) -> list[Run]:
    """Split the events of a profile, in order of time, into runs."""
    runs: list[Run] = []
    current: Run = []
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            operator = event.get("args", {}).get("op_name", "")
            current.append((name.removesuffix("_kernel_time"), operator, event["dur"] / 1e3))
        elif name == "model_run":
            runs.append(current)
            current = []
    return runs
