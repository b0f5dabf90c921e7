from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core.artifacts import read_sidecar
from rtresnet.models import checkpoint


def train(data: str, out: Path, *more: str, epochs: int = 4) -> int:
    arguments = ["--model", "resnet8", "--data", data, "--epochs", str(epochs), "--out", str(out)]
    return main(["train", *arguments, *more])


def final_state(out: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return checkpoint.load(out / name).state


def assert_identical(first: Path, second: Path, name: str = "last.pt") -> None:
    a, b = final_state(first, name), final_state(second, name)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_learns_and_leaves_its_files(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]
    best = checkpoint.load(trained / "best.pt")
    assert best.measured["test_top1"] > 90
    assert best.measured["test_n"] == 24
    assert best.model.architecture == "resnet8"
    assert best.weights.origin == "trained"
    sidecar = read_sidecar(trained / "best.pt")
    assert sidecar is not None and best.measured.items() <= sidecar.measured.items()


def test_the_same_seed_gives_the_same_weights(tints: str, trained: Path, tmp_path: Path) -> None:
    assert train(tints, tmp_path / "again") == 0
    assert_identical(tmp_path / "again", trained)
    assert train(tints, tmp_path / "other", "--seed", "1") == 0
    a, b = final_state(trained), final_state(tmp_path / "other")
    assert not torch.equal(a["fc.weight"], b["fc.weight"])


ZYGOTE = """
import os, random, signal, sys, time
from rtresnet.cli.main import main
import rtresnet.training.loop
# Forked from a process that has imported torch but started no threads: a child trains at once.
state, kills, arguments = sys.argv[1] + "/last.pt", int(sys.argv[2]), sys.argv[3:]
draw, killed = random.Random(7), 0
def written():
    return os.stat(state).st_mtime_ns if os.path.exists(state) else 0
while killed < kills:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main([*arguments, *(["--resume"] if written() else [])]))
    for _ in range(draw.choice((0, 1, 1, 2, 3))):  # so many states saved, and then some
        before, limit = written(), time.monotonic() + 60
        while written() == before and time.monotonic() < limit:
            time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(f"finished after {killed} kills, {os.waitstatus_to_exitcode(status)}")
    killed += 1
"""


@pytest.mark.slow
def test_killed_at_20_random_moments_it_ends_in_identical_weights(
    tints: str, tmp_path: Path
) -> None:
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    arguments = ["train", "--model", "resnet8", "--data", tints, "--epochs", "16", "--save-every",
                 "0", "--set", "precision=fp32"]  # fmt: skip
    assert main([*arguments, "--out", str(unbroken)]) == 0
    killed = [*arguments, "--out", str(out)]
    subprocess.run([sys.executable, "-c", ZYGOTE, str(out), "20", *killed], check=True)
    assert main([*killed, "--resume"]) == 0
    assert_identical(out, unbroken)
    assert_identical(out, unbroken, "best.pt")
    ours, theirs = ((run / "log.jsonl").read_text().splitlines() for run in (out, unbroken))
    for first, second in zip(ours, theirs, strict=True):
        assert untimed(first) == untimed(second)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 12])
def test_stopped_in_any_step_also_an_epochs_and_the_runs_last_it_goes_on_as_if_it_had_not_been(
    step: int, tints: str, tmp_path: Path, interrupt_in: Callable[[int], None]
) -> None:
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    options = ["--set", "precision=fp32"]
    assert train(tints, unbroken, *options, epochs=2) == 0
    interrupt_in(step)
    assert train(tints, out, *options, epochs=2) == 130
    assert checkpoint.load(out / "last.pt").training["step"] == step
    assert main(["train", "--out", str(out), "--resume"]) == 0
    for name in ("best.pt", "last.pt"):
        assert_identical(out, unbroken, name)
    ours, theirs = ((run / "log.jsonl").read_text().splitlines() for run in (out, unbroken))
    assert [untimed(line) for line in ours] == [untimed(line) for line in theirs]
    assert len(ours) == 2


def untimed(line: str) -> dict[str, object]:
    timed = ("seconds", "images_per_second", "waiting", "decoded_per_core")
    return {name: value for name, value in json.loads(line).items() if name not in timed}


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tints: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "rtresnet", "train", "--model", "resnet8", "--data", tints,
        "--epochs", "500", "--out", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors and str(out) in errors
    assert "Traceback" not in errors
    assert not list(out.glob(".*.tmp"))


def test_resuming_with_another_recipe_names_the_field(
    tints: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tints, trained, "--lr", "0.5", "--resume") == 2
    assert "-> 0.5" in capsys.readouterr().err


def test_resuming_on_changed_images_is_refused(
    trained: Path, tmp_path: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(tints.removeprefix("npz:")) as file:
        images, labels = file["images"].copy(), file["labels"]
    images[0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "tints.npz", images=images, labels=labels)
    assert train(f"npz:{tmp_path / 'tints.npz'}", trained, "--resume") == 2
    assert "changed" in capsys.readouterr().err


def test_a_run_is_not_overwritten(
    tints: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "last.pt").read_bytes()
    assert train(tints, trained) == 2
    assert "--resume" in capsys.readouterr().err
    assert (trained / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(
    tints: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = checkpoint.load(trained / "best.pt")
    huge.state["fc.weight"].fill_(3e38)
    checkpoint.save(tmp_path / "huge.pt", huge)
    assert train(tints, tmp_path / "run", "--weights", str(tmp_path / "huge.pt")) == 1
    message = capsys.readouterr().err
    assert "at step" in message and "learning rate" in message and "--lr" in message


def test_fine_tuning_replaces_the_head_of_another_class_count(
    trained: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "three.npz", images=images, labels=np.arange(60) % 3)
    out = tmp_path / "run"
    weights = ["--weights", str(trained / "best.pt")]
    assert main(["train", *weights, "--data", f"npz:{tmp_path / 'three.npz'}", "--epochs", "1",
                 "--out", str(out)]) == 0  # fmt: skip
    tuned = checkpoint.load(out / "best.pt")
    assert tuned.model.architecture == "resnet8"
    assert tuned.state["fc.weight"].shape[0] == 3


def test_a_folder_of_photographs_trains_at_a_size_above_the_small_ones(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(15):
            low = 0 if label == "dark" else 150
            pixels = rng.integers(low, low + 100, (90, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.jpg")
    out = tmp_path / "run"
    assert main(["train", "--model", "resnet8", "--data", str(tmp_path / "data"), "--size", "72",
                 "--epochs", "1", "--batch", "8", "--out", str(out)]) == 0  # fmt: skip
    best = checkpoint.load(out / "best.pt")
    assert best.model.classes == ("dark", "light")
    assert (best.input.size, best.input.resize) == (72, 82)


def test_resuming_where_there_is_no_run_says_so(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tints, tmp_path / "run", "--resume") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "without --resume" in message and not (tmp_path / "run").exists()
