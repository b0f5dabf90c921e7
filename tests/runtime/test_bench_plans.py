"""`rtresnet bench` with plans, on the fake GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import Bench

from rtresnet.cli.main import main
from rtresnet.runtime import batcher

Captured = pytest.CaptureFixture[str]


def run(bench: Bench, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Return the first result of `bench --json`."""
    file = tmp_path / "result.json"
    arguments = ["bench", str(bench.path), "--queries", "20", *options, "--json", str(file)]
    assert main(arguments) == 0
    result: dict[str, Any] = json.loads(file.read_text())["result"]["results"][0]
    return result


@pytest.mark.parametrize(
    ("options", "contexts", "graphs"),
    [
        ([], 1, "by hand"),
        (["--graphs"], 1, "by hand"),
        (["--no-graphs", "--contexts", "3"], 3, "none"),
        (["--concurrency", "8", "--max-batch", "4"], 2, "by hand"),
        (["--concurrency", "8", "--max-batch", "4", "--contexts", "1"], 1, "by hand"),
    ],
)
def test_bench_plan_records_contexts_and_graphs(
    bench: Bench, tmp_path: Path, options: list[str], contexts: int, graphs: str
) -> None:
    bench.by_hand()
    entry = run(bench, tmp_path, *options)
    assert (entry["contexts"], entry["graphs"]) == (contexts, graphs)
    assert (entry["load"]["max_batch"] is not None) == ("--max-batch" in options)


@pytest.mark.parametrize("contexts", [1, 2])
def test_bench_offline_plan_keeps_batches_in_flight(
    bench: Bench, tmp_path: Path, capsys: Captured, contexts: int
) -> None:
    entry = run(bench, tmp_path, "--scenario", "offline", "--contexts", str(contexts))
    load = {name: value for name, value in entry["load"].items() if value is not None}
    assert load == {"in_flight": 2 * contexts}
    assert entry["latency"]["n"] == 20 and entry["parts"].keys() >= {"h2d", "compute", "d2h"}
    out = capsys.readouterr().out
    assert f"{2 * contexts} batches in flight" in out and "sequential batches" not in out
    assert bench.cuda.is_idle() and bench.cuda.live == []


def test_bench_offline_baseline_without_batches_in_flight_is_refused(
    bench: Bench, tmp_path: Path, capsys: Captured
) -> None:
    file, options = tmp_path / "result.json", ["--scenario", "offline"]
    run(bench, tmp_path, *options)
    record = json.loads(file.read_text())
    for name in ("contexts", "graphs"):  # as earlier versions wrote it
        del record["result"]["results"][0][name]
    record["result"]["results"][0]["load"] = {}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(record))
    code = main(["bench", str(bench.path), "--queries", "20", *options, "--baseline", str(old)])
    err = capsys.readouterr().err
    assert code == 2 and "in_flight: 2" in err and "contexts" not in err


def test_bench_graphs_that_a_plan_cannot_have_exit_3(bench: Bench, capsys: Captured) -> None:
    bench.by_hand()
    bench.cuda.graphs = False
    assert main(["bench", str(bench.path), "--graphs"]) == 3
    assert "CUDA graphs were requested" in capsys.readouterr().err


def test_bench_batcher_of_a_plan_has_a_worker_for_each_context(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: set[str] = set()
    work = batcher.Batcher._work

    def noted(self: batcher.Batcher, room: Any) -> None:
        names.add(f"{self._workers} workers, {len(room)} images")
        work(self, room)

    monkeypatch.setattr(batcher.Batcher, "_work", noted)
    run(bench, tmp_path, "--concurrency", "8", "--max-batch", "4")
    assert names == {"2 workers, 4 images"}
