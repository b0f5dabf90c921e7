"""A user's mistake gives one line on standard error, with a fix, and the right exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware

needs_no_gpu = pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [["compare", "a.onnx"], ["bench", "a.onnx", "--qps", "abc"]])
def test_usage_error_of_click_joins_its_fix_without_a_period(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"; see: rtresnet {arguments[0]} --help" in error and ".;" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], ["unknown command 'fly'", "known: quickstart"]),
        (["benhc", "net.onnx"], ["'benhc'; did you mean 'bench'?"]),
        (["export", "--model", "resnet51"], ["resnet51", "resnet50"]),
        (["export"], ["--model"]),
        (["export", "--model", "resnet8", "--batch", "0"], ["--batch 0", "1:8:32"]),
        (["export", "--model", "resnet8", "--batch", "8:4:2"], ["8:4:2"]),
        (["export", "--model", "resnet8", "--target", "sm_90"], ["sm_90", "--builder tensorrt"]),
        (["bench", "x.onnx", "--provider", "tensorrt"], ["not supported", "--builder tensorrt"]),
        (["export", "--model", "resnet8", "--target", "sm_88"], ["sm_88", "sm_8"]),
        (["export", "--model", "resnet8", "--weights", "imagenet"], ["resnet8", "resnet50"]),
        (["export", "--weights", "nothing.pt"], ["nothing.pt", "no such file"]),
        (["export", "--model", "resnet8", "--mean", "1,2"], ["--mean 1,2", "three"]),
        (["train", "--data", "digit"], ["'digit'", "'digits'"]),
        (["train", "--data", "folder:nowhere"], ["nowhere", "no such folder"]),
        (["train", "--model", "resnet21"], ["resnet21"]),
        (["eval", "nothing.onnx", "--data", "digits"], ["nothing.onnx", "no such file"]),
        (["eval", "pyproject.toml", "--data", "digits"], ["no such file"]),
        (["bench", "nothing.plan"], ["nothing.plan", "rtresnet export"]),
        (["quantize", "nothing.onnx"], ["nothing.onnx"]),
        (["build", "nothing.onnx"], ["nothing.onnx"]),
        (["predict", "nothing.jpg"], ["nothing.jpg", "no such file"]),
        (["inspect", "nothing.plan"], ["nothing.plan"]),
        (["compare", "a.onnx", "b.onnx", "--data", "digits"], ["a.onnx"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not list(here.rglob("*.onnx")) and not list(here.rglob("*.tmp"))


@pytest.mark.parametrize(
    "arguments", [["study", "fly"], ["train", "--epochs", "0"], ["bench"], ["eval", "x"]]
)
def test_usage_errors_are_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "--help" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "verb", [["inspect"], ["bench"], ["eval", "--data", "synthetic:4"], ["quantize"], ["build"]]
)
def test_a_truncated_onnx_file_is_named_with_the_command_that_makes_it_anew(
    copied: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    path = copied / "resnet8.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    assert main([verb[0], str(path), *verb[1:]]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in message and "truncated" in message and "rtresnet export" in message


def test_a_truncated_onnx_file_without_sidecar_is_named(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "stray.onnx"
    path.write_bytes((copied / "resnet8.onnx").read_bytes()[:1000])
    for verb in (["inspect"], ["quantize"], ["bench"]):
        assert main([*verb, str(path)]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: ") and str(path) in message


@pytest.mark.parametrize("verb", ["build", "quantize", "lint"])
def test_verb_for_onnx_files_given_another_kind_names_the_command_to_use(
    trained: Path, copied: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    checkpoint = trained / "best.pt"
    assert main([verb, str(checkpoint)]) == 2
    assert f"rtresnet export --weights {checkpoint}" in capsys.readouterr().err.splitlines()[-1]
    stray = copied / "stray.plan"
    stray.write_bytes(b"of another tool")
    assert main([verb, str(stray)]) == 2
    assert "plan" in capsys.readouterr().err.splitlines()[-1]
    plan = copied / "resnet8-int8.plan"
    if plan.exists() and verb != "build":
        assert main([verb, str(plan)]) == 2
        parent = copied / "resnet8-int8.onnx"
        assert f"rtresnet {verb} {parent}" in capsys.readouterr().err.splitlines()[-1]


def test_a_truncated_checkpoint_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes((trained / "best.pt").read_bytes()[:5000])
    for verb in (["inspect"], ["export", "--weights"], ["eval", "--data", "digits"]):
        assert main([*verb, str(path)]) == 2
        assert str(path) in capsys.readouterr().err.splitlines()[-1]


def test_a_truncated_plan_is_named_even_without_its_sidecar(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "resnet8.plan"
    if not path.exists():
        pytest.skip("no TensorRT-RTX here")
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["inspect", str(path)]) == 2
    assert "truncated" in capsys.readouterr().err
    Path(f"{path}.json").unlink()
    assert main(["inspect", str(path)]) == 2
    assert "truncated" in capsys.readouterr().err


def test_a_sidecar_of_another_file_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(copied / "resnet8.onnx.json", copied / "resnet8-int8.onnx.json")
    assert main(["bench", str(copied / "resnet8-int8.onnx")]) == 2
    assert "resnet8-int8.onnx" in capsys.readouterr().err


@needs_no_gpu
def test_a_plan_without_a_gpu_is_exit_code_3_naming_its_onnx_file(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "resnet8-int8.plan"
    if not path.exists():
        pytest.skip("no TensorRT-RTX here")
    for verb in (["bench", "--device", "cuda"], ["eval", "--data", "synthetic:4"]):
        arguments = [verb[0], str(path), *verb[1:]]
        assert main(arguments) == 3
        assert "resnet8-int8.onnx" in capsys.readouterr().err


@needs_no_gpu
def test_a_plan_of_another_version_or_without_its_builder_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "resnet8.plan"
    if not path.exists():
        pytest.skip("no TensorRT-RTX here")
    sidecar = json.loads(Path(f"{path}.json").read_text())
    sidecar["plan"]["version"] = "1.0.0"
    Path(f"{path}.json").write_text(json.dumps(sidecar))
    assert main(["eval", str(path), "--data", "synthetic:4"]) == 2
    message = capsys.readouterr().err
    assert "1.0.0" in message and "build it again: rtresnet" in message


@needs_no_gpu
def test_bench_refuses_a_stand_in_that_is_not_what_the_plan_was_built_from(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "resnet8.plan"
    if not path.exists():
        pytest.skip("no TensorRT-RTX here")
    with open(copied / "resnet8-fp16.onnx", "ab") as file:
        file.write(b"\0")
    assert main(["bench", str(path)]) == 2
    assert "resnet8-fp16.onnx" in capsys.readouterr().err


def test_a_provider_that_is_not_here_is_exit_code_3(
    engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rtresnet.runtime.providers import openvino

    missing = ["cuda"] if not hardware.gpus() else []
    missing += ["openvino"] if openvino() is None else []
    for provider in missing:
        assert main(["bench", str(engines / "resnet8.onnx"), "--provider", provider]) == 3
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("batch", ["0", "-1", "1,x", ""])
def test_a_batch_below_one_is_refused(
    engines: Path, capsys: pytest.CaptureFixture[str], batch: str
) -> None:
    assert main(["bench", str(engines / "resnet8.onnx"), f"--batch={batch}"]) == 2
    assert "--batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["models"],
        ["inspect", "resnet8.onnx"],
        ["lint", "resnet8-int8.onnx"],
        ["check", "resnet8.onnx"],
        ["compare", "resnet8.onnx", "resnet8-fp16.onnx", "--data", "digits"],
        ["profile", "resnet8.onnx", "--seconds", "0.1"],
        ["bench", "resnet8.onnx", "--queries", "20"],
        ["estimate", "resnet8", "--gpu", "L4"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_for_stdout_is_all_that_goes_there(
    arguments: list[str],
    engines: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(engines)
    main(arguments)
    plain = capsys.readouterr()
    main([*arguments, "--json", "-"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verb"] == arguments[0]
    assert plain.out.strip() and len(captured.err.splitlines()) >= len(plain.out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["quantize", "resnet8.onnx", "--calib", "none", "--out", "resnet8.onnx"],
            "overwrite its source",
        ),
        (["quantize", "resnet8.onnx", "--fp16", "--out", "x.plan"], "of kind plan"),
        (["build", "resnet8.onnx", "--out", "resnet8.onnx"], "of kind onnx"),
        (["inspect", "resnet8.onnx", "--json", "resnet8.onnx"], "the suffix of a model"),
        (["models", "--json", "resnet8.onnx"], "the suffix of a model"),
        (["report", "resnet8.onnx", "--out", "resnet8.onnx"], "the suffix of a model"),
        (["report", "resnet8.onnx", "--out", "r.md", "--markdown", "r.md"], "name the same file"),
        (["quantize", "resnet8.onnx", "--calib", "none", "--max-drop", "1"], "add --eval"),
        (["quantize", "resnet8.onnx", "--eval", "digits", "--max-drop", "nan"], "at least 0"),
        (["quantize", "resnet8.onnx", "--fp16", "--calib", "digits"], "--calib applies to INT8"),
        (["quantize", "resnet8.onnx", "--fp16", "--rest", "fp16"], "--float-dtype applies to INT8"),
        (["bench", "resnet8.onnx", "--tolerance", "5%"], "without --baseline"),
    ],
    ids=lambda value: "-".join(value[:4]) if isinstance(value, list) else None,
)
def test_nothing_is_overwritten_and_no_option_dropped_in_passing(
    arguments: list[str],
    words: str,
    engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("resnet8.onnx", "resnet8.onnx.json"):
        shutil.copy(engines / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "build":
        pytest.importorskip("tensorrt_rtx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert output.startswith("error: ") and words in output
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert content == before


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    engines: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(engines / "resnet8.onnx")
    assert main(["quantize", source, "--fp16", "--out", str(small_disk / "half.onnx")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "disk is full" in message and "half.onnx" in message
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--json", "-"]])
def test_a_reader_that_has_gone_ends_it_without_a_word_and_hides_no_gate(
    options: list[str],
) -> None:
    """Tables are rich's, the document is click's: each has its own idea of a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "rtresnet", "models", *options],
        stdout=writer, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 141, done.stderr
    assert b"Traceback" not in done.stderr and b"error" not in done.stderr


