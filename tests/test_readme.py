"""The README's commands run as they stand, in order, and print what the README shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rtresnet.core import hardware

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SESSION = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROCESSOR = re.compile(r".*, \d+ cores; ")
NEEDED = ("tensorrt_rtx", "onnxruntime", "sklearn", "matplotlib")

needs_all = pytest.mark.skipif(
    not all(map(hardware.installed, NEEDED)), reason=f"needs {', '.join(NEEDED)}"
)


def first_words(text: str) -> set[str]:
    """The word each line begins with: what a line is about, whatever its figures are.

    Rules are left out: how long one is depends on how wide the figures above it are. So are lines
    that begin with the name of this or that processor.
    """
    lines = (line for line in text.splitlines() if not PROCESSOR.match(line))
    words = {line.split()[0].strip(":") for line in lines if line.strip()}
    return {word for word in words if word.strip("─")}


def shell(command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@needs_all
@pytest.mark.slow
def test_the_session_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    assert len(SESSION) >= 5
    readme.save_scans(tmp_path / "scans")
    for block in SESSION:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            assert command.startswith("rtresnet ")
            missing = first_words(shown) - first_words(shell(command, tmp_path))
            assert not missing, f"{command} no longer prints lines about {missing}"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(PYTHON)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_all
@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy_and_writes_its_page(tmp_path: Path) -> None:
    shell("rtresnet quickstart --seconds 0.3", tmp_path)
    out = tmp_path / "runs" / "quickstart"
    import json

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


def test_every_verb_is_in_the_readme() -> None:
    from rtresnet.cli.main import VERBS

    for verb in VERBS:
        assert f"rtresnet {verb}" in README, verb
