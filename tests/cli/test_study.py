"""`rtresnet study`, for real, on a tiny set."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware

drawn = hardware.installed("matplotlib")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def study(verb: str, *arguments: object) -> dict:  # type: ignore[type-arg]
    assert main(["study", verb, *map(str, arguments), "--json", "r.json"]) == 0
    record = json.loads(Path("r.json").read_text())
    assert record["verb"] == f"study {verb}"
    result: dict = record["result"]  # type: ignore[type-arg]
    return result


def check_files(folder: Path, name: str) -> str:
    wanted = {f"{name}.json", "index.html"} | ({f"{name}.png", f"{name}.svg"} if drawn else set())
    assert wanted <= {path.name for path in folder.iterdir()}
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == drawn and "<script" not in page
    return page


def test_degradation_makes_every_run_once_and_reports_what_the_logs_say(
    here: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", tints, "--depths", "8", "--seeds", 2, "--epochs", 2, "--images", 100)
    result = study("degradation", *arguments)
    out = here / "runs" / "study-degradation"
    page = check_files(out, "degradation")
    printed = capsys.readouterr()
    assert "of the paper's 64,000 steps" in printed.err
    assert "80 training images of tints; mean ± std of 2 seeds" in printed.err
    assert [net["net"] for net in result["nets"]] == ["plain8", "resnet8"]
    assert result["nets"][0]["parameters"] == result["nets"][1]["parameters"]
    for net in result["nets"]:
        lasts = []
        for seed in (0, 1):
            lines = (out / f"{net['net']}-seed{seed}" / "log.jsonl").read_text().splitlines()
            lasts.append(100 - json.loads(lines[-1])["train_top1"])
        mean = sum(lasts) / 2
        assert net["train_error"]["mean"] == pytest.approx(mean) and net["train_error"]["n"] == 2
        std = net["train_error"]["std"]
        assert std == pytest.approx(abs(lasts[0] - lasts[1]) / 2**0.5)
        assert f"{mean:.2f} ± {std:.2f}" in page
    before = {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")}
    assert len(before) == 4
    assert study("degradation", *arguments) == result
    assert {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")} == before
    assert capsys.readouterr().err.count("made before") == 4
    assert main(["study", "degradation", *map(str, arguments), "--set", "lr=0.5"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "lr 0.025 -> 0.5" in message and "another --out" in message
    assert {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")} == before


def test_shortcuts_sets_the_options_beside_the_plain_net(
    here: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", "resnet8", "--data", tints, "--seeds", 1, "--steps", 3)
    result = study("shortcuts", *arguments, "--out", "s")
    check_files(here / "s", "shortcuts")
    assert [net["shortcut"] for net in result["nets"]] == [None, "A", "B", "C"]
    assert all(net["seeds"][0]["log"][-1]["step"] == 3 for net in result["nets"])
    out = capsys.readouterr().out
    assert "mult-adds" in out and "resnet8-C" in out and max(map(len, out.splitlines())) <= 80


def test_a_net_that_diverges_stands_in_the_table_and_the_study_goes_on(
    here: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("--epochs", 20, "--set", "lr=99", "--set", "weight_decay=1")
    result = study("degradation", "--data", tints, "--depths", 8, "--seeds", 1, *wild)
    assert [net["diverged"] for net in result["nets"]] == [1, 1]
    assert "diverged" in capsys.readouterr().out
    page = (here / "runs" / "study-degradation" / "index.html").read_text()
    assert "Diverged: plain8, seed 0" in page and "<svg" not in page


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_study_does(here: Path, tints: str) -> None:
    arguments = ["study", "degradation", "--data", tints, "--depths", "8", "--seeds", "1",
                 "--epochs", "15", "--out", "s"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "rtresnet", *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = here / "s" / "plain8-seed0" / "log.jsonl"
    deadline = time.time() + 120
    while not first.exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert f"go on with the same command: rtresnet {' '.join(arguments)}" in errors
    done = len(first.read_text().splitlines())
    assert 1 <= done < 15 and not (here / "s" / "resnet8-seed0").exists()
    kept = json.loads(first.read_text().splitlines()[0])
    assert main(arguments) == 0
    assert json.loads(first.read_text().splitlines()[0]) == kept
    assert len(first.read_text().splitlines()) == 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["degradation", "--depths", "8,x"], ["8,x", "--depths 20,32"]),
        (["degradation", "--depths", "21"], ["plain21"]),
        (["degradation", "--epochs", "1", "--steps", "1"], ["--epochs and --steps"]),
        (["degradation", "--set", "seed=1"], ["--set seed", "--seeds N"]),
        (["degradation", "--set", "lrr=1"], ["lrr", "lr"]),
        (["degradation", "--recipe", "paper"], ["paper-cifar"]),
        (["shortcuts", "--model", "plain20"], ["--model resnet20"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    here: Path,
    tints: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    assert main(["study", *arguments, "--data", tints]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words)
    assert not list(here.iterdir())


def test_responses_draws_a_line_a_checkpoint(here: Path, trained: Path, tints: str) -> None:
    best = trained / "best.pt"
    result = study("responses", best, best, "--data", tints, "--images", 20, "--out", "r")
    assert [entry["n"] for entry in result["results"]] == [20, 20]
    page = check_files(here / "r", "responses")
    assert page.count("<table>") == 2 and "layer3.0.conv2" in page
