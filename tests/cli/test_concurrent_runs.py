"""Two processes that use one output folder at the same time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core import artifacts, locks
from rtresnet.core.preprocess import Preprocess
from rtresnet.models import checkpoint, zoo


def started(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rtresnet", *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def training(data: str, seed: int, *more: object) -> list[object]:
    return ["train", "--model", "resnet8", "--data", data, "--seed", seed, *more]


@pytest.mark.slow
def test_train_by_two_processes_without_out_takes_two_folders(tints: str, tmp_path: Path) -> None:
    both = [started(*training(tints, seed, "--epochs", 2), cwd=tmp_path) for seed in (1, 2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    seeds = {checkpoint.load(path / "best.pt").training["recipe"]["seed"] for path in folders}
    assert seeds == {1, 2}
    assert not [path for path in folders if (path / locks.FOLDER_LOCK).exists()]


@pytest.mark.slow
def test_train_into_a_folder_that_another_process_trains_into_is_refused(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = started(*training(tints, 1, "--epochs", 500, "--out", out), cwd=tmp_path)
    try:
        wait_for(out / "last.pt", first)
        for more in ([], ["--resume"]):
            assert main([str(a) for a in training(tints, 2, "--out", out, *more)]) == 2
            output = capsys.readouterr().err.splitlines()[-1]
            assert f"process {first.pid}" in output and "--seed 1" in output
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert checkpoint.load(out / "last.pt").training["recipe"]["seed"] == 1


def test_export_into_a_folder_that_another_process_writes_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second export begins while the first is at work, as its progress line shows."""
    contract = Preprocess.for_size(32)
    for seed in (1, 2):
        made = checkpoint.untrained(zoo.spec("resnet20"), contract, seed=seed)
        checkpoint.save(tmp_path / f"{seed}.pt", made)
    arguments = ["export", "--no-plan", "--fp16", "--out", str(tmp_path / "engines"), "--weights"]
    first = started(*arguments, tmp_path / "1.pt", cwd=tmp_path)
    wait_for(tmp_path / "engines" / locks.FOLDER_LOCK, first)
    assert main([*arguments, str(tmp_path / "2.pt")]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert f"process {first.pid}" in output and "1.pt" in output
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    chain = list(artifacts.chain(tmp_path / "engines" / "resnet20-fp16.onnx"))
    assert [state for _, _, state in chain] == ["ok"] * 3
    assert chain[-1][0] == tmp_path / "1.pt"
    assert main([*arguments, str(tmp_path / "2.pt")]) == 0  # free again


def test_train_without_out_reuses_a_folder_that_has_only_the_list_of_broken_images(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(a) for a in training(tints, 0, "--epochs", 1)]
    assert main(arguments) == 0
    (first,) = Path("runs").iterdir()
    second = first.with_name(f"{first.name}-2")
    second.mkdir()
    (second / "broken.txt").write_text("a.jpg: not an image\n")
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in Path("runs").iterdir()} == {first.name, second.name}
    assert (second / "best.pt").exists()
    assert f"page: {second / 'index.html'}" in printed
    assert printed.splitlines()[-1] == f"next: rtresnet export --weights {second / 'best.pt'}"


def test_train_refused_without_out_leaves_no_folder(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(a) for a in training(tints, 0, "--recipe", "moderne")]) == 2
    output = capsys.readouterr().err
    assert "did you mean 'modern'?" in output and "known: paper-cifar, paper-imagenet" in output
    assert list(tmp_path.iterdir()) == []
