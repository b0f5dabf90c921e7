from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.models import checkpoint


def run(data: str, out: Path, *more: str) -> int:
    return main(["train", "--model", "resnet8", "--data", data, "--out", str(out), *more])


def recipe_of(out: Path) -> dict[str, object]:
    recipe: dict[str, object] = checkpoint.load(out / "last.pt").training["recipe"]
    return recipe


def test_the_resolved_recipe_is_printed_and_stored(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(tints, out, "--recipe", "paper-cifar", "--epochs", "1", "--set", "clip=2") == 0
    printed, recipe = capsys.readouterr().err, recipe_of(out)
    assert "recipe paper-cifar:" in printed and "clip=2" in printed and "precision=fp32" in printed
    assert (recipe["name"], recipe["clip"], recipe["batch"]) == ("paper-cifar", 2.0, 32)
    assert f"lr={recipe['lr']:g}" in printed


def test_without_a_name_it_is_speed_and_with_weights_finetune(
    tints: str, trained: Path, tmp_path: Path
) -> None:
    assert recipe_of(trained)["name"] == "speed"
    out = tmp_path / "run"
    weights = str(trained / "best.pt")
    assert main(["train", "--weights", weights, "--data", tints, "--epochs", "1",
                 "--set", "freeze=2", "--out", str(out)]) == 0  # fmt: skip
    assert recipe_of(out)["name"] == "finetune"
    before, after = (checkpoint.load(path / "best.pt").state for path in (trained, out))
    for name, tensor in before.items():
        frozen = name.startswith(("conv1", "bn1", "layer1"))
        same = torch.equal(tensor, after[name])
        assert same == frozen or name.endswith("num_batches_tracked"), name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--set", "label_smoothin=0.1"], "did you mean 'label_smoothing'?"),
        (["--set", "flip=sideways"], "known: none, random, alternate"),
        (["--set", "precision=fp16"], "--set precision=bf16"),
        (["--recipe", "moderne"], "did you mean 'modern'?"),
        (["--set", "lr=-1"], "must be at least 1e-12"),
        (["--batch", "30", "--set", "accumulate=4"], "into 4 equal parts"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    assert run(tints, tmp_path / "run", *option) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "run").exists()


def test_a_resume_needs_nothing_but_the_folder(
    tints: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "test top-1" in capsys.readouterr().out
    for option in (["--model", "resnet20"], ["--size", "16"], ["--mean", "0.1,0.1,0.1"]):
        assert main(["train", "--out", str(out), "--resume", *option]) == 2
        assert "resnet8 at 32 pixels" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--recipe", "modern"]) == 2
    assert "name speed -> modern" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--seed", "5"]) == 2
    assert "seed 0 -> 5" in capsys.readouterr().err


def test_without_a_folder_the_latest_run_is_resumed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, age in (("old", 100), ("new", 0), ("older", 200)):
        shutil.copytree(trained, Path("runs") / name)
        stamp = time.time() - age
        os.utime(Path("runs") / name / "last.pt", (stamp, stamp))
    assert main(["train", "--resume"]) == 0
    assert "runs/new/best.pt" in capsys.readouterr().out


def test_the_folder_has_the_name_of_the_weights_net_and_is_found_by_the_data(
    trained: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(tints.removeprefix("npz:"), "tints.npz")
    data = ["--data", "npz:tints.npz"]
    weights = ["--weights", str(trained / "best.pt")]
    assert main(["train", *weights, *data, "--set", "steps=1"]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name == "resnet8-npz-tints-npz"
    page = (folder / "index.html").read_text()
    assert "Epoch 1 is kept: top-1" in page and "uncertain by" in page
    capsys.readouterr()
    assert main(["train", *data, "--resume"]) == 0
    assert f"{folder}/best.pt" in capsys.readouterr().out


def test_weights_that_cannot_be_used_leave_no_folder(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--weights", "none.pt", "--data", tints]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_weights_alone_is_no_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(trained / "best.pt", out / "last.pt")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "--weights" in capsys.readouterr().err


def test_a_truncated_state_is_told_and_the_best_is_still_there(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "last.pt" in capsys.readouterr().err
    assert checkpoint.load(out / "best.pt").measured["test_n"] == 24


@pytest.mark.slow
def test_sigterm_saves_as_ctrl_c_does(tints: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rtresnet", "train", "--model", "resnet8", "--data", tints,
               "--epochs", "500", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"rtresnet train --out {out} --resume" in errors
    state = checkpoint.load(out / "last.pt").training
    assert state["step"] >= 6 * len((out / "log.jsonl").read_text().splitlines())


def test_a_full_disk_leaves_the_previous_state_and_the_run_goes_on_from_it(
    tints: str, tmp_path: Path, disk_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", "3", "--set", "precision=fp32"]
    assert run(tints, tmp_path / "unbroken", *options) == 0
    # Room for best.pt and one last.pt, not for the second next to it.
    needed = sum((tmp_path / "unbroken" / name).stat().st_size for name in ("best.pt", "last.pt"))
    disk = disk_of(f"{needed // 1024 + 200}k")
    capsys.readouterr()
    assert run(tints, disk / "run", *options) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "last.pt" in message or "best.pt" in message
    assert "the disk is full" in message
    assert not list((disk / "run").glob(".*.tmp"))
    assert checkpoint.load(disk / "run" / "last.pt").training["step"] == 6
    larger = ["mount", "-o", "remount,size=50m", str(disk)]
    subprocess.run(larger, check=True)
    assert main(["train", "--out", str(disk / "run"), "--resume"]) == 0
    ours = checkpoint.load(disk / "run" / "last.pt").state
    theirs = checkpoint.load(tmp_path / "unbroken" / "last.pt").state
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_curves_and_the_page_are_drawn(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (trained / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (trained / "index.html").read_text()
    assert (
        page.count("<svg") == 3
        and "recipe speed:" in page
        and "http" not in page.replace("http://www.w3.org", "")
    )


def test_event_files_are_written_when_asked_for(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    if not importable("tensorboard"):
        assert run(tints, out, "--epochs", "1", "--tensorboard") == 3
        assert "pip install tensorboard" in capsys.readouterr().err
        return
    assert run(tints, out, "--epochs", "1", "--tensorboard") == 0
    (events,) = (out / "tensorboard").iterdir()
    assert b"val_top1" in events.read_bytes()


def importable(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(
    "more",
    [
        ["--set", "accumulate=2", "--set", "clip=1", "--set", "ema=0"],
        ["--set", "precision=bf16", "--set", "bn_images=64"],
        ["--recipe", "modern", "--set", "holdout=0"],
    ],
)
def test_the_options_of_the_loop_work_and_train(
    tints: str, tmp_path: Path, more: list[str]
) -> None:
    out = tmp_path / "run"
    assert run(tints, out, "--epochs", "4", *more) == 0
    best = checkpoint.load(out / "best.pt")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    if "holdout=0" in more:
        assert best.measured["val_top1"] is None and best.measured["epoch"] == 4
        assert recipe_of(out)["holdout"] == 0
    if "bn_images=64" in more:
        assert best.measured["bn_images"] in (0, 64)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_run_exports_like_any_other(tints: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(tints, out, "--epochs", "2", "--compile", "--set", "progressive=") == 0
    state = checkpoint.load(out / "best.pt").state
    assert "layer1.0.conv1.weight" in state and not any("_orig_mod" in name for name in state)


def test_without_a_compiler_compiling_is_refused_before_anything_runs(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert run(tints, tmp_path / "run", "--compile") == 3
    assert "C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_images_of_other_shapes_than_the_nets_are_cropped_to_it(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 40, 48, 3), dtype=np.uint8)
    np.savez(tmp_path / "wide.npz", images=images, labels=np.arange(60) % 2)
    assert run(f"npz:{tmp_path / 'wide.npz'}", tmp_path / "run", "--epochs", "1") == 0


def photographs(root: Path) -> Path:
    """Return 60 images of two classes and 12 test images; two of the former are no images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for label in ("cats", "dogs"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{index:02}.jpg")
    Image.new("RGBA", (40, 50), (9, 9, 9, 100)).save(root / "train" / "cats" / "clear.png")
    shutil.copy(root / "train" / "cats" / "03.jpg", root / "test" / "dogs" / "copy.jpg")
    for name in ("train/cats/05.jpg", "train/dogs/07.jpg"):
        (root / name).write_text("<html>")
    return root


def test_train_with_broken_images_lists_them_all_and_exits_2_before_the_first_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(str(photographs(tmp_path / "set")), out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines if line.startswith("broken: ")] == [
        str(tmp_path / "set" / "train" / name) for name in ("cats/05.jpg", "dogs/07.jpg")
    ]
    assert "--max-broken 4%" in lines[-1]
    assert [path.name for path in out.iterdir()] == ["broken.txt"]


def test_train_with_tolerated_broken_images_records_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "run", str(photographs(tmp_path / "set"))
    result = tmp_path / "result.json"
    options = ["--max-broken", "4%", "--epochs", "1", "--json", str(result)]
    assert run(data, out, *options) == 0
    printed = capsys.readouterr().err
    assert "cats" in printed and "composited on white: 1 transparent image" in printed
    assert "copy.jpg" in printed and printed.index("copy.jpg") < printed.index("epoch   1")
    images = checkpoint.load(out / "best.pt").training["images"]
    assert images == checkpoint.load(out / "last.pt").training["images"]
    assert json.loads(result.read_text())["result"]["images"]["counts"] == images["counts"]
    assert {split: sum(counts) for split, counts in images["counts"].items()} == {
        "train": 53, "val": 6, "test": 13,
    }  # fmt: skip
    assert images["broken"] == {"train": [5, 38], "test": []}
    assert (images["identical"]["test"], images["transparent"]) == (1, 1)
    assert main(["train", "--out", str(out), "--resume"]) == 0  # knows what was tolerated
    assert "broken: " not in capsys.readouterr().err


def test_train_with_run_of_an_earlier_version_resumes_without_a_record_of_its_images(
    tints: str, tmp_path: Path, interrupt_in: Callable[[int], None]
) -> None:
    out = tmp_path / "run"
    interrupt_in(7)
    assert run(tints, out, "--epochs", "2") == 130
    for name in ("best.pt", "last.pt"):
        saved = checkpoint.load(out / name)
        del saved.training["images"]
        checkpoint.save(out / name, saved)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert checkpoint.load(out / "last.pt").training["images"]["check"] == "arrays"


@pytest.mark.parametrize("text", ["-1%", "101", "some", "nan", "%"])
def test_train_with_impossible_share_of_broken_images_exits_2(
    text: str, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tints, tmp_path / "run", "--max-broken", text) == 2
    assert "as in 1%" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
