"""Compare a detector's file with one of standard operators: speed in ONNX Runtime.

    python benchmarks/detection_speed.py [--runs 5]

The reference file has RoiAlign and NonMaxSuppression nodes instead of matrix products. Both files
run alternately in one process, so that a loaded machine slows down both. ResNet-50 v1, untrained,
one image.
The cost of the nodes of each part is from ONNX Runtime's profile, recorded in other sessions.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from rtresnet.core import hardware
from rtresnet.core.sidecar import Detection
from rtresnet.detection import export
from rtresnet.detection import net as nets
from rtresnet.models import zoo
from rtresnet.quantization import qdq
from rtresnet.runtime.ort import OrtBackend
from rtresnet.workflows.detect_quantize import SCOPES, float_nodes

SPEC = Detection(pool=7, canvas=(608, 800), regions=100)


PARTS = ("proposals", "align", "select")


def parts(
    models: dict[str, onnx.ModelProto], feed: dict[str, np.ndarray], runs: int
) -> dict[str, dict[str, float]]:
    """Return milliseconds of the nodes of each part, sums of medians; the rest is the net."""
    sessions, milliseconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / name)
            sessions[name] = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        for _ in range(runs):
            for session in sessions.values():
                session.run(None, feed)
        for name, session in sessions.items():
            events = json.loads(Path(session.end_profiling()).read_text())
            nodes = collections.defaultdict(list)
            for event in events:
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    nodes[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
            sums = dict.fromkeys((*PARTS, "net"), 0.0)
            for node, values in nodes.items():
                part = node.partition(".")[0]
                sums[part if part in PARTS else "net"] += statistics.median(values)
            milliseconds[name] = sums
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detection_speed.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    net = nets.build(zoo.spec("resnet50", stride_in="1x1"), SPEC, 20).eval()
    plain = export.to_onnx(net, name="plain")
    twin = export.to_onnx(net, name="twin", standard=True)
    keep = float_nodes(plain, SCOPES)
    int8 = qdq.insert(plain, dict.fromkeys(qdq.placement(plain, keep), 0.05), keep)
    images = np.random.default_rng(0).standard_normal((1, 3, *SPEC.canvas)).astype(np.float32)
    extent = np.array([[600, 800]], np.float32)
    with tempfile.TemporaryDirectory() as folder:
        backends = {}
        for name, model in (("plain", plain), ("twin", twin), ("plain int8", int8)):
            path = Path(folder) / f"{name}.onnx"
            onnx.save(model, path)
            backends[name] = OrtBackend(path, provider="cpu", threads=1)
        load_before = os.getloadavg()[0]
        times: dict[str, list[float]] = {name: [] for name in backends}
        for run in range(arguments.runs + 1):
            for name, backend in backends.items():
                start = time.perf_counter()
                backend.detect(images, extent)
                if run:
                    times[name].append(time.perf_counter() - start)
    feed = {"images": images, "extent": extent}
    profile = parts({"plain": plain, "twin": twin}, feed, arguments.runs)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "what": "one image of 608 x 800 pixels, 100 regions, 1 thread; medians of alternating runs",
        "device": hardware.cpu(), "versions": hardware.versions(("rtresnet", "onnxruntime")),
        "load_before": load_before,
        "n": arguments.runs, "seconds": medians,
        "node_milliseconds": profile,
        "twin_over_plain": medians["twin"] / medians["plain"],
        "twin_over_plain_int8": medians["twin"] / medians["plain int8"],
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
