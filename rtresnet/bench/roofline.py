"""What this machine can do at best: multiply-adds and bytes a second, measured once and kept.

A matrix product in ONNX Runtime for each type, a copy in NumPy on every thread: the best of many
repetitions, because a roof is what nothing passes. Kept under ~/.cache/rtresnet (RTRESNET_CACHE),
by processor, threads and version of ONNX Runtime. Knows no net.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.core import atomic_io, hardware
from rtresnet.core.errors import missing_package
from rtresnet.core.serialization import from_json
from rtresnet.runtime.ort import OrtBackend

SIDES = (512, 1024)  # of the matrices
COPY = 128 << 20  # bytes: far beyond any cache
SECONDS = 0.6  # for each of the measurements


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The best rates.

    Attributes:
        fp32, int8: Operations a second; a multiply-add is two.
        bandwidth: Bytes a second, read and written together.
    """

    fp32: float
    int8: float
    bandwidth: float

    def rate(self, dtype: str) -> float:
        """Operations a second. FP16 is computed in FP32 on a CPU."""
        return self.int8 if dtype == "int8" else self.fp32


def cache_file() -> Path:
    """Where roofs are kept."""
    folder = os.environ.get("RTRESNET_CACHE", Path.home() / ".cache" / "rtresnet")
    return Path(folder) / "roofline.json"


def key(threads: int) -> str:
    """What a roof holds for."""
    version = hardware.version("onnxruntime", "onnxruntime-gpu")
    return f"{hardware.cpu()}; {threads} threads; onnxruntime {version}"


def of_this_machine(
    threads: int, *, anew: bool = False, measure: Callable[[int], Roof] | None = None
) -> tuple[Roof, bool]:
    """The roof for so many threads, and whether it was measured just now.

    A cache that cannot be read is measured and written anew; one that cannot be written is done
    without.
    """
    place, name = cache_file(), key(threads)
    kept = _read(place)
    if not anew and name in kept:
        return kept[name], False
    roof = (measure or measured)(threads)
    entries = {label: asdict(entry) for label, entry in (kept | {name: roof}).items()}
    with contextlib.suppress(OSError, ValueError):  # a home that is not writable
        atomic_io.write_text(place, json.dumps(entries, indent=1) + "\n")
    return roof, True


def _read(place: Path) -> dict[str, Roof]:
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        found = {name: from_json(Roof, entry) for name, entry in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: roof for name, roof in found.items() if min(asdict(roof).values()) > 0}


def measured(threads: int) -> Roof:
    """Measures all three, about two seconds."""
    return Roof(
        fp32=max(_product(side, "fp32", threads) for side in SIDES),
        int8=max(_product(side, "int8", threads) for side in SIDES),
        bandwidth=_copy(threads),
    )


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls."""
    call()
    best, until = float("inf"), time.perf_counter() + SECONDS / 2
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > until:
            return best


def _product(side: int, dtype: str, threads: int) -> float:
    rng = np.random.default_rng(0)
    if dtype == "int8":  # as runtime/ort.py has the processor do it
        weight = rng.integers(0, 100, (side, side)).astype(
            np.int8 if not hardware.int8_sums_saturate() else np.uint8
        )
        given = rng.integers(0, 255, (side, side), dtype=np.uint8)
    else:
        weight = rng.standard_normal((side, side)).astype(np.float32)
        given = rng.standard_normal((side, side)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="rtresnet-roof-") as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(_model(weight, given))
        backend = OrtBackend(path, provider="cpu", threads=threads)
        seconds = _best(lambda: backend.infer(given))
        backend.close()
    return float(2 * side**3 / seconds)


def _model(weight: np.ndarray, given: np.ndarray) -> bytes:
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise missing_package("onnx", "measuring the roofline") from None
    whole = weight.dtype != np.float32
    node = helper.make_node("MatMulInteger" if whole else "MatMul", ["x", "w"], ["y"])
    out = TensorProto.INT32 if whole else TensorProto.FLOAT
    shape = list(weight.shape)
    kinds: dict[Any, int] = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kinds[given.dtype.name], shape)],
        [helper.make_tensor_value_info("y", out, shape)],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def _copy(threads: int) -> float:
    parts = [np.ones(COPY // threads // 8) for _ in range(threads)]
    into = [np.empty_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(np.copyto, into, parts)))
    return 2 * sum(part.nbytes for part in parts) / seconds