def test_an_os_error_says_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtresnet.cli import main as module

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/secret")

    monkeypatch.setattr(module.cli, "main", refuse)
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "error: /etc/secret: Permission denied\n"


@pytest.mark.parametrize("verb", ["bench", "report", "inspect"])
@pytest.mark.parametrize("place", ["folder", "net.onnx", "file/under/it.json"])
def test_a_place_for_text_is_judged_before_the_work(
    verb: str,
    place: str,
    engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    option = {"bench": "--json", "report": "--out", "inspect": "--svg"}[verb]
    # The artifact is not there either: what is told first was looked at first.
    assert main([verb, "nothing.onnx", option, place]) == 2
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 1 and output[0].startswith("error: ") and place.split("/")[0] in output[0]


def test_a_name_of_another_kind_is_refused_before_the_work(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = str(engines / "resnet8.onnx")
    assert main(["quantize", net, "--calib", "digits", "--out", str(tmp_path / "x.plan")]) == 2
    (output,) = capsys.readouterr().err.splitlines()
    assert "of kind plan" in output  # and not a word of calibrating


def test_an_exit_that_no_reader_caused_is_not_taken_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rtresnet.cli import main as module

    def leave(*_: object, **__: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr(module.cli, "main", leave)
    with pytest.raises(SystemExit, match="7"):
        main(["models"])


def test_ctrl_c_while_a_package_is_imported_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension module says "initialization failed" and has the reason as its cause."""
    from rtresnet.cli import main as module

    def fail(cause: BaseException | None) -> None:
        raise ImportError("initialization failed") from cause

    monkeypatch.setattr(module.cli, "main", lambda *_, **__: fail(KeyboardInterrupt()))
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr(module.cli, "main", lambda *_, **__: fail(None))
    with pytest.raises(ImportError):  # a mistake of ours, not a user's
        main(["models"])
