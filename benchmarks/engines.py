"""Size, build time and CPU speed of the zoo's nets in three precisions.

    python benchmarks/engines.py resnet18 resnet50 resnet152

Weights are untrained: sizes, build times and speed do not depend on them. The three ONNX files of a
net are measured alternately, in one process, at batch 1 and 8.

The results say whether the processor has VNNI, and go into a file for each kind. To see the kernels
of the other kind (gcc, objdump and Linux on x86-64):

    .venv/bin/python tests/runtime/hide_vnni.py .venv/bin/python benchmarks/engines.py resnet50

OpenVINO, on a processor that its plugin does not offer, is in another build of ONNX Runtime:

    make .venv/openvino
    PYTHONPATH=$PWD/.venv/openvino .venv/bin/python benchmarks/engines.py \\
        --provider openvino resnet50
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from common import markdown, rtresnet, save

from rtresnet.core import hardware

HEADINGS = (
    "net", "precision", "ONNX MB", "plan MB", "build s", "convolutions", "ms, batch 1",
    "images/s, batch 8", "speed, batch 8", "n",
)  # fmt: skip


def measure(model: str, provider: str, seconds: float) -> tuple[list[tuple[object, ...]], dict]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        exported = rtresnet(
            "export", "--model", model, "--weights", "untrained", "--fp32", "--fp16", "--int8",
            cwd=place,
        )  # fmt: skip
        files = [entry["file"] for entry in exported["onnx"]]
        bench = rtresnet(
            "bench", *files, "--provider", provider, "--batch", "1,8", "--seconds", str(seconds),
            cwd=place,
        )  # fmt: skip
    for entry in bench["results"]:
        del entry["samples"]
    rows = []
    for entry, plan in zip(exported["onnx"], exported["plans"], strict=True):
        one, eight = (r for r in bench["results"] if r["precision"] == entry["precision"])
        took = plan["attested"]["dtypes"]
        rows.append(
            (
                model,
                entry["precision"],
                f"{entry['bytes'] / 1e6:.1f}",
                f"{plan['bytes'] / 1e6:.1f}",
                f"{plan['seconds']:.1f}",
                ", ".join(f"{count} {dtype}" for dtype, count in took.items()),
                f"{one['latency']['median']:.1f}",
                f"{eight['latency']['images_per_second']:.1f}",
                f"{eight['speed']:.2f}",
                eight["latency"]["n"],
            )
        )
    return rows, {"export": exported, "bench": bench}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50", "resnet152"])
    parser.add_argument("--provider", default="cpu", help="as `rtresnet bench --provider`")
    parser.add_argument("--seconds", type=float, default=10, help="seconds for each file and batch")
    parser.add_argument(
        "--name", help="name of the results' files; by provider and kind by default"
    )
    options = parser.parse_args()
    rows, records = [], {}
    for model in options.models:
        measured, records[model] = measure(model, options.provider, options.seconds)
        rows += measured
    first = next(iter(records.values()))
    where, plan = first["bench"]["results"][0], first["export"]["plans"][0]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    kind = "with VNNI"
    if hardware.int8_sums_saturate():
        hidden = "no_vnni" in os.environ.get("LD_PRELOAD", "")
        kind = "without VNNI" + (" (hidden by tests/runtime/hide_vnni.py)" if hidden else "")
    caption = (
        f"Plans by {plan['builder']} {plan['version']} for {', '.join(plan['targets'])}. Speed of "
        f"the ONNX files on {where['device']}, {kind}, {where['provider']}, "
        f"{where['threads']} threads, {versions}; {options.seconds:g} s each, alternately; "
        "speed against FP32; n batches of 8."
    )
    name = "engines" if options.provider == "cpu" else f"engines-{options.provider}"
    name += "-no-vnni" if hardware.int8_sums_saturate() else ""
    save(options.name or name, records, markdown(HEADINGS, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
