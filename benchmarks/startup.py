"""Time to `import rtresnet` and to print a help page.

    python benchmarks/startup.py [--rounds 30]

Each command is a new process; the commands take turns, so that a change of the machine's load or
clock meets all of them alike. An empty Python process is one of them: the others contain its time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from common import markdown, save

from rtresnet.core import hardware

EMPTY = "empty process"
COMMANDS = {
    EMPTY: ["-c", "pass"],
    "import rtresnet": ["-c", "import rtresnet"],
    "rtresnet --help": ["-m", "rtresnet", "--help"],
    "rtresnet export --help": ["-m", "rtresnet", "export", "--help"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run Python once; return wall time and processor time in ms."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return 1e3 * wall, 1e3 * (usage.ru_utime + usage.ru_stime)


def main() -> None:
    """Measure, and write results/startup.md and .json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    for arguments in COMMANDS.values():  # compiles modules and fills the page cache
        measure(arguments)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            samples[name].append(measure(arguments))
    medians = {
        name: tuple(statistics.median(column) for column in zip(*pairs, strict=True))
        for name, pairs in samples.items()
    }
    empty = medians[EMPTY][1]
    rows = [
        (
            name,
            f"{wall:.0f}",
            f"{processor:.0f}",
            "" if name == EMPTY else f"{processor - empty:.0f}",
        )
        for name, (wall, processor) in medians.items()
    ]
    versions = hardware.versions(("rtresnet", "click"))
    load = os.getloadavg()[0]
    caption = (
        f"Medians of {rounds} processes each, alternately, in ms; {hardware.cpu()}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; load average "
        f"{load:.1f} of {hardware.cores()} cores."
        + (" The machine was busy: compare CPU times only." if load > hardware.cores() / 2 else "")
    )
    headings = ("command", "wall ms", "CPU ms", "CPU ms above an empty process")
    record = {"medians_ms": medians, "rounds": rounds, "load": load, "versions": versions,
              "device": hardware.cpu()}  # fmt: skip
    save("startup", record, markdown(headings, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
