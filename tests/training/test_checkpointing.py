from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rtresnet.core.preprocess import Preprocess
from rtresnet.data.sources import Arrays
from rtresnet.models import checkpoint, zoo
from rtresnet.training.checkpointing import load_start

NAMES = ("red", "green", "blue", "grey")


def start(classes: tuple[str, ...]) -> checkpoint.Checkpoint:
    spec = zoo.spec("resnet8")
    torch.manual_seed(0)
    made = checkpoint.untrained(spec, Preprocess.for_size(32))
    model = dataclasses.replace(made.model, classes=classes)
    net = zoo.build(spec, len(classes))
    return dataclasses.replace(made, model=model, state=net.state_dict())


def source(classes: tuple[str, ...], named: bool = True) -> Arrays:
    images = np.zeros((len(classes), 8, 8, 3), np.uint8)
    return Arrays("data", images, np.arange(len(classes)), classes, named=named)


@pytest.mark.parametrize(
    ("of", "to", "named", "rows", "says"),
    [
        (NAMES, NAMES, True, [0, 1, 2, 3], None),
        (NAMES, ("blue", "green", "grey", "red"), True, [2, 1, 3, 0], "order"),
        (NAMES, ("cat", "dog", "horse", "zebra"), True, None, "different classes"),
        (NAMES, ("blue", "green"), True, None, "different classes"),
        (NAMES, ("0", "1", "2", "3"), False, [0, 1, 2, 3], "by position"),
        (("0", "1", "2", "3"), NAMES, True, [0, 1, 2, 3], "by position"),
    ],
)
def test_adopt_weights_moves_the_last_layers_rows_with_their_classes(
    of: tuple[str, ...], to: tuple[str, ...], named: bool, rows: list[int] | None, says: str | None
) -> None:
    beginning, net = start(of), zoo.build(zoo.spec("resnet8"), len(to))
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    remarks = load_start(net, beginning, source(to, named))
    assert remarks is None if says is None else says in (remarks or "")
    for name in ("fc.weight", "fc.bias"):
        expected = own[name] if rows is None else beginning.state[name][rows]
        assert torch.equal(net.state_dict()[name], expected)
    assert torch.equal(net.state_dict()["conv1.weight"], beginning.state["conv1.weight"])


def test_train_from_weights_of_the_same_classes_in_another_order_keeps_the_accuracy(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rtresnet.cli.main import main
    from tests.conftest import tinted_noise

    loaded = checkpoint.load(trained / "best.pt")
    model = dataclasses.replace(loaded.model, classes=NAMES)
    checkpoint.save(tmp_path / "named.pt", dataclasses.replace(loaded, model=model))
    images, labels = tinted_noise(120, seed=5)
    order = ["grey", "blue", "green", "red"]
    np.savez(tmp_path / "data.npz", images=images, labels=3 - labels, classes=order)
    arguments = ["--weights", str(tmp_path / "named.pt"), "--data", f"npz:{tmp_path / 'data.npz'}"]
    out = tmp_path / "run"
    assert main(["train", *arguments, "--epochs", "1", "--lr", "1e-9", "--out", str(out)]) == 0
    assert "the data's classes" in capsys.readouterr().err
    saved = checkpoint.load(out / "best.pt")
    assert saved.model.classes == tuple(order) and saved.measured["test_top1"] > 80
