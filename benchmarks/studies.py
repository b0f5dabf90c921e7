"""The paper's analyses on real images: the figures in the README, and what they say in numbers.

    python benchmarks/studies.py --data folder:cifar10 [--images 6400] [--steps 300] [--seeds 2]

Runs that were finished in --out are not made again. Figures and tables go to results/.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, markdown, rtresnet, save

from rtresnet.core import hardware


def error(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['mean']:.2f}" + (f" ± {entry['std']:.2f}" if entry["std"] is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--depths", default="20,56")
    parser.add_argument("--images", default="6400")
    parser.add_argument("--steps", default="300")
    parser.add_argument("--seeds", default="2")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    common = (
        "--data", options.data, "--seeds", options.seeds, "--recipe", "paper-cifar",
        "--images", options.images, "--steps", options.steps, "--set", "precision=bf16",
    )  # fmt: skip
    folders = {name: options.out / name for name in ("degradation", "shortcuts", "responses")}
    degradation = rtresnet("study", "degradation", "--depths", options.depths, *common,
                           "--out", str(folders["degradation"]))  # fmt: skip
    shortcuts = rtresnet("study", "shortcuts", *common, "--out", str(folders["shortcuts"]))
    first = sorted(folders["degradation"].glob("*-seed0/best.pt"))
    rtresnet("study", "responses", *map(str, first), "--data", options.data,
             "--out", str(folders["responses"]))  # fmt: skip
    for name, folder in folders.items():
        shutil.copy(folder / f"{name}.png", RESULTS / f"{name}.png")
    where = f"{hardware.cpu()}, torch {torch.__version__}"
    for study in (degradation, shortcuts):
        rows = [
            (
                net["net"], f"{net['parameters']:,}",
                *(error(net[f"{part}_error"]) for part in ("train", "val", "test")),
                len(net["seeds"]),
            )
            for net in study["nets"]
        ]  # fmt: skip
        headings = ("net", "parameters", "training %", "validation %", "test %", "n")
        save(study["study"], study, markdown(headings, rows) + f"\n\n{study['note']}; {where}.")


if __name__ == "__main__":
    main()
