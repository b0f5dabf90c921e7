"""What calibrating costs: time against plain FP32 passes, and peak memory against images.

    python benchmarks/calibration.py [--model resnet50] [--images 512]

The photographs are made here: smooth noise, saved as JPEG. Time: a plain pass decodes and runs the
FP32 file over the same images with the same threads; it is taken before and after every
calibration. Memory: the whole `rtresnet quantize`, each in a process of its own, the largest of
two, since what an allocator keeps differs from run to run by some percent.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import markdown, rtresnet, save
from PIL import Image

from rtresnet.core import hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.data import loader
from rtresnet.data.sources import open_images
from rtresnet.quantization import calibrate, qdq
from rtresnet.quantization.canonicalize import canonicalize
from rtresnet.quantization.simulate import make_session

FEW, MANY = 128, 1024
METHODS = ("max", "auto")


def photographs(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg")


def times(source: Path, photos: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    model = canonicalize(onnx.load(source))
    tensors = list(qdq.placement(model))
    contract = Preprocess.for_size(model.graph.input[0].type.tensor_type.shape.dim[3].dim_value)
    images = open_images(str(photos))
    chosen = loader.sample(images, count)
    plain, name = make_session(model), model.graph.input[0].name

    def batches() -> Any:
        loaded = loader.batches(images, contract, 16, indices=chosen)
        return (batch for batch, _ in loaded)

    def one_pass() -> float:
        start = time.perf_counter()
        for batch in batches():
            plain.run(None, {name: batch})
        return time.perf_counter() - start

    one_pass()
    durations: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        before = one_pass()
        for method in METHODS:
            start = time.perf_counter()
            calibrate.calibrate(model, tensors, batches, method)
            seconds = time.perf_counter() - start
            after = one_pass()
            durations[method].append(seconds / ((before + after) / 2))
            before = after
    return [
        {"method": m, "passes": statistics.median(r), "rounds": r} for m, r in durations.items()
    ]


def peak(source: Path, photos: Path, count: int, method: str) -> int:
    """Return a size in bytes."""
    shutil.rmtree(source.parent / "calib", ignore_errors=True)  # or its scales are used again
    command = [sys.executable, "-m", "rtresnet", "quantize", str(source), "--calib", str(photos),
               "--calib-images", str(count), "--calibrator", method]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=source.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place, photos = Path(folder), Path(folder) / "photographs"
        photos.mkdir()
        photographs(photos, MANY)
        exported = rtresnet("export", "--model", options.model, "--weights", "untrained", "--fp32",
                            "--no-plan", cwd=place)  # fmt: skip
        source = place / exported["onnx"][0]["file"]
        # Memory first: Linux counts what this process holds at the fork to the child's peak.
        peaks = {
            (m, n): max(peak(source, photos, n, m) for _ in range(2))
            for m in METHODS
            for n in (FEW, MANY)
        }
        results = times(source, photos, options.images, options.rounds)
        for entry in results:
            for count in (FEW, MANY):
                entry[f"peak_{count}"] = peaks[entry["method"], count]
    rows = [
        (
            entry["method"], f"{entry['passes']:.2f}", f"{entry[f'peak_{FEW}'] / 1e6:,.0f}",
            f"{entry[f'peak_{MANY}'] / 1e6:,.0f}",
            f"{100 * (entry[f'peak_{MANY}'] / entry[f'peak_{FEW}'] - 1):+.1f}",
        )
        for entry in results
    ]  # fmt: skip
    headings = (
        "calibrator", "plain passes", f"peak MB, {FEW} images", f"peak MB, {MANY} images",
        "growth %",
    )  # fmt: skip
    versions = hardware.versions(("rtresnet", "numpy", "onnx", "onnxruntime"))
    caption = (
        f"{options.model}, {options.images} images of 400x300 px; time as a multiple of a plain "
        f"FP32 pass (decode and run), median of {options.rounds}; ONNX Runtime CPU on "
        f"{hardware.cpu()}, " + ", ".join(f"{n} {v}" for n, v in versions.items()) + "."
    )
    save("calibration", {"results": results, "versions": versions},
         markdown(headings, rows) + "\n\n" + caption)  # fmt: skip


if __name__ == "__main__":
    main()
