from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.reporting import results
from rtresnet.reporting.report_tables import summary, tables
from rtresnet.reporting.results import pareto
from tests.reporting.conftest import bench, searched

Write = Callable[..., Path]


def test_everything_of_an_artifact_comes_together(measured: list[Path]) -> None:
    gathered = results.gather(measured)
    assert [a.name for a in gathered.artifacts] == [
        "net-fp32.onnx", "net-fp16.onnx", "net-int8.onnx", "net-bad.onnx",
    ]  # fmt: skip
    int8 = gathered.artifacts[2]
    assert int8.score == 90.0 and int8.precision == "int8"
    assert int8.agreement and (int8.agreement["agreement"], int8.agreement["n"]) == (0.984375, 846)
    assert gathered.batches == [1, 8] and gathered.batch == 1
    assert gathered.baseline is gathered.artifacts[0]
    assert len(gathered.timings) == 8 and len(gathered.profiles) == 2
    assert {kind for kind, _ in gathered.environments} == {"latency", "accuracy", "profile"}


def test_artifacts_bring_their_chain_and_their_accuracy(engines: Path) -> None:
    gathered = results.gather([engines])
    names = {artifact.name for artifact in gathered.artifacts}
    assert {"resnet8.onnx", "resnet8-fp16.onnx", "resnet8-int8.onnx"} <= names
    int8 = next(a for a in gathered.artifacts if a.name == "resnet8-int8.onnx")
    assert int8.model == "resnet8" and gathered.title == "resnet8"
    assert [sidecar.kind for _, sidecar, _ in int8.chain if sidecar][-1] == "checkpoint"
    assert all(state == "ok" for _, _, state in int8.chain)
    sidecar = results.gather([engines / "resnet8-int8.onnx.json"])
    assert [a.name for a in sidecar.artifacts] == ["resnet8-int8.onnx"]


