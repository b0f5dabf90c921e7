"""Trains small detectors on drawn shapes, three seeds, and measures average precision.

    python benchmarks/detection_shapes.py [--seeds 0 1 2] [--keep DIR]
    python benchmarks/detection_shapes.py --precisions DIR    # FP32, FP16, INT8 of --keep DIR

Shows that the machinery learns; it says nothing about the paper's comparison of backbones. A
quarter-width ResNet-18 from untrained weights, 400 images of 128 pixels, 1,200 steps of 8 images,
one CPU thread; 100 test images, used once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import rtresnet
from rtresnet.core import detector_preprocess, hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection, DetectionParityRecord
from rtresnet.detection import checkpoint, evaluate, parity, training
from rtresnet.detection.data import open_detection
from rtresnet.detection.recipe import SCRATCH
from rtresnet.models import zoo

SPEC = Detection(
    shorter=128, longer=128, anchors=(16.0, 32.0, 64.0), pool=7, width=0.25, candidates=300,
    regions=50, detections=20,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="folder for the trained nets")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/detection_shapes.json")
    )
    parser.add_argument("--precisions", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.precisions:
        precisions(arguments.precisions, arguments.seeds)
        return
    torch.set_num_threads(1)
    runs = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = arguments.keep / f"seed{seed}" if arguments.keep else Path(folder) / "run"
            job = training.DetectionJob(
                spec=zoo.spec("resnet18"), detection=SPEC, source=open_detection("shapes:400"),
                test=open_detection("shapes:400", "test"), preprocess=Preprocess.for_size(128),
                recipe=dataclasses.replace(SCRATCH, seed=seed), out=out,
            )  # fmt: skip
            wall, cpu = time.perf_counter(), time.process_time()
            best = training.train(job)
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        runs.append({"seed": seed, **seconds, **best.measured["average_precision"]})
        print(json.dumps(runs[-1]), flush=True)
    values = [run["ap50"] for run in runs]
    result = {
        "what": "quarter-width ResNet-18 Faster R-CNN on shapes, 1,200 steps of 8 images",
        "device": hardware.cpu(), "threads": 1,
        "versions": hardware.versions(("rtresnet", "torch", "numpy")),
        "loaded": "other processes ran at the same time; cpu_s is this process's own time",
        "ap50_mean": statistics.mean(values), "ap50_min": min(values), "runs": runs,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def parity_of(best: Path, exported: rtresnet.ExportResult) -> DetectionParityRecord:
    """Compare detections of the FP32 file with those of torch, on the 100 test images."""
    sidecar = rtresnet.read_sidecar(exported.path)
    assert sidecar is not None and sidecar.detection is not None
    run = evaluate.torch_run(checkpoint.build(checkpoint.load(best)))
    source, total = open_detection("shapes:400", "test"), parity.DetectionParity()
    with rtresnet.load(exported.path, provider="cpu", threads=1) as session:
        for index in range(len(source)):
            images, extent = detector_preprocess.to_canvas(
                source.read(index), sidecar.detection, sidecar.input
            )
            outputs = session.backend.detect(images, extent)
            total += parity.compare(run(images, extent), outputs, 0.05)
    return total.record()


def precisions(runs_folder: Path, seeds: list[int]) -> None:
    """Average precision of the exported files on the test images, in ONNX Runtime."""
    rows, parities = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            exported = rtresnet.export(
                runs_folder / f"seed{seed}" / "best.pt", folder,
                rtresnet.ExportConfig(precisions=("fp32", "fp16", "int8")),
                quantize=rtresnet.QuantizeConfig(calib="shapes:64", calib_images=64),
            )  # fmt: skip
            parities.append(
                {"seed": seed} | parity_of(runs_folder / f"seed{seed}" / "best.pt", exported)
            )
            for entry in exported.onnx:
                runtime = rtresnet.RuntimeConfig(provider="cpu", threads=1)
                result = rtresnet.evaluate_detector(entry.path, "shapes:400", runtime=runtime)
                row = {"seed": seed, "precision": entry.precision, "ap": result.ap,
                       "ap50": result.ap50, "unsettled": result.unsettled}  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
    drops = [
        a["ap"] - b["ap"]
        for a in rows for b in rows
        if a["seed"] == b["seed"] and (a["precision"], b["precision"]) == ("fp32", "int8")
    ]  # fmt: skip
    result = {
        "what": "the nets of detection_shapes.json as ONNX files in ONNX Runtime, 100 test images, "
        "INT8 calibrated on 64 training images",
        "device": hardware.cpu(), "versions": hardware.versions(("rtresnet", "onnxruntime")),
        "int8_loses_ap": {"mean": statistics.mean(drops), "largest": max(drops)},
        "parity_of_fp32_file_and_torch": parities, "rows": rows,
    }  # fmt: skip
    path = Path("benchmarks/results/detection_precisions.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
