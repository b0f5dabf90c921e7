"""INT8 on the kernels of x86 CPUs without VNNI, whatever CPU the tests run on.

OpenVINO's are chosen by ONEDNN_MAX_CPU_ISA, ONNX Runtime's by hiding the newer instructions
(no_vnni.c). Each test runs in a process of its own, since libraries look once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core import hardware
from rtresnet.quantization import qdq, simulate
from rtresnet.runtime.providers import openvino

OnnxFile = Callable[..., Path]
Images = Callable[..., np.ndarray]

RUN = """
import sys, numpy as np
from rtresnet.runtime.ort import OrtBackend
backend = OrtBackend(sys.argv[1], provider=sys.argv[2], preserve_numerics=True)
print(backend.cpu_note)
np.save(sys.argv[4], backend.infer(np.load(sys.argv[3])))
"""
# As if the processor had VNNI: 8-bit weights on all of uint8.
UNAWARE = (
    """
from rtresnet.core import hardware
hardware.int8_sums_saturate = lambda: False
"""
    + RUN
)


def run(
    code: str, model: Path, provider: str, batch: np.ndarray, folder: Path, env: dict[str, str]
) -> tuple[np.ndarray, str]:
    """Return logits and standard output of a process with these environment variables."""
    np.save(folder / "images.npy", batch)
    out = folder / "logits.npy"
    command = [
        sys.executable,
        "-c",
        code,
        str(model),
        provider,
        str(folder / "images.npy"),
        str(out),
    ]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.load(out), done.stdout


def extreme(path: Path) -> Path:
    """Return a net with the largest activations and weights of INT8: logits are 1 for ones."""
    channels = 32
    first = np.full((channels, 3, 1, 1), 1 / 3, np.float32)
    rest = {f"w{n}": np.full((channels, channels, 1, 1), 1 / channels, np.float32) for n in "bc"}
    nodes = []
    for index, name in enumerate("abc"):
        source = "images" if index == 0 else "abc"[index - 1]
        nodes += [
            helper.make_node("Conv", [source, f"w{name}"], [f"{name}.c"], name=f"{name}.c"),
            helper.make_node("Relu", [f"{name}.c"], [name], name=name),
        ]
    nodes += [
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="p"),
        helper.make_node("Flatten", ["p"], ["logits"], name="f"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "ones", [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", channels])],
        [numpy_helper.from_array(array, name) for name, array in ({"wa": first} | rest).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(qdq.insert(model, dict.fromkeys(qdq.placement(model), 1 / 127)), path)
    return path


def test_backend_without_vnni_avoids_saturation(
    tmp_path: Path, without_vnni: dict[str, str]
) -> None:
    path, ones = extreme(tmp_path / "extreme.onnx"), np.ones((2, 3, 8, 8), np.float32)
    wrong, _ = run(UNAWARE, path, "cpu", ones, tmp_path, without_vnni)
    assert np.abs(wrong - 1).max() > 0.1  # so the kernels of such a CPU ran
    logits, note = run(RUN, path, "cpu", ones, tmp_path, without_vnni)
    np.testing.assert_allclose(logits, 1, atol=0.01)
    assert "no VNNI" in note


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_backend_without_vnni_returns_the_files_logits(
    name: str, provider: str, onnx_file: OnnxFile, images: Images, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    if provider == "cpu":
        env = request.getfixturevalue("without_vnni")
    elif openvino() is None:
        pytest.skip("OpenVINO is not installed, or offers no device on this CPU")
    size = 32 if name == "resnet8" else 64
    path, batch = onnx_file(name, "int8", size), 2 * images(8, size)
    session = simulate.make_session(onnx.load(path))
    (written,) = session.run(None, {session.get_inputs()[0].name: batch})
    logits, note = run(RUN, path, provider, batch, tmp_path, env)
    assert "conv1" in note
    noise = np.square(logits - written).sum() / np.square(written).sum()
    assert noise < 10**-3.5  # 35 dB; saturating kernels gave 13


@pytest.mark.parametrize(
    ("limit", "flags", "expected"),
    [
        (None, {"avx2"}, True),
        (None, {"avx2", "avx512f", "avx512bw"}, True),
        (None, {"avx2", "avx_vnni"}, False),
        (None, {"avx512_vnni"}, False),
        ("AVX2", {"avx512_vnni"}, True),
        ("avx512_core", {"avx512_vnni"}, True),
        ("AVX512_CORE_VNNI", {"avx512_vnni"}, False),
        ("DEFAULT", {"avx2"}, True),
    ],
)
def test_int8_sums_saturate_follows_flags_and_onednn_limit(
    limit: str | None, flags: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_flags", lambda: flags)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert hardware.int8_sums_saturate() is expected
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert hardware.int8_sums_saturate() is False
