from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtresnet.errors import ArtifactError, InputError
from rtresnet.report import results
from rtresnet.report.results import pareto
from tests.report.conftest import searched

Write = Callable[..., Path]


def test_everything_of_an_artifact_comes_together(measured: list[Path]) -> None:
    found = results.gather(measured)
    assert [a.name for a in found.artifacts] == [
        "net-fp32.onnx", "net-fp16.onnx", "net-int8.onnx", "net-bad.onnx",
    ]  # fmt: skip
    int8 = found.artifacts[2]
    assert int8.top1 == 90.0 and int8.precision == "int8"
    assert int8.agreement == (0.984375, 846, "net-fp32.onnx")
    assert found.batches == [1, 8] and found.batch == 1
    assert found.baseline is found.artifacts[0]
    assert len(found.timings) == 8 and len(found.profiles) == 2
    assert {what for what, _ in found.environments} == {"latency", "accuracy", "profile"}


def test_artifacts_bring_their_chain_and_their_accuracy(engines: Path) -> None:
    found = results.gather([engines])
    names = {artifact.name for artifact in found.artifacts}
    assert {"resnet8.onnx", "resnet8-fp16.onnx", "resnet8-int8.onnx"} <= names
    int8 = next(a for a in found.artifacts if a.name == "resnet8-int8.onnx")
    assert int8.model == "resnet8" and found.title == "resnet8"
    assert [link[1] for link in int8.chain][-1] == "checkpoint"
    assert all(len(link[3] or "") == 64 and link[4] == "ok" for link in int8.chain)
    sidecar = results.gather([engines / "resnet8-int8.onnx.json"])
    assert [a.name for a in sidecar.artifacts] == ["resnet8-int8.onnx"]


def test_a_quickstarts_file_holds_all_of_it(measured: list[Path], write: Write) -> None:
    def of(path: Path) -> Any:
        return json.loads(path.read_text())["result"]

    whole = {
        "bench": of(measured[0]),
        "eval": {name: of(path) for name, path in zip("abcd", measured[1:5], strict=True)},
        "compare": {"a": of(measured[5])},
    }
    found = results.gather([write("quickstart", whole)])
    assert [a.top1 for a in found.artifacts] == [91.5, 91.25, 90.0, 80.0]
    assert len(found.timings) == 8


def test_what_is_not_a_result_is_said(write: Write, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    for content, words in (
        ("{", "not JSON"),
        ("[1]", "not written by"),
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
    with pytest.raises(InputError, match="has no sidecar, and no result here"):
        results.gather([file])
    result = {"searches": searched("batch", 4)["searches"][:1]}
    result["searches"][0]["measured"] = str(file)
    (found,) = results.gather([file, write("bench-find", result)]).artifacts
    assert found.bytes == 8


@pytest.mark.parametrize("gone", ["measured", "batch", "latency"])
def test_half_a_result_is_said(gone: str, measured: list[Path], write: Write) -> None:
    result = json.loads(measured[0].read_text())["result"]
    del result["results"][0][gone]
    with pytest.raises(InputError, match="not a whole result of bench"):
        results.gather([write("bench", result)])


def test_unknown_and_missing_fields_do_no_harm(measured: list[Path], write: Write) -> None:
    result = copy.deepcopy(json.loads(measured[0].read_text())["result"])
    for entry in result["results"]:
        for name in ("samples", "speed", "steady", "asked", "threads"):
            del entry[name]
        entry |= {"new": {"x": 1}, "environment": {"remarks": ["The processor was throttled."]}}
        entry["latency"] = {"median": entry["latency"]["median"], "p99": None}
    found = results.gather([write("bench", result)])
    assert found.notes == ["The processor was throttled."]
    assert len(found.timings) == 8


def test_a_broken_sidecar_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "a.onnx.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        results.gather([tmp_path / "a.onnx"])


def test_untrained_weights_have_no_accuracy(write: Write, measured: list[Path]) -> None:
    result = json.loads(measured[0].read_text())["result"]
    for entry in result["results"]:
        entry["untrained"] = True
    found = results.gather([write("bench", result), *measured[1:]])
    assert all(artifact.top1 is None for artifact in found.artifacts)


def test_the_front_by_hand() -> None:
    assert pareto([(4, 91.5), (2.5, 91.25), (1.5, 90), (3, 80)]) == [2, 1, 0]
    assert pareto([(1, 5), (1, 5), (2, 5)]) == [0, 1]
    assert pareto([]) == []
