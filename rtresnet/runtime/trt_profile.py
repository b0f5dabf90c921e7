"""Time a layer, from TensorRT's IProfiler. Reached by `rtresnet profile X.plan` on a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rtresnet.core import artifacts, trt_loading
from rtresnet.runtime.ort_profile import LEAST, WARM_UP, Recorded, Run, fitting
from rtresnet.runtime.trt import TrtBackend


def profiler(trt: Any) -> Any:
    """An object of a class derived from the module's IProfiler that keeps what it is told.

    TensorRT calls `report_layer_time(layer_name, ms)` once a layer after each enqueue.
    """

    class Keeper(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.layers: Run = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, "", float(ms)))

    return Keeper()


def record(
    path: str | os.PathLike[str],
    images: np.ndarray,
    *,
    seconds: float,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> Recorded:
    """Profiles a plan on the GPU that is here. What is compared is its compute, without copies.

    Args:
        path: A plan.
        images: float32 [N, 3, S, S]; N no larger than the plan's largest batch.
        seconds: For runs with and without the profiler together.
        on_progress: Called with the seconds spent.

    Raises:
        UnavailableError: No GPU, no TensorRT, or it does not accept the plan.
        ArtifactError: Version or target do not match.
    """
    sidecar = artifacts.verify(path)
    name = sidecar.plan.builder if sidecar and sidecar.plan else "tensorrt_rtx"
    # Inside a CUDA graph there are no layers to be told of: both run without, to be comparable.
    plain = TrtBackend(path, sidecar, graphs=False, timings=True)
    watched = TrtBackend(path, sidecar, graphs=False)
    try:
        images = fitting(images, plain.input_dtype, plain.layout)
        keeper = profiler(trt_loading.load_tensorrt(name))
        watched.watch(keeper)
        runs: list[Run] = []
        whole: list[float] = []
        for _ in range(WARM_UP):
            plain.infer(images)
            watched.infer(images)
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or len(whole) < LEAST:
            plain.infer(images)
            whole.append(plain.timings()["compute"])
            keeper.layers = []
            watched.infer(images)
            runs.append(keeper.layers)
            on_progress(elapsed)
        return Recorded(
            runs=runs, whole=whole, device=plain.device, provider=plain.provider,
            threads=None, versions=plain.versions,
        )  # fmt: skip
    finally:
        watched.close()
        plain.close()
