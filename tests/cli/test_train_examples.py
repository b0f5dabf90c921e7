"""The commands of the guides to training run, each for a few steps."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
COMMANDS = [
    line
    for name in ("train.md", "fine-tune.md")
    for block in BLOCK.findall((GUIDES / name).read_text(encoding="utf-8"))
    for line in block.splitlines()
    if "digits" in line
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hardware.installed("sklearn"), reason="needs scikit-learn"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of ResNet-20 on the digits, and its weights under two names."""
    folder = tmp_path_factory.mktemp("guide")
    run = folder / "runs" / "resnet20-digits"
    options = ["--data", "digits", "--set", "steps=2", "--out", str(run)]
    assert main(["train", *options]) == 0
    for name in ("best.pt", "teacher.pt"):
        shutil.copy(run / "best.pt", folder / name)
    return folder


def test_guides_have_examples_of_every_option_for_control() -> None:
    text = " ".join(COMMANDS)
    for option in ("--patience", "--balance", "--layer-decay", "--freeze", "--teacher", "--threads",
                   "--workers", "--log", "--config"):  # fmt: skip
        assert option in text, option


@pytest.mark.parametrize("command", COMMANDS)
def test_guide_command_runs(
    command: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--log tensorboard" in command:
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(finished)
    _, *arguments = shlex.split(command)
    assert main([*arguments, "--set", "steps=2", "--out", str(tmp_path / "run")]) == 0
