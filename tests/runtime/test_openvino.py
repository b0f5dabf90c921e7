"""The OpenVINO provider of ONNX Runtime, in a process of its own.

That build replaces onnxruntime, so `make test` installs it into a folder of its own,
.venv/openvino, and only these tests look there. The plugin comes first where it offers this
processor, so the processes act as if it offered nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtresnet.runtime import providers
from rtresnet.runtime.ort import OrtBackend
from rtresnet.runtime.providers import OPENVINO_BUILT_IN, PROVIDERS

OnnxFile = Callable[..., Path]
Images = Callable[..., np.ndarray]
BUILD = Path(sys.prefix) / "openvino"
installed = pytest.mark.skipif(
    not (BUILD / "onnxruntime").is_dir(), reason=f"no onnxruntime-openvino in {BUILD}"
)


def with_build(*arguments: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(BUILD), os.environ.get("PYTHONPATH", "")])
    limit = {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | limit,
        capture_output=True,
        text=True,
        check=False,
    )


WITHOUT_PLUGIN = """
from rtresnet.runtime import ort, providers
providers._plugin_device = lambda about: None
"""
RUN = (
    WITHOUT_PLUGIN
    + """
import sys, numpy as np
import rtresnet
with rtresnet.load(sys.argv[1], provider=sys.argv[2]) as session:
    about = session.describe()
    images = np.load(sys.argv[3])
    np.savez(sys.argv[4], *[session(images[:count]) for count in (1, 3, len(images))],
             provider=about["provider"], versions=list(about["versions"]))
"""
)


MAIN = (
    WITHOUT_PLUGIN
    + """
import sys
from rtresnet.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
)


@installed
@pytest.mark.parametrize("isa", [None, "AVX2"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("provider", ["openvino", "auto"])
def test_openvino_build_returns_what_onnx_runtime_returns(
    precision: str,
    provider: str,
    isa: str | None,
    onnx_file: OnnxFile,
    images: Images,
    tmp_path: Path,
) -> None:
    path, batch = onnx_file("resnet8", precision), images(8)
    np.save(tmp_path / "images.npy", batch)
    done = with_build(
        "-c",
        RUN,
        str(path),
        provider,
        str(tmp_path / "images.npy"),
        str(tmp_path / "out.npz"),
        isa=isa,
    )
    assert done.returncode == 0, done.stderr
    loaded = np.load(tmp_path / "out.npz")
    assert loaded["provider"] == "ONNX Runtime OpenVINO"
    assert "onnxruntime-openvino" in loaded["versions"]
    assert "onnxruntime" not in loaded["versions"]  # installed too, and not what ran
    reference = OrtBackend(path, provider="cpu", preserve_numerics=True).infer(batch)
    # Half precision computes in float32 on either; INT8 may round a tie the other way.
    tolerance = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2}[precision]
    for key, count in (("arr_0", 1), ("arr_1", 3), ("arr_2", 8)):
        difference = np.abs(loaded[key] - reference[:count]).max()
        assert difference < tolerance * np.abs(reference).max(), key


@installed
def test_openvino_build_is_named_by_bench_and_doctor(onnx_file: OnnxFile) -> None:
    path = str(onnx_file("resnet8", "int8"))
    done = with_build(
        "-c", MAIN, "bench", path, "--provider", "openvino", "--batch", "8",
        "--queries", "20", "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["result"]["results"]
    assert result["provider"] == "ONNX Runtime OpenVINO"
    output = with_build("-c", MAIN, "doctor").stdout
    assert "ONNX Runtime OpenVINO (the default on this CPU)" in output
    version = next(BUILD.glob("onnxruntime_openvino-*")).name.split("-")[1].removesuffix(".dist")
    line = next(line for line in output.splitlines() if line.strip().startswith("onnxruntime "))
    assert version in line  # of the module, not of the other package that brings it


class Built:
    """An onnxruntime that says which providers it was built with."""

    __version__ = "0"

    def __init__(self, *providers: str) -> None:
        self.providers = [*providers, "CPUExecutionProvider"]

    def get_available_providers(self) -> list[str]:
        return self.providers


@pytest.mark.parametrize(
    ("installed", "device", "built", "expected"),
    [
        (True, object(), (), PROVIDERS["openvino"]),
        (True, object(), ("OpenVINOExecutionProvider",), PROVIDERS["openvino"]),
        (True, None, ("OpenVINOExecutionProvider",), OPENVINO_BUILT_IN),
        (False, None, ("OpenVINOExecutionProvider",), OPENVINO_BUILT_IN),
        (True, None, (), None),
        (False, None, (), None),
    ],
)
def test_openvino_prefers_the_plugin_to_the_build(
    installed: bool,
    device: Any,
    built: tuple[str, ...],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers.hardware, "installed", lambda module: installed)
    monkeypatch.setattr(providers, "_plugin_device", lambda about: device)
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: Built(*built))
    assert providers.openvino() is expected
