"""Training speed by OpenMP's wait policy and number of threads, on a free and on a shared machine.

    python benchmarks/train_threads.py [--rounds 4]

OpenMP's threads spin while they wait for each other (active waiting), which costs little on a free
machine and much where other processes need the cores. `rtresnet train` lets them sleep after 1,000
turns, unless the user has set OMP_WAIT_POLICY. Each setting has a process of its own, which is
suspended while another one is measured; a few steps of each alternately, ratios round by round, the
median of them. The load is one busy process for every second core.
"""

from __future__ import annotations

import argparse
import os

from common import load, markdown, save
from train import BATCH, RTRESNET, Loop, in_turn, start, stop

from rtresnet.core import hardware

STEPS = 5  # a round
SETTINGS: dict[str, dict[str, str]] = {
    "active": {"OMP_WAIT_POLICY": "active"},
    "OpenMP's default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "rtresnet's": RTRESNET,
    "rtresnet's, 1 thread": RTRESNET | {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    before = os.getloadavg()[0]
    loops = {
        name: Loop(kind="rtresnet", variables=variables) for name, variables in SETTINGS.items()
    }
    running = start(loops, "resnet20", 32)
    results = []
    try:
        for busy in (0, max(1, hardware.cores() // 2)):
            with load(busy):
                measured = in_turn(running, rounds, STEPS, BATCH[32], base="OpenMP's default")
            results += [
                {"busy": busy, "setting": name, **figures} for name, figures in measured.items()
            ]
    finally:
        stop(running)
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
        f"ResNet-20 in fp32, batch {BATCH[32]}, on {hardware.cpu()}, "
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
