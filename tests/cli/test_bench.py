"""`rtresnet bench` on the small trained net: scenarios, searches and baselines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def net(engines: Path) -> str:
    return str(engines / "resnet8.onnx")


def run(arguments: list[str], tmp_path: Path, code: int = 0) -> dict[str, Any]:
    file = tmp_path / "result.json"
    assert main(["bench", *arguments, "--json", str(file)]) == code
    result: dict[str, Any] = json.loads(file.read_text())["result"]
    return result


def recorded(net: str, tmp_path: Path, scale: float = 1.0, **changed: Any) -> str:
    """Return a baseline in which everything took `scale` times as long as it does now."""
    result = run([net, "--batch", "1", "--queries", "200"], tmp_path)
    for entry in result["results"]:
        entry["samples"] = [scale * sample for sample in entry["samples"]]
        entry |= changed
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"verb": "bench", "result": result}))
    return str(path)


def test_bench_checkpoint_and_onnx_file_are_compared(
    net: str, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    checkpoint = str(trained / "best.pt")
    result = run(
        [checkpoint, net, "--batch", "1", "--queries", "30", "--provider", "cpu"], tmp_path
    )
    torch_row, onnx_row = result["results"]
    assert torch_row["provider"] == "torch" and "torch" in torch_row["versions"]
    assert onnx_row["provider"] == "ONNX Runtime CPU" and onnx_row["comparison"]
    assert torch_row["latency"]["n"] == 30 and torch_row["size"] == onnx_row["size"] == 32
    assert "torch" in capsys.readouterr().out
    assert main(["bench", checkpoint, "--provider", "cpu"]) == 2
    assert "--provider does not apply" in capsys.readouterr().err


def test_bench_baseline_with_too_few_samples_exits_2(
    net: str, tmp_path: Path, capsys: Captured
) -> None:
    few = [net, "--qps", "300", "--queries", "20"]
    run(few, tmp_path)
    (tmp_path / "result.json").rename(tmp_path / "then.json")
    assert main(["bench", *few, "--baseline", str(tmp_path / "then.json")]) == 2
    assert "too few samples for a p99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "batch", "words"),
    [
        (["--scenario", "multi-stream"], 8, "per query of 8 images"),
        (["--scenario", "offline", "--batch", "4"], 4, "sequential batches"),
        (["--scenario", "server", "--qps", "300"], 1, "300 per second"),
        (["--qps", "300", "--max-batch", "4"], 1, "300 per second"),
        (["--concurrency", "3"], 1, "with 3 requests in flight"),
        (
            ["--concurrency", "8", "--max-batch", "4", "--max-wait", "1ms"],
            1,
            "8 requests in flight",
        ),
    ],
)
def test_bench_scenario_is_measured_and_described(
    net: str, tmp_path: Path, capsys: Captured, options: list[str], batch: int, words: str
) -> None:
    result = run([net, *options, "--queries", "30", "--seed", "7"], tmp_path)
    (entry,) = result["results"]
    assert entry["batch"] == batch and entry["scenario"] == result["scenario"]
    assert entry["latency"]["n"] == len(entry["samples"]) == 30
    assert entry["chain"][0]["file"] == "resnet8.onnx" and len(entry["chain"][0]["sha256"]) == 64
    assert entry["trtexec"].startswith("Throughput: ")
    assert result["environment"]["host"]["model"] == hardware.cpu()
    out = capsys.readouterr().out
    assert words in out
    assert all(len(line) <= 80 for line in out.splitlines() if "─" in line)


def test_bench_two_files_under_server_are_compared_unpaired(
    engines: Path, tmp_path: Path, capsys: Captured
) -> None:
    files = [str(engines / name) for name in ("resnet8.onnx", "resnet8-int8.onnx")]
    result = run([*files, "--qps", "100", "--queries", "120"], tmp_path)
    first, second = result["results"]
    assert first["comparison"] is None and second["comparison"]["paired"] is False
    assert "not paired" in capsys.readouterr().out


def test_bench_intervals_and_trtexec_are_printed(
    net: str, tmp_path: Path, capsys: Captured
) -> None:
    options = ["--batch", "1", "--queries", "1500", "--intervals", "--trtexec"]
    (entry,) = run([net, *options], tmp_path)["results"]
    low, high = entry["latency"]["intervals"]["p99"]
    assert low <= entry["latency"]["p99"] <= high
    assert entry["latency"]["intervals"]["p999"] is None  # 10 samples beyond take 10,000
    out = capsys.readouterr().out
    assert "95 % intervals" in out and "percentile(99%) = " in out
    assert any(line.startswith("Latency: min = ") for line in out.splitlines())


def test_bench_with_preprocess_measures_encoded_images(
    net: str, tmp_path: Path, capsys: Captured
) -> None:
    from PIL import Image

    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    options = ["--batch", "2", "--queries", "20", "--with-preprocess"]
    result = run([net, *options, str(folder)], tmp_path)
    assert result["with_preprocess"] is True and result["results"][0]["latency"]["n"] == 20
    assert "from encoded bytes" in capsys.readouterr().out
    (folder / "0.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["bench", net, *options, str(folder / "0.jpg")]) == 2
    assert "0.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_bench_find_batch_writes_result_and_plot(
    net: str, tmp_path: Path, capsys: Captured, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"curve.{suffix}"
    options = ["--find-batch", "--p99", "10s", "--max-batch", "2", "--seconds", "0.05"]
    options += ["--plot", str(plot)]
    (output,) = run([net, *options], tmp_path)["searches"]
    assert output["search"]["best"] == 2 and output["search"]["limit"] is True
    assert all(point["n"] >= 100 for point in output["search"]["points"])
    assert "batch 2 keeps the p99 within 10000 ms" in capsys.readouterr().out
    start = plot.read_bytes()[:8]
    assert start.startswith(b"<svg") if suffix == "svg" else start == b"\x89PNG\r\n\x1a\n"


def test_bench_find_qps_needs_enough_arrivals(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtresnet.workflows.benchmark_search.STEP", 4)
    options = ["--find-qps", "--p99", "10s", "--seconds", "0.05", "--queries", "20"]
    # 20 arrivals have no p99, and what is unknown does not hold.
    assert main(["bench", net, *options]) == 1
    options[-1] = "100"
    (output,) = run([net, *options], tmp_path)["searches"]
    assert output["search"]["best"] > 0
    assert all(point["p99"] for point in output["search"]["points"])


@pytest.mark.parametrize("kind", ["batch", "qps"])
def test_bench_find_without_success_exits_1(net: str, capsys: Captured, kind: str) -> None:
    options = [f"--find-{kind}", "--p99", "1us", "--seconds", "0.05"]
    assert main(["bench", net, *options]) == 1
    assert f"no {kind} has a p99 within 0.001 ms" in capsys.readouterr().err


def test_bench_regression_exits_1_and_is_in_the_json(
    net: str, tmp_path: Path, capsys: Captured
) -> None:
    path = recorded(net, tmp_path, scale=0.01)
    options = [net, "--batch", "1", "--queries", "200", "--baseline", path]
    result = run(options, tmp_path, code=1)
    (judged,) = result["regressions"]
    assert judged["regression"] is True and judged["figure"] == "median"
    captured = capsys.readouterr()
    assert "REGRESSION beyond 3 %" in captured.out and "resnet8.onnx at batch 1" in captured.err


def test_bench_no_regression_exits_0(net: str, tmp_path: Path, capsys: Captured) -> None:
    path = recorded(net, tmp_path, scale=100)
    run([net, "--batch", "1", "--queries", "200", "--baseline", path], tmp_path)
    assert "no regression shown beyond 3 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"device": "NVIDIA H100"}, "device"),
        ({"batch": 8}, "batch"),
        ({"versions": {"onnxruntime": "1.0"}}, "versions"),
    ],
)
def test_bench_baseline_of_another_machine_exits_2_unless_forced(
    net: str, tmp_path: Path, capsys: Captured, changed: dict[str, Any], word: str
) -> None:
    path = recorded(net, tmp_path, scale=100, **changed)
    options = ["bench", net, "--batch", "1", "--queries", "50", "--baseline", path]
    assert main(options) == 2
    err = capsys.readouterr().err
    assert f"{word}: " in err and "--force" in err
    assert main([*options, "--force"]) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"verb": "eval", "result": {}}'])
def test_bench_baseline_of_another_kind_exits_2(
    net: str, tmp_path: Path, capsys: Captured, text: str
) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    assert main(["bench", net, "--baseline", str(path)]) == 2
    assert "baseline.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", [1.0, float("nan")]), ("samples", [1.0, None]), ("samples", []),
        ("samples", [0]), ("samples", "12"), ("batch", "1"), ("batch", True), ("scenario", "x"),
        ("load", [1]), ("measured", None), ("versions", [1]),
    ],
)  # fmt: skip
def test_bench_invalid_baseline_exits_2_and_names_the_field(
    net: str, tmp_path: Path, capsys: Captured, field: str, value: Any
) -> None:
    entry = {"measured": net, "batch": 1, "latency": {"median": 1.0}, "samples": [1.0, 2.0]}
    record = {"verb": "bench", "result": {"results": [entry | {field: value}]}}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(record))
    assert main(["bench", net, "--batch", "1", "--baseline", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{path}: " in err and field in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--scenario", "server"], "--qps"),
        (["--with-preprocess", "nothing.jpg"], "nothing.jpg"),
        (["--find-batch"], "--p99"),
        (["--find-batch", "--find-qps", "--p99", "1ms"], "choose one"),
        (["--find-qps", "--p99", "fast"], "--p99 fast"),
        (["--find-batch", "--p99", "1ms", "--plot", "curve.pdf"], ".svg or .png"),
        (["--find-batch", "--p99", "1ms", "--qps", "5"], "--qps"),
        (["--p99", "1ms"], "--find-batch"),
        (["--find-batch", "--p99", "1ms", "--intervals"], "--intervals"),
        (["--json", "other.onnx.json"], "other.onnx's sidecar"),
        (["--json", "photograph.png"], "suffix of an image"),
        (["--tolerance", "much"], "--tolerance much"),
        (["--tolerance", "3%"], "--baseline"),
        (["--force"], "--baseline"),
        (["--contexts", "2"], "--contexts"),
        (["--graphs"], "--graphs"),
        (["--no-graphs", "--find-batch", "--p99", "1ms"], "--graphs"),
        (["--contexts", "0"], "--contexts"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_bench_contradicting_options_exit_2(
    net: str, capsys: Captured, options: list[str], word: str
) -> None:
    assert main(["bench", net, *options]) == 2
    assert word in capsys.readouterr().err


def test_bench_switch_interval_is_short_meanwhile_and_restored(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtresnet.workflows import workload

    before, during = sys.getswitchinterval(), list[float]()
    measure = workload.measure

    def looks(*arguments: Any) -> Any:
        during.append(sys.getswitchinterval())
        return measure(*arguments)

    monkeypatch.setattr(workload, "measure", looks)
    result = run([net, "--batch", "1", "--queries", "20"], tmp_path)
    assert during == [pytest.approx(1e-4)] and result["switch_interval_s"] == 1e-4
    assert sys.getswitchinterval() == before
    assert main(["bench", net, "--graphs"]) == 2  # fails where it is set already
    assert sys.getswitchinterval() == before
    entry = result["results"][0]
    assert entry["contexts"] is entry["graphs"] is entry["load"]["in_flight"] is None
