"""`rtresnet study` on a tiny data set."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.detection import checkpoint
from rtresnet.models import download, zoo

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
    expected = {f"{name}.json", "index.html"} | ({f"{name}.png", f"{name}.svg"} if drawn else set())
    assert expected <= {path.name for path in folder.iterdir()}
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
    assert "84 training images of tints; mean ± std of 2 seeds" in printed.err
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
    assert capsys.readouterr().err.count("from an earlier run") == 4
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
    assert f"resume with the same command: rtresnet {' '.join(arguments)}" in errors
    done = len(first.read_text().splitlines())
    assert 1 <= done < 15 and not (here / "s" / "resnet8-seed0").exists()
    record = json.loads(first.read_text().splitlines()[0])
    assert main(arguments) == 0
    assert json.loads(first.read_text().splitlines()[0]) == record
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


def test_blocks_of_one_two_and_three_layers_have_the_same_parameters(
    here: Path, tints: str
) -> None:
    arguments = ("--model", "resnet20", "--data", tints, "--seeds", 1, "--steps", 1)
    result = study("blocks", *arguments, "--images", 40, "--out", "b")
    check_files(here / "b", "blocks")
    names = [net["net"] for net in result["nets"]]
    assert names == ["resnet20-block1", "resnet20", "resnet20-block3", "resnet20-C"]
    one, two, three, projections = (net["parameters"] for net in result["nets"])
    assert one == two == three < projections


def test_cost_compares_with_vgg19(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = study("cost", "--out", "c")
    check_files(here / "c", "cost")
    nets = {net["model"]: net for net in result["nets"]}
    assert nets["resnet34"]["of_vgg19"] == pytest.approx(0.187, abs=5e-4)  # the paper says 18 %
    assert nets["vgg19"]["fc_multiply_adds"] == pytest.approx(0.006, abs=5e-4)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_gradients_are_measured_once_and_explode_in_deep_plain_nets(
    here: Path, tints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", tints, "--steps", 2, "--batch", 16, "--size", 16, "--out", "g"]
    arguments += ["--model", "plain44", "--model", "resnet44"]
    result = study("gradients", *arguments)
    check_files(here / "g", "gradients")
    first = {net["model"]: net["points"][0] for net in result["nets"]}
    assert [point["step"] for point in result["nets"][0]["points"]] == [0, 1, 2]
    assert len(first["plain44"]["norms"]) == 43
    assert first["plain44"]["ratio"] > 5 * first["resnet44"]["ratio"]
    monkeypatch.setattr("rtresnet.study.analyses.along_a_run", None)  # it is not run again
    assert study("gradients", *arguments) == result
    assert main(["study", "gradients", *map(str, arguments), "--seed", "1"]) == 2


def test_gradients_are_the_losss_derivatives() -> None:
    import torch

    from rtresnet.models import zoo
    from rtresnet.study.analyses import measure_gradients

    torch.manual_seed(0)
    net = zoo.build(zoo.spec("resnet8"), 3).double()
    images, labels = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    result = measure_gradients(net, images, labels, 0)
    weight = net.layer1[0].conv1.weight
    direction = weight.grad / weight.grad.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-5 * direction
            losses.append(torch.nn.functional.cross_entropy(net(images), labels))
            weight -= sign * 1e-5 * direction
    slope = float(losses[0] - losses[1]) / 2e-5
    assert result.norms["layer1.0.conv1"] == pytest.approx(slope, rel=1e-4)


def test_lesions_leave_one_block_out_and_stand_next_to_its_int8_noise(
    here: Path, trained: Path, tints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from rtresnet.models import checkpoint
    from rtresnet.study import analyses

    arguments = (trained / "best.pt", "--data", tints, "--out", "l")
    result = study("lesions", *arguments)
    check_files(here / "l", "lesions")
    assert [block["block"] for block in result["blocks"]] == ["layer1.0", "layer2.0", "layer3.0"]
    assert result["calibration_images"] == 240  # all that there are
    # the data have no test split of their own
    assert "training images of" in result["remarks"][0]
    assert 90 < result["top1"] <= 100  # a percentage, not a count of the 24 images
    for block in result["blocks"]:
        assert block["drop"] == pytest.approx(result["top1"] - block["top1"])
        assert 5 < block["int8_db"] < 90
    net = checkpoint.load(trained / "best.pt").net().eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        whole = net(images)
        with analyses.without(net, "layer1.0"):
            assert not torch.equal(net(images), whole)
            stem = net.relu(net.bn1(net.conv1(images)))
            assert torch.equal(net.layer1(stem), stem)  # only the shortcut, and ReLU of it
        assert torch.equal(net(images), whole)
    monkeypatch.setattr("rtresnet.training.evaluate.evaluate", None)  # nothing is measured again
    assert study("lesions", *arguments) == result
    assert main(["study", "lesions", *map(str, arguments[:3]), "--images", "3", "--out", "l"]) == 2


DETECTORS = (
    "--data", "shapes:4", "--set", "width=0.125", "--set", "shorter=64", "--set", "longer=64",
    "--set", "anchors=16,32", "--set", "candidates=60", "--set", "regions=12", "--epochs", 2,
    "--pretrain-steps", 2, "--backbone", "resnet18", "--backbone", "plain18",
)  # fmt: skip


def test_detection_compares_backbones_and_repeats_no_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = study("detection", *DETECTORS, "--seeds", 1)
    out = here / "runs" / "study-detection"
    page = check_files(out, "detection")
    assert "resnet18" in page and "2 steps on objects" in capsys.readouterr().err
    assert [record["backbone"] for record in result["backbones"]] == ["resnet18", "plain18"]
    for record in result["backbones"]:
        (run,) = record["runs"]
        lines = (Path(run["folder"]) / "log.jsonl").read_text().splitlines()
        assert run["loss"] == [json.loads(line)["loss"] for line in lines] and len(lines) == 2
        assert record["ap50"]["mean"] == run["measured"]["ap50"]
    times = {path: path.stat().st_mtime_ns for path in out.rglob("best.pt")}
    assert study("detection", *DETECTORS, "--seeds", 1) == result
    assert {path: path.stat().st_mtime_ns for path in out.rglob("best.pt")} == times
    other = ["study", "detection", *map(str, DETECTORS), "--seeds", "1", "--set", "lr=0.001"]
    assert main(other) == 2 and "different recipe" in capsys.readouterr().err


def test_detection_interrupted_study_ends_in_the_same_numbers(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtresnet.detection import training

    whole = study("detection", *DETECTORS, "--seeds", 1, "--out", "whole")
    right, calls = training._Run._update, []

    def interrupted(self: training._Run, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:  # in the second epoch, after its first was saved
            raise KeyboardInterrupt
        return right(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training._Run, "_update", interrupted)
    arguments = ["study", "detection", *map(str, DETECTORS), "--seeds", "1", "--out", "parts"]
    assert main(arguments) == 130
    parts = study("detection", *DETECTORS, "--seeds", 1, "--out", "parts")
    for one, other in zip(whole["backbones"], parts["backbones"], strict=True):
        assert one["ap"] == other["ap"] and one["runs"][0]["loss"] == other["runs"][0]["loss"]


@pytest.mark.slow
def test_detection_default_backbone_and_a_deep_one_run_to_the_end(here: Path) -> None:
    small = DETECTORS[: DETECTORS.index("--backbone")]
    result = study("detection", *small, "--seeds", 1, "--backbone", "vgg16_bn",
                   "--backbone", "resnet101")  # fmt: skip
    assert [record["backbone"] for record in result["backbones"]] == ["vgg16_bn", "resnet101"]
    for record in result["backbones"]:
        (run,) = record["runs"]
        assert run["diverged"] is None and len(run["loss"]) == 2
        assert run["measured"]["n"] == 4 and record["ap50"]["n"] == 1
        assert (Path(run["folder"]) / "pretrain.pt").exists()
    assert "resnet101" in check_files(here / "runs" / "study-detection", "detection")


@pytest.mark.slow
def test_detection_imagenet_pretraining_starts_from_the_published_weights(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of the published layout, with random weights, stand for torchvision's."""
    backbones = ("resnet18", "resnet34")
    for name in backbones:
        torch.manual_seed(0)
        content = io.BytesIO()
        torch.save(zoo.build(zoo.spec(name)).state_dict(), content)
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        file = here / "mirror" / f"{name}-{digest[:8]}.pth"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.getvalue())
        monkeypatch.setitem(download.IMAGENET_FILES, name, file.name)
    monkeypatch.setenv("RTRESNET_WEIGHTS_URL", (here / "mirror").as_uri())
    monkeypatch.setenv("RTRESNET_CACHE", str(here / "cache"))
    arguments = ["--data", "shapes:4", "--pretrain", "imagenet", "--epochs", 1, "--seeds", 1]
    arguments += [part for name in backbones for part in ("--backbone", name)]
    result = study("detection", *arguments)
    assert "pre-training: ImageNet" in capsys.readouterr().err
    assert result["recipe"][0].startswith("recipe paper-detection")
    for record in result["backbones"]:
        (run,) = record["runs"]
        assert run["diverged"] is None and run["measured"]["n"] == 4
        # the recipe does not train the stem and the first stage: they are the published ones
        before = torch.load(
            here / "cache" / download.IMAGENET_FILES[record["backbone"]], weights_only=True
        )
        after = checkpoint.load(Path(run["folder"]) / "best.pt").state
        same = {name: torch.equal(before[name], after[name]) for name in before if name in after}
        assert same["conv1.weight"] and same["layer1.0.conv1.weight"]
        assert not same["layer2.0.conv1.weight"] and not same["layer4.0.conv1.weight"]
    narrow = ["study", "detection", *map(str, arguments), "--out", "n", "--set", "width=0.5"]
    assert main(narrow) == 2
    assert "width=1" in capsys.readouterr().err


