"""What the benchmark scripts share: the tool run as a person runs it, and tables as Markdown."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def rtresnet(*arguments: str, cwd: Path | None = None) -> dict[str, Any]:
    """Run a command in a process of its own and return what it wrote with --json."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "rtresnet", *arguments, "--json", file.name]
        subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
        record: dict[str, Any] = json.loads(Path(file.name).read_text())
    result: dict[str, Any] = record["result"]
    return result


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
            process.join()


def markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, record: dict[str, Any], table: str) -> None:
    """Write results/NAME.json and .md, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table + "\n")
    print(table)
