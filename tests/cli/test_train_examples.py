"""The commands of the guides to training run, each for a few steps."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.models import download, zoo
from tests.models.test_download import CFG
from tests.workflows.test_config_file import Stub
from tests.workflows.test_duplicates import scenes

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
LINES = [
    line
    for name in ("train.md", "fine-tune.md", "predict.md")
    for block in BLOCK.findall((GUIDES / name).read_text(encoding="utf-8"))
    for line in block.splitlines()
]
COMMANDS = [line for line in LINES if "digits" in line]
PHOTOS = [line for line in LINES if "rtresnet train --data photos" in line]
OTHERS = [line for line in LINES if "rtresnet weights" in line or "--explain" in line]

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


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, weights of ResNet-50, and mirrors of published weights."""
    pytest.importorskip("huggingface_hub")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("photographs")
    for number, pixels in enumerate(scenes(24, side=64)):
        place = folder / "photos" / ("cats" if number % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:02}.jpg")
    state = zoo.build(zoo.spec("resnet50")).state_dict()
    torch.save(state, folder / "resnet50.pth")
    config = {"architecture": "resnet50", "num_classes": 1000, "pretrained_cfg": CFG}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(state, folder / "model.safetensors", {"format": "pt"})
    torch.save(zoo.build(zoo.spec("resnet18")).state_dict(), folder / "net.pth")
    digest = hashlib.sha256((folder / "net.pth").read_bytes()).hexdigest()
    (folder / "net.pth").rename(folder / f"resnet18-{digest[:8]}.pth")
    return folder


def test_guides_have_examples_of_every_option_for_control() -> None:
    text = " ".join(COMMANDS)
    for option in ("--patience", "--balance", "--layer-decay", "--freeze", "--teacher", "--threads",
                   "--workers", "--log", "--config", "label_smoothing", "mixup"):  # fmt: skip
        assert option in text, option
    for option in ("--weights imagenet", "--weights hf:", "--log mlflow,wandb"):
        assert option in " ".join(PHOTOS), option
    for option in ("weights export", "weights import", "--explain"):
        assert option in " ".join(OTHERS), option


@pytest.mark.parametrize("command", PHOTOS)
def test_guide_command_on_photographs_runs(
    command: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photographs)
    for name in ("mlflow", "wandb"):  # test_config_file.py has the real packages
        monkeypatch.setitem(sys.modules, name, Stub(name))
    (published,) = photographs.glob("resnet18-*.pth")
    monkeypatch.setitem(download.IMAGENET_FILES, "resnet18", published.name)
    monkeypatch.setenv("RTRESNET_WEIGHTS_URL", photographs.as_uri())
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "cache"))
    command = command.replace("hf:timm/resnet50.a1_in1k", "model.safetensors")  # test_download.py
    _, *arguments = shlex.split(command)
    options = ["--set", "steps=2", "--batch", "2", "--out", str(tmp_path / "run")]
    if "--weights" not in arguments:
        options += ["--size", "32"]
    assert main([*arguments, *options]) == 0
    assert "Epoch 1 is kept" in (tmp_path / "run" / "index.html").read_text()


@pytest.mark.parametrize("command", OTHERS)
def test_other_guide_command_runs(
    command: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    Image.fromarray(scenes(1)[0]).save("photo.jpg")
    _, *arguments = shlex.split(command)
    if "import" in arguments and not Path("best.safetensors").exists():
        assert main(["weights", "export", "best.pt", "--out", "best.safetensors"]) == 0
    assert main(arguments) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_guide_command_runs(
    command: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--log tensorboard" in command:
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(finished)
    _, *arguments = shlex.split(command)
    assert main([*arguments, "--set", "steps=2", "--out", str(tmp_path / "run")]) == 0
