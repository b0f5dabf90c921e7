"""Detector training: targets, samples, and bitwise equal results after a kill."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rtresnet.core.errors import CheckFailedError, DataError, InputError, UnknownNameError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection
from rtresnet.detection import boxes, checkpoint, losses, pretrain, recipe, training
from rtresnet.detection.data import open_detection
from rtresnet.detection.losses import Truth
from rtresnet.models import zoo
from rtresnet.training.loop import Progress

SMALL = Detection(
    shorter=64, longer=64, anchors=(16.0, 32.0), pool=7, width=0.125, candidates=60, regions=12,
    detections=8,
)  # fmt: skip
RECIPE = dataclasses.replace(
    recipe.SCRATCH, epochs=2, batch=2, rpn_batch=16, head_batch=8, candidates=60, regions=20
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nets this small are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "whole"
    training.train(job(out))
    return out


def job(out: Path, **changes: object) -> training.DetectionJob:
    values: dict[str, object] = {
        "spec": zoo.spec("resnet18"), "detection": SMALL, "source": open_detection("shapes:8"),
        "test": open_detection("shapes:4", "test"), "preprocess": Preprocess.for_size(64),
        "recipe": RECIPE, "out": out,
    }  # fmt: skip
    return training.DetectionJob(**(values | changes))  # type: ignore[arg-type]


def truth(rows: list[list[float]], ignored: list[list[float]] | None = None) -> Truth:
    return Truth(
        boxes=torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(rows)),
        ignored=torch.tensor(ignored or [], dtype=torch.float32).reshape(-1, 4),
        extent=torch.tensor([64.0, 64.0]),
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- targets


def test_sample_anchors_best_of_each_object_is_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16], [20, 20, 36, 36], [40, 40, 56, 56], [60, 60, 80, 80]])
    objects = truth([[0, 0, 16, 16], [30, 30, 44, 44]])
    positive, negative, offsets = losses.sample_anchors(anchors, objects, RECIPE, generator())
    # Anchor 0 overlaps fully, 1 is the best of the second object, 3 crosses the border.
    assert sorted(positive.tolist()) == [0, 1]
    assert negative.tolist() == [2]
    again = boxes.decode(offsets, anchors[positive])
    assert torch.allclose(again, objects.boxes[[0, 1]], atol=1e-4)


def test_sample_anchors_in_an_ignored_area_are_left_out() -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16], [40, 40, 56, 56]])
    positive, negative, _ = losses.sample_anchors(
        anchors, truth([], [[38, 38, 60, 60]]), RECIPE, generator()
    )
    assert positive.tolist() == [] and negative.tolist() == [0]


def test_sample_anchors_holds_the_shares() -> None:
    anchors = boxes.anchors(4, 4, 16, (16.0, 32.0))
    objects = truth([[x, y, x + 16, y + 16] for x in range(0, 48, 8) for y in range(0, 48, 8)])
    positive, negative, _ = losses.sample_anchors(anchors, objects, RECIPE, generator())
    assert len(positive) == 8 and len(positive) + len(negative) <= 16


def test_sample_regions_positives_first_and_objects_included() -> None:
    regions = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 0, 0]])
    sampled, classes, offsets = losses.sample_regions(
        regions, truth([[0, 0, 10, 12], [30, 30, 40, 40]]), RECIPE, generator()
    )
    count = len(offsets)
    assert (classes[:count] > 0).all() and (classes[count:] == 0).all()
    assert count == 2 and len(sampled) == 3  # a quarter of 8; the empty region is left out
    decoded = boxes.decode(offsets, sampled[:count], boxes.REGION_STD)
    expected = torch.tensor([[0.0, 0, 10, 12], [30, 30, 40, 40]])[classes[:count] - 1]
    assert torch.allclose(decoded, expected, atol=1e-4)


def test_head_losses_use_the_offsets_of_the_own_class() -> None:
    logits = torch.zeros(2, 4)
    offsets = torch.zeros(2, 12)
    offsets[0, 4:8] = 1.0  # of class 1
    targets = torch.ones(1, 4)
    classes = torch.tensor([2, 0])
    _, regression = losses.head_losses(logits, offsets, classes, targets, torch.tensor([0]))
    assert regression.item() == 0


# --- recipes


def test_paper_recipe_has_the_published_rates() -> None:
    paper = recipe.named("paper-detection")
    assert [paper.lr_at(step, 80_000) for step in (0, 59_999, 60_000, 79_999)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4]
    )
    assert (paper.rpn_batch, paper.head_batch, paper.weight_decay) == (256, 128, 5e-4)


def test_changed_sets_fields_of_recipe_and_net() -> None:
    changed, spec = recipe.changed(
        recipe.PAPER, Detection(), ["lr=0.01", "flip=false", "anchors=64,128", "pool=7"]
    )
    assert (changed.lr, changed.flip, spec.anchors, spec.pool) == (0.01, False, (64.0, 128.0), 7)
    with pytest.raises(UnknownNameError):
        recipe.changed(recipe.PAPER, Detection(), ["learning=1"])
    with pytest.raises(InputError):
        recipe.changed(recipe.PAPER, Detection(), ["batch=many"])


# --- runs


def test_train_leaves_a_tested_detector(run_folder: Path) -> None:
    loaded = checkpoint.load(run_folder / "best.pt")
    accuracy = training.accuracy_of(loaded)
    assert accuracy is not None and accuracy.n == 4 and accuracy.ap50 is not None
    assert loaded.detection == SMALL and loaded.model.classes == ("circle", "square", "triangle")
    net = checkpoint.build(loaded)
    assert not net.training
    assert len((run_folder / "log.jsonl").read_text().splitlines()) == 2


def test_train_stopped_and_resumed_ends_in_the_same_bits(tmp_path: Path, run_folder: Path) -> None:
    whole = checkpoint.load(run_folder / "best.pt")

    class Stopped(Exception):
        pass

    def stop_at(step: int) -> training.Listener:
        def listen(progress: Progress) -> None:
            if progress.step == step:
                raise Stopped

        return listen

    out = tmp_path / "parts"
    for step in (3, 6):  # within the first epoch, and in the part with frozen batch norm
        with pytest.raises(Stopped):
            training.train(job(out, save_every=0.0), resume=step > 3, on_step=stop_at(step))
    parts = training.train(job(out), resume=True)
    assert parts.state.keys() == whole.state.keys()
    assert all(torch.equal(parts.state[name], whole.state[name]) for name in whole.state)
    assert parts.measured == whole.measured


def test_train_resume_with_another_recipe_is_refused(run_folder: Path) -> None:
    other = dataclasses.replace(RECIPE, lr=0.5)
    with pytest.raises(InputError, match="recipe"):
        training.train(job(run_folder, recipe=other), resume=True)
    with pytest.raises(InputError, match="already contains a run"):
        training.train(job(run_folder))


def test_train_fixed_batch_norm_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pre-trained"):
        training.train(job(tmp_path, recipe=recipe.PAPER))


def test_train_fixed_parts_and_norms_do_not_change(tmp_path: Path, run_folder: Path) -> None:
    start = checkpoint.load(run_folder / "best.pt")
    fixed = dataclasses.replace(RECIPE, epochs=1, norm_fraction=0.0, freeze=2)
    later = training.train(job(tmp_path / "later", recipe=fixed, start=start))
    norm = re.compile(r"bn\d|downsample\.1")
    for name, tensor in start.state.items():
        same = torch.equal(later.state[name], tensor)
        frozen = name.startswith(("conv1.", "bn1.", "layer1.")) or norm.search(name) is not None
        assert same or not frozen, name
    assert not torch.equal(start.state["rpn.conv.weight"], later.state["rpn.conv.weight"])


def test_train_loss_not_finite_is_an_error(tmp_path: Path, run_folder: Path) -> None:
    wild = dataclasses.replace(RECIPE, lr=10.0, clip=0.0, warmup=0.0, epochs=20)
    start = checkpoint.load(run_folder / "best.pt")
    state = {n: t * (np.inf if n == "rpn.conv.weight" else 1) for n, t in start.state.items()}
    broken = dataclasses.replace(start, state=state)
    with pytest.raises(CheckFailedError):
        training.train(job(tmp_path / "wild", recipe=wild, start=broken))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_training import job
from rtresnet.detection import training
out = Path(sys.argv[2])
training.train(job(out, save_every=0.0), resume=(out / "last.pt").exists(),
               on_step=lambda p: print(p.step, flush=True))
"""


@pytest.mark.slow
def test_train_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=120) == 0
    process = start(tmp_path / "killed")
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path / "killed").wait(timeout=120) == 0
    one, other = (checkpoint.load(tmp_path / name / "best.pt") for name in ("whole", "killed"))
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_pretrain_without_a_countable_object_is_refused(tmp_path: Path) -> None:
    source = open_detection("shapes:2")
    targets = tuple(
        dataclasses.replace(entry, ignored=np.ones_like(entry.ignored)) for entry in source.targets
    )
    difficult = dataclasses.replace(source, targets=targets)
    with pytest.raises(DataError) as caught:
        pretrain.pretrain(job(tmp_path, source=difficult), pretrain.PretrainRecipe(steps=1))
    assert caught.value.fix and not (tmp_path / "pretrain.pt").exists()
