"""The claims of docs/concepts/bytes.md, on a small net and the installed TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bytes.py"
PARTIAL = ("only", "weights")  # variants that leave convolutions in float


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("ml_dtypes")
    spec = importlib.util.spec_from_file_location("bytes_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec.loader.exec_module(module)
    return module


def test_no_placement_moves_fewer_bytes_than_that_of_quantize(script: ModuleType) -> None:
    model = script.folded("resnet8", "B")
    rows = {}
    for variant in (*script.REFERENCES, *script.VARIANTS):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        layers = script.built(variant.make(copy), variant.settings)
        rows[variant.name] = script.row(variant.name, layers, "resnet8")
    default = rows["INT8, as `quantize` places it"]
    convolutions = default["narrow_kernels"]
    assert convolutions >= 7 and rows["FP16"]["moved"] < default["moved"]
    for name, row in rows.items():
        assert row["moved"] == row["read"] + row["written"] + row["weights"]
        whole = not any(word in name for word in PARTIAL)
        if name in ("FP32", "FP16") or not whole:
            assert row["narrow_kernels"] < convolutions, name
        else:
            assert row["narrow_kernels"] == convolutions, name
            # Fewer by a Cast of a few bytes at most.
            assert row["moved"] > 0.999 * default["moved"], name
