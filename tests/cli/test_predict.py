"""`rtresnet predict`: single images, tables of a folder, and interrupted runs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core import hardware, locks
from rtresnet.core.errors import InputError
from rtresnet.workflows.predictor import Predictor

COUNT, BATCH, BROKEN = 50, 4, 13
DEADLINE = 60  # seconds after which a process has failed


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ResNet-8 as ONNX: ten classes at 32 pixels."""
    folder = tmp_path_factory.mktemp("net")
    arguments = ["--model", "resnet8", "--weights", "untrained", "--no-plan", "--out", str(folder)]
    assert main(["export", *arguments]) == 0
    return folder / "resnet8.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two folders, one of them broken; and a file that is no image."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        path = root / ("a" if index < 30 else "b, c") / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (root / "a" / f"{BROKEN:03}.png").write_bytes(b"\x89PNG and then nothing")
    (root / "a" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def predict(net: Path, folder: Path, tmp_path: Path) -> Callable[..., int]:
    """predict("x.csv", "--top", "2"): the exit code of a bulk run over the folder."""

    def run(out: str, *more: str) -> int:
        arguments = [str(net), str(folder), "--out", str(tmp_path / out), "--batch", str(BATCH)]
        return main(["predict", *arguments, *more])

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_predict_every_form_of_table_equals_the_terminal(
    predict: Callable[..., int], net: Path, folder: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    assert predict("x.jsonl", "--top", "2", "--json", str(result)) == 0
    assert predict("x.csv", "--top", "2") == 0
    lines = rows(tmp_path / "x.jsonl")
    assert list(lines[0]) == [
        "image", "class_1", "probability_1", "class_2", "probability_2", "error"
    ]  # fmt: skip
    assert len(lines) == COUNT
    names = [row["image"] for row in lines]
    assert names == sorted(names) and names[-1] == str(folder / "b, c" / f"{COUNT - 1:03}.png")
    (broken,) = (row for row in lines if row["error"])
    assert broken["image"] == names[BROKEN] and names[BROKEN] in broken["error"]
    assert broken["class_1"] is None and broken["probability_2"] is None
    with open(tmp_path / "x.csv", newline="") as file:
        as_text = list(csv.DictReader(file))
    assert as_text == [{k: "" if v is None else str(v) for k, v in row.items()} for row in lines]
    shown = tmp_path / "shown.json"
    few = ["predict", str(folder), "--with", str(net), "--top", "2", "--batch", str(BATCH)]
    assert main([*few, "--json", str(shown)]) == 0
    terminal = json.loads(shown.read_text())["result"]
    assert [(e["image"], e["top"][0]["class"], e["top"][1]["probability"]) for e in
            terminal["images"]] == [
        (row["image"], row["class_1"], row["probability_2"]) for row in lines if not row["error"]
    ]  # fmt: skip
    assert terminal["skipped"] == [broken["error"]]
    summary = json.loads(result.read_text())["result"]
    assert (summary["images"], summary["broken"], summary["resumed_at"]) == (COUNT, 1, 0)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


def test_predict_parquet_keeps_types_and_provenance(
    predict: Callable[..., int], tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert predict("x.parquet") == 0 and predict("x.jsonl") == 0
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.schema.field("probability_1").type == "float"
    json_rows = rows(tmp_path / "x.jsonl")
    for record, row in zip(table.to_pylist(), json_rows, strict=True):
        for name, value in row.items():
            expected = np.float32(value) if isinstance(value, float) else value
            assert record[name] == expected
    head = json.loads(table.schema.metadata[b"rtresnet"])
    assert head["images"] == COUNT and len(head["model"]) == 64 and head["top"] == 3


STOPS_AT = """
import sys, time
from pathlib import Path
from rtresnet.cli.main import main
from rtresnet.workflows.predictor import Predictor

read = Predictor._read

def reads(self, name):
    while name.endswith({stop!r}) and not Path({go!r}).exists():
        time.sleep(0.01)
    return read(self, name)

Predictor._read = reads
sys.exit(main(sys.argv[1:]))
"""


def stopped(
    arguments: Sequence[str], part: Path, at: int, number: signal.Signals, go: Path
) -> tuple[int, str]:
    """Run a process that gets a signal after the images before `at`."""
    code = STOPS_AT.format(stop=f"{at:03}.png", go=str(go))
    process = subprocess.Popen(
        [sys.executable, "-c", code, "predict", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + DEADLINE
    while not part.exists() or part.read_bytes().count(b"\n") < 1 + at // BATCH * BATCH:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    if number != signal.SIGKILL:
        time.sleep(0.1)  # the image under way is still finished
        go.touch()
    errors = process.communicate(timeout=DEADLINE)[1]
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_predict_stopped_process_resumes_to_the_same_table(
    predict: Callable[..., int],
    net: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    assert predict("whole.jsonl") == 0
    out, part = tmp_path / "x.jsonl", tmp_path / "x.jsonl.part"
    arguments = [str(net), str(folder), "--out", str(out), "--batch", str(BATCH)]
    code, errors = stopped(arguments, part, 30, number, tmp_path / "go")
    assert not out.exists() and len(rows(part)) == 1 + 28
    if number == signal.SIGINT:
        assert code == 130
        assert "28 of 50" in errors and "--resume" in errors and "Traceback" not in errors
    else:
        assert code == -number
    with part.open("a") as file:  # what a process that is killed while it writes leaves
        file.write(part.read_text().splitlines()[1] + '\n{"image": "half a li')
    capsys.readouterr()
    assert predict("x.jsonl", "--resume") == 0
    assert "resuming at image 28 of 50" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


@pytest.fixture
def part(predict: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A journal that a failing net left after five batches."""
    predict_batch, made = Predictor._predict, [0]

    def fails(self: Predictor, entries: Any) -> Any:
        made[0] += 1
        if made[0] == 6:
            raise InputError("the net fails")
        return predict_batch(self, entries)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "_predict", fails)
        assert predict("x.csv") == 2
    path = tmp_path / "x.csv.part"
    assert len(rows(path)) == 1 + 5 * BATCH
    return path


def test_predict_journal_of_other_options_is_refused_and_kept(
    predict: Callable[..., int],
    part: Path,
    net: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = part.read_bytes()
    assert predict("x.csv") == 2
    assert "--resume" in last_line(capsys)
    for more, word in (
        (["--top", "2"], "top (3 then, now 2)"),
        (["--batch", "5"], "batch (4 then, now 5)"),
        (["--mean", "0.5,0.5,0.5"], "preprocess"),
        ([str(folder / "a" / "001.png")], "images (50 then, now 51)"),
    ):
        assert predict("x.csv", "--resume", *more) == 2
        assert word in last_line(capsys)
    other = shutil.copy(net.with_name("resnet8-fp16.onnx"), tmp_path / "other.onnx")
    shutil.copy(net.with_name("resnet8-fp16.onnx.json"), tmp_path / "other.onnx.json")
    common_part = ["--out", str(tmp_path / "x.csv"), "--batch", str(BATCH), "--resume"]
    assert main(["predict", str(other), str(folder), *common_part]) == 2
    assert "a different model" in last_line(capsys)
    shutil.copytree(folder, tmp_path / "moved")
    assert main(["predict", str(net), str(tmp_path / "moved"), *common_part]) == 2
    assert "a different list of images" in last_line(capsys)
    changed = folder / "a" / "001.png"
    content, stat = changed.read_bytes(), changed.stat()
    changed.write_bytes(content + b"\0")  # the same name, another image
    assert predict("x.csv", "--resume") == 2
    assert "a different list of images" in last_line(capsys)
    changed.write_bytes(content)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with locks.hold_file(tmp_path / "x.csv", warn=print):
        assert predict("x.csv", "--resume") == 2
        assert f"process {os.getpid()} has been writing there" in last_line(capsys)
    assert part.read_bytes() == before
    assert predict("x.csv", "--resume") == 0
    assert predict("whole.csv") == 0
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("spoil", [b"", b'{"journal"', b"\0" * 600, b'[1]\n"a"\n'])
def test_predict_journal_without_first_line_is_started_again(
    predict: Callable[..., int], tmp_path: Path, spoil: bytes
) -> None:
    (tmp_path / "x.csv.part").write_bytes(spoil)
    assert predict("x.csv", "--resume") == 0
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 1 + COUNT


def test_predict_resume_of_a_finished_table_is_refused_and_keeps_it(
    predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("x.csv", "--resume") == 0  # nothing is there: a first run
    table = (tmp_path / "x.csv").read_bytes()
    assert predict("x.csv", "--resume") == 2
    assert "--resume" in last_line(capsys)
    assert (tmp_path / "x.csv").read_bytes() == table and not (tmp_path / "x.csv.part").exists()


def test_predict_full_disk_exits_2_and_resumes(
    net: Path, folder: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hog = small_disk / "hog"
    hog.write_bytes(b"x" * (13 << 12))
    arguments = ["predict", str(net), str(folder), "--out", str(small_disk / "x.csv")]
    arguments += ["--batch", "1", "--top", "10"]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "disk is full" in errors and "x.csv.part" in errors and "Traceback" not in errors
    assert not (small_disk / "x.csv").exists()
    hog.unlink()
    assert main([*arguments, "--resume"]) == 0
    assert len((small_disk / "x.csv").read_text().splitlines()) == 1 + COUNT


@pytest.mark.parametrize(
    ("out", "more", "words"),
    [
        ("x.xlsx", [], ["x.xlsx", "*.parquet"]),
        ("x", [], ["no suffix", "*.csv"]),
        ("file/x.csv", [], ["file", "not writable"]),
        ("there.csv", [], ["there.csv", "is a folder"]),
        ("x.csv", ["--top", "11"], ["--top 11", "10 classes", "--top 10"]),
        ("x.csv", ["nothing.jpg"], ["nothing.jpg", "no such file"]),
        ("x.csv", ["-"], ["standard input is not supported"]),
        ("x.csv", ["--actors", "2"], ["--actors needs --ray"]),
    ],
)
def test_predict_mistake_exits_2_before_anything_is_written(
    predict: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    out: str,
    more: list[str],
    words: list[str],
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "there.csv").mkdir()
    assert predict(out, *more) == 2
    message = last_line(capsys)
    for word in words:
        assert word in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.csv"]


def test_predict_missing_images_exit_2(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "x.csv")]
    assert main(["predict", str(net), str(tmp_path / "empty"), *out]) == 2
    assert "in this folder" in last_line(capsys)
    assert main(["predict", str(net), *out]) == 2
    assert "to predict with" in last_line(capsys)
    assert main(["predict", str(net), "--resume", "x.jpg"]) == 2
    assert "need --out" in last_line(capsys)
    for index in range(3):
        (tmp_path / "empty" / f"{index}.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["predict", str(net), str(tmp_path / "empty"), *out]) == 2
    assert "none of the 3 images" in last_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_predict_model_behind_an_image_is_refused_with_the_right_order(
    net: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(folder / "a" / "000.png")
    for model in (str(net), "gone.onnx", "x.plan", "best.pt"):
        assert main(["predict", image, model]) == 2
        assert f"rtresnet predict {model} {image}" in last_line(capsys)
    assert main(["predict", str(net), image, "other.onnx"]) == 2
    assert "one model at a time" in last_line(capsys)
    assert main(["predict", image, "other.onnx", "--with", str(net)]) == 2
    assert "one model at a time" in last_line(capsys)
    named = tmp_path / "photos.onnx"  # a folder of images may have any name
    shutil.copytree(folder, named)
    assert main(["predict", str(net), str(named)]) == 0


def test_predict_without_a_model_takes_the_only_one_and_refuses_to_choose(
    net: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    without_gpu: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    image = str(folder / "a" / "000.png")
    assert main(["predict", image]) == 2
    assert "--with FILE" in last_line(capsys)
    engines = tmp_path / "engines"
    engines.mkdir()
    for name in ("resnet8.onnx", "resnet8.onnx.json"):
        shutil.copy(net.with_name(name), engines)
    (engines / "resnet8.plan").write_bytes(b"a plan does not run without a GPU")
    assert main(["predict", image]) == 0
    assert "with engines/resnet8.onnx" in capsys.readouterr().err
    shutil.copy(net, engines / "another.onnx")
    assert main(["predict", image]) == 2
    error = last_line(capsys)
    assert "engines/another.onnx, engines/resnet8.onnx" in error and "--with engines/" in error


@pytest.mark.parametrize(("out", "more", "package"), [
    ("x.parquet", [], "pyarrow"),
    ("x.csv", ["--ray"], "ray[data]"),
])  # fmt: skip
def test_predict_missing_package_exits_3(
    predict: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    more: list[str],
    package: str,
) -> None:
    installed = hardware.installed
    monkeypatch.setattr(hardware, "installed", lambda name: name != "pyarrow" and installed(name))
    monkeypatch.setitem(sys.modules, "ray", None)
    assert predict(out, *more) == 3
    message = last_line(capsys)
    assert "pip install" in message and package in message


def test_predict_non_utf8_name_and_deleted_file_are_rows(
    net: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strange = b"caf\xe9.png"
    with open(strange, "wb") as file:
        file.write((folder / "a" / "000.png").read_bytes())
    Path("gone.png").touch()
    read = Predictor._read

    def late(self: Predictor, name: str) -> Any:
        Path("gone.png").unlink(missing_ok=True)
        return read(self, name)

    monkeypatch.setattr(Predictor, "_read", late)
    for form in ("csv", "jsonl", *(["parquet"] if hardware.installed("pyarrow") else [])):
        Path("gone.png").touch()
        names = [strange.decode(errors="surrogateescape"), "gone.png"]
        assert main(["predict", str(net), *names, "--out", f"x.{form}"]) == 0
    first, second = rows(Path("x.jsonl"))
    assert first["image"] == r"caf\udce9.png" and first["class_1"]
    assert "gone.png: No such file" in second["error"]


@pytest.mark.slow
def test_predict_local_ray_gives_the_same_table(
    predict: Callable[..., int],
    tmp_path: Path,
    net: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray.data")
    assert predict("here.jsonl") == 0
    assert predict("x.jsonl", "--ray", "--actors", "2") == 0
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    # Goes on with what a run without Ray left: it is the same journal.
    shutil.copy(tmp_path / "x.jsonl", tmp_path / "kept.jsonl")
    code = stopped(
        [str(net), str(folder), "--out", str(tmp_path / "x.jsonl"), "--batch", str(BATCH)],
        tmp_path / "x.jsonl.part", 30, signal.SIGKILL, tmp_path / "go",
    )[0]  # fmt: skip
    assert code == -signal.SIGKILL
    assert predict("x.jsonl", "--ray", "--resume") == 0
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "kept.jsonl").read_bytes()
    capsys.readouterr()
    assert predict("y.jsonl", "--ray", "--top", "11") == 2
    assert last_line(capsys).startswith("error: --top 11")


def test_predict_of_transparent_image_equals_its_composite_on_white(
    net: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    pixels[:, :16, 3], pixels[:, 16:, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "transparent.png")
    pixels[:, :16] = 255
    Image.fromarray(pixels[..., :3]).save(tmp_path / "white.png")
    tops = []
    for name in ("transparent", "white"):
        result = tmp_path / f"{name}.json"
        image = str(tmp_path / f"{name}.png")
        assert main(["predict", str(net), image, "--json", str(result)]) == 0
        tops.append(json.loads(result.read_text())["result"]["images"][0]["top"])
    assert tops[0] == tops[1]
