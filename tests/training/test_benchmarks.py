"""The training loops of benchmarks/train.py, and their reported figures."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rtresnet.core import hardware

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("train")
        for name in ("train", "common"):
            del sys.modules[name]


def tints(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return images of ten brightnesses with noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    noise = rng.integers(0, 8, (count, 32, 32, 3))
    return (25 * labels[:, None, None, None] + noise).astype(np.uint8), labels


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("plain", {}), ("torchvision", {}), ("timm", {}), ("timm", {"amp": True}), ("rtresnet", {})],
)
def test_each_loop_lowers_its_loss(
    kind: str, settings: dict[str, bool], script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BATCH", {32: 32})
    monkeypatch.setattr(hardware, "cores", lambda: 1)
    torch.manual_seed(0)
    losses = script.KINDS[kind]("resnet8", *tints(), 32, **settings)
    observed = [next(losses) for _ in range(24)]
    losses.close()
    assert np.isfinite(observed).all() and np.mean(observed[-4:]) < 0.9 * np.mean(observed[:4])


def test_augmented_images_are_crops_of_the_padded_image(script: ModuleType) -> None:
    images, labels = tints(4)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    crops = set[bytes]()
    for top, left in np.ndindex(9, 9):
        crop = padded[2, top : top + 32, left : left + 32]
        crops |= {crop.tobytes(), crop[:, ::-1].tobytes()}
    pixels = script.Augmented(images, labels, normalized=False)
    drawn = {pixels[2][0].permute(1, 2, 0).numpy().tobytes() for _ in range(20)}
    assert drawn <= crops and len(drawn) > 10


class Timed:
    """A loop with given seconds of a step, round by round."""

    def __init__(self, seconds: list[float]) -> None:
        self.rounds, self.steps = iter(seconds), list[int]()

    def seconds(self, steps: int) -> float:
        self.steps.append(steps)
        return next(self.rounds)


def test_in_turn_divides_round_by_round(script: ModuleType) -> None:
    loops = {"plain": Timed([2.0, 4.0, 2.0]), "fast": Timed([1.0, 1.0, 2.0])}
    result = script.in_turn(loops, 3, 5, 100, base="plain")
    assert result["plain"]["speed"] == 1 and result["plain"]["images_per_second"] == 50
    assert (result["fast"]["low"], result["fast"]["speed"], result["fast"]["high"]) == (1, 2, 4)
    assert result["fast"]["n"] == 15 and loops["fast"].steps == [5, 5, 5]


def status(pid: int | None) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on, see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_a_running_loop_uses_no_processor_while_another_is_measured(script: ModuleType) -> None:
    loop = script.Loop(kind="plain", variables={"OMP_WAIT_POLICY": "active"})
    running = script.start({"plain": loop}, "resnet8", 32)["plain"]
    try:
        pid = running.process.pid
        limit = time.monotonic() + 60
        while status(pid)[0] != "T" and time.monotonic() < limit:  # the kernel stops every thread
            time.sleep(0.01)
        state, before = status(pid)[0], status(pid)[11]
        time.sleep(0.2)
        assert state == "T" and status(pid)[11] == before
        assert running.seconds(1) > 0
    finally:
        script.stop({"plain": running})


def test_load_keeps_cores_busy_and_ends(script: ModuleType) -> None:
    with script.load(1):
        (process,) = multiprocessing.active_children()
        limit = time.monotonic() + 60
        while int(status(process.pid)[11]) < 5 and time.monotonic() < limit:  # ticks of 10 ms
            time.sleep(0.01)
        assert int(status(process.pid)[11]) >= 5
    assert not multiprocessing.active_children()
