from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rtresnet.cli.main import main


def test_a_page_and_markdown_of_real_artifacts(
    engines: Path, tmp_path: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    accuracy, out = tmp_path / "e.json", tmp_path / "r.html"
    file = str(engines / "resnet8-int8.onnx")
    assert main(["eval", file, "--data", tints, "--json", str(accuracy)]) == 0
    arguments = [
        str(engines),
        str(accuracy),
        "--out",
        str(out),
        "--markdown",
        str(tmp_path / "r.md"),
    ]
    assert main(["report", *arguments]) == 0
    assert f"page: {out}" in capsys.readouterr().out
    assert "resnet8-int8.onnx" in out.read_text()
    assert "| resnet8-int8.onnx | int8 |" in (tmp_path / "r.md").read_text()
    assert main(["report", file, "--out", str(out), "--markdown", "-"]) == 0
    assert capsys.readouterr().out.startswith("## resnet8: accuracy and latency")


def test_the_page_shows_what_a_plan_fuses(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorrt_rtx")
    out, copy = tmp_path / "r.html", tmp_path / "engines"
    shutil.copytree(engines, copy)
    plan = copy / "resnet8-int8.plan"
    assert main(["report", str(plan), "--out", str(out)]) == 0
    text = out.read_text()
    assert "The fused layers of resnet8-int8.plan" in text
    assert text.count('class="frame"') >= 4  # stem, three blocks, head
    (copy / "resnet8-int8.plan.layers.json").write_text("{}")
    assert main(["report", str(plan), "--out", str(out)]) == 2
    assert "does not belong to" in capsys.readouterr().err
    assert out.read_text() == text
    (copy / "resnet8-int8.plan.layers.json").unlink()
    assert main(["report", str(plan), "--out", str(out)]) == 0
    assert "layers of resnet8-int8.plan are not shown" in capsys.readouterr().out
    assert "What the engines fuse" not in out.read_text()


def test_no_result_is_replaced_by_the_page(
    engines: Path, tmp_path: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "e.json"
    file = str(engines / "resnet8.onnx")
    assert main(["eval", file, "--data", tints, "--json", str(result)]) == 0
    (tmp_path / "results").mkdir()
    inside = tmp_path / "results" / "e.json"
    shutil.copy(result, inside)
    before = result.read_bytes()
    for option in ("--out", "--markdown"):
        page = ["--out", str(tmp_path / "r.html")] if option == "--markdown" else []
        assert main(["report", str(result), option, str(result), *page]) == 2
        assert ".html" in capsys.readouterr().err
        assert main(["report", str(inside.parent), option, str(inside), *page]) == 2
    assert result.read_bytes() == inside.read_bytes() == before


def test_nothing_to_report_is_said_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    (tmp_path / "bad.json").write_text('{"verb": "bench", "result": {}}')
    assert main(["report", "bad.json"]) == 2
    assert "bad.json: result: " in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "result",
    [
        {"results": [{"measured": "a.onnx", "batch": 1, "latency": {"median": float("nan")}}]},
        {"results": [{"measured": "a.onnx", "batch": 1, "latency": [1]}]},
        {"results": [["a.onnx"]]},
        {"results": "a.onnx"},
        ["a.onnx"],
        None,
    ],
)
def test_report_invalid_result_exits_2_and_leaves_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], result: object
) -> None:
    file, page = tmp_path / "bench.json", tmp_path / "r.html"
    file.write_text(json.dumps({"verb": "bench", "result": result}))
    page.write_text("earlier")
    assert main(["report", str(file), "--out", str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: result")
    assert page.read_text() == "earlier"
