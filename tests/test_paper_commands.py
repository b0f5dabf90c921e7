"""The commands in docs/paper.md's table run, each with a few steps on a few images."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtresnet.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "paper.md").read_text()
COMMANDS = re.findall(r"^\|[^|]*\|[^|]*\|[^|]*`rtresnet ([^`]*)`[^`|]*\|$", PAGE, re.M)
STEPS = ("--set", "steps=2", "--batch", "4")
STUDY = ("--steps", "2", "--seeds", "1", "--set", "batch=4")
SHORTER = {
    "study blocks": ("--model", "resnet20", *STUDY),
    "study shortcuts": ("--model", "resnet8", *STUDY),
    "study degradation": ("--depths", "8,14", *STUDY),
    "study gradients": ("--model", "plain8", "--steps", "2", "--batch", "4"),
    "study detection": (
        "--backbone",
        "resnet18",
        "--pretrain-steps",
        "2",
        "--seeds",
        "1",
        "--set",
        "steps=2",
        "--set",
        "width=0.25",
    ),
    "train": STEPS,
}
"""Options that make a command short."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes, and a checkpoint of 56 pixels."""
    folder = tmp_path_factory.mktemp("paper")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 8)):
        for number in range(count):
            path = folder / "images" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 128, (64, 64, 3)) + 120 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    arguments = ["--model", "resnet18", "--data", f"folder:{folder / 'images'}", "--size", "56"]
    assert main(["train", *arguments, *STEPS, "--out", str(folder / "run")]) == 0
    return folder


def test_table_has_a_command_in_every_row() -> None:
    rows = re.findall(r"^\|[^|]*\|[^|]*\|[^|]*\|$", PAGE, re.M)
    assert len(COMMANDS) == len(rows) - 2 >= 18  # without the heading and the rule


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_paper_page_runs(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "resnet1202" in command:
        pytest.skip("tests/training/test_paper_recipe.py trains 1202 layers")
    data = "shapes:8" if "detect" in command else f"folder:{folder / 'images'}"
    checkpoint = str(folder / "run" / "best.pt")
    words = [
        {"DATA": data, "voc:DIR": data, "NET.pt": checkpoint}.get(word, word)
        for word in shlex.split(command)
    ]
    name = " ".join(words[: 2 if words[0] == "study" else 1])
    if "vgg19_bn" in words:
        words += ["--size", "32"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, *SHORTER.get(name, ())]) == 0
