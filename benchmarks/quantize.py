"""INT8 against FP32: agreement, accuracy and noise, beside other tools' on the same images.

    python benchmarks/quantize.py --data folder:cifar10 --calib folder:cifar10 \\
        [--modelopt PYTHON] WEIGHTS...

Every file is calibrated on the same 512 training images and compared with the FP32 file on all the
test images. ONNX Runtime's `quantize_static` is given the flags that TensorRT needs. NVIDIA
ModelOpt runs in an environment of its own, whose python `--modelopt` names: it is no dependency.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import markdown, rtresnet, save

import rtresnet as package
from rtresnet import machine, metrics
from rtresnet.data import loader
from rtresnet.data.sources import open_images, open_source

OURS = ("auto", "max", "percentile", "entropy", "mse")
IMAGES = 512

MODELOPT = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
source, images, method, out = sys.argv[1:]
quantize(source, quantize_mode="int8", calibration_data={"images": np.load(images)},
         calibration_method=method, output_path=out, calibration_eps=["cpu"],
         high_precision_dtype="fp32")
"""


def onnxruntime_file(source: Path, images: np.ndarray, method: str, out: Path) -> Path:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(np.array_split(images, len(images) // 32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantize_static(
        str(source), str(out), Reader(), per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True,
                       "QuantizeBias": False, "DedicatedQDQPair": False},
    )  # fmt: skip
    return out


def modelopt_file(python: str, source: Path, images: Path, method: str, out: Path) -> Path:
    subprocess.run(
        [python, "-c", MODELOPT, str(source), str(images), method, str(out)], check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return out


def plainly(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits by ONNX Runtime's CPU provider as anybody calls it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = np.array_split(images, max(1, len(images) // 128))
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


def ours(path: Path, images: np.ndarray) -> np.ndarray:
    with package.load(str(path), provider="cpu") as session:
        batches = np.array_split(images, max(1, len(images) // 128))
        return np.concatenate([session(batch) for batch in batches])


def noise_ratio(reference: np.ndarray, logits: np.ndarray) -> float:
    noise = np.square(reference.astype(np.float64) - logits).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise))


def measure(weights: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    exported = rtresnet("export", "--weights", weights, "--fp32", "--no-plan", cwd=folder)
    source = folder / exported["onnx"][0]["file"]
    with package.load(str(source), provider="cpu") as session:
        contract = session.preprocess
    test = open_source(options.data, "test")
    found = list(loader.batches(test, contract, 128))
    images, labels = (np.concatenate([batch[n] for batch in found]) for n in (0, 1))
    calib = open_images(options.calib)
    chosen = loader.sample(calib, IMAGES)
    batches = loader.batches(calib, contract, 128, indices=chosen)
    seen = np.concatenate([batch for batch, _ in batches])
    np.save(folder / "calib.npy", seen)
    files: list[tuple[str, Path, bool]] = []
    for method in OURS:
        out = folder / f"{source.stem}-{method}.onnx"
        rtresnet("quantize", str(source), "--calib", options.calib, "--calib-images", str(IMAGES),
                 "--calibrator", method, "--out", str(out), cwd=folder)  # fmt: skip
        files.append((f"rtresnet, {method}", out, True))
    for method in ("MinMax", "Percentile", "Entropy"):
        out = onnxruntime_file(source, seen, method, folder / f"{source.stem}-ort-{method}.onnx")
        files.append((f"ONNX Runtime, {method}", out, False))
    for method in ("max", "entropy") if options.modelopt else ():
        out = folder / f"{source.stem}-modelopt-{method}.onnx"
        modelopt_file(options.modelopt, source, folder / "calib.npy", method, out)
        files.append((f"ModelOpt, {method}", out, False))
    reference = ours(source, images)
    base = int((reference.argmax(1) == labels).sum())
    results = []
    for name, path, is_ours in files:
        logits = (ours if is_ours else plainly)(path, images)
        drop = metrics.paired_drop(reference.argmax(1) == labels, logits.argmax(1) == labels)
        results.append(
            {
                "net": exported["model"],
                "by": name,
                "n": len(images),
                "fp32_top1": base,
                "agreement": 100 * metrics.parity(reference, logits).agreement,
                "drop": drop.points,
                "low": drop.low,
                "high": drop.high,
                "noise_ratio": noise_ratio(reference, logits),
                "pairs": sum(n.op_type == "QuantizeLinear" for n in onnx.load(path).graph.node),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--modelopt", metavar="PYTHON")
    parser.add_argument("--name", default="quantize")
    options = parser.parse_args()
    results = []
    for weights in options.weights:
        with tempfile.TemporaryDirectory() as folder:
            results += measure(str(Path(weights).resolve()), options, Path(folder))
    headings = ("net", "INT8 by", "agreement %", "drop, points", "95 %", "SNR dB", "images")
    rows = [
        (
            e["net"], e["by"], f"{e['agreement']:.2f}", f"{e['drop']:.2f}",
            f"{e['low']:.2f} to {e['high']:.2f}", f"{e['noise_ratio']:.1f}", e["n"],
        )
        for e in results
    ]  # fmt: skip
    names = ("rtresnet", "numpy", "onnx", "onnxruntime")
    versions = ", ".join(f"{n} {v}" for n, v in machine.versions(names).items())
    caption = (
        f"Agreement and drop against the FP32 file on the same images; calibrated on {IMAGES} "
        f"training images of {Path(options.calib.partition(':')[2]).name}; ONNX Runtime CPU on "
        f"{machine.cpu()}, {versions}."
    )
    save(options.name, {"results": results, "versions": versions},
         markdown(headings, rows) + "\n\n" + caption)  # fmt: skip


if __name__ == "__main__":
    main()
