"""Runs the README's own commands and writes what they print into it.

    python benchmarks/readme.py            # the verbs' session and the quickstart's table
    python benchmarks/readme.py --tables   # only copy in the tables of benchmarks/results/

Everything a person sees in the README between the markers or after a `$` comes from here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS
from PIL import Image
from sklearn.datasets import load_digits

README = Path(__file__).parent.parent / "README.md"
TABLES = {
    "engines table": "engines",
    "accuracy table": "accuracy-resnet20",
    "training table": "train",
    "time to accuracy table": "train-accuracy",
    "decoding table": "decode",
    "degradation table": "degradation",
    "shortcuts table": "shortcuts",
    "quantize table": "quantize",
    "quantize deep table": "quantize-resnet56",
    "calibration table": "calibration",
    "qat table": "qat",
    "engines without vnni table": "engines-no-vnni",
    "int8 cpu table": "int8-cpu",
    "openvino table": "engines-openvino",
}
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands(block: str) -> list[str]:
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def output(command: str, cwd: str) -> str:
    """Both streams of a command, as a terminal shows them, without trailing space."""
    done = subprocess.run(
        f"{sys.executable} -m {command}", shell=True, cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True,
    )  # fmt: skip
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n")


def save_scans(folder: Path) -> None:
    """What the session's `predict` is given: 20 of scikit-learn's scans as image files."""
    folder.mkdir()
    for number, scan in enumerate(load_digits().images[:20]):
        Image.fromarray((scan * 15.9).astype("uint8")).save(folder / f"{number:02d}.png")


def between(text: str, name: str, content: str) -> str:
    """Replaces what stands after a marker up to the next blank-line-separated heading or text."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if end not in text:
        text = text.replace(begin, f"{begin}\n{end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    text = README.read_text()
    for name, file in TABLES.items():
        path = RESULTS / f"{file}.md"
        if path.exists():
            text = between(text, name, path.read_text())
    if not options.tables:
        with tempfile.TemporaryDirectory() as folder:
            save_scans(Path(folder) / "scans")

            def run(block: re.Match[str]) -> str:
                parts = [f"$ {c}\n{output(c, folder)}\n" for c in commands(block[1])]
                return "```console\n" + "".join(parts) + "```"

            text = BLOCK.sub(run, text)
            shown = output("rtresnet quickstart", folder)
            table = shown[shown.index(" precision  ONNX") :]
            text = between(text, "quickstart table", "```\n" + table + "\n```")
    README.write_text(text)


if __name__ == "__main__":
    main()
