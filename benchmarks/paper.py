"""The analyses of the paper that take minutes on a CPU.

    python benchmarks/paper.py --data folder:cifar10 --checkpoint resnet32.th [--images 1000]

Runs each study, or reads what is finished in --out. JSON and tables go to results/, figures to
docs/assets/.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, markdown, rtresnet, save

from rtresnet.core import hardware

ASSETS = RESULTS.parent.parent / "docs" / "assets"
DEPTHS = (20, 56, 110)


def cost(options: argparse.Namespace) -> tuple[Any, list[tuple[object, ...]], str]:
    result = rtresnet("study", "cost", "--out", str(options.out / "cost"))
    rows = [
        (
            net["model"], f"{net['parameters']:,}", f"{net['multiply_adds'] / 1e9:.3f}",
            f"{100 * net['fc_parameters']:.1f}", f"{100 * net['fc_multiply_adds']:.2f}",
            f"{100 * net['of_vgg19']:.1f}",
        )
        for net in result["nets"]
        if net["size"] == 224
    ]  # fmt: skip
    headings = ("net", "parameters", "G mult-adds", "FC % of parameters", "FC % of mult-adds",
                "% of VGG-19")  # fmt: skip
    return result, [headings, *rows], "One image of 224 x 224 pixels; counted, not measured"


def gradients(options: argparse.Namespace) -> tuple[Any, list[tuple[object, ...]], str]:
    models = [f"--model={kind}{depth}" for kind in ("plain", "resnet") for depth in DEPTHS]
    result = rtresnet("study", "gradients", "--data", options.data, *models, "--steps", "100",
                      "--batch", "32", "--out", str(options.out / "gradients"))  # fmt: skip
    points = [[_digits(point["ratio"]) for point in net["points"]] for net in result["nets"]]
    steps = [f"step {point['step']}" for point in result["nets"][0]["points"]]
    rows = [(net["model"], *ratios) for net, ratios in zip(result["nets"], points, strict=True)]
    about = (
        f"Norm of the gradient of the first 3x3 layer over that of the last; {result['batch']} "
        f"images a step, n = 1 seed; {_name(options.data)}"
    )
    return result, [("net", *steps), *rows], about


def blocks(options: argparse.Namespace) -> tuple[Any, list[tuple[object, ...]], str]:
    result = rtresnet(
        "study", "blocks", "--data", options.data, "--images", "6400", "--steps", "300", "--seeds",
        "2", "--set", "precision=bf16", "--out", str(options.out / "blocks"),
    )  # fmt: skip
    rows = [
        (net["net"], f"{net['parameters']:,}",
         *(f"{net[name]['mean']:.2f} ± {net[name]['std']:.2f}"
           for name in ("train_error", "val_error", "test_error")),
         len(net["seeds"]))
        for net in result["nets"]
    ]  # fmt: skip
    headings = ("net", "parameters", "training %", "validation %", "test %", "n")
    return result, [headings, *rows], result["note"]


def lesions(options: argparse.Namespace) -> tuple[Any, list[tuple[object, ...]], str]:
    result = rtresnet(
        "study",
        "lesions",
        str(options.checkpoint),
        "--data",
        options.data,
        "--images",
        str(options.images),
        "--out",
        str(options.out / "lesions"),
    )
    rows = [
        (block["block"], f"{block['top1']:.2f}", f"{block['drop']:.2f}", f"{block['int8_db']:.1f}")
        for block in result["blocks"]
    ]
    headings = ("without", "top-1 %", "points lost", "INT8 dB")
    of = f"n = {result['n']} of {_name(options.data)}"
    about = f"{result['model']}, all blocks: {result['top1']:.2f} %, {of}"
    return result, [headings, *rows], about


def detection(options: argparse.Namespace) -> tuple[Any, list[tuple[object, ...]], str]:
    backbones = [f"--backbone={name}" for name in ("plain18", "resnet18", "resnet34")]
    result = rtresnet(
        "study", "detection", "--data", "shapes:200", *backbones, "--set", "width=0.125",
        "--epochs", "12", "--pretrain-steps", "60", "--seeds", "2",
        "--out", str(options.out / "detection"),
    )  # fmt: skip
    rows = [
        (record["backbone"], f"{record['parameters']:,}",
         *(f"{record[name]['mean']:.1f} ± {record[name]['std']:.1f}"
           for name in ("ap50", "ap", "voc07")),
         len(record["runs"]))
        for record in result["backbones"]
    ]  # fmt: skip
    headings = ("backbone", "parameters", "AP50 %", "AP %", "VOC07 %", "n")
    return result, [headings, *rows], f"{result['note']}; an eighth of the nets' width"


def _name(data: str) -> str:
    return Path(data.rpartition(":")[2]).name


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


STUDIES = {"cost": cost, "gradients": gradients, "lesions": lesions, "blocks": blocks,
           "detection": detection}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="not needed by cost and detection")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--study", action="append", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    where = f"{hardware.cpu()}, torch {torch.__version__}"
    for name in options.study or STUDIES:
        result, (headings, *rows), about = STUDIES[name](options)
        save(f"study-{name}", result, markdown(headings, rows) + f"\n\n{about}; {where}.")
        with contextlib.suppress(FileNotFoundError):  # matplotlib is not installed
            shutil.copy(options.out / name / f"{name}.png", ASSETS / f"{name}.png")


if __name__ == "__main__":
    main()
