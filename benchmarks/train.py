"""Training speed of the loop next to loops that a user would write; see also train_accuracy.py.

    python benchmarks/train.py [--rounds 8]

Same net, uint8 images in memory, batch, threads and augmentation (pad, crop, mirror). Each loop has
a process of its own, which is suspended while another one is measured; a few steps of each,
ratios round by round, the median of them: on a machine that does nothing else, and with a busy
process on every second core.

plain loop           what a careful person writes: images normalized once, crops vectorized, no
                     needless copies
torchvision's style  as torchvision's reference script: a DataLoader with workers, each image
                     augmented and normalized by itself, the accuracy of every batch
timm's style         as timm's documented script: workers collate uint8, normalization on the
                     batch, channels-last, averaged weights; with --amp in bf16

timm's own train.py is not run, because timm installs torchvision, which this project does not use.
The three loops are written after the documentation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
import torch
from common import load, markdown, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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
PADDING = 4


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop to measure.

    Attributes:
        kind: A key of KINDS.
        settings: Its arguments.
        variables: Environment variables of its process.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def plain(model: str, images: np.ndarray, labels: np.ndarray, size: int) -> Iterator[float]:
    """Yield the loss of each step."""
    contract = Preprocess.for_size(size)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (contract.mean, contract.std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    padded = nn.functional.pad(pixels, (PADDING,) * 4)
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
            top, left = torch.randint(0, 2 * PADDING + 1, (2, len(chosen), 1))
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


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images that are padded, cropped and mirrored one by one.

    Args:
        images: uint8 [N, S, S, 3].
        labels: int64 [N].
        normalized: Whether an image becomes normalized float32, else it stays uint8.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, normalized: bool) -> None:
        self.images, self.labels, self.normalized = torch.from_numpy(images), labels, normalized
        contract = Preprocess.for_size(images.shape[1])
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (contract.mean, contract.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].permute(2, 0, 1)
        size = image.shape[1]
        image = nn.functional.pad(image, (PADDING,) * 4)
        top, left = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        image = image[:, top : top + size, left : left + size]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        if self.normalized:
            image = (image.float() / 255 - self.mean) / self.std
        return image, int(self.labels[index])


def fed(images: np.ndarray, labels: np.ndarray, size: int, *, normalized: bool) -> DataLoader[Any]:
    """Return a DataLoader with a worker for each core."""
    return DataLoader(
        Augmented(images, labels, normalized=normalized), BATCH[size], shuffle=True, drop_last=True,
        num_workers=hardware.cores(), persistent_workers=True,
    )  # fmt: skip


def torchvision_style(
    model: str, images: np.ndarray, labels: np.ndarray, size: int
) -> Iterator[float]:
    net = zoo.build(zoo.spec(model), 10).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss_of = nn.CrossEntropyLoss()
    feed = fed(images, labels, size, normalized=True)
    while True:
        for inputs, truth in feed:
            logits = net(inputs)
            loss = loss_of(logits, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.inference_mode():
                correct = logits.topk(5)[1] == truth[:, None]
                correct[:, :1].sum().item(), correct.sum().item()
            yield loss.item()


def timm_style(
    model: str, images: np.ndarray, labels: np.ndarray, size: int, *, amp: bool = False
) -> Iterator[float]:
    contract = Preprocess.for_size(size)
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (contract.mean, contract.std))
    net = zoo.build(zoo.spec(model), 10).train().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9998), use_buffers=True
    )
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    loss_of = nn.CrossEntropyLoss()
    feed = fed(images, labels, size, normalized=False)
    while True:
        for pixels, truth in feed:
            inputs = pixels.float().sub_(mean).div_(std)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = loss_of(net(inputs), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(net)
            yield loss.item()


def ours(
    model: str, images: np.ndarray, labels: np.ndarray, size: int, **fields: Any
) -> Iterator[float]:
    hardware.keep_freed_memory()  # as loop.train does
    spec = zoo.spec(model)
    settings = {"batch": BATCH[size], "lr": 0.1, "precision": "fp32", "mean_image": False} | fields
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


KINDS = {
    "plain": plain,
    "torchvision": torchvision_style,
    "timm": timm_style,
    "rtresnet": ours,
}
RTRESNET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}  # as `rtresnet train` sets them
ONE_THREAD = RTRESNET | {"OMP_NUM_THREADS": "1"}  # as --threads 1
LOOPS = {
    "plain loop": Loop(kind="plain"),
    "torchvision's style": Loop(kind="torchvision"),
    "timm's style": Loop(kind="timm"),
    "rtresnet": Loop(kind="rtresnet", variables=RTRESNET),
    "rtresnet --threads 1": Loop(kind="rtresnet", variables=ONE_THREAD),
    "rtresnet --compile": Loop(kind="rtresnet", settings={"compile": True}, variables=RTRESNET),
}
BF16_LOOPS = {
    "timm's style, bf16": Loop(kind="timm", settings={"amp": True}),
    "rtresnet, bf16": Loop(kind="rtresnet", settings={"precision": "bf16"}, variables=RTRESNET),
    "rtresnet, bf16, --threads 1": Loop(
        kind="rtresnet", settings={"precision": "bf16"}, variables=ONE_THREAD
    ),
    "rtresnet, bf16, --compile": Loop(
        kind="rtresnet", settings={"precision": "bf16", "compile": True}, variables=RTRESNET
    ),
}


def work(pipe: Connection, loop: Loop, model: str, size: int) -> None:
    """Run one loop in this process: take a number of steps, send the seconds of each, repeat."""
    rng = np.random.default_rng(0)
    count = 10_000 if size == 32 else 1_000
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, count)
    torch.manual_seed(0)
    losses = KINDS[loop.kind](model, images, labels, size, **loop.settings)
    while steps := pipe.recv():
        next(losses)  # threads and caches after the suspension
        begin = time.perf_counter()
        for _ in range(steps):
            next(losses)
        pipe.send((time.perf_counter() - begin) / steps)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A loop's process. Suspended unless it is measured, because OpenMP's threads may spin."""

    process: SpawnProcess
    pipe: Connection

    def seconds(self, steps: int) -> float:
        """Resume the process for some steps; return the seconds of a step."""
        self.signal(signal.SIGCONT)
        self.pipe.send(steps)
        seconds: float = self.pipe.recv()
        self.signal(signal.SIGSTOP)
        return seconds

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def start(loops: Mapping[str, Loop], model: str, size: int) -> dict[str, Running]:
    """Start each loop in a process, and let it do its compilation and first allocations."""
    spawn = multiprocessing.get_context("spawn")
    before, running = dict(os.environ), dict[str, Running]()
    for name, loop in loops.items():
        for variable in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
            os.environ.pop(variable, None)
        os.environ.update(loop.variables)
        pipe, remote = spawn.Pipe()
        process = spawn.Process(target=work, args=(remote, loop, model, size))
        process.start()
        remote.close()
        running[name] = Running(process=process, pipe=pipe)
        running[name].seconds(3)
    os.environ.clear()
    os.environ.update(before)
    return running


