"""Builds detectors with TensorRT-RTX and records precision of the convolutions, size and memory.

    python benchmarks/detection_builds.py [--only resnet50 vgg16 resnet101]

Untrained weights at 608 x 1008 pixels, 1,000 boxes before and 300 regions after non-maximum
suppression; INT8 with one scale for all tensors, because the counts do not depend on it.
Needs no GPU; the plans are not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from rtresnet.builder import engine
from rtresnet.core import artifacts, hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection, Sidecar, Weights
from rtresnet.detection import export
from rtresnet.detection import net as nets
from rtresnet.models import checkpoint, zoo
from rtresnet.quantization import mixed, qdq
from rtresnet.workflows.detect_quantize import SCOPES, float_nodes

CANVAS = (608, 1008)
# Backbone, its variant, side of a region's features, precisions.
CASES = {
    "resnet50": ("1x1", 7, ("fp32", "fp16", "int8")),
    "vgg16": (None, 7, ("fp32", "fp16", "int8")),
    "resnet101": ("1x1", 14, ("fp16", "int8")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES))
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/detection_builds.json")
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        stride_in, pool, precisions = CASES[name]
        torch.manual_seed(0)
        spec = zoo.spec(name, stride_in=stride_in)
        detection = Detection(pool=pool, canvas=CANVAS)
        net = nets.build(spec, detection, 20).eval()
        model = export.to_onnx(net, name=name)
        record = Sidecar(
            kind="onnx", file="", model=checkpoint.model_of(spec, tuple(map(str, range(20)))),
            input=Preprocess.for_size(224), weights=Weights(origin="untrained"), precision="fp32",
            detection=detection,
        )  # fmt: skip
        del net
        for precision in precisions:
            changed = model
            if precision == "fp16":
                changed = mixed.to_half_except(model, float_nodes(model))
            elif precision == "int8":
                keep = float_nodes(model, SCOPES)
                changed = qdq.insert(model, dict.fromkeys(qdq.placement(model, keep), 0.05), keep)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}-{precision}.onnx"
                data = changed.SerializeToString()
                artifacts.publish(
                    path,
                    lambda temporary, data=data: temporary.write_bytes(data),
                    dataclasses.replace(record, precision=precision),
                )
                built = engine.build(path, path.with_suffix(".plan"), builder="rtx")
            assert built.plan is not None and built.plan.attested is not None
            attested = built.plan.attested
            rows.append(
                {
                    "backbone": name, "pool": pool, "precision": precision, "canvas": CANVAS,
                    "onnx_bytes": len(data), "plan_bytes": built.bytes,
                    "nodes": len(changed.graph.node), "seconds": built.plan.seconds,
                    "convolutions": attested.convolutions, "dtypes": attested.dtypes,
                    "activation_bytes": attested.activations,
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "Faster R-CNN (C4) of plain operations, 300 regions, built by TensorRT-RTX",
        "device": hardware.cpu(),
        "versions": hardware.versions(("rtresnet", "tensorrt-rtx-cu13", "onnx", "torch")),
        "loaded": "other processes ran at the same time",
        "builds": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
