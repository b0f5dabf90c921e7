"""Accuracy and agreement of a checkpoint and of what is exported from it.

    python benchmarks/accuracy.py WEIGHTS DATA CALIB

DATA and CALIB as `--data` takes them; CALIB should hold images that DATA does not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import markdown, rtresnet, save

HEADINGS = ("artifact", "top-1", "of", "%", "agreement with the checkpoint, %")


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    weights, data, calib = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        exported = rtresnet(
            "export", "--weights", weights, "--fp32", "--fp16", "--int8", "--calib", calib,
            "--no-plan", cwd=place,
        )  # fmt: skip
        paths = [weights, *(entry["file"] for entry in exported["onnx"])]
        evaluated = [rtresnet("eval", path, "--data", data, cwd=place) for path in paths]
        compared = [rtresnet("compare", weights, path, "--data", data, cwd=place) for path in paths]
    rows = [
        (
            "checkpoint" if path == weights else f"{e['precision'].upper()} ONNX",
            e["top1"], e["n"], f"{e['top1_percent']:.2f}", f"{100 * c['agreement']:.2f}",
        )
        for path, e, c in zip(paths, evaluated, compared, strict=True)
    ]  # fmt: skip
    where = evaluated[-1]
    caption = (
        f"{exported['model']}, {Path(weights).name}; data {Path(data).name}, calibrated on "
        f"{Path(calib).name}; ONNX files on {where['device']}, {where['provider']}, onnxruntime "
        f"{where['versions']['onnxruntime']}."
    )
    record = {"export": exported, "eval": evaluated, "compare": compared}
    save(f"accuracy-{exported['model']}", record, markdown(HEADINGS, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
