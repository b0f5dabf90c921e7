"""Training on a GPU: the paper's CIFAR run in full, `speed` to the same accuracy, ResNet-50.

    python benchmarks/train_gpu.py --data folder:cifar10 [--seeds 3] [--device cuda]

ResNet-20 under `paper-cifar`, all 64,000 steps, `--seeds` times, next to the paper's 8.75 % error;
then `speed`, with the seconds it took to that mean accuracy on the held-out images; then the speed
of ResNet-50 at 224 pixels on synthetic images, bf16, channels-last, compiled. `--steps` cuts the
runs short, to try the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown, rtresnet, save

from rtresnet.core import hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.loader import DecodeErrors
from rtresnet.data.sources import Arrays
from rtresnet.models import zoo
from rtresnet.training.distributed import ALONE
from rtresnet.training.loader import TrainLoader
from rtresnet.training.recipes import resolve
from rtresnet.training.step import Stepper, cudnn_benchmark

PAPER_ERROR = 8.75  # ResNet-20 on CIFAR-10, table 6


def run(folder: Path, recipe: str, seed: int, options: argparse.Namespace, *more: str) -> Any:
    out = folder / f"{recipe}-{seed}"
    result = rtresnet(
        "train", "--model", "resnet20", "--data", options.data, "--recipe", recipe, "--seed",
        str(seed), "--device", options.device, "--out", str(out), *more,
    )  # fmt: skip
    lines = (out / "log.jsonl").read_text().splitlines()
    return result["measured"] | {"log": [json.loads(line) for line in lines]}


def throughput(device: str, batch: int, steps: int, size: int, *, compiled: bool = True) -> float:
    """Return ResNet-50's training images/s, augmentation included."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * batch, size, size, 3), dtype=np.uint8)
    source = Arrays("noise", images, np.arange(2 * batch) % 10, [str(i) for i in range(10)])
    settings = {"batch": batch, "precision": "bf16", "compile": compiled, "padding": 0}
    recipe = resolve("paper-imagenet", images=2 * batch, size=size, depth=50, settings=settings)
    feed = TrainLoader(source, np.arange(2 * batch), Preprocess.for_size(size), recipe,
                device=device,
                tally=DecodeErrors(2 * batch))  # fmt: skip
    net = zoo.build(zoo.spec("resnet50"), 10).to(device).to(memory_format=torch.channels_last)
    stepper = Stepper(net, recipe, ALONE, device)
    stepper.train()
    begin, done = 0.0, 0
    with cudnn_benchmark(device):
        for first in range(0, 2 * (steps + 5), 2):
            if done == 10:  # compiled and warm
                torch.cuda.synchronize() if device.startswith("cuda") else None
                begin = time.perf_counter()
            for step, micros in feed.steps(first, first + 2):
                loss, _ = stepper.step(micros, recipe.lr_at(step, feed.total))
                done += 1
    loss.item()  # waits for the GPU
    return (done - 10) * batch / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    short = ("--set", f"steps={options.steps}") if options.steps else ()
    with tempfile.TemporaryDirectory() as name:
        paper = [run(Path(name), "paper-cifar", s, options, *short) for s in range(options.seeds)]
        goal = statistics.mean(entry["val_top1"] for entry in paper)
        quick = [run(Path(name), "speed", s, options, *short) for s in range(options.seeds)]
    rows = []
    for label, runs in (("paper-cifar", paper), ("speed", quick)):
        errors = [100 - entry["test_top1"] for entry in runs]
        deviation = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        spent = [_seconds_to(entry["log"], goal if label == "speed" else -1.0) for entry in runs]
        steps = [seconds for seconds in spent if seconds is not None]
        rows.append(
            (
                f"resnet20, {label}", f"{statistics.mean(errors):.2f}{deviation}",
                PAPER_ERROR if label == "paper-cifar" else "",
                f"{statistics.median(steps):.0f}" if steps else "not reached", len(runs), "",
            )
        )  # fmt: skip
    rate = throughput(options.device, options.batch, 40 if not options.steps else 6, options.size)
    rows.append((f"resnet50, {options.size} px, bf16, compiled, batch {options.batch}", "", "", "",
                 1, f"{rate:,.0f}"))  # fmt: skip
    headings = ("run", "test error %", "paper %", "s to the accuracy", "n", "images/s")
    on_gpu = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if on_gpu else hardware.cpu()
    versions = ", ".join(f"{n} {v}" for n, v in hardware.versions(("rtresnet", "torch")).items())
    caption = (
        f"{where}, {versions}. The images at hand are recompressed as JPEG, on which every net "
        "scores some points lower than on the originals. Seconds are those of the training steps, "
        f"of speed until its held-out accuracy is paper-cifar's mean of {goal:.2f} %."
    )
    save("train-gpu", {"paper": paper, "speed": quick, "resnet50": rate},
         markdown(headings, rows) + "\n\n" + caption)  # fmt: skip


def _seconds_to(log: list[dict[str, Any]], accuracy: float) -> float | None:
    """Train until the accuracy is reached; the whole run for -1."""
    spent = 0.0
    for record in log:
        spent += record["seconds"]
        if 0 <= accuracy <= record["val_top1"]:
            return spent
    return spent if accuracy < 0 else None


if __name__ == "__main__":
    main()
