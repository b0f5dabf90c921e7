"""Fine-tuning for INT8 or FP8: does the exported file compute what was trained?

    python benchmarks/qat.py --data folder:cifar10 [--epochs 1] WEIGHTS...
    python benchmarks/qat.py --data folder:cifar10 --precision fp8 --steps 100 --name qat-fp8 ...

`rtresnet train --qat` on the training images, then `export` of its best checkpoint. The test images
run through the net in torch with fake quantization, the quantized ONNX file as it is written (ONNX
Runtime without its optimizer), the same file as `rtresnet.load` runs it on a CPU (INT8: with
integer kernels), the FP32 file of the weights before training, and their file calibrated with
`mse`. In FP8, training computes tensors that are not FP8 in float32; the file has FP32 or FP16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import markdown, rtresnet, save

import rtresnet as package
from rtresnet.core import hardware, metrics
from rtresnet.data import loader
from rtresnet.data.sources import open_source
from rtresnet.models import checkpoint
from rtresnet.quantization import simulate
from rtresnet.training import qat


def ran_heading(precision: str) -> str:
    return "in integers %" if precision == "int8" else "on a CPU %"


def headings(precision: str) -> tuple[str, ...]:
    name = precision.upper()
    return (
        "net", "other tensors", "training images", "epochs", "torch and ONNX agree %", "of",
        "equal logits %", "SNR, dB", ran_heading(precision), "FP32 before %", f"{name} before %",
        f"{name} after %", "drop, points", "95 %",
    )  # fmt: skip


def measure(weights: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Train once; yield the measurements of the file for each data type of its other tensors."""
    flag = f"--{options.precision}"
    length = ("--set", f"steps={options.steps}") if options.steps else ()
    calib = ("--calib", options.data, "--calib-images", "512", "--calibrator", "mse")
    before = rtresnet("export", "--weights", weights, flag, *calib, "--no-plan", "--out", "before",
                      cwd=folder)  # fmt: skip
    rtresnet("train", "--weights", weights, "--data", options.data, "--qat", "--precision",
             options.precision, "--epochs", str(options.epochs), *length, "--out", "run",
             cwd=folder)  # fmt: skip
    for dtype in ("fp32", "fp16") if options.precision == "fp8" else ("fp32",):
        after = rtresnet("export", "--weights", "run/best.pt", flag, "--float-dtype", dtype,
                         "--no-plan", "--out", f"after-{dtype}", cwd=folder)  # fmt: skip
        yield compared(before, after, options, folder) | {"other_tensors": dtype}


def compared(
    before: dict[str, Any], after: dict[str, Any], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    best = checkpoint.load(folder / "run" / "best.pt")
    assert best.learned is not None
    fake = qat.FakeQuantized(best.net(), options.precision).eval()
    fake.set_scales(best.learned.scales)
    (written,) = [entry for entry in after["onnx"] if entry["precision"] == options.precision]
    plain, calibrated = before["onnx"]
    files = [folder / entry["file"] for entry in (written, plain, calibrated)]
    sessions = [simulate.make_session(onnx.load(file)) for file in files]
    as_run = package.load(str(files[0]), provider="cpu")
    outputs: list[list[np.ndarray]] = []
    test = open_source(options.data, "test")
    chosen = loader.sample(test, options.images)
    for images, labels in loader.batches(test, best.input, 128, indices=chosen):
        with torch.inference_mode():
            trained = fake(torch.from_numpy(images)).numpy()
        runs = [session.run(None, {"images": images})[0] for session in sessions]
        outputs.append([trained, *runs, as_run(images), labels])
    as_run.close()
    trained, quantized, fp32, calibrated, ran, labels = (
        np.concatenate(part) for part in zip(*outputs, strict=True)
    )
    drop = metrics.paired_drop(fp32.argmax(1) == labels, quantized.argmax(1) == labels)
    return {
        "net": after["model"], "training_images": best.learned.n, "epochs": options.epochs,
        "precision": options.precision, "steps": options.steps,
        "agreement": 100 * metrics.parity(trained, quantized).agreement, "n": len(labels),
        "equal": 100 * float((trained == quantized).all(1).mean()),
        "noise_db": simulate.noise_ratio(trained, quantized),
        "as_run": 100 * metrics.parity(trained, ran).agreement,
        "fp32_top1": 100 * float((fp32.argmax(1) == labels).mean()),
        "calibrated_top1": 100 * float((calibrated.argmax(1) == labels).mean()),
        "top1": 100 * float((quantized.argmax(1) == labels).mean()),
        "drop": drop.points, "low": drop.low, "high": drop.high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--precision", choices=["int8", "fp8"], default="int8")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="instead of epochs")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--name", default="qat")
    options = parser.parse_args()
    results = []
    for weights in options.weights:
        with tempfile.TemporaryDirectory() as folder:
            results += measure(str(Path(weights).resolve()), options, Path(folder))
    rows = [
        (
            e["net"], e["other_tensors"].upper(), e["training_images"],
            f"{e['steps']} steps" if e["steps"] else e["epochs"], f"{e['agreement']:.2f}", e["n"],
            f"{e['equal']:.2f}", f"{e['noise_db']:.1f}", f"{e['as_run']:.2f}",
            f"{e['fp32_top1']:.2f}", f"{e['calibrated_top1']:.2f}", f"{e['top1']:.2f}",
            f"{e['drop']:.2f}", f"{e['low']:.2f} to {e['high']:.2f}",
        )
        for e in results
    ]  # fmt: skip
    versions = hardware.versions(("rtresnet", "torch", "onnx", "onnxruntime"))
    caption = (
        f"Fine-tuned on {Path(options.data.partition(':')[2]).name}; equal logits: of torch and "
        f"ONNX, bit for bit; SNR: signal-to-noise ratio of the file's logits against "
        f"torch's; {ran_heading(options.precision).removesuffix(' %')}: agreement of torch with "
        f"the file as ONNX Runtime runs it; "
        f"{options.precision.upper()} before: calibrated by mse on 512 training images; "
        f"drop: {options.precision.upper()} after against FP32 before; CPU, {hardware.cpu()}, "
        + ", ".join(f"{n} {v}" for n, v in versions.items())
        + "."
    )
    save(options.name, {"results": results, "versions": versions},
         markdown(headings(options.precision), rows) + "\n\n" + caption)  # fmt: skip


if __name__ == "__main__":
    main()
