"""Configurations in TOML files, loggers and threads of `train`."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.models import checkpoint
from rtresnet.workflows.config_file import read_config
from tests.training.test_loop import assert_identical


def train(*arguments: str) -> int:
    return main(["train", "--model", "resnet8", *arguments])


def test_train_resolved_configuration_fed_back_gives_the_same_run(
    tints: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--data", tints, "--epochs", "2", "--no-flip", "--set", "clip=1.5", "--patience",
               "7", "--set", "progressive=0:0.5,0.5:1", "--preset", "half"]  # fmt: skip
    assert train(*options, "--out", str(first)) == 0
    assert main(["train", "--config", str(first / "config.toml"), "--out", str(second)]) == 0
    assert_identical(first, second)
    recipes = [checkpoint.load(run / "last.pt").training["recipe"] for run in (first, second)]
    assert recipes[0] == recipes[1]
    texts = [(run / "config.toml").read_text() for run in (first, second)]
    assert texts[0] == texts[1]


def test_train_command_line_overrides_the_file(tints: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "resnet8"\ndata = "{tints}"\nsave_every = 7\n'
        "[recipe]\nepochs = 3\nclip = 2\nema = 0\n"
    )
    out = tmp_path / "run"
    arguments = ["--config", str(file), "--epochs", "1", "--set", "clip=0.5", "--out", str(out)]
    assert main(["train", *arguments]) == 0
    recipe = checkpoint.load(out / "last.pt").training["recipe"]
    assert (recipe["epochs"], recipe["clip"], recipe["ema"]) == (1, 0.5, 0)
    assert "save_every = 7" in (out / "config.toml").read_text()


def test_train_preset_of_the_file_is_used_and_overridden(tints: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    common = f'model = "resnet8"\ndata = "{tints}"\n[recipe]\nepochs = 1\n'
    file.write_text(f'preset = "half"\n{common}')

    def trained(name: str, file: Path, *options: str) -> tuple[object, object]:
        out = str(tmp_path / name)
        assert main(["train", "--config", str(file), *options, "--out", out]) == 0
        loaded = checkpoint.load(tmp_path / name / "last.pt")
        return loaded.input.mean, loaded.input.std

    half, unit = ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)
    assert trained("half", file) == half
    resolved = tmp_path / "half" / "config.toml"
    for source in (file, resolved):
        assert trained(f"unit-{source.stem}", source, "--preset", "unit") == unit
    mean = trained("mean", file, "--mean", "0.1,0.2,0.3")
    assert mean == ((0.1, 0.2, 0.3), (0.5,) * 3)
    both = ["--preset", "half", "--mean", "0,0,0"]
    assert main(["train", "--config", str(file), *both, "--out", str(tmp_path / "both")]) == 2


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("model = ", InputError, "not a TOML file"),
        ('modell = "resnet8"', UnknownNameError, "did you mean 'model'"),
        ("save_every = -1", InputError, "save_every"),
        ("save_every = 'long'", InputError, "save_every"),
        ("[recipe.a]\nb = 1", InputError, "recipe.a"),
        ("resume = true", UnknownNameError, "resume"),
    ],
)
def test_read_config_names_what_is_wrong(
    text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(error, match=message):
        read_config(tmp_path / "a.toml")


def test_train_file_with_an_unknown_field_of_the_recipe_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("[recipe]\nepoch = 3\n")
    assert main(["train", "--config", str(tmp_path / "a.toml")]) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err


class Stub(types.ModuleType):
    """A package of a logger that keeps what it receives."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Stub:
            self.calls.append((name, (arguments, options)))
            return self

        return call