def stop(running: Mapping[str, Running]) -> None:
    """End the processes."""
    for loop in running.values():
        loop.signal(signal.SIGCONT)
        loop.pipe.send(0)
        loop.pipe.close()
        loop.process.join()


def in_turn(
    running: Mapping[str, Running], rounds: int, steps: int, batch: int, *, base: str
) -> dict[str, dict[str, float]]:
    """Measure the loops alternately; returns the speed of each relative to `base`."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(running[name].seconds(steps))
    ratios = {
        name: [b / t for b, t in zip(seconds[base], took, strict=True)]
        for name, took in seconds.items()
    }
    return {
        name: {
            "images_per_second": batch / statistics.median(seconds[name]),
            "speed": statistics.median(ratios[name]),
            "low": min(ratios[name]),
            "high": max(ratios[name]),
            "n": rounds * steps,
        }
        for name in running
    }


def measure(model: str, size: int, rounds: int) -> list[dict[str, object]]:
    """Measure every loop on a net, without and with other work on the machine."""
    running = start(LOOPS | (BF16_LOOPS if hardware.native_bf16() else {}), model, size)
    results: list[dict[str, object]] = []
    try:
        for busy in (0, max(1, hardware.cores() // 2)):
            with load(busy):
                measured = in_turn(running, rounds, STEPS[size], BATCH[size], base="plain loop")
            about = {"net": model, "size": size, "batch": BATCH[size], "busy": busy}
            results += [{**about, "loop": name, **figures} for name, figures in measured.items()]
    finally:
        stop(running)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    before = os.getloadavg()[0]
    result = measure("resnet20", 32, rounds) + measure("resnet18", 128, rounds)
    headings = ("net", "image", "batch", "busy", "loop", "images/s", "speed", "of rounds", "steps")
    rows = [
        (
            entry["net"], entry["size"], entry["batch"], entry["busy"], entry["loop"],
            f"{entry['images_per_second']:.0f}", f"{entry['speed']:.2f}",
            f"{entry['low']:.2f} to {entry['high']:.2f}", entry["n"],
        )
        for entry in result
    ]  # fmt: skip
    versions = ", ".join(
        f"{n} {v}" for n, v in hardware.versions(("rtresnet", "numpy", "torch")).items()
    )
    caption = (
        f"Forward, backward, update and augmentation on {hardware.cpu()}, "
        f"{torch.get_num_threads()} threads, {versions}; busy: processes of the script that keep a "
        f"core busy; load average of other processes before the run: {before:.1f}; a few steps in "
        f"turn, {rounds} rounds; speed: the median of the rounds' ratios to the plain loop. The "
        "loops in the style of torchvision and timm are written after their documentation and run "
        "without these packages."
    )
    save(
        "train",
        {"results": result, "versions": versions, "load_average": before},
        markdown(headings, rows) + "\n\n" + caption,
    )


if __name__ == "__main__":
    main()
