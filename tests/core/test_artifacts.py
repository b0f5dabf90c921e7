from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtresnet.core import artifacts, atomic_io, locks, provenance
from rtresnet.core.artifacts import (
    chain,
    link_to,
    publish,
    publish_bytes,
    read_sidecar,
    record_accuracy,
    sidecar_path,
    update_measured,
    verify,
)
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.serialization import to_json
from rtresnet.core.sidecar import (
    Attestation,
    Calibration,
    Link,
    Model,
    Plan,
    Profile,
    Sidecar,
    Weights,
    accuracies,
    parse_sidecar,
)

MODEL = Model(architecture="resnet20", classes=("cat", "chat"), shortcut="A", stride_in="3x3")
MINIMAL = Sidecar(
    kind="checkpoint",
    file="best.pt",
    model=MODEL,
    input=Preprocess(size=32, resize=32),
    weights=Weights(origin="untrained"),
    precision="fp32",
)
FULL = Sidecar(
    kind="plan",
    file="cats.int8.plan",
    model=MODEL,
    input=Preprocess(size=32, resize=36, mean=(0.5, 0.25, 0.125), std=(0.5, 0.5, 0.25)),
    weights=Weights(origin="trained", sha256="a" * 64, source="runs/cats/best.pt"),
    precision="int8",
    parent=Link(file="cats.int8.onnx", sha256="b" * 64),
    calibration=Calibration(
        method="entropy",
        images="folder:cats",
        images_sha256="c" * 64,
        n=512,
        scales="../calib/cats.json",
        scales_sha256="d" * 64,
    ),
    plan=Plan(
        builder="TensorRT-RTX",
        version="1.7.0",
        targets=("sm_80", "sm_89"),
        profiles=(Profile(min=1, opt=8, max=32),),
        seconds=1.5,
        attested=Attestation(
            convolutions=21,
            dtypes={"Int8": 20, "Float": 1},
            layers=30,
            stages={"stem": {"Int8": 1}, "layer1": {"Int8": 19, "Float": 1}},
            adds=9,
            unfused_adds=("layer1.0.add",),
            requantizes=2,
            reformats=1,
            rounds=("layer1.0.add.q",),
            activations=(4096,),
        ),
        layers=Link(file="cats.int8.plan.layers.json", sha256="f" * 64),
        tf32=True,
    ),
    measured={"accuracy": {"n": 359, "top1": 350, "top5": None}, "parity": [0.5, 1e-06]},
    made_by={"command": "rtresnet build cats.int8.onnx", "rtresnet": "0.1.0"},
    sha256="e" * 64,
    bytes=1234567,
)

# The file format, one file a kind, and what was written before engines' layers were counted. A
# change here is a change of SCHEMA, unless what people have still reads.
GOLDEN = Path(__file__).parents[1] / "golden"
ONNX = dataclasses.replace(FULL, kind="onnx", file="cats.int8.onnx", plan=None, parent=None)
KINDS = {"checkpoint": MINIMAL, "onnx": ONNX, "plan": FULL}


def make(path: Path, content: bytes = b"content", **changes: Any) -> Path:
    """Return an artifact with a sidecar that says how it was made."""
    sidecar = dataclasses.replace(
        MINIMAL, made_by={"command": f"rtresnet make {path.name}"}, **changes
    )
    named = dataclasses.replace(sidecar, kind=artifacts.kind_of(path))
    publish(path, lambda temporary: temporary.write_bytes(content), named)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- the sidecar's format


@pytest.mark.parametrize("kind", KINDS)
def test_the_sidecars_format_is_pinned_byte_for_byte(kind: str) -> None:
    text = (GOLDEN / f"{kind}.json").read_text(encoding="utf-8")
    assert to_json(KINDS[kind]) == text
    assert parse_sidecar(json.loads(text)) == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_sidecar_from_before_interpolation_reads_as_bilinear(kind: str) -> None:
    text = (GOLDEN / f"{kind}-before-interpolation.json").read_text(encoding="utf-8")
    sidecar = parse_sidecar(json.loads(text))
    assert sidecar == KINDS[kind] and sidecar.input.interpolation == "bilinear"


