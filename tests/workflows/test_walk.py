"""Each command reads every file once, and enters every package at most once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import onnx
import pytest

import rtresnet as rt
from rtresnet.cli.main import main
from rtresnet.core import atomic_io, hardware

EXPORT = ("export", "--model", "resnet8", "--weights", "untrained", "--calib", "synthetic:32")
INT8, FP32 = "engines/resnet8-int8.onnx", "engines/resnet8.onnx"
SECONDS = ("--seconds", "0.1")
DATA = ("--data", "synthetic:16")
needs_builder = pytest.mark.skipif(
    not hardware.installed("tensorrt_rtx"), reason="needs tensorrt_rtx"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained net's files in engines/."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*EXPORT, "--int8", "--no-plan"]) == 0
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each file was parsed or hashed, by its name."""
    counts: Counter[tuple[str, str]] = Counter()

    def watch(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *arguments: Any, **options: Any) -> Any:
            counts[kind, Path(path).name] += 1
            return function(path, *arguments, **options)

        return watched

    monkeypatch.setattr(onnx, "load", watch("parse", onnx.load))
    monkeypatch.setattr(atomic_io, "sha256", watch("hash", atomic_io.sha256))
    return counts


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", INT8, *SECONDS),
        ("profile", FP32, *SECONDS),
        ("bench", INT8, FP32, *SECONDS),
        ("eval", INT8, *DATA),
        ("compare", INT8, FP32, *DATA),
        ("check", INT8, *DATA),
        ("lint", INT8),
        ("inspect", INT8),
        ("quantize", FP32, "--calib", "synthetic:32", "--eval", "synthetic:32"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_command_parses_and_hashes_each_artifact_once(
    arguments: tuple[str, ...], folder: Path, reads: Counter[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch, brief_measurements: None,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(list(arguments)) == 0
    artifact = Path(arguments[1]).name
    if arguments[0] == "eval":  # hashes again under the lock, before it records the accuracy
        assert reads.pop(("hash", artifact)) == 2
    else:
        assert reads["hash", artifact] == 1
    assert reads["parse", artifact] == 1
    assert {count for (_, name), count in reads.items() if name.startswith("resnet8")} == {1}


@needs_builder
def test_export_reads_each_file_once(
    reads: Counter[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*EXPORT, "--int8", "--fp16", "--target", "sm_86"]) == 0
    artifacts = {key: count for key, count in reads.items() if not key[1].endswith(".json")}
    assert reads["parse", "resnet8.onnx"] == 1 and set(artifacts.values()) == {1}


def walk(work: Callable[[], object]) -> list[str]:
    """Return the packages that the workflows enter, in order, besides core.

    Entries that one package makes into another, and callbacks, are not counted.
    """
    root = Path(rt.__file__).parent
    names: dict[str, str] = {}

    def package(frame: FrameType) -> str:
        file = frame.f_code.co_filename
        if file not in names:
            path = Path(file)
            parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
            names[file] = parts[0] if len(parts) > 1 else ""
        return names[file]

    entered: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        entry, caller = package(frame), frame.f_back
        if event != "call" or entry in ("", "core", "workflows"):
            return
        if frame.f_code.co_name == "<module>":
            return
        callers = set()
        while caller is not None:
            callers.add(package(caller))
            caller = caller.f_back
        if callers <= {"", "core", "workflows"} and "workflows" in callers:
            entered.extend([entry] if entered[-1:] != [entry] else [])

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return entered


@needs_builder
def test_export_int8_enters_each_package_at_most_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    def export() -> None:
        rt.export(
            "untrained", "engines",
            rt.ExportConfig(model="resnet8", precisions=("int8",), plan=True),
            quantize=rt.QuantizeConfig(calib="synthetic:32"),
            build=rt.BuildConfig(targets=("sm_86",)),
        )  # fmt: skip

    visits = Counter(walk(export))
    assert set(visits) >= {"models", "exporter", "onnxlib", "quantization", "data", "builder"}
    assert max(visits.values()) <= 2, visits
