"""Training speed of the loop next to a plain PyTorch loop; see also train_accuracy.py.

    python benchmarks/train.py [--rounds 8]

Same net, uint8 images in memory, batch, threads and augmentation (pad, crop, mirror). Each loop has
a process of its own; a few steps of each in turn, ratios round by round, the median of them. The
plain loop is what a careful person writes: images normalized once, crops vectorized, no needless
copies.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from common import markdown, save
from torch import nn

from rtresnet.core import hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.loader import DecodeErrors
from rtresnet.data.sources import Arrays
from rtresnet.models import zoo
from rtresnet.training.distributed import ALONE
from rtresnet.training.loader import TrainLoader
from rtresnet.training.recipes import resolve
from rtresnet.training.step import Stepper

BATCH = {32: 128, 128: 32}
STEPS = {32: 8, 128: 4}  # a round


def plain(model: str, images: np.ndarray, labels: np.ndarray, size: int) -> Iterator[float]:
    """A step's loss, again and again."""
    torch.manual_seed(0)
    contract = Preprocess.for_size(size)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (contract.mean, contract.std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    padded = nn.functional.pad(pixels, (4, 4, 4, 4))
    truth = torch.from_numpy(labels)
    net = zoo.build(zoo.spec(model), 10).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [32_000, 48_000])
    loss_of = nn.CrossEntropyLoss()
    side = torch.arange(size)
    while True:
        for chosen in torch.randperm(len(truth)).split(BATCH[size]):
            if len(chosen) < BATCH[size]:
                continue
            top, left = torch.randint(0, 9, (2, len(chosen), 1))
            rows, columns = (top + side)[:, None, :, None], (left + side)[:, None, None, :]
            channels = torch.arange(3)[:, None, None]
            inputs = padded[chosen[:, None, None, None], channels, rows, columns]
            mirrored = torch.rand(len(chosen)) < 0.5
            inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
            optimizer.zero_grad()
            loss = loss_of(net(inputs), truth[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()


def ours(
    model: str, images: np.ndarray, labels: np.ndarray, size: int, **fields: Any
) -> Iterator[float]:
    torch.manual_seed(0)
    spec = zoo.spec(model)
    settings = {"batch": BATCH[size], "lr": 0.1, "precision": "fp32"} | fields
    recipe = resolve("paper-cifar", images=len(images), size=size, depth=20, settings=settings)
    source = Arrays("benchmark", images, labels, [str(index) for index in range(10)])
    net = zoo.build(spec, 10).to(memory_format=torch.channels_last)
    feed = TrainLoader(
        source,
        np.arange(len(images)),
        Preprocess.for_size(size),
        recipe,
        tally=DecodeErrors(len(images)),
    )
    stepper = Stepper(net, recipe, ALONE, "cpu")
    stepper.train()
    first = 0
    while True:
        for step, micros in feed.steps(first, first + feed.steps_per_epoch):
            loss, _ = stepper.step(micros, recipe.lr_at(step, feed.total))
            yield loss.item()
        first += feed.steps_per_epoch


LOOPS: dict[str, dict[str, Any] | None] = {
    "plain loop": None,
    "rtresnet": {},
    "rtresnet --compile": {"compile": True},
    "rtresnet, bf16": {"precision": "bf16"},
    "rtresnet, bf16, --compile": {"precision": "bf16", "compile": True},
}


def work(pipe: Connection, name: str, model: str, size: int) -> None:
    """One loop in a process of its own; does as many steps as it is told, and says how long."""
    rng = np.random.default_rng(0)
    count = 10_000 if size == 32 else 1_000
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, count)
    fields = LOOPS[name]
    if fields is None:
        loop = plain(model, images, labels, size)
    else:
        hardware.keep_freed_memory()  # as loop.train does
        loop = ours(model, images, labels, size, **fields)
    while steps := pipe.recv():
        begin = time.perf_counter()
        for _ in range(steps):
            next(loop)
        pipe.send((time.perf_counter() - begin) / steps)


def measure(model: str, size: int, rounds: int) -> list[dict[str, object]]:
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in LOOPS:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, name, model, size), daemon=True).start()
        theirs.close()
        pipes[name].send(3)  # compilation and the first allocations
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(rounds):
        names = list(pipes)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            pipes[name].send(STEPS[size])
            seconds[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(0)
    base = seconds["plain loop"]
    return [
        {
            "net": model,
            "size": size,
            "batch": BATCH[size],
            "loop": name,
            "images_per_second": BATCH[size] / statistics.median(took),
            "speed": statistics.median(b / t for b, t in zip(base, took, strict=True)),
            "low": min(b / t for b, t in zip(base, took, strict=True)),
            "high": max(b / t for b, t in zip(base, took, strict=True)),
            "n": rounds * STEPS[size],
        }
        for name, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    found = measure("resnet20", 32, rounds) + measure("resnet18", 128, rounds)
    headings = ("net", "image", "batch", "loop", "images/s", "speed", "of rounds", "steps")
    rows = [
        (
            entry["net"], entry["size"], entry["batch"], entry["loop"],
            f"{entry['images_per_second']:.0f}", f"{entry['speed']:.2f}",
            f"{entry['low']:.2f} to {entry['high']:.2f}", entry["n"],
        )
        for entry in found
    ]  # fmt: skip
    versions = ", ".join(
        f"{n} {v}" for n, v in hardware.versions(("rtresnet", "numpy", "torch")).items()
    )
    caption = (
        f"Forward, backward, update and augmentation on {hardware.cpu()}, "
        f"{torch.get_num_threads()} threads, {versions}; a few steps in turn, "
        f"{rounds} rounds; speed: the median of the "
        "rounds' ratios to the plain loop."
    )
    save(
        "train",
        {"results": found, "versions": versions},
        markdown(headings, rows) + "\n\n" + caption,
    )


if __name__ == "__main__":
    main()