def test_a_record_from_before_there_were_top_k_files_is_one_of_logits() -> None:
    old = json.loads(to_json(FULL))
    del old["topk"]
    assert parse_sidecar(old) == FULL


def test_a_plans_record_from_before_its_layers_were_counted_still_reads(tmp_path: Path) -> None:
    path = tmp_path / "cats.int8.plan"
    sidecar_path(path).write_bytes((GOLDEN / "plan-before-layers.json").read_bytes())
    old = read_sidecar(path)
    assert FULL.plan is not None
    counted = Attestation(convolutions=21, dtypes={"Int8": 20, "Float": 1}, layers=30)
    plan = dataclasses.replace(FULL.plan, attested=counted, layers=None, tf32=None)
    assert old == dataclasses.replace(FULL, plan=plan)


def test_plan_sidecar_from_before_tf32_was_recorded_still_reads(tmp_path: Path) -> None:
    path = tmp_path / "cats.int8.plan"
    sidecar_path(path).write_bytes((GOLDEN / "plan-before-tf32.json").read_bytes())
    assert FULL.plan is not None
    plan = dataclasses.replace(FULL.plan, tf32=None)
    assert read_sidecar(path) == dataclasses.replace(FULL, plan=plan)


@pytest.mark.parametrize("schema", [0, 2])
def test_a_plans_record_of_another_schema_names_the_command_that_renews_it(
    tmp_path: Path, schema: int
) -> None:
    data = json.loads((GOLDEN / "plan.json").read_text()) | {"schema": schema}
    path = tmp_path / "cats.int8.plan"
    sidecar_path(path).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"rtresnet build cats\.int8\.onnx"):
        read_sidecar(path)


def test_unknown_values_are_written_as_null_and_read_back() -> None:
    data = json.loads(to_json(MINIMAL))
    assert data["parent"] is data["calibration"] is data["plan"] is None
    unknown = dict.fromkeys(("sha256", "source", "license"))
    assert data["weights"] == {"origin": "untrained"} | unknown
    assert parse_sidecar(data) == MINIMAL


@pytest.mark.parametrize("name", ["[x]", "a, b", 'quo"te', "{}", "new\nline", "été", "猫", "\\"])
def test_any_class_name_survives(name: str) -> None:
    model = dataclasses.replace(MODEL, classes=("first", name, "last"))
    record = dataclasses.replace(MINIMAL, model=model)
    assert parse_sidecar(json.loads(to_json(record))) == record


def test_a_profile_prints_as_on_the_command_line() -> None:
    assert str(Profile(min=1, opt=8, max=32)) == "1:8:32"


# --- publish and read


def test_publish_writes_artifact_and_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "net.pt"
    returned = publish(path, lambda temporary: temporary.write_bytes(b"weights"), MINIMAL)
    assert names_in(path.parent) == ["net.pt", "net.pt.json"]
    assert path.read_bytes() == b"weights"
    assert returned == read_sidecar(path) == verify(path)
    assert returned.file == "net.pt"
    assert returned.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert returned.bytes == 7
    assert {"command", "rtresnet", "numpy"} <= set(returned.made_by)


def test_the_command_is_the_one_being_carried_out(tmp_path: Path) -> None:
    token = provenance.command.set(("rtresnet", "train", "--data", "my cats"))
    try:
        made = publish(tmp_path / "a.pt", lambda path: path.write_bytes(b"x"), MINIMAL)
    finally:
        provenance.command.reset(token)
    assert made.made_by["command"] == "rtresnet train --data 'my cats'"


def test_from_python_the_command_is_the_scripts_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["my script.py", "--fast"])
    made = publish(tmp_path / "a.pt", lambda path: path.write_bytes(b"x"), MINIMAL)
    assert made.made_by["command"] == "'my script.py' --fast"


def test_publish_keeps_what_the_caller_knows_better_of_how_it_was_made(tmp_path: Path) -> None:
    path = make(tmp_path / "net.pt")
    sidecar = read_sidecar(path)
    assert sidecar is not None
    assert sidecar.made_by["command"] == "rtresnet make net.pt"
    assert "numpy" in sidecar.made_by


def test_the_sidecar_stands_beside_its_artifact() -> None:
    assert sidecar_path("engines/a.plan") == Path("engines/a.plan.json")


