from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rtresnet.core.errors import InputError
from rtresnet.data.sources import Arrays
from rtresnet.models import checkpoint
from rtresnet.study import ablations, runs
from rtresnet.study.ablations import Terms
from rtresnet.study.runs import Run
from rtresnet.training.loop import Progress


def source(seed: int = 0) -> Arrays:
    """Return noise with a tint for each class."""
    images = np.random.default_rng(seed).integers(0, 120, (120, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(120) % 3
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 110
    return Arrays("tints", images, labels, list("rgb"))


def planned(out: Path, images: int = 0, **settings: object) -> Run:
    terms = Terms(
        source=source(images), test=None, recipe="paper-cifar",
        settings={"epochs": 2, "batch": 32} | settings, seeds=1, out=out, device="cpu",
    )  # fmt: skip
    return ablations.plan(ablations.degradation_nets([8]), terms)[1]


def test_a_finished_run_is_found_and_not_made_again(tmp_path: Path) -> None:
    run = planned(tmp_path)
    assert runs.finished(run) is None
    made = runs.make(run)
    log = run.job.out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert made.log == lines and len(lines) == 2
    assert made.train_error == 100 - lines[-1]["train_top1"]
    assert made.test_error == 100 - checkpoint.load(run.job.out / "best.pt").measured["test_top1"]
    before = log.stat().st_mtime_ns
    again = runs.make(planned(tmp_path))
    assert (again.log, again.measured) == (made.log, made.measured)
    assert log.stat().st_mtime_ns == before


def test_an_interrupted_run_is_gone_on_with_to_the_same_weights(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    run = planned(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        runs.make(run, on_step=interrupt)
    assert runs.finished(run) is None
    steps: list[int] = []
    runs.make(run, on_step=lambda progress: steps.append(progress.step))
    assert steps == [6]  # what came during step 4 was heard by all processes after step 5
    whole = planned(tmp_path / "b")
    runs.make(whole)
    first, second = (checkpoint.load(r.job.out / "last.pt").state for r in (run, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_under_another_recipe_or_on_other_images_is_refused(tmp_path: Path) -> None:
    runs.make(planned(tmp_path))
    with pytest.raises(InputError, match=r"epochs 2 -> 3.*another --out"):
        runs.finished(planned(tmp_path, epochs=3))
    with pytest.raises(InputError, match=r"different images.*another --out"):
        runs.finished(planned(tmp_path, images=1))


def test_a_run_that_diverges_is_a_result_that_is_kept(tmp_path: Path) -> None:
    wild = {"lr": 99.0, "weight_decay": 1.0, "epochs": 40}
    run = planned(tmp_path, **wild)
    made = runs.make(run)
    assert made.diverged is not None and "at step" in made.diverged
    steps: list[int] = []
    again = runs.make(planned(tmp_path, **wild), on_step=lambda p: steps.append(p.step))
    assert again.diverged == made.diverged and not steps
    with pytest.raises(InputError, match=r"lr 99\.0 -> 0\.1"):
        runs.finished(planned(tmp_path, **(wild | {"lr": 0.1})))


class Lazy:
    """Images that are not in memory."""

    name, classes, splits, named = "lazy", ("a", "b", "c"), True, True

    def __init__(self) -> None:
        self.labels = np.arange(30) % 3

    def __len__(self) -> int:
        return 30

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        return np.full((4, 4, 3), index + (at_least or 0), np.uint8)

    def fingerprint(self) -> str:
        return "lazy"


def test_a_part_of_the_images_is_balanced_and_always_the_same() -> None:
    for whole in (source(), Lazy()):
        part = runs.part(whole, 21)
        assert len(part) == 21 and np.bincount(part.labels).tolist() == [7, 7, 7]
        assert part.classes == whole.classes and part.splits == whole.splits
        assert "21 images" in part.name
        assert part.fingerprint() == runs.part(whole, 21).fingerprint()
        assert part.fingerprint() != runs.part(whole, 18).fingerprint()
        assert runs.part(whole, None) is runs.part(whole, 1000) is whole
    lazy = runs.part(Lazy(), 21)
    for index in range(21):
        assert lazy.image(index)[0, 0, 0] % 3 == lazy.labels[index]
        assert lazy.image(index, 5)[0, 0, 0] == lazy.image(index)[0, 0, 0] + 5
