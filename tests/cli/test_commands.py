"""Every command on the small trained net."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.core.artifacts import chain, read_sidecar
from tests.conftest import as_foreign

needs_rtx = pytest.mark.skipif(not hardware.installed("tensorrt_rtx"), reason="no TensorRT-RTX")


def run(arguments: list[str], tmp_path: Path) -> dict:  # type: ignore[type-arg]
    """Run a command and return what it wrote with --json."""
    file = tmp_path / "result.json"
    assert main([*arguments, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["verb"] == record["command"] == arguments[0]
    assert record["made_by"]["rtresnet"]
    result: dict = record["result"]  # type: ignore[type-arg]
    return result


def test_export_writes_the_promised_names_with_sidecars(engines: Path) -> None:
    names = {path.name for path in engines.iterdir() if path.suffix != ".json"}
    onnx_files = {"resnet8.onnx", "resnet8-fp16.onnx", "resnet8-int8.onnx"}
    plans = {"resnet8.plan", "resnet8-fp32.plan", "resnet8-int8.plan"}
    assert names == onnx_files | (plans if hardware.installed("tensorrt_rtx") else set())
    for name in names:
        assert (engines / f"{name}.json").exists()


def test_export_records_parity_with_torch(engines: Path) -> None:
    sidecar = read_sidecar(engines / "resnet8.onnx")
    assert sidecar is not None
    parity = sidecar.measured["parity"]
    assert 0 <= parity["relative"] < 1e-4 and parity["n"] == 3


@needs_rtx
def test_the_chain_leads_from_a_plan_to_the_checkpoint(engines: Path, trained: Path) -> None:
    links = list(chain(engines / "resnet8-int8.plan"))
    assert [state for _, _, state in links] == ["ok"] * 4
    assert [record.kind for _, record, _ in links if record] == [
        "plan",
        "onnx",
        "onnx",
        "checkpoint",
    ]
    assert links[-1][0].samefile(trained / "best.pt")


@needs_rtx
def test_plans_are_attested(engines: Path) -> None:
    for name, dtype in (("resnet8-fp32", "Float"), ("resnet8", "Half"), ("resnet8-int8", "Int8")):
        sidecar = read_sidecar(engines / f"{name}.plan")
        assert (
            sidecar is not None and sidecar.plan is not None and sidecar.plan.attested is not None
        )
        assert sidecar.plan.attested.dtypes == {dtype: 7}


@pytest.mark.parametrize(
    "name", ["best.pt", "resnet8.onnx", "resnet8-fp16.onnx", "resnet8-int8.onnx"]
)
def test_eval_gives_the_same_accuracy_for_every_artifact(
    engines: Path, trained: Path, tints: str, tmp_path: Path, name: str
) -> None:
    path = (trained if name.endswith(".pt") else engines) / name
    result = run(["eval", str(path), "--data", tints], tmp_path)
    assert result["n"] == 240
    assert result["top1_percent"] > 90
    assert result["top5"] is None
    sidecar = read_sidecar(path)
    assert sidecar is not None and sidecar.measured["accuracy"][-1]["top1"] == result["top1"]


def test_compare_finds_an_artifact_equal_to_itself_and_int8_near(
    engines: Path, trained: Path, tints: str, tmp_path: Path
) -> None:
    reference = str(trained / "best.pt")
    same = run(["compare", reference, reference, "--data", tints], tmp_path)
    assert same["largest"] == 0 and same["agreement"] == 1
    fp32 = run(["compare", reference, str(engines / "resnet8.onnx"), "--data", tints], tmp_path)
    int8 = run(
        ["compare", reference, str(engines / "resnet8-int8.onnx"), "--data", tints], tmp_path
    )
    assert fp32["agreement"] == 1 and fp32["relative"] < 1e-4
    assert int8["agreement"] > 0.95 and fp32["relative"] < int8["relative"] < 0.2


def test_bench_reports_what_figures_need(engines: Path, tmp_path: Path) -> None:
    files = [str(engines / name) for name in ("resnet8.onnx", "resnet8-int8.onnx")]
    result = run(["bench", *files, "--batch", "1,3", "--seconds", "0.1"], tmp_path)
    assert [(r["measured"], r["batch"]) for r in result["results"]] == [
        (files[0], 1), (files[1], 1), (files[0], 3), (files[1], 3),
    ]  # fmt: skip
    for entry in result["results"]:
        latency = entry["latency"]
        assert latency["n"] == len(entry["samples"]) >= 15
        assert 0 < latency["median"] <= max(entry["samples"])
        assert entry["device"] == hardware.cpu() and entry["threads"] == hardware.cores()
        assert entry["versions"]["onnxruntime"] and entry["provider"]
        assert (latency["p99"] is None) == (latency["n"] < 100)
    assert result["results"][0]["speed"] == 1


def test_bench_takes_arrivals_at_a_rate_and_tells_what_the_machine_did(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    source = next(engines.glob("*.onnx"))
    assert main(["bench", str(source), "--qps", "40", "--seconds", "1", "--json", str(out)]) == 0
    assert "40 per second" in capsys.readouterr().out
    result = json.loads(out.read_text())["result"]
    (entry,) = result["results"]
    assert entry["batch"] == 1 and entry["load"]["qps"] == 40 and entry["latency"]["n"] > 10
    assert result["environment"]["host"]["cores"] >= 1
    assert main(["bench", str(source), "--qps", "0"]) == 2


@needs_rtx
@pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU here")
def test_bench_of_a_plan_without_a_gpu_says_first_what_it_measured(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(engines / "resnet8.plan")
    result = run(["bench", plan, "--batch", "1", "--seconds", "0.1"], tmp_path)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("NOTE: this machine has no GPU") and "resnet8-fp16.onnx" in first
    assert next(iter(result)) == "notes" and plan in result["notes"][0]
    entry = result["results"][0]
    assert entry["asked"] == plan and entry["instead_of_plan"] is True
    assert entry["measured"].endswith("resnet8-fp16.onnx")


@needs_rtx
def test_inspect_shows_a_plans_header_without_its_sidecar(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "stray.plan"
    plan.write_bytes((engines / "resnet8.plan").read_bytes())
    result = run(["inspect", str(plan)], tmp_path)
    assert result["header"]["version"] == __import__("tensorrt_rtx").__version__
    assert "sm_89" in result["header"]["targets"]
    assert "no sidecar" in capsys.readouterr().out


def test_models_lists_the_papers_nets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(["models"], tmp_path)
    results = {record["model"]: record for record in result["models"]}
    assert results["resnet50"]["parameters"] == 25_557_032
    assert results["resnet110"]["parameters"] == 1_727_962
    assert results["resnet1202"]["parameters"] == 19_421_274
    assert results["resnet1202"]["multiply_adds"] == 2_829_238_912
    assert result["vgg19_multiply_adds"] == 19_632_062_464
    out = capsys.readouterr().out
    assert "vgg19_bn" in out and max(map(len, out.splitlines())) <= 80


def test_models_counts_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from rtresnet.cli.main import main; "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit(main(['models']))"], check=False)
    assert done.returncode == 0


def test_doctor_knows_what_is_here(tmp_path: Path) -> None:
    result = run(["doctor"], tmp_path)
    versions = {package["package"]: package["version"] for package in result["packages"]}
    assert versions["torch"] and versions["onnx"]
    assert len(result["gpus"]) == len(hardware.gpus())


def test_study_responses_covers_every_3x3_layer(trained: Path, tints: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    best = str(trained / "best.pt")
    assert main(["study", "responses", best, "--data", tints, "--json", str(file)]) == 0
    (entry,) = json.loads(file.read_text())["result"]["results"]
    assert len(entry["responses"]) == 7 and all(value > 0 for value in entry["responses"].values())


def test_export_without_weights_takes_the_best_run_of_that_net(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "mine")
    result = run(["export", "--model", "resnet8", "--no-plan"], tmp_path)
    assert result["weights"] == "trained"
    assert "runs/mine/best.pt" in capsys.readouterr().err


@pytest.mark.parametrize("others", [True, False])
def test_export_without_weights_prefers_runs_without_quantization_aware_training(
    others: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("float", "rounded") if others else ("rounded",):
        shutil.copytree(trained, tmp_path / "runs" / name)
    sidecar = tmp_path / "runs" / "rounded" / "best.pt.json"
    record = json.loads(sidecar.read_text())
    record["measured"]["val_top1"] = 101  # the highest
    record["calibration"] = {
        "method": "qat", "images": "tints", "images_sha256": "", "n": 1, "scales": "best.pt",
        "scales_sha256": "",
    }  # fmt: skip
    sidecar.write_text(json.dumps(record))
    assert main(["export", "--model", "resnet8", "--fp32", "--no-plan"]) == 0
    printed = capsys.readouterr().err
    assert f"weights: runs/{'float' if others else 'rounded'}/best.pt" in printed
    assert ("not used: runs/rounded/best.pt" in printed) == others


def test_export_without_weights_asks_which_of_several_data_sets(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    sidecar = tmp_path / "runs" / "other" / "best.pt.json"
    record = json.loads(sidecar.read_text())
    record["weights"]["source"] = "digits"
    sidecar.write_text(json.dumps(record))
    assert main(["export", "--model", "resnet8", "--no-plan"]) == 2
    error = capsys.readouterr().err
    assert "digits" in error and "--weights runs/" in error
    assert not (tmp_path / "engines").exists()


def test_export_notes_that_it_replaces_the_file_of_another_run(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(["export", "--model", "resnet8", "--weights", "untrained", "--no-plan"], tmp_path)
    assert "replaces" not in capsys.readouterr().err
    mine = ["export", "--weights", str(trained / "best.pt"), "--no-plan"]
    run(mine, tmp_path)
    assert "replaces engines/resnet8.onnx" in capsys.readouterr().err
    run(mine, tmp_path)
    assert "replaces" not in capsys.readouterr().err


def test_export_of_untrained_weights_warns_and_marks_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(["export", "--model", "resnet8", "--int8", "--no-plan"], tmp_path)
    warnings = capsys.readouterr().err
    assert "untrained weights" in warnings and "no calibration images" in warnings
    sidecar = read_sidecar("engines/resnet8-int8.onnx")
    assert sidecar is not None and sidecar.calibration is not None
    assert sidecar.weights.origin == "untrained" and "noise" in sidecar.calibration.images
    run(["bench", "engines/resnet8-int8.onnx", "--batch", "1", "--seconds", "0.1"], tmp_path)
    assert "Untrained weights" in capsys.readouterr().out


def test_calib_holds_images_lists_and_the_scales_that_came_of_them(
    engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "calib").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "calib" / f"{index}.png")
    source = str(engines / "resnet8.onnx")
    out = tmp_path / "small.onnx"
    result = run(["quantize", source, "--calibrator", "max", "--out", str(out)], tmp_path)
    assert "WARNING" not in capsys.readouterr().err
    assert (result["calibration"]["n"], result["calibration"]["method"]) == (3, "max")
    scales = json.loads(Path(result["calibration"]["scales"]).read_text())
    quantized = onnx.load(out)
    stored = {
        t.name.removesuffix(".scale"): float(onnx.numpy_helper.to_array(t))
        for t in quantized.graph.initializer
        if t.name.endswith(".scale") and not t.dims
    }
    assert stored == pytest.approx(scales["scales"])
    (tmp_path / "list.txt").write_text("calib/0.png\n# a comment\n\ncalib/2.png\n")
    result = run(["quantize", source, "--calib", "list.txt", "--out", str(out)], tmp_path)
    assert result["calibration"]["n"] == 2


@needs_rtx
def test_build_makes_the_plan_that_export_makes(engines: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.plan"
    arguments = ["build", str(engines / "resnet8-fp16.onnx"), "--out", str(out)]
    result = run([*arguments, "--target", "sm_86,sm_89", "--batch", "2:4:16"], tmp_path)
    assert result["targets"] == ["sm_86", "sm_89"]
    assert result["profiles"] == [{"min": 2, "opt": 4, "max": 16}]
    assert out.stat().st_size == result["bytes"]


def test_export_says_what_to_install_where_there_is_no_builder(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = hardware.installed
    monkeypatch.setattr(hardware, "installed", lambda m: m != "tensorrt_rtx" and real(m))
    monkeypatch.chdir(tmp_path)
    result = run(["export", "--weights", str(trained / "best.pt")], tmp_path)
    assert result["plans"] == [] and Path("engines/resnet8-fp16.onnx").exists()
    assert "pip install tensorrt-rtx-cu13" in capsys.readouterr().err


def test_every_artifact_names_the_command_that_made_it(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "half.onnx"
    run(["quantize", str(engines / "resnet8.onnx"), "--fp16", "--out", str(out)], tmp_path)
    sidecar = read_sidecar(out)
    assert sidecar is not None and sidecar.made_by["command"].startswith("rtresnet quantize ")


@needs_rtx
def test_a_plan_of_an_onnx_file_without_sidecar_says_what_it_had_to_guess(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = tmp_path / "stray.onnx"
    stray.write_bytes((engines / "resnet8.onnx").read_bytes())
    as_foreign(stray)
    run(["build", str(stray)], tmp_path)
    assert "without sidecar" in capsys.readouterr().err
    sidecar = read_sidecar(tmp_path / "stray.plan")
    assert sidecar is not None and sidecar.assumed == ("model", "input")
    assert main(["eval", str(stray), "--data", "synthetic:4"]) == 2
    run(["bench", str(stray), "--batch", "1", "--seconds", "0.1"], tmp_path)


def test_inspect_folder_lists_its_artifacts_and_their_state(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "all"
    shutil.copytree(engines, folder / "engines")
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "resnet8-int8.onnx" in shown and max(map(len, shown.splitlines())) <= 80
    with open(folder / "engines" / "resnet8.onnx", "ab") as file:
        file.write(b"\0")
    assert main(["inspect", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "resnet8.onnx changed" in captured.out and "resnet8.onnx" in captured.err


def test_inspect_folder_without_artifacts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert main(["inspect", str(tmp_path), "--layers"]) == 2
    assert "apply to one plan" in capsys.readouterr().err


@needs_rtx
def test_inspect_ends_with_an_error_where_the_chain_has_changed(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(engines, tmp_path / "engines")
    with open(folder / "resnet8-int8.onnx", "ab") as file:
        file.write(b"\0")
    assert main(["inspect", str(folder / "resnet8-int8.plan")]) == 2
    captured = capsys.readouterr()
    assert "(changed)" in captured.out and "resnet8-int8.onnx: changed" in captured.err


def test_what_export_needs_is_checked_before_it_writes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = ["--weights", str(trained / "best.pt")]
    assert main(["export", *weights, "--int8", "--calib", "/nowhere"]) == 2
    (tmp_path / "file").touch()
    assert main(["export", *weights, "--out", "file"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_quantize_says_which_calibration_it_replaces(
    engines: Path,
    tints: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "small.onnx"
    arguments = ["quantize", str(engines / "resnet8.onnx"), "--out", str(out)]
    run([*arguments, "--calib", tints], tmp_path)
    run([*arguments, "--calib", tints], tmp_path)
    assert "replaces" not in capsys.readouterr().err
    run(arguments, tmp_path)
    assert f"calibrated on {tints}" in capsys.readouterr().err


def test_the_float_rest_of_an_int8_export_can_be_fp16(
    trained: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    arguments = ["--weights", str(trained / "best.pt"), "--int8", "--calib", tints]
    assert main(["export", *arguments, "--rest", "fp16", "--target", "sm_89"]) == 0
    types = {t.data_type for t in onnx.load("engines/resnet8-int8.onnx").graph.initializer}
    assert {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8} <= types
    sidecar = read_sidecar("engines/resnet8-int8.plan")
    assert sidecar is not None and sidecar.plan is not None and sidecar.plan.attested is not None
    assert sidecar.plan.targets == ("sm_89",) and set(sidecar.plan.attested.dtypes) == {"Int8"}
    assert sidecar.calibration is not None and sidecar.calibration.rest == "fp16"


def test_verbs_on_weights_that_name_no_net_say_what_is_assumed_down_to_the_plan(
    trained: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch

    from rtresnet.models import checkpoint

    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint.load(trained / "best.pt").state, "theirs.pt")
    assert main(["export", "--weights", "theirs.pt", "--fp16", "--json", "export.json"]) == 0
    captured = capsys.readouterr()
    assert "Assumed: model: resnet8" in captured.out
    assert "without sidecar" not in captured.err  # its input is known
    (entry,) = (
        line
        for line in json.loads(Path("export.json").read_text())["result"]["assumed"]
        if line.startswith("model: ")
    )
    written = [path for path in Path("engines").iterdir() if path.suffix in (".onnx", ".plan")]
    assert written
    for path in written:
        sidecar = read_sidecar(path)
        assert sidecar is not None and entry in sidecar.assumed
        assert main(["inspect", str(path)]) == 0
        assert entry in capsys.readouterr().out
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros((8, 32, 32, 3), np.uint8), labels=np.arange(8) % 4)
    for path in ("theirs.pt", "engines/resnet8-fp16.onnx"):
        assert main(["eval", path, "--data", f"npz:{data}", "--device", "cpu"]) == 0
        assert "Assumed: model: resnet8" in capsys.readouterr().out
    assert main(["study", "responses", "theirs.pt", "--data", f"npz:{data}"]) == 0
    assert "Assumed about theirs.pt: model: resnet8" in capsys.readouterr().out
    more = ["--epochs", "1", "--out", "run"]
    assert main(["train", "--weights", "theirs.pt", "--data", tints, *more]) == 0
    assert "Assumed about the weights: model: resnet8" in capsys.readouterr().err