def test_detection_diverged_run_is_a_result(here: Path) -> None:
    result = study("detection", *DETECTORS, "--seeds", 1, "--set", "lr=10", "--set", "clip=0",
                   "--set", "warmup=0", "--set", "epochs=8", "--pretrain", "none")  # fmt: skip
    lost = [run["diverged"] for record in result["backbones"] for run in record["runs"]]
    assert any(lost)
    for record, message in zip(result["backbones"], lost, strict=True):
        assert (record["ap"] is None) == (message is not None)


def test_detection_pretraining_learns_the_objects(tmp_path: Path) -> None:
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.core.sidecar import Detection
    from rtresnet.detection import pretrain, recipe, training
    from rtresnet.detection.data import open_detection
    from rtresnet.models import zoo

    job = training.DetectionJob(
        spec=zoo.spec("resnet18"), detection=Detection(pool=7, width=0.125), test=None,
        source=open_detection("shapes:30"), preprocess=Preprocess.for_size(64),
        recipe=recipe.SCRATCH, out=tmp_path,
    )  # fmt: skip
    losses: list[float] = []
    terms = pretrain.PretrainRecipe(steps=30, batch=16)
    start = pretrain.pretrain(job, terms, lambda step, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    again = pretrain.pretrain(job, terms, lambda step, loss: losses.append(loss))
    assert len(losses) == 30 and again.weights.sha256 is not None
    assert all((again.state[name] == start.state[name]).all() for name in start.state)