def test_gather_shows_the_checkpoints_accuracy_and_the_gates_loss(
    engines: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(engines, folder)
    sidecar = folder / "resnet8-int8.onnx.json"
    record = json.loads(sidecar.read_text())
    drop = {"points": 0.25, "low": -0.44, "high": 0.94, "n": 400, "data": "folder:/a/photos"}
    gate = {"rule": "point", "bound": 0.5, "passed": True, "verdict": "not shown to hold"}
    record["measured"] = record["measured"] | {"drop": drop, "gate": gate}
    sidecar.write_text(json.dumps(record))
    trained = json.loads(Path(f"{_origin(folder)}.json").read_text())["measured"]
    gathered = results.gather([folder])
    table = tables(gathered)["origin"]
    rows = {row[0]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    row = rows["resnet8-int8.onnx"]
    assert row["INT8 loss, points"] == 0.25 and row["95 % interval"] == "-0.44 to 0.94"
    assert row["bound"] == 0.5 and row["verdict"] == "not shown to hold"
    assert rows["resnet8.onnx"]["INT8 loss, points"] is None
    if "test_top1" in trained:
        assert row["test top-1 %"] == trained["test_top1"]
    assert "folder:photos" in table.about
    record["measured"]["drop"]["points"] = "much"  # not a number: no row is made of it
    sidecar.write_text(json.dumps(record))
    int8 = next(a for a in results.gather([folder]).artifacts if a.name == "resnet8-int8.onnx")
    assert int8.gate is None


def _origin(folder: Path) -> Path:
    from rtresnet.core import artifacts

    return list(artifacts.chain(folder / "resnet8-int8.onnx"))[-1][0]


def test_artifacts_are_compared_on_the_data_set_that_most_have(measured: list[Path]) -> None:
    """Not on whichever was evaluated last: accuracies of two data sets say nothing together."""
    int8 = json.loads(measured[3].read_text())["result"]
    other = int8["members"][0] | {"data": "digits", "top1_percent": 12.5}
    path = measured[3].with_name("other.json")
    record = json.loads(measured[3].read_text()) | {"result": other | {"members": [other]}}
    path.write_text(json.dumps(record))
    gathered = results.gather([*measured, path])
    assert [a.score for a in gathered.artifacts] == [91.5, 91.25, 90.0, 80.0]
    assert [r["top1_percent"] for r in gathered.artifacts[2].accuracies] == [90.0, 12.5]
    table = tables(gathered)["accuracy"]
    assert [row[4] for row in table.rows] == [91.5, 91.25, 90.0, 12.5, 80.0]
    assert "accuracy" not in tables(results.gather(measured))


def test_what_an_accuracy_assumes_is_in_the_report(measured: list[Path]) -> None:
    record = json.loads(measured[3].read_text())
    record["result"]["members"][0] |= {
        "assumed": ["class names matched by position: x"],
        "labels": {"remarks": ["the data has 2 of the model's 4 classes"]},
    }
    measured[3].write_text(json.dumps(record))
    notes = " ".join(results.gather(measured).notes)
    assert "by position" in notes and "2 of the model's 4 classes" in notes


def test_a_quickstarts_file_holds_all_of_it(measured: list[Path], write: Write) -> None:
    def of(path: Path) -> Any:
        return json.loads(path.read_text())["result"]

    whole = {
        "bench": of(measured[0]),
        "eval": {name: of(path) for name, path in zip("abcd", measured[1:5], strict=True)},
        "compare": {"a": of(measured[5])},
    }
    gathered = results.gather([write("quickstart", whole)])
    assert [a.score for a in gathered.artifacts] == [91.5, 91.25, 90.0, 80.0]
    assert len(gathered.timings) == 8


def _second_call(size: int, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two calls of bench: of net-*.onnx, and of other-*.onnx, ten times as slow."""
    first, second = bench(), bench()
    for call, name, chain in ((first, "net", "a" * 64), (second, "other", origin)):
        for entry in call["results"]:
            entry["measured"] = entry["measured"].replace("net", name)
            entry["chain"] = [{"sha256": entry["measured"]}, {"sha256": chain}]
    for entry in second["results"]:
        entry["size"] = size
        for key in ("median", "mean", "std", "p90", "p95", "p99"):
            entry["latency"][key] *= 10
    return first, second


def _speeds(gathered: results.Results) -> dict[str, float]:
    table = tables(gathered)["artifacts"]
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    return {row["artifact"]: row["speed"] for row in rows}


def test_report_two_nets_compares_each_with_its_own_baseline(write: Write) -> None:
    first, second = _second_call(224, "b" * 64)
    gathered = results.gather([write("bench", first, "one"), write("bench", second, "two")])
    speeds = _speeds(gathered)
    assert speeds["net-fp32.onnx"] == speeds["other-fp32.onnx"] == 1
    assert speeds["other-int8.onnx"] == pytest.approx(4 / 1.5)
    lines = [line for line in summary(gathered) if line.startswith("other")]
    assert not any("net-fp32.onnx" in line for line in lines)
    assert "times as fast" not in lines[0]
    assert "2.67 times as fast as other-fp32.onnx" in lines[2]
    about = tables(gathered)["artifacts"].about
    assert "net-fp32.onnx, other-fp32.onnx" in about


def test_report_one_net_in_two_calls_compares_medians_not_the_calls_speeds(write: Write) -> None:
    first, second = _second_call(32, "a" * 64)
    gathered = results.gather([write("bench", first, "one"), write("bench", second, "two")])
    speeds, medians = _speeds(gathered), {
        artifact.name: entry["latency"]["median"] for artifact, entry in gathered.streams(1)
    }  # fmt: skip
    assert speeds["net-int8.onnx"] == pytest.approx(4 / 1.5)
    for name in ("other-fp32.onnx", "other-int8.onnx"):
        assert speeds[name] == pytest.approx(medians["net-fp32.onnx"] / medians[name])
        assert speeds[name] < 1


def test_report_a_call_that_starts_with_another_artifact_compares_medians(write: Write) -> None:
    call = bench()
    call["results"].sort(key=lambda entry: (entry["batch"], "fp32" in entry["measured"]))
    gathered = results.gather([write("bench", call)])
    medians = {a.name: entry["latency"]["median"] for a, entry in gathered.streams(1)}
    for name, speed in _speeds(gathered).items():
        assert speed == pytest.approx(medians["net-fp32.onnx"] / medians[name])


def test_what_is_not_a_result_is_said(write: Write, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    for content, words in (
        ("{", "not valid JSON"),
        ("[1]", "not a result"),
        ('{"verb": "lint"}', "lint"),
    ):
        broken.write_text(content)
        with pytest.raises(InputError, match=words):
            results.gather([broken])
    with pytest.raises(InputError, match="nothing to report"):
        results.gather([tmp_path])  # of a folder only results are taken
    with pytest.raises(InputError, match="no such file"):
        results.gather([tmp_path / "none.json"])


def test_an_artifact_of_which_nothing_is_known_is_said(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(b"anything")
    with pytest.raises(InputError, match="no sidecar and no result"):
        results.gather([file])
    result = {"searches": searched("batch", 4)["searches"][:1]}
    result["searches"][0]["measured"] = str(file)
    (gathered,) = results.gather([file, write("bench-find", result)]).artifacts
    assert gathered.bytes == 8


@pytest.mark.parametrize("gone", ["measured", "batch", "latency"])
def test_gather_missing_field_names_its_place(
    gone: str, measured: list[Path], write: Write
) -> None:
    result = json.loads(measured[0].read_text())["result"]
    del result["results"][0][gone]
    with pytest.raises(InputError, match=rf"bench\.json: result\.results\[0\].*{gone}") as caught:
        results.gather([write("bench", result)])
    assert "rtresnet bench" in (caught.value.fix or "")


WRONG = {
    "bench": [
        ("results.0.latency.median", [math.nan, math.inf, True, "1", None, 0, -1, 1e300, [], {}]),
        ("results.0.latency.p99", [math.nan, True, "1", 0, [1]]),
        ("results.0.latency", [None, 3, [], "x"]),
        ("results.0.samples.3", [math.nan, math.inf, True, "1", None, 0, -1, 10**400]),
        ("results.0.batch", [True, 1.5, "1", 0, -1, None, math.nan]),
        ("results.0.speed", [math.nan, "1", True, 0]),
        ("results.0.measured", [None, 1, ["a"]]),
        ("results.0.versions", ["1.0", [1], {"onnxruntime": 1}]),
        ("results.0.environment", [[1], "x", {"remarks": 3}, {"remarks": [3]}]),
        ("results.0.scenario", ["single", 3]),
        ("results", [None, {}, 3, [3], [None]]),
        ("notes", [[1], "note", {"a": "b"}]),
    ],
    "bench-find": [
        ("searches.0.search.points.0.load", [math.nan, None, "1", -1, True]),
        ("searches.0.search.points", [None, {}, [1]]),
        ("searches.0.search.best", [math.nan, "1", True]),
        ("searches.0.search.what", ["images", None]),
        ("searches.0.note", [3]),
    ],
    "eval": [
        ("members.0.top1_percent", [math.nan, "91", 101, -1, True]),
        ("members.0.n", ["1", -1, 1.5, True]),
        ("members.0.data", [3, ["x"]]),
        ("members", [3, "x", [3]]),
    ],
    "compare": [
        ("agreement", [math.nan, None, 1.5, "1", True]),
        ("candidate", [None, [], "a.onnx", {}]),
    ],
    "profile": [
        ("blocks.0.ms", [math.nan, None, "1", -1]),
        ("stages.0.share", [math.nan, 2, None]),
        ("stages", [None, {}, 3]),
    ],
}


@pytest.mark.parametrize("verb", WRONG)
def test_gather_wrong_value_is_refused_with_its_place(
    verb: str, measured: list[Path], write: Write
) -> None:
    whole = {json.loads(path.read_text())["verb"]: path for path in measured}
    valid = (
        searched("batch", 4) if verb == "bench-find"
        else json.loads(whole[verb].read_text())["result"]
    )  # fmt: skip
    for place, values in WRONG[verb]:
        for value in values:
            result = copy.deepcopy(valid)
            *steps, last = [int(step) if step.isdigit() else step for step in place.split(".")]
            inside = result
            for step in steps:
                inside = inside[step]
            inside[last] = value
            with pytest.raises(InputError) as caught:
                results.gather([write(verb, result)])
            top = place.split(".")[0]
            assert f"{verb}.json: result.{top}" in str(caught.value), (place, value)


def test_gather_results_of_older_versions_are_read(write: Write) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    engines = json.loads((folder / "engines.json").read_text())
    accuracy = json.loads((folder / "accuracy-resnet20.json").read_text())
    gathered = results.gather(
        [
            *(write("bench", net["bench"], f"bench-{name}") for name, net in engines.items()),
            *(write("eval", entry, f"eval-{n}") for n, entry in enumerate(accuracy["eval"])),
            *(write("compare", entry, f"c-{n}") for n, entry in enumerate(accuracy["compare"])),
        ]
    )
    assert {artifact.name for artifact, _ in gathered.timings} >= {"resnet18.onnx", "resnet50.onnx"}
    assert any(artifact.score for artifact in gathered.artifacts)
    assert any(artifact.agreement for artifact in gathered.artifacts)


def test_gather_wrong_accuracy_in_a_sidecar_is_refused(engines: Path, tmp_path: Path) -> None:
    for name in ("resnet8.onnx", "resnet8.onnx.json"):
        shutil.copy(engines / name, tmp_path)
    sidecar = json.loads((tmp_path / "resnet8.onnx.json").read_text())
    sidecar["measured"]["accuracy"] = {"top1_percent": "91", "n": 3}
    (tmp_path / "resnet8.onnx.json").write_text(json.dumps(sidecar))
    with pytest.raises(ArtifactError, match=r"measured\.accuracy\.top1_percent"):
        results.gather([tmp_path / "resnet8.onnx"])


def test_unknown_and_missing_fields_do_no_harm(measured: list[Path], write: Write) -> None:
    result = copy.deepcopy(json.loads(measured[0].read_text())["result"])
    for entry in result["results"]:
        for name in ("samples", "speed", "steady", "asked", "threads"):
            del entry[name]
        entry |= {"new": {"x": 1}, "environment": {"remarks": ["The processor was throttled."]}}
        entry["latency"] = {"median": entry["latency"]["median"], "p99": None}
    gathered = results.gather([write("bench", result)])
    assert gathered.notes == ["The processor was throttled."]
    assert len(gathered.timings) == 8


def test_a_broken_sidecar_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "a.onnx.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        results.gather([tmp_path / "a.onnx"])


def test_untrained_weights_have_no_accuracy(write: Write, measured: list[Path]) -> None:
    result = json.loads(measured[0].read_text())["result"]
    for entry in result["results"]:
        entry["untrained"] = True
    gathered = results.gather([write("bench", result), *measured[1:]])
    assert all(artifact.score is None for artifact in gathered.artifacts)


def test_the_front_by_hand() -> None:
    assert pareto([(4, 91.5), (2.5, 91.25), (1.5, 90), (3, 80)]) == [2, 1, 0]
    assert pareto([(1, 5), (1, 5), (2, 5)]) == [0, 1]
    assert pareto([]) == []


def estimated(name: str, gpus: tuple[str, ...] = ("L4", "RTX 4090")) -> dict[str, Any]:
    """Return a result of `estimate --json`."""
    return {
        "what": "bound", "model": f"engines/net-{name}.plan", "precision": name, "batch": 8,
        "kernels": 58, "bytes": 12_500_000, "builder": "TensorRT-RTX 1.7", "as_if": False,
        "results": [
            {"gpu": gpu, "no_faster_than_ms": 0.25, "through_memory_ms": 0.5, "stages": []}
            for gpu in gpus
        ],
    }  # fmt: skip


def test_bounds_are_shown_next_to_what_was_measured_on_the_same_gpu(write: Write) -> None:
    entry = {
        "measured": "engines/net-int8.plan", "precision": "int8", "batch": 8,
        "device": "NVIDIA L4", "latency": {"median": 1.5},
        "parts": {"compute": {"median": 0.75}},
    }  # fmt: skip
    other = entry | {"measured": "engines/net-fp16.plan", "parts": None, "batch": 16}
    sentence = "INT8 moves 1.9 times the bytes of FP16."
    result = results.gather(
        [
            write("bench", {"results": [entry, other]}),
            write("estimate", estimated("int8")),
            write("advise", {"plans": [estimated("int8"), estimated("fp16")],
                             "advice": [sentence]}),
        ]
    )  # fmt: skip
    table = tables(result)["bounds"]
    assert "not measurements" in table.title and sentence in table.about
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [(row["artifact"], row["GPU"], row["measured, ms"]) for row in rows] == [
        ("net-int8.plan", "L4", 0.75), ("net-int8.plan", "RTX 4090", None),
        ("net-fp16.plan", "L4", None), ("net-fp16.plan", "RTX 4090", None),
    ]  # fmt: skip
    assert rows[0]["MB moved"] == 12.5 and rows[0]["minimum (L2), ms"] == 0.25


def test_bounds_of_a_plan_alone_make_a_report_and_broken_ones_do_not(write: Write) -> None:
    table = tables(results.gather([write("estimate", estimated("int8"))]))["bounds"]
    assert "measured, ms" not in table.headings
    broken = estimated("int8")
    broken["results"][0]["no_faster_than_ms"] = "fast"
    with pytest.raises(InputError, match="no_faster_than_ms"):
        results.gather([write("estimate", broken)])
