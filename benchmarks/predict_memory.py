"""Peak memory of `rtresnet predict` over many images: flat, or growing with them?

    python benchmarks/predict_memory.py [--images 10000]

Writes small photographs of several sizes, and has a process of its own predict a tenth of them,
then all, each into a table; what is reported is the process's largest resident set, as the kernel
counts it. Weights are untrained: memory does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown, rtresnet, save
from PIL import Image

from rtresnet.core import hardware


def photographs(folder: Path, count: int) -> None:
    """Return `count` JPEGs of 64 different pictures, 120 to 500 pixels a side."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(64):
        width, height = (int(side) for side in rng.integers(120, 500, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        path = folder / "one.jpg"
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=85)
        encoded.append(path.read_bytes())
    path.unlink()
    for index in range(count):
        place = folder / f"{index // 1000:03}"
        place.mkdir(exist_ok=True)
        (place / f"{index:06}.jpg").write_bytes(encoded[index % len(encoded)])


def peak(arguments: list[str]) -> tuple[float, dict[str, Any]]:
    """Return MB of the largest resident set of `rtresnet predict`, and its output."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, "-m", "rtresnet", "predict", *arguments, "--json", result.name]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        return usage.ru_maxrss / 1024, json.loads(Path(result.name).read_text())["result"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10000)
    options = parser.parse_args()
    cases = [("resnet8", 32, "parquet"), ("resnet8", 64, "csv")]
    results = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part, count in (("tenth", options.images // 10), ("all", options.images)):
            (root / part).mkdir()
            photographs(root / part, count)
        for model, size, form in cases:
            rtresnet(
                "export", "--model", model, "--weights", "untrained", "--size", str(size),
                "--fp32", "--no-plan", "--out", str(root / model),
            )  # fmt: skip
            artifact = str(root / model / f"{model}.onnx")
            entry: dict[str, Any] = {"net": model, "pixels": size, "form": form}
            for part in ("tenth", "all"):
                out = str(root / f"{model}-{part}.{form}")
                megabytes, output = peak([artifact, str(root / part), "--out", out])
                entry |= {f"{part}_mb": megabytes, f"{part}_images": output["images"]}
            entry |= {key: output[key] for key in ("batch", "images_per_second", "provider")}
            entry["ratio"] = entry["all_mb"] / entry["tenth_mb"]
            results.append(entry)
    headings = (
        "net", "pixels", "table", "batch", f"MB, {options.images // 10:,} images",
        f"MB, {options.images:,} images", "ratio", "images/s",
    )  # fmt: skip
    rows = [
        (
            e["net"], e["pixels"], e["form"], e["batch"], f"{e['tenth_mb']:.1f}",
            f"{e['all_mb']:.1f}", f"{e['ratio']:.3f}", f"{e['images_per_second']:,.0f}",
        )
        for e in results
    ]  # fmt: skip
    names = ("rtresnet", "numpy", "onnxruntime", "pillow", "simplejpeg", "pyarrow")
    versions = hardware.versions(names)
    caption = (
        f"Largest resident set of the process on {hardware.cpu()}, {results[0]['provider']}, "
        f"{', '.join(f'{n} {v}' for n, v in versions.items())}; JPEGs of 120 to 500 pixels a side; "
        f"{time.perf_counter() - begin:.0f} s in all. The machine was shared, which the images a "
        "second show and the memory does not."
    )
    record = {"results": results, "versions": versions, "device": hardware.cpu()}
    save("predict-memory", record, markdown(headings, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
