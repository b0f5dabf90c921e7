"""Training speed by OpenMP's wait policy and number of threads, on a free and on a shared machine.

    python benchmarks/train_threads.py [--rounds 4]

OpenMP's threads spin while they wait for each other (active waiting), which costs little on a free
machine and much where other processes need the cores. `rtresnet train` sets OMP_WAIT_POLICY=passive
unless the user has set it. Each setting has a process of its own; a few steps of each in turn,
ratios round by round, the median of them. The load is one busy process for every second core.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Iterator

from common import markdown, save
from train import BATCH, work

from rtresnet.core import hardware

STEPS = 4  # a round
SETTINGS: dict[str, dict[str, str]] = {
    "active": {"OMP_WAIT_POLICY": "active"},
    "OpenMP's default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "passive, 1 thread": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"},
}


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep some cores busy."""
    busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(processes)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    before = os.getloadavg()[0]
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for name, variables in SETTINGS.items():
        for variable in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
            os.environ.pop(variable, None)
        os.environ.update(variables)
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, "rtresnet", "resnet20", 32), daemon=True).start()
        theirs.close()
        pipes[name].send(2)
        pipes[name].recv()
    results = []
    for busy in (0, max(1, hardware.cores() // 2)):
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        with load(busy):
            for number in range(rounds):
                names = list(pipes)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    pipes[name].send(STEPS)
                    seconds[name].append(pipes[name].recv())
        base = seconds["OpenMP's default"]
        results += [
            {
                "busy": busy,
                "setting": name,
                "images_per_second": BATCH[32] / statistics.median(took),
                "speed": statistics.median(b / t for b, t in zip(base, took, strict=True)),
                "low": min(b / t for b, t in zip(base, took, strict=True)),
                "high": max(b / t for b, t in zip(base, took, strict=True)),
                "n": rounds * STEPS,
            }
            for name, took in seconds.items()
        ]
    for pipe in pipes.values():
        pipe.send(0)
    rows = [
        (
            entry["busy"], entry["setting"], f"{entry['images_per_second']:.0f}",
            f"{entry['speed']:.2f}", f"{entry['low']:.2f} to {entry['high']:.2f}", entry["n"],
        )
        for entry in results
    ]  # fmt: skip
    versions = ", ".join(
        f"{name} {version}" for name, version in hardware.versions(("rtresnet", "torch")).items()
    )
    caption = (
        f"ResNet-20 in fp32, batch {BATCH[32]}, on {hardware.cpu()}, {hardware.cores()} cores, "
        f"{versions}; load average of other processes before the run: {before:.1f}; speed: "
        "the median of the rounds' ratios to OpenMP's default."
    )
    headings = ("busy processes", "setting", "images/s", "speed", "of rounds", "steps")
    save(
        "train-threads",
        {"results": results, "versions": versions, "load_average": before},
        markdown(headings, rows) + "\n\n" + caption,
    )


if __name__ == "__main__":
    main()
