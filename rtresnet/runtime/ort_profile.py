"""Time a node, from ONNX Runtime's own profile. Reached by `rtresnet profile X.onnx`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.runtime.ort import OrtBackend

WARM_UP = 3  # runs that are not recorded
LEAST = 5  # runs

Run = list[tuple[str, str, float]]
"""(node's name after fusion, operator, milliseconds), in the order they ran."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Runs with the profiler, and runs of the same session's twin without it, in turn.

    Attributes:
        runs: One a profiled run.
        whole: Milliseconds of each run without profiler, wall time.
        device: The GPU's name, or "cpu".
        provider: What ran.
        threads: None on a GPU.
        versions: Name and version of each library that ran the net.
    """

    runs: list[Run]
    whole: list[float]
    device: str
    provider: str
    threads: int | None
    versions: dict[str, str]


def record(
    path: str | os.PathLike[str],
    images: np.ndarray,
    *,
    seconds: float,
    threads: int | None = None,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> Recorded:
    """Profiles the CPU provider, which alone tells the time of every node.

    Args:
        path: An ONNX file.
        images: float32 [N, 3, S, S].
        seconds: For both kinds of runs together; at least five of each are made.
        threads: Intra-op threads; every core by default.
        on_progress: Called with the seconds spent.

    Raises:
        UnavailableError: onnxruntime is not installed.
        ArtifactError: The file cannot be loaded.
        InputError: The images do not fit.
    """
    with tempfile.TemporaryDirectory(prefix="rtresnet-profile-") as folder:
        plain = OrtBackend(path, provider="cpu", threads=threads)
        watched = OrtBackend(
            path, provider="cpu", threads=threads, profile=str(Path(folder) / "nodes")
        )
        images = fitting(images, plain.input_dtype, plain.layout)
        whole: list[float] = []
        for _ in range(WARM_UP):
            plain.infer(images)
            watched.infer(images)
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or len(whole) < LEAST:
            start = time.perf_counter()
            plain.infer(images)
            whole.append(1e3 * (time.perf_counter() - start))
            watched.infer(images)
            on_progress(elapsed)
        runs = parse(json.loads(Path(watched.end_profile()).read_text(encoding="utf-8")))
        plain.close()
        watched.close()
    return Recorded(
        runs=runs[WARM_UP:], whole=whole, device=plain.device, provider=plain.provider,
        threads=plain.threads, versions=plain.versions,
    )  # fmt: skip


def fitting(images: np.ndarray, dtype: np.dtype[Any], layout: str) -> np.ndarray:
    """Standard normal float32 [N, 3, S, S] as a file takes its input, pixels for uint8."""
    if dtype == np.uint8:
        images = np.clip(128 + 64 * images, 0, 255)
    placed = images.transpose(0, 2, 3, 1) if layout == "nhwc" else images
    return np.ascontiguousarray(placed, dtype)


def parse(events: list[dict[str, Any]]) -> list[Run]:
    """Cuts a profile's events, in order of time, into runs."""
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