def test_train_sends_its_numbers_to_the_loggers(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {name: Stub(name) for name in ("mlflow", "wandb")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    options = ["--data", tints, "--epochs", "1", "--log", "mlflow,wandb"]
    assert train(*options, "--out", str(tmp_path / "run")) == 0
    names = [name for name, _ in packages["mlflow"].calls]
    assert names[:2] == ["start_run", "log_params"] and names[-1] == "end_run"
    assert names.count("log_metrics") == 7  # six steps and the epoch
    (values,), options = packages["mlflow"].calls[-2][1]
    assert options["step"] == 6 and values.keys() >= {"val_top1", "train_top1"}
    names = [name for name, _ in packages["wandb"].calls]
    assert names[0] == "init" and names[-1] == "finish" and names.count("log") == 7
    assert packages["wandb"].calls[0][1][1]["config"]["model"] == "resnet8"


def test_train_logs_to_tensorboard(tints: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert train("--data", tints, "--epochs", "2", "--log", "tensorboard", "--out", str(out)) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val_top1")] == [6, 12]
    assert len(events.Scalars("loss")) == 12


class Broken(Stub):
    """A package that fails in one function."""

    def __init__(self, name: str, broken: str) -> None:
        super().__init__(name)
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__.get("broken"):
            raise RuntimeError("no route to the server\nsecond line")
        return super().__getattr__(name)


def test_train_logger_that_refuses_ends_the_run_before_its_first_step(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb", "init"))
    out = tmp_path / "run"
    assert train("--data", tints, "--log", "mlflow,wandb", "--out", str(out)) == 3
    output = capsys.readouterr().err
    assert "--log wandb: no route to the server" in output and "WANDB_MODE=offline" in output
    assert "second line" not in output and not (out / "last.pt").exists()
    assert stub.calls[-1] == ("end_run", (("FAILED",), {}))


def test_train_goes_on_without_a_logger_that_fails(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Broken("mlflow", "log_metrics")
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    out = tmp_path / "run"
    assert train("--data", tints, "--epochs", "1", "--log", "mlflow", "--out", str(out)) == 0
    assert capsys.readouterr().err.count("--log mlflow failed") == 1
    assert (out / "best.pt").exists()


def test_train_logs_to_mlflow(tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out = tmp_path / "run"
    assert train("--data", tints, "--epochs", "2", "--log", "mlflow", "--out", str(out)) == 0
    client = mlflow.MlflowClient()
    (result,) = client.search_runs(["0"])
    assert (result.info.run_name, result.info.status) == ("run", "FINISHED")
    assert result.data.params["model"] == "resnet8" and result.data.params["epochs"] == "2"
    history = client.get_metric_history(result.info.run_id, "val_top1")
    assert [entry.step for entry in history] == [6, 12]
    assert len(client.get_metric_history(result.info.run_id, "loss")) == 12


def test_train_logs_to_wandb_offline(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    assert train("--data", tints, "--epochs", "2", "--log", "wandb", "--out", str(out)) == 0
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert content.count(b"val_top1") >= 2 and content.count(b"loss") >= 12
    assert b"resnet8" in content


@pytest.mark.parametrize(
    ("log", "code", "message"),
    [("tensorbord", 2, "did you mean"), (",", 2, "no logger named"), ("mlflow", 3, "mlflow")],
)
def test_train_logger_that_cannot_be_used_is_refused_before_anything_runs(
    log: str, code: int, message: str, tints: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert train("--data", tints, "--log", log, "--out", str(tmp_path / "run")) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_threads_and_workers_are_used_and_restored(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    original = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (used.append(n), original(n))[1])
    before = torch.get_num_threads()
    options = ["--data", tints, "--epochs", "1", "--threads", "1", "--workers", "2"]
    assert train(*options, "--out", str(tmp_path / "run")) == 0
    assert used[0] == 1 and torch.get_num_threads() == before


def test_train_prints_the_input_pipelines_speed_after_the_first_epoch(
    tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--data", tints, "--epochs", "2", "--out", str(tmp_path / "run")) == 0
    lines = capsys.readouterr().err.splitlines()
    (place,) = [n for n, line in enumerate(lines) if "waited for data" in line]
    assert lines[place - 1].startswith("epoch   1")


@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_train_threads_wait_passively_unless_the_user_decides(
    policy: str | None, tints: str, tmp_path: Path
) -> None:
    variables = {name: value for name, value in os.environ.items() if "OMP" not in name}
    variables |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    command = [sys.executable, "-m", "rtresnet", "train", "--model", "resnet8", "--data", tints,
               "--set", "steps=1", "--threads", "1", "--out", str(tmp_path / "run")]  # fmt: skip
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy or 'PASSIVE'}'" in run.stderr
    assert ("GOMP_SPINCOUNT = '1000'" in run.stderr) == (policy is None)


@pytest.mark.parametrize(("options", "used", "advised"), [
    ((), 1.0, True), ((), 0.2, False), (("--threads", "1"), 1.0, False),
])  # fmt: skip
def test_train_names_a_number_of_threads_if_others_use_cores(
    options: tuple[str, ...], used: float, advised: bool, tints: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(hardware, "cores_in_use", lambda: used)
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    options += "--set", "steps=1", "--out", str(tmp_path / "run")
    assert train("--data", tints, *options) == 0
    assert ("1 of 4 cores: while they run, --threads 3" in capsys.readouterr().err) == advised
