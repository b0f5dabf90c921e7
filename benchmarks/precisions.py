"""FP32, FP16, BF16, INT8 and FP8 of the same nets: size, accuracy, bytes, bounds on four GPUs.

    python benchmarks/precisions.py --data npz:cifar10-test.npz \\
        --weights resnet20=resnet20.th --untrained resnet18 --untrained resnet50

Needs no GPU. Every file is linted, and built with TensorRT-RTX for sm_89 and sm_120, which fails
unless each convolution runs in the file's precision. Accuracy is measured with ONNX Runtime, which
computes BF16 and FP8 files in float32 with the file's rounding. Trained nets pass the accuracy gate
(0.5 points). Untrained nets are calibrated on noise and have no accuracy. Nothing is timed: the
bounds are those of `rtresnet estimate` at batch 8.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import markdown, save

import rtresnet as rt
from rtresnet.core import hardware
from rtresnet.core.sidecar import Sidecar

GPUS = ("L4", "L40S", "RTX 4090", "RTX 5090")
TARGETS = ("sm_89", "sm_120")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
ATTESTED = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8", "fp8": "FP8"}
HEADINGS = ("net", "precision", "ONNX MB", "plan MB", "top-1 %", "SNR dB", "convolutions",
            "MB moved", *(f"{gpu} us" for gpu in GPUS))  # fmt: skip


def quantized(source: Path, precision: str, data: str | None, images: int) -> Path:
    """Return the file of a precision, next to the FP32 file."""
    if precision == "fp32":
        return source
    if precision in ("fp16", "bf16"):
        return rt.quantize(source, rt.QuantizeConfig(precision=precision)).path  # type: ignore[arg-type]
    config = rt.QuantizeConfig(
        precision=precision,  # type: ignore[arg-type]
        calib=data or f"synthetic:{images}",
        calib_images=images,
        float_dtype="fp16",
        eval_data=data,
        calibrator="auto" if data else "mse",
    )
    return rt.quantize(source, config).path


def noise(sidecar: Sidecar) -> float | None:
    """Signal to noise at the logits, as calibration measured it."""
    calibration = sidecar.calibration
    if calibration is None:
        return None
    from rtresnet.quantization import scales

    ratio = scales.read(calibration.scales).ratios.get("kept")
    return None if ratio is None else round(ratio, 1)


def measure(net: str, weights: str, data: str | None, folder: Path) -> list[dict[str, Any]]:
    source = rt.export(weights, folder / f"{net}.onnx", rt.ExportConfig(model=net)).path
    entries, plans = [], []
    for precision in PRECISIONS:
        path = quantized(source, precision, data, 128 if data else 8)
        lint = rt.lint(path)
        assert lint.passed, (path, lint.worse)
        plan = rt.build(path, rt.BuildConfig(targets=TARGETS))
        sidecar = rt.read_sidecar(path)
        assert sidecar is not None
        attested = plan.plan.attested
        assert attested is not None
        kept = sidecar.calibration.kept if sidecar.calibration else ()
        floats = sum(n for dtype, n in attested.dtypes.items() if dtype != ATTESTED[precision])
        assert floats <= len(kept), attested.dtypes
        accuracy = rt.evaluate(path, data) if data else None
        entries.append(
            {
                "net": net,
                "precision": precision,
                "onnx_bytes": path.stat().st_size,
                "plan_bytes": plan.bytes,
                "top1": None if accuracy is None else round(accuracy.top1_percent, 2),
                "n": None if accuracy is None else accuracy.n,
                "snr_db": noise(sidecar),
                "convolutions": attested.dtypes,
                "lint": lint.worse,
                "left_in_float": list(kept),
            }
        )
        plans.append(plan.path)
        print(entries[-1], flush=True)
    for entry, plan in zip(entries, rt.advise(plans, bounds()).plans, strict=True):
        entry["bytes_moved"] = plan.estimate.bytes
        entry["bounds_us"] = {
            gpu.gpu: [1e3 * gpu.no_faster_than_ms, 1e3 * gpu.through_memory_ms]
            for gpu in plan.estimate.results
        }
    return entries


def bounds() -> rt.EstimateConfig:
    return rt.EstimateConfig(gpus=GPUS, batch=8)


def row(entry: dict[str, Any]) -> tuple[object, ...]:
    times = (entry["bounds_us"].get(gpu) for gpu in GPUS)
    return (
        entry["net"], entry["precision"], f"{entry['onnx_bytes'] / 1e6:.1f}",
        f"{entry['plan_bytes'] / 1e6:.1f}",
        "-" if entry["top1"] is None else f"{entry['top1']:.2f}",
        "-" if entry["snr_db"] is None else entry["snr_db"],
        ", ".join(f"{n} {dtype}" for dtype, n in entry["convolutions"].items()),
        f"{entry['bytes_moved'] / 1e6:.1f}",
        *("-" if both is None else f"{both[0]:.3g} to {both[1]:.3g}" for both in times),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="labelled images for the nets of --weights")
    parser.add_argument("--weights", action="append", default=[], metavar="NET=FILE")
    parser.add_argument("--untrained", action="append", default=[], metavar="NET")
    arguments = parser.parse_args()
    nets = [(*entry.split("=", 1), arguments.data) for entry in arguments.weights]
    nets += [(net, "untrained", None) for net in arguments.untrained]
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for net, weights, data in nets:
            entries += measure(net, weights, data, Path(folder))
            record = {
                "device": hardware.cpu(),
                "targets": TARGETS,
                "batch": 8,
                "versions": {
                    name: hardware.version(name)
                    for name in ("tensorrt-rtx-cu13", "onnx", "onnxruntime")
                },
                "results": entries,
            }
            save("precisions", record, markdown(HEADINGS, [row(entry) for entry in entries]))


if __name__ == "__main__":
    main()
