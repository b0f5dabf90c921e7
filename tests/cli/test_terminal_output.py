"""Control characters from files are escaped on the terminal."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rtresnet.cli import common, console
from rtresnet.cli.main import main
from rtresnet.core import reporter
from rtresnet.reporting import tables

Captured = pytest.CaptureFixture[str]
NAME = "\x1b]0;owned\x07\x9b31m[bold]:smile:\u202egnp\r$\nforged"
NASTY = f"{NAME}[/red]"


@pytest.fixture(scope="module")
def nasty(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file in a folder, with class names, a data name and a command line to be wary of."""
    folder = tmp_path_factory.mktemp("nasty") / f"a{NAME}"
    folder.mkdir()
    path = folder / f"net{NAME}.onnx"
    shutil.copy(engines / "resnet8.onnx", path)
    sidecar = json.loads((engines / "resnet8.onnx.json").read_text())
    sidecar["model"]["classes"] = [f"{n}{NASTY}" for n in range(4)]
    sidecar["weights"]["source"] = NASTY
    sidecar["made_by"]["command"] = NASTY
    sidecar["measured"]["note"] = {NASTY: NASTY}
    Path(f"{path}.json").write_text(json.dumps(sidecar))
    return path


def harmless(captured: Captured) -> str:
    """Return the output; it holds no control characters, and no name begins a line of its own."""
    out, err = captured.readouterr()
    for text in (out, err):
        assert reporter.escape(text) == text
        assert not any(line.startswith("forged") for line in text.splitlines())
    return out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"], ["inspect", "--layers"], ["check"], ["lint"],
        ["bench", "--queries", "3", "--batch", "1"], ["profile", "--seconds", "0.1"],
        ["report", "--markdown", "-"], ["estimate"], ["build"],
        ["quantize", "--calib", "none"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_escape_what_files_hold(
    arguments: list[str], nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = main([arguments[0], str(nasty), *arguments[1:]])
    assert code in (0, 1, 2, 3)
    assert "\\x1b]0;owned\\x07" in harmless(capsys)


def test_data_commands_escape_what_files_hold(
    nasty: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / f"data{NAME}.npz"
    shutil.copy(tints.removeprefix("npz:"), data)
    image = tmp_path / f"image{NAME}.png"
    Image.new("RGB", (40, 40)).save(image)
    (tmp_path / f"broken{NAME}.png").write_bytes(b"no image")
    images = [str(image), str(tmp_path / f"broken{NAME}.png")]
    assert main(["predict", *images, "--with", str(nasty)]) == 0
    assert "skipped" in harmless(capsys)
    main(["eval", str(nasty), "--data", f"npz:{data}"])
    main(["compare", str(nasty), str(nasty), "--data", f"npz:{data}"])
    assert ":smile:" in harmless(capsys)


def test_errors_escape_names(capsys: Captured) -> None:
    assert main(["eval", f"{NASTY}.onnx", "--data", "digits"]) == 2
    assert main([f"verb{NASTY}"]) == 2
    assert main(["eval", f"--{NASTY}"]) == 2
    assert main(["bench", "a.onnx", "--batch", NASTY]) == 2
    assert harmless(capsys).count("error: ") == 4


def test_progress_shows_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    with common.REPORTER.progress(f"running {NASTY}", total=2) as update:
        update(1)
        common.note(NASTY)
    harmless(capsys)


def test_warning_shows_names_as_they_are(capsys: Captured) -> None:
    common.REPORTER.warning(NASTY, NASTY)
    assert "[/red]" in harmless(capsys)


@pytest.mark.parametrize(
    "show",
    [
        common.say,
        common.note,
        lambda line: console.Console().print(line),
        lambda line: console.Console().print(line, soft_wrap=True, style="bold"),
        lambda line: tables.show(
            console.Console(), tables.DataTable(headings=[line], rows=[[line]], title=line)
        ),
    ],
    ids=("say", "note", "print", "soft wrap", "table"),
)
def test_output_line_with_a_line_end_in_a_name_stays_one_line(
    show: Callable[[str], None], capsys: Captured
) -> None:
    show("net\nforged\tname")
    assert "net\\x0aforged\\x09name" in harmless(capsys)


def test_progress_without_a_terminal_keeps_a_description_on_one_line(capsys: Captured) -> None:
    with common.REPORTER.progress("running net\nforged", total=2):
        pass
    assert harmless(capsys).splitlines() == ["running net\\x0aforged"]


def test_warning_body_keeps_its_lines(capsys: Captured) -> None:
    common.REPORTER.warning("two lines", "first\nsecond")
    lines = harmless(capsys).splitlines()
    assert any("first" in line and "second" not in line for line in lines)
    assert any("second" in line and "first" not in line for line in lines)


def test_json_on_stdout_is_not_changed(nasty: Path, tmp_path: Path, capsys: Captured) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40)).save(image)
    assert main(["predict", str(image), "--with", str(nasty), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["artifact"] == str(nasty)
    assert NASTY in result["images"][0]["top"][0]["class"]


def test_report_page_escapes_markup_in_names(
    engines: Path, tmp_path: Path, capsys: Captured
) -> None:
    pytest.importorskip("matplotlib")
    script = "<script>alert(1)</script>"
    path = tmp_path / "<img src=x onerror=alert(1)>.onnx"
    shutil.copy(engines / "resnet8.onnx", path)
    record = {
        "verb": "bench",
        "made_by": {"command": script},
        "result": {
            "notes": [script],
            "results": [
                {
                    "measured": str(path), "batch": 1, "latency": {"median": 1.0},
                    "samples": [1.0, 2.0], "device": script, "versions": {script: script},
                }
            ],
        },
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps(record))
    page, markdown = tmp_path / "r.html", tmp_path / "r.md"
    arguments = [str(tmp_path / "bench.json"), "--out", str(page), "--markdown", str(markdown)]
    assert main(["report", *arguments]) == 0
    for text in (page.read_text(), markdown.read_text().split("```")[0]):
        assert "<script>alert" not in text and "<img" not in text


FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1")


def test_predict_excel_safe_marks_formulas_in_csv(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tmp_path / "net.onnx"
    shutil.copy(engines / "resnet8.onnx", net)
    sidecar = json.loads((engines / "resnet8.onnx.json").read_text())
    sidecar["model"]["classes"] = ["=cmd|' /C calc'!A0", "+red", "-green", "@blue"]
    Path(f"{net}.json").write_text(json.dumps(sidecar))
    monkeypatch.chdir(tmp_path)
    for name in (*FORMULAS, "plain"):
        Image.new("RGB", (40, 40)).save(f"{name}.png")
    images = [f"{name}.png" for name in ("plain", *FORMULAS)]
    predict = ["predict", "--with", str(net), "--out", "t.csv"]

    def rows() -> list[dict[str, str]]:
        with open("t.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    assert main([*predict, "--", *images]) == 0
    assert rows()[1]["image"] == "=1+1.png"
    assert main([*predict, "--excel-safe", "--", *images]) == 0
    first, *others = rows()
    assert first["image"] == "plain.png"
    assert [row["image"] for row in others] == [f"'{name}.png" for name in FORMULAS]
    assert all(row["class_1"].startswith("'") for row in (first, *others))
    assert all(0 <= float(row["probability_1"]) <= 1 for row in (first, *others))


@pytest.mark.parametrize("out", [[], ["--out", "t.jsonl"], ["--out", "t.parquet"]])
def test_predict_excel_safe_needs_csv(out: list[str], capsys: Captured) -> None:
    assert main(["predict", "a.png", "--with", "a.onnx", "--excel-safe", *out]) == 2
    assert "--excel-safe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--queries", "3"],
        ["bench", "--queries", "20", "--scenario", "server", "--qps", "50"],
        ["bench", "--find-batch", "--p99", "1000ms", "--max-batch", "2", "--seconds", "0.05"],
        ["profile", "--seconds", "0.1"], ["check"], ["estimate"], ["models"], ["doctor"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_in_80_columns_print_whole_tables(
    arguments: list[str], engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shown: list[object] = []
    show = tables.show

    def watched(console: Any, data: tables.DataTable) -> None:
        numbers = [column for column in zip(*data.rows, strict=True) if tables.numeric(column)]
        cells = (tables.text(cell) for column in numbers for cell in column)
        shown.extend([*data.headings, *cells])
        show(console, data)

    monkeypatch.setattr(tables, "show", watched)
    files: list[str] = []
    if arguments[0] not in ("models", "doctor"):
        names = "ab" if arguments[0] == "bench" else "a"
        files = [f"resnet152-{'fine-tuned-' * 3}{name}.onnx" for name in names]
    for file in files:
        for suffix in ("", ".json"):
            shutil.copy(engines / f"resnet8.onnx{suffix}", f"{file}{suffix}")
    assert main([arguments[0], *files, *arguments[1:]]) in (0, 1)
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith(" ")]
    assert table and max(map(len, table)) <= 80
    words = Counter(out.split())
    assert all(words[word] for cell in shown for word in str(cell).split())
