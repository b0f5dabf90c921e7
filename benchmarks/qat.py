"""Fine-tuning for INT8: does the exported file compute what was trained?

    python benchmarks/qat.py --data folder:cifar10 [--epochs 1] WEIGHTS...

`rtresnet train --qat` on the training images, `export --int8` of what it kept, then the test
images through four: the net in torch with fake quantization, the INT8 ONNX file as it is written
(ONNX Runtime without its optimizer), the same in integers (as `rtresnet.load` runs it on a CPU),
and the FP32 file that training began with.
"""

from __future__ import annotations

import argparse
import tempfile
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

HEADINGS = (
    "net", "training images", "epochs", "torch and ONNX agree %", "of", "equal logits %",
    "in integers %", "FP32 before %", "INT8 after %", "drop, points", "95 %",
)  # fmt: skip


def measure(weights: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    before = rtresnet("export", "--weights", weights, "--fp32", "--no-plan", "--out", "before",
                      cwd=place)  # fmt: skip
    rtresnet("train", "--weights", weights, "--data", options.data, "--qat", "--epochs",
             str(options.epochs), "--out", "run", cwd=place)  # fmt: skip
    after = rtresnet("export", "--weights", "run/best.pt", "--int8", "--no-plan", "--out", "after",
                     cwd=place)  # fmt: skip
    kept = checkpoint.load(place / "run" / "best.pt")
    assert kept.learned is not None
    fake = qat.FakeQuantized(kept.net()).eval()
    fake.set_scales(kept.learned.scales)
    (written,) = [entry for entry in after["onnx"] if entry["precision"] == "int8"]
    (plain,) = before["onnx"]
    files = [place / entry["file"] for entry in (written, plain)]
    sessions = [simulate.make_session(onnx.load(file)) for file in files]
    integers = package.load(str(files[0]), provider="cpu")
    found: list[list[np.ndarray]] = []
    for images, labels in loader.batches(open_source(options.data, "test"), kept.input, 128):
        with torch.inference_mode():
            trained = fake(torch.from_numpy(images)).numpy()
        runs = [session.run(None, {"images": images})[0] for session in sessions]
        found.append([trained, *runs, integers(images), labels])
    integers.close()
    trained, int8, fp32, ran, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    drop = metrics.paired_drop(fp32.argmax(1) == labels, int8.argmax(1) == labels)
    return {
        "net": after["model"], "training_images": kept.learned.n, "epochs": options.epochs,
        "agreement": 100 * metrics.parity(trained, int8).agreement, "n": len(labels),
        "equal": 100 * float((trained == int8).all(1).mean()),
        "in_integers": 100 * metrics.parity(trained, ran).agreement,
        "fp32_top1": 100 * float((fp32.argmax(1) == labels).mean()),
        "int8_top1": 100 * float((int8.argmax(1) == labels).mean()),
        "drop": drop.points, "low": drop.low, "high": drop.high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    results = []
    for weights in options.weights:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(str(Path(weights).resolve()), options, Path(folder)))
    rows = [
        (
            e["net"], e["training_images"], e["epochs"], f"{e['agreement']:.2f}", e["n"],
            f"{e['equal']:.2f}", f"{e['in_integers']:.2f}", f"{e['fp32_top1']:.2f}",
            f"{e['int8_top1']:.2f}",
            f"{e['drop']:.2f}", f"{e['low']:.2f} to {e['high']:.2f}",
        )
        for e in results
    ]  # fmt: skip
    versions = hardware.versions(("rtresnet", "torch", "onnx", "onnxruntime"))
    caption = (
        f"Fine-tuned on {Path(options.data.partition(':')[2]).name}; equal logits: of torch and "
        f"ONNX, bit for bit; in integers: torch and the file as a CPU runs it agree; "
        f"drop: INT8 after against FP32 before; CPU, {hardware.cpu()}, "
        + ", ".join(f"{n} {v}" for n, v in versions.items())
        + "."
    )
    save("qat", {"results": results, "versions": versions},
         markdown(HEADINGS, rows) + "\n\n" + caption)  # fmt: skip


if __name__ == "__main__":
    main()
