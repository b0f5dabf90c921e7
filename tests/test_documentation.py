"""What people read: commands print what is shown, examples run, links and options are right."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from rtresnet.cli.main import COMMANDS, cli
from rtresnet.core import hardware

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NEEDED = ("tensorrt_rtx", "onnxruntime", "sklearn", "matplotlib")
PROCESSOR = re.compile(r".*, \d+ cores; ")
IDIOMS = re.compile(
    r"\b(anew|likewise|beside|hand one another|what batch norm knew|told apart|made anew)\b", re.I
)

needs_all = pytest.mark.skipif(
    not all(map(hardware.installed, NEEDED)), reason=f"needs {', '.join(NEEDED)}"
)


@pytest.fixture(scope="module")
def docs() -> object:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("docs")


def first_words(text: str) -> set[str]:
    """The word each line begins with: what a line is about, whatever its figures are.

    Rules of tables are left out, because their length depends on the figures, and lines that begin
    with the name of a processor.
    """
    lines = (line for line in text.splitlines() if not PROCESSOR.match(line))
    words = {line.split()[0].strip(":") for line in lines if line.strip()}
    return {word for word in words if word.strip("─")}


@needs_all
@pytest.mark.slow
def test_quickstart_reaches_its_accuracy_and_writes_its_page(docs: object, tmp_path: Path) -> None:
    docs.run("rtresnet quickstart --seconds 0.3", tmp_path)  # type: ignore[attr-defined]
    out = tmp_path / "runs" / "quickstart"
    result = json.loads((out / "quickstart.json").read_text())["result"]
    assert result["train"]["measured"]["test_top1"] >= 97
    assert [entry["precision"] for entry in result["export"]["onnx"]] == ["fp32", "fp16", "int8"]
    assert [plan["attested"]["dtypes"] for plan in result["export"]["plans"]] == [
        {"Float": 19}, {"Half": 19}, {"Int8": 19},
    ]  # fmt: skip
    assert all(result["compare"][p]["agreement"] > 0.98 for p in ("fp32", "fp16", "int8"))
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in re.sub(r'xmlns\S*="[^"]*"', "", page)
    assert len(page) < 2_000_000


def test_readme_is_short_and_names_every_command() -> None:
    assert len(README.splitlines()) <= 300
    for command in COMMANDS:
        assert f"rtresnet {command}" in README, command


def commands(group: click.Group, path: str = "rtresnet") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


ALL = dict(commands(cli))


def readable() -> list[Path]:
    """Every file of ours that a person reads."""
    folders = ("rtresnet", "tests", "benchmarks", "docs", "examples")
    files = [p for f in folders for s in ("py", "md", "yml") for p in (ROOT / f).rglob(f"*.{s}")]
    return [*files, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]


def test_every_module_has_a_docstring_that_ends_its_first_line() -> None:
    for path in (ROOT / "rtresnet").rglob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, path
