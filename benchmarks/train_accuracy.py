"""Time to an accuracy: the recipe `speed` against `paper-cifar` scaled down to a few epochs.

    python benchmarks/train_accuracy.py --data folder:cifar10 [--epochs 8] [--speed-epochs 4]

Seconds are those of the training steps, summed until the held-out images are first recognized as
well as by `paper-cifar` at its end; one after the other, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import markdown, rtresnet, save

from rtresnet.core import hardware


def run(data: str, recipe: str, epochs: int, seed: int, folder: Path, *more: str) -> dict[str, Any]:
    out = folder / f"{recipe}-{seed}-{len(more)}"
    result = rtresnet(
        "train", "--model", "resnet20", "--data", data, "--recipe", recipe, "--epochs", str(epochs),
        "--seed", str(seed), "--out", str(out), *more,
    )  # fmt: skip
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return result | {"log": log}


def seconds_to(log: list[dict[str, Any]], accuracy: float) -> float | None:
    spent = 0.0
    for record in log:
        spent += record["seconds"]
        if record["val_top1"] >= accuracy:
            return spent
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--speed-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    rows, records = [], []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paper = run(options.data, "paper-cifar", options.epochs, seed, folder)
            goal = paper["log"][-1]["val_top1"]
            base = sum(record["seconds"] for record in paper["log"])
            quick = options.speed_epochs
            runs = [
                ("paper-cifar", paper),
                ("speed", run(options.data, "speed", quick, seed, folder)),
                (
                    "speed, fp32",
                    run(options.data, "speed", quick, seed, folder, "--set", "precision=fp32"),
                ),
            ]
        for label, entry in runs:
            took = seconds_to(entry["log"], goal) if entry is not paper else base
            rows.append(
                (
                    label, seed, len(entry["log"]), f"{entry['log'][-1]['val_top1']:.2f}",
                    f"{entry['measured']['test_top1']:.2f}",
                    f"{sum(record['seconds'] for record in entry['log']):.0f}",
                    "not reached" if took is None else f"{took:.0f}",
                    "" if took is None else f"{took / base:.2f}",
                )
            )  # fmt: skip
            records.append(
                {"recipe": label, "seed": seed, "goal": goal, "seconds_to_goal": took} | entry
            )
    headings = ("recipe", "seed", "epochs", "held out %", "test %", "seconds",
                "to paper-cifar's accuracy", "ratio")  # fmt: skip
    versions = ", ".join(
        f"{n} {v}" for n, v in hardware.versions(("rtresnet", "numpy", "torch")).items()
    )
    tested = records[0]["measured"]
    caption = (
        f"resnet20 on {Path(options.data.partition(':')[2]).name}, 45,000 training images, "
        f"{tested['val_n']} held out, {tested['test_n']} tested; {hardware.cpu()}, "
        f"{torch.get_num_threads()} threads, {versions}; one run a row, one after the other."
    )
    save("train-accuracy", {"results": records}, markdown(headings, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
