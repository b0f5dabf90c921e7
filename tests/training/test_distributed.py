"""Distributed training: torchrun with two real processes and gloo."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core.errors import InputError
from rtresnet.data.sources import open_source
from rtresnet.models import checkpoint
from rtresnet.models.nets import TorchBackend
from rtresnet.training import loader
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import World, check_batch
from rtresnet.training.evaluate import evaluate

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str, processes: int = 2, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--standalone", "--max-restarts", str(restarts), "--monitor-interval", "0.2",
        "-m", "rtresnet", *arguments,
    ]  # fmt: skip


def arguments(data: str, out: Path, *more: str) -> list[str]:
    return ["train", "--model", "resnet8", "--data", data, "--out", str(out), "--epochs", "3",
            "--set", "precision=fp32", *more]  # fmt: skip


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tints: str) -> Path:
    """The run folder of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    command = torchrun(*arguments(tints, out))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test top-1") == 1  # one of the two speaks
    assert "2 processes" in done.stderr and done.stderr.count("training\n") == 1
    return out


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(together: Path, tints: str, tmp_path: Path) -> None:
    # Batch norm takes a process's part of the batch; so does one process in two parts.
    assert main(arguments(tints, tmp_path / "run", "--threads", "1", "--set", "accumulate=2")) == 0
    ours, alone = log_of(together), log_of(tmp_path / "run")
    assert len(ours) == len(alone) == 3
    for two, one in zip(ours, alone, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["train_top1"] == pytest.approx(one["train_top1"], abs=0.6)
        assert (two["lr"], two["step"], two["val_n"]) == (one["lr"], one["step"], one["val_n"])
    first, second = (checkpoint.load(out / "last.pt").state for out in (together, tmp_path / "run"))
    for name, tensor in first.items():
        if "running" not in name:
            assert torch.allclose(tensor, second[name], atol=1e-3), name


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path: Path, tints: str) -> None:
    # 31 images held out, an odd number: shares of 16 and 15.
    with np.load(tints.removeprefix("npz:")) as file:
        np.savez(tmp_path / "odd.npz", images=file["images"][:239], labels=file["labels"][:239])
    data = f"npz:{tmp_path / 'odd.npz'}"
    out = tmp_path / "run"
    command = torchrun(*arguments(data, out, "--set", "holdout=0.125", "--epochs", "1"))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = log_of(out)
    source, best = open_source(data), checkpoint.load(out / "best.pt")
    parts = loader.split(source, Recipe(**best.training["recipe"]))
    assert parts.test is not None and record["val_n"] == 31
    tested = best.measured["test_n"], best.measured["test_top1"]
    for indices, (n, top1) in ((parts.val, (31, record["val_top1"])), (parts.test, tested)):
        alone = evaluate(TorchBackend(best.net()), source, best.input, indices=indices)
        assert (n, top1) == (alone.n, pytest.approx(alone.top1_percent))


@pytest.mark.slow
def test_prepare_over_two_processes_finds_what_one_finds(tmp_path: Path) -> None:
    root, rng = tmp_path / "set", np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 3)):
        for label in ("cats", "dogs"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{index:02}.jpg")
    for index in (4, 9):  # one of them is in each process's share
        shutil.copy(root / f"train/cats/{index:02}.jpg", root / f"test/dogs/copy{index}.jpg")
    for index in (0, 1, 3):
        (root / f"train/dogs/{index:02}.jpg").write_text("no image")
    options = ["--size", "72", "--batch", "8", "--epochs", "1", "--max-broken", "10%"]
    command = torchrun(*arguments(str(root), tmp_path / "two", *options))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("broken: ") == 3
    assert main(arguments(str(root), tmp_path / "one", *options)) == 0
    two, one = (checkpoint.load(tmp_path / name / "best.pt").training for name in ("two", "one"))
    assert two["images"] == one["images"]
    assert one["images"]["broken"]["train"] == [15, 16, 18]
    assert one["images"]["identical"]["test"] == 2


@pytest.mark.slow
def test_a_killed_process_is_started_anew_and_the_run_ends_the_same(
    together: Path, tints: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = torchrun(*arguments(tints, out, "--save-every", "0"), restarts=2)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(out / "last.pt")
    victims = workers(process.pid)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    ours, theirs = (checkpoint.load(run / "best.pt") for run in (out, together))
    for name in ours.state:
        assert torch.equal(ours.state[name], theirs.state[name]), name
    assert len(log_of(out)) == 3


@pytest.mark.slow
def test_a_restart_finds_its_own_run_among_others_without_being_told(
    trained: Path, tints: str, tmp_path: Path
) -> None:
    name = Path("runs") / f"resnet8-{re.sub(r'[^A-Za-z0-9]+', '-', tints).strip('-')[-40:]}"
    old, new = tmp_path / name, tmp_path / f"{name}-2"
    shutil.copytree(trained, old)
    before = (old / "last.pt").read_bytes()
    command = torchrun("train", "--model", "resnet8", "--data", tints, "--epochs", "3",
                       "--save-every", "0", restarts=1)  # fmt: skip
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(new / "last.pt")
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == [old.name, new.name]
    assert (old / "last.pt").read_bytes() == before and len(log_of(new)) == 3


@pytest.mark.slow
def test_a_folder_that_was_refused_is_not_gone_on_with_by_a_restart(
    trained: Path, tints: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = (out / "last.pt").read_bytes()
    command = torchrun("train", "--model", "resnet8", "--data", tints, "--out", str(out),
                       restarts=1)  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "already contains a run" in done.stderr
    assert "recipe speed" not in done.stderr
    assert (out / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_one(tints: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        torchrun(*arguments(tints, out, "--save-every", "0", "--epochs", "40")),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(out / "last.pt")
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert "--resume" in errors and process.returncode != 0
    step = checkpoint.load(out / "last.pt").training["step"]
    assert 0 < step < 240
    assert main(["train", "--out", str(out), "--resume", "--set", "epochs=41"]) == 2
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert checkpoint.load(out / "last.pt").training["step"] == 240


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def workers(parent: int) -> list[int]:
    """Return processes that torchrun started, by rank."""
    results = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK=")]
        if int(fields[1]) == parent and ranks:
            results.append((ranks[0], int(entry.name)))
    return [pid for _, pid in sorted(results)]


def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can() -> None:
    check_batch(128, 2, World(0, 4))
    with pytest.raises(InputError, match="--batch 96"):
        check_batch(100, 4, World(0, 8))


def test_shards_hold_every_image_once() -> None:
    indices = np.random.default_rng(0).permutation(23)
    shards = [World(rank, 4).shard(indices) for rank in range(4)]
    assert sorted(np.concatenate(shards)) == list(range(23))


def test_alone_nothing_is_exchanged(tints: str) -> None:
    alone = World()
    assert alone.sums(np.array([1.0, 2.0]), "cpu").tolist() == [1, 2]
    assert alone.broadcast("x") == "x" and alone.part(12, 3, 1) == slice(4, 8)
