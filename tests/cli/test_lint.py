"""`rtresnet lint`: output, repaired files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rtresnet.cli.main import main
from rtresnet.core.artifacts import chain, read_sidecar, sidecar_path

pytest.importorskip("onnxruntime")


def shifted(source: Path, target: Path, zero: int) -> Path:
    """Return the file with uint8 activations and this zero point, without a sidecar."""
    model = onnx.load(source)
    activations = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in activations:
            tensor.CopyFrom(numpy_helper.from_array(np.array(zero, np.uint8), tensor.name))
    onnx.save(onnx.shape_inference.infer_shapes(_without_types(model)), target)
    return target


def _without_types(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.value_info[:]
    return model


def test_our_int8_file_passes_and_a_float_file_says_that_it_is_one(
    engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engines / "resnet8-int8.onnx"
    assert main(["lint", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no problems\n"
    assert main(["lint", str(engines / "resnet8.onnx")]) == 0
    assert "a float model" in capsys.readouterr().out


def test_lint_several_files_names_each_file_without_problems_once(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = engines / "resnet8-int8.onnx"
    bad = shifted(good, tmp_path / "theirs.onnx", 0)
    assert main(["lint", str(good), str(bad)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{good}: no problems", f"{bad}:"]


def test_a_flaw_is_told_in_80_columns_with_its_nodes_and_exit_code_1(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shifted(engines / "resnet8-int8.onnx", tmp_path / "theirs.onnx", 0)
    assert main(["lint", str(path), "--json", str(tmp_path / "found.json")]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[:2] == [
        "error    unsigned, 10 nodes",
        "  nodes   images.q, relu.q, layer1.0.relu1.q and 7 more",
    ]
    assert all(len(line) <= 80 for line in output.out.splitlines())
    # --fix could do nothing for this one
    assert output.err == f"error: {path}: 10 errors\n"
    result = json.loads((tmp_path / "found.json").read_text())["result"]
    assert len(result["findings"]) == 10 and not result["repaired"]
    assert set(result["findings"][0]) == {"rule", "severity", "node", "consequence", "mend"}


def test_fix_writes_a_file_that_passes(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shifted(engines / "resnet8-int8.onnx", tmp_path / "theirs.onnx", 128)
    assert main(["lint", str(path)]) == 1
    assert "--fix OUT.onnx" in capsys.readouterr().err
    out = tmp_path / "fixed.onnx"
    assert main(["lint", str(path), "--fix", str(out)]) == 0
    output = capsys.readouterr().out
    assert "repaired  zero-point, 20 nodes: int8 with zero point 0" in output
    assert f"{out}: same outputs, bit for bit" in output
    assert main(["lint", str(out)]) == 0
    assert not sidecar_path(out).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed.onnx", "theirs.onnx"]


def test_fix_exits_by_what_is_left(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shifted(engines / "resnet8-int8.onnx", tmp_path / "theirs.onnx", 0)
    out = tmp_path / "fixed.onnx"
    assert main(["lint", str(path), "--fix", str(out)]) == 1
    output = capsys.readouterr()
    assert f"{out}: nothing was repaired" in output.out and f"{out}: 10 errors" in output.err
    assert out.exists()


def test_a_fixed_file_has_the_sidecar_of_its_source_and_is_a_link_of_the_chain(
    copied: Path, tmp_path: Path
) -> None:
    source, out = copied / "resnet8-int8.onnx", copied / "resnet8-fixed.onnx"
    assert main(["lint", str(source), "--fix", str(out)]) == 0
    before, after = read_sidecar(source), read_sidecar(out)
    assert before is not None and after is not None and after.parent is not None
    assert (after.model, after.precision, after.calibration) == (
        before.model, before.precision, before.calibration,
    )  # fmt: skip
    assert after.parent.sha256 == before.sha256
    links = [(path.name, state) for path, _, state in chain(out)]
    assert links[:3] == [
        ("resnet8-fixed.onnx", "ok"), ("resnet8-int8.onnx", "ok"), ("resnet8.onnx", "ok"),
    ]  # fmt: skip


def test_a_file_repaired_in_place_keeps_its_parent(copied: Path) -> None:
    source = copied / "resnet8-int8.onnx"
    before = read_sidecar(source)
    assert main(["lint", str(source), "--fix", str(source)]) == 0
    after = read_sidecar(source)
    assert before is not None and after is not None and after.parent == before.parent


def test_a_file_with_a_sidecar_of_its_own_is_not_replaced_by_a_stranger(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = shifted(copied / "resnet8-int8.onnx", tmp_path / "theirs.onnx", 128)
    content = (copied / "resnet8.onnx").read_bytes()
    assert main(["lint", str(stranger), "--fix", str(copied / "resnet8.onnx")]) == 2
    assert "sidecar" in capsys.readouterr().err
    assert (copied / "resnet8.onnx").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model", b"\x08\x08", b"text\n"])
def test_what_is_not_an_onnx_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "some.onnx"
    path.write_bytes(content)
    assert main(["lint", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: ")


@pytest.mark.parametrize("name", ["resnet8-int8.onnx", "stray.onnx"])
def test_a_truncated_file_is_named_with_a_sidecar_and_without(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = copied / name
    path.write_bytes((copied / "resnet8-int8.onnx").read_bytes()[:2000])
    assert main(["lint", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}: ") and "truncated" in message


def test_a_missing_file_is_exit_code_2(tmp_path: Path) -> None:
    assert main(["lint", str(tmp_path / "nothing.onnx")]) == 2


def test_lint_several_files_checks_each_and_names_those_with_findings(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = str(engines / "resnet8-int8.onnx"), str(tmp_path / "theirs.onnx")
    shifted(engines / "resnet8-int8.onnx", Path(bad), 0)
    result = tmp_path / "found.json"
    assert main(["lint", good, str(engines / "resnet8.onnx"), "--json", str(result)]) == 0
    assert main(["lint", bad, good, "--json", str(result)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {bad}: 10 errors\n"
    assert f"{good}: no problems" in captured.out
    files = json.loads(result.read_text())["result"]["files"]
    assert [entry["file"] for entry in files] == [bad, good]
    assert [len(entry["findings"]) for entry in files] == [10, 0]


def test_lint_several_files_what_cannot_be_checked_is_refused_first(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(engines / "resnet8-int8.onnx")
    assert main(["lint", good, str(tmp_path / "nothing.onnx")]) == 2
    assert main(["lint", good, good, "--fix", str(tmp_path / "out.onnx")]) == 2
    captured = capsys.readouterr()
    assert "once for each file" in captured.err
    assert captured.out == "" and not list(tmp_path.iterdir())