def test_an_artifact_without_a_sidecar_reads_as_none(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(b"x")
    assert read_sidecar(path) is None
    assert verify(path) is None


def test_measurements_are_added_and_the_rest_stays(tmp_path: Path) -> None:
    path = make(tmp_path / "net.pt", measured={"parity": 1})
    before = read_sidecar(path)
    update_measured(path, {"accuracy": {"n": 10, "top1": 9}})
    after = read_sidecar(path)
    assert before is not None
    measured = {"parity": 1, "accuracy": {"n": 10, "top1": 9}}
    assert after == dataclasses.replace(before, measured=measured)


def test_accuracies_of_sidecars_of_every_version_are_read(tmp_path: Path) -> None:
    (old,) = accuracies(json.loads((GOLDEN / "onnx.json").read_text())["measured"])
    assert old["top1"] == 350
    assert accuracies({}) == accuracies({"accuracy": None}) == accuracies({"accuracy": 3}) == []
    path = make(tmp_path / "net.pt", measured={"accuracy": old})
    for digest, top1 in (("a", 1), ("b", 2), ("a", 3)):
        record_accuracy(path, {"n": 9, "top1": top1, "data": "d", "data_sha256": digest})
    sidecar = read_sidecar(path)
    assert sidecar is not None
    assert [entry["top1"] for entry in accuracies(sidecar.measured)] == [350, 2, 3]


def test_measuring_an_artifact_without_a_sidecar_makes_none(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(b"x")
    update_measured(path, {"accuracy": 1})
    assert names_in(tmp_path) == ["foreign.onnx"]


RECORDER = """
import sys
from rtresnet.core import artifacts
path, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for index in range(20):
    artifacts.record_accuracy(path, {"n": 1, "top1": 1, "data": f"{name}{index}"})
"""


def test_record_accuracy_from_two_processes_keeps_both_records(tmp_path: Path) -> None:
    path = make(tmp_path / "net.pt")
    recorders = [
        subprocess.Popen(
            [sys.executable, "-c", RECORDER, str(path), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "ab"
    ]  # fmt: skip
    for recorder in recorders:
        assert recorder.stdout is not None and recorder.stdout.readline() == "ready\n"
    for recorder in recorders:
        assert recorder.stdin is not None
        recorder.stdin.write("\n")
        recorder.stdin.flush()
    for recorder in recorders:
        recorder.communicate(timeout=120)
        assert recorder.returncode == 0
    sidecar = verify(path)
    assert sidecar is not None
    assert {entry["data"] for entry in accuracies(sidecar.measured)} == {
        f"{name}{index}" for name in "ab" for index in range(20)
    }


def test_update_measured_of_a_file_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "net.pt")
    measured = read_sidecar(path)
    assert measured is not None
    make(path, b"another net")
    before = read_sidecar(path)
    with pytest.raises(ArtifactError) as caught:
        update_measured(path, {"parity": 1}, sha256=measured.sha256)
    assert caught.value.fix and read_sidecar(path) == before
    path.write_bytes(b"without its new sidecar")
    with pytest.raises(ArtifactError):
        update_measured(path, {"parity": 1})


def test_update_measured_of_a_file_that_is_being_written_waits_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "UPDATE_WAIT", 0.1)
    path = make(tmp_path / "net.pt")
    with locks.hold_folder(tmp_path, warn=print), pytest.raises(locks.LockedError):
        update_measured(path, {"parity": 1})


def broken(path: Path, change: dict[str, Any], drop: str | None = None) -> ArtifactError:
    """Return the error that reading an artifact's sidecar raises after a change of its JSON."""
    make(path)
    data = json.loads(sidecar_path(path).read_text()) | change
    if drop:
        del data[drop]
    sidecar_path(path).write_text(json.dumps(data))
    with pytest.raises(ArtifactError) as caught:
        read_sidecar(path)
    assert str(sidecar_path(path)) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_newer_schema_is_refused_with_the_command_that_remakes_it(tmp_path: Path) -> None:
    error = broken(tmp_path / "net.pt", {"schema": 99})
    assert "schema 99" in str(error)
    assert "rtresnet make net.pt" in str(error)


def test_a_missing_schema_is_refused(tmp_path: Path) -> None:
    assert "schema None" in str(broken(tmp_path / "net.pt", {}, drop="schema"))


@pytest.mark.parametrize("field", ["kind", "file", "model", "input", "weights", "precision"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    error = broken(tmp_path / "net.pt", {}, drop=field)
    assert f"`{field}`" in str(error)
    assert "rtresnet make net.pt" in str(error)


def test_a_missing_field_of_a_part_is_named(tmp_path: Path) -> None:
    model = {"architecture": "resnet20", "classes": ["a"], "shortcut": "A"}
    assert "`stride_in`" in str(broken(tmp_path / "net.pt", {"model": model}))


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    assert "'flavour'" in str(broken(tmp_path / "net.pt", {"flavour": "vanilla"}))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bytes", "seven", "bytes"),
        ("bytes", None, "bytes"),
        ("kind", 3, "kind"),
        ("sha256", ["a"], "sha256"),
        ("model", "resnet20", "$.model"),
        ("model", None, "$.model"),
        ("measured", [1], "measured"),
        ("plan", {"builder": "x"}, "version"),
        ("parent", {"file": 1, "sha256": "x"}, "file"),
        ("input", {"size": 32, "resize": 32, "mean": "grey"}, "mean"),
        ("input", {"size": 32, "resize": 32, "std": ["a", "b", "c"]}, "std"),
        ("input", {"size": 32, "resize": 8}, "resize 8"),
        ("input", {"size": 32, "resize": 32, "std": [0, 0, 0]}, "std"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(
    tmp_path: Path, field: str, value: object, says: str
) -> None:
    assert says in str(broken(tmp_path / "net.pt", {field: value}))


@pytest.mark.parametrize("text", [b"", b"{", b"not json", b'{"kind": "plan"', b"\xff\xfe\x00"])
def test_garbage_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    path = make(tmp_path / "net.pt")
    sidecar_path(path).write_bytes(text)
    with pytest.raises(ArtifactError, match=r"net\.pt\.json: not valid JSON") as caught:
        read_sidecar(path)
    assert f"create {path} again" in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"schema"', '[{"schema": 1}]'])
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = make(tmp_path / "net.pt")
    sidecar_path(path).write_text(text)
    with pytest.raises(ArtifactError, match=r"net\.pt\.json"):
        read_sidecar(path)


ACCURACY = {"n": 10, "top1": 9, "data": "folder:up"}


@pytest.mark.parametrize("way", ["equal", "other bytes", "other input", "broken sidecar"])
def test_publish_equal_bytes_and_input_keeps_what_was_measured(tmp_path: Path, way: str) -> None:
    parent = Link(file="net.pt", sha256="a" * 64)
    path = make(tmp_path / "net.onnx", parent=parent)
    update_measured(path, {"accuracy": [ACCURACY], "parity": [0.5, 1e-6]})  # type: ignore[typeddict-item]
    if way == "broken sidecar":
        sidecar_path(path).write_text("{")
    changes = {"input": Preprocess(size=64, resize=64)} if way == "other input" else {}
    content = b"others" if way == "other bytes" else b"content"
    make(path, content, parent=parent, **changes)
    written = read_sidecar(path)
    assert written is not None
    expected = {"accuracy": [ACCURACY], "parity": [0.5, 1e-6]} if way == "equal" else {}
    assert written.measured == expected


def test_publish_equal_bytes_of_another_parent_drops_the_parity(tmp_path: Path) -> None:
    path = make(tmp_path / "net.onnx", parent=Link(file="net.pt", sha256="a" * 64))
    update_measured(path, {"accuracy": [ACCURACY], "parity": [0.5, 1e-6]})  # type: ignore[typeddict-item]
    make(path, parent=Link(file="net.pt", sha256="b" * 64))
    written = read_sidecar(path)
    assert written is not None and written.measured == {"accuracy": [ACCURACY]}


# --- verify


def test_a_truncated_file_is_told_with_its_sizes_and_the_command(tmp_path: Path) -> None:
    path = make(tmp_path / "net.plan", b"0123456789")
    path.write_bytes(b"0123")
    with pytest.raises(ArtifactError) as caught:
        verify(path)
    assert str(path) in str(caught.value)
    assert "net.plan.json (4 bytes instead of 10): truncated" in str(caught.value)
    assert "delete net.plan.json" in (caught.value.fix or "")
    assert str(caught.value).endswith("rtresnet make net.plan")


def test_a_replaced_file_is_told_with_the_command(tmp_path: Path) -> None:
    path = make(tmp_path / "net.plan", b"0123456789")
    path.write_bytes(b"9876543210")
    with pytest.raises(ArtifactError, match="match its sidecar") as caught:
        verify(path)
    assert str(caught.value).endswith("rtresnet make net.plan")


def test_one_flipped_bit_is_seen(tmp_path: Path) -> None:
    content = bytearray(os.urandom(3 << 20))
    path = make(tmp_path / "net.plan", bytes(content))
    assert verify(path) is not None
    content[2 << 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        verify(path)


def test_a_file_that_is_not_there_or_empty_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.plan: no such file"):
        verify(tmp_path / "gone.plan")
    (tmp_path / "empty.plan").touch()
    with pytest.raises(ArtifactError, match=r"empty\.plan: the file is empty"):
        verify(tmp_path / "empty.plan")
    with pytest.raises(InputError, match="a folder, not a file"):
        verify(tmp_path)


def test_require_file_folder_of_a_run_names_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        atomic_io.require_file(tmp_path, fix="rtresnet export")
    assert caught.value.fix == "rtresnet export"
    (tmp_path / "best.pt").touch()
    with pytest.raises(InputError) as caught:
        atomic_io.require_file(tmp_path, fix="rtresnet export")
    assert caught.value.fix is not None and str(tmp_path / "best.pt") in caught.value.fix


def test_the_kind_follows_from_the_name() -> None:
    kinds = {"a.pt": "checkpoint", "a.PTH": "checkpoint", "b.fp16.onnx": "onnx", "c.plan": "plan"}
    assert {name: artifacts.kind_of(name) for name in kinds} == kinds
    with pytest.raises(InputError, match=r"net\.engine.*\.plan"):
        artifacts.kind_of("net.engine")


# --- chain


@pytest.fixture
def line(tmp_path: Path) -> list[Path]:
    """plan, ONNX file and checkpoint, each made from the next, in two folders."""
    checkpoint = make(tmp_path / "run" / "best.pt", b"weights")
    onnx = tmp_path / "engines" / "net.onnx"
    make(onnx, b"graph", kind="onnx", parent=link_to(checkpoint, onnx))
    plan = tmp_path / "engines" / "net.plan"
    make(plan, b"engine", kind="plan", parent=link_to(onnx, plan))
    return [plan, onnx, checkpoint]


def states(path: Path) -> list[tuple[str, str]]:
    return [(link.name, state) for link, _, state in chain(path)]


def test_an_intact_chain_is_walked_to_its_head(line: list[Path]) -> None:
    assert states(line[0]) == [("net.plan", "ok"), ("net.onnx", "ok"), ("best.pt", "ok")]
    assert [sidecar.kind for _, sidecar, _ in chain(line[0]) if sidecar] == [
        "plan",
        "onnx",
        "checkpoint",
    ]


def test_links_are_relative_so_a_moved_tree_keeps_its_chain(
    line: list[Path], tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in ("run", "engines"):
        (tmp_path / folder).rename(moved / folder)
    assert [state for _, state in states(moved / "engines" / "net.plan")] == ["ok"] * 3


def test_the_chain_ends_at_a_missing_parent(line: list[Path]) -> None:
    line[2].unlink()
    assert states(line[0]) == [("net.plan", "ok"), ("net.onnx", "ok"), ("best.pt", "missing")]


def test_a_parent_made_anew_shows_as_changed(line: list[Path]) -> None:
    make(line[1], b"another graph", kind="onnx")
    assert verify(line[1]) is not None  # sound in itself, but not what the plan was built from
    assert states(line[0]) == [("net.plan", "ok"), ("net.onnx", "changed")]


def test_a_file_that_differs_from_its_sidecar_shows_as_changed(line: list[Path]) -> None:
    line[0].write_bytes(b"not the engine")
    assert states(line[0]) == [("net.plan", "changed")]


def test_the_chain_ends_at_a_file_without_a_sidecar(line: list[Path]) -> None:
    sidecar_path(line[1]).unlink()
    assert states(line[0]) == [("net.plan", "ok"), ("net.onnx", "no sidecar")]


def test_a_missing_artifact_is_a_chain_of_one(tmp_path: Path) -> None:
    assert states(tmp_path / "gone.plan") == [("gone.plan", "missing")]


def test_a_chain_that_bites_its_tail_ends(tmp_path: Path) -> None:
    """As when a step writes over its own input and nothing in it changes."""
    path = make(tmp_path / "net.onnx", b"graph")
    make(path, b"graph", parent=link_to(path, path))
    assert len(list(itertools.islice(chain(path), 5))) < 5


# --- atomic writes


def test_publish_that_fails_keeps_artifact_and_sidecar(tmp_path: Path) -> None:
    path = make(tmp_path / "net.pt", b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(path, fail, MINIMAL)
    assert path.read_bytes() == b"old"
    assert verify(path) is not None
    assert names_in(tmp_path) == ["net.pt", "net.pt.json"]


def test_bytes_are_published_as_a_file_is(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    one = publish(tmp_path / "a" / "net.pt", lambda path: path.write_bytes(data), MINIMAL)
    two = publish_bytes(tmp_path / "b" / "net.pt", memoryview(data), lambda: MINIMAL)
    assert one == two == verify(tmp_path / "b" / "net.pt")
    assert names_in(tmp_path / "b") == ["net.pt", "net.pt.json"]


@pytest.mark.parametrize("error", [CheckFailedError("no"), KeyboardInterrupt()])
def test_bytes_whose_description_fails_are_not_published(
    tmp_path: Path, error: BaseException
) -> None:
    path = make(tmp_path / "net.pt", b"old")

    def describe() -> Sidecar:
        raise error

    with pytest.raises(type(error)):
        publish_bytes(path, memoryview(b"new"), describe)
    assert path.read_bytes() == b"old" and verify(path) is not None
    assert names_in(tmp_path) == ["net.pt", "net.pt.json"]


def test_a_full_disk_under_published_bytes_keeps_the_old_artifact_valid(small_disk: Path) -> None:
    path = make(small_disk / "net.pt", b"old")
    with pytest.raises(OSError) as caught:
        publish_bytes(path, memoryview(bytes(200_000)), lambda: MINIMAL)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old" and verify(path) is not None
    assert names_in(small_disk) == ["net.pt", "net.pt.json"]


def test_a_full_disk_under_publish_keeps_the_old_artifact_valid(small_disk: Path) -> None:
    path = make(small_disk / "net.pt", b"old")
    with pytest.raises(OSError) as caught:
        make(path, bytes(200_000))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert verify(path) is not None
    assert names_in(small_disk) == ["net.pt", "net.pt.json"]


def test_a_disk_that_fills_up_before_the_sidecar_is_noticed_by_verify(small_disk: Path) -> None:
    wordy = dataclasses.replace(MODEL, classes=tuple(f"class number {i}" for i in range(500)))
    path = make(small_disk / "net.pt", b"old", model=wordy)
    durations = sum(-(-entry.stat().st_size // 4096) for entry in small_disk.iterdir())
    with pytest.raises(OSError) as caught:
        make(path, bytes((16 - durations) * 4096), model=wordy)
    assert caught.value.errno == errno.ENOSPC
    assert names_in(small_disk) == ["net.pt", "net.pt.json"]
    with pytest.raises(ArtifactError, match="match its sidecar"):
        verify(path)


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    odd = dataclasses.replace(MINIMAL, measured={"parity": {"relative": float("inf"), "n": 3}})
    text = to_json(odd)
    assert "Infinity" not in text
    assert json.loads(text)["measured"] == {"parity": {"relative": None, "n": 3}}


@pytest.mark.parametrize("name", ["net.onnx", "net.plan"])
def test_a_name_of_another_kind_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"what was there")
    with pytest.raises(InputError, match=r"of kind checkpoint; .* ends in \.pt"):
        publish(tmp_path / name, lambda path: path.write_bytes(b"x"), MINIMAL)
    data = memoryview(b"x")
    with pytest.raises(InputError, match="of kind checkpoint"):
        publish_bytes(tmp_path / name, data, lambda: MINIMAL)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"what was there"
