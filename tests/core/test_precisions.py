"""The table of precisions, and the tables that need a row for each precision."""

from __future__ import annotations

import dataclasses
import typing

import onnx
import pytest

from rtresnet.bench import consistency, kernels, roofline
from rtresnet.builder import inspector, layers
from rtresnet.core import gpu_targets
from rtresnet.core.precisions import (
    BY_TENSORRT_TYPE,
    CALIBRATED,
    PRECISIONS,
    CalibratedName,
    PrecisionName,
    QuantizedName,
    unsupported,
)
from rtresnet.quantization.number_formats import FORMATS
from rtresnet.workflows import detect_check


def test_names_of_the_types_are_the_names_in_the_table() -> None:
    assert set(typing.get_args(PrecisionName)) == set(PRECISIONS)
    assert set(typing.get_args(CalibratedName)) == set(CALIBRATED) == set(FORMATS)
    assert {*typing.get_args(QuantizedName), "fp32"} == set(PRECISIONS)


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_is_in_every_table(name: str) -> None:
    spec = PRECISIONS[name]
    assert consistency.BATCHES[name] > 0 and consistency.PARENT[name] > 0
    if name != "bf16":  # a detector has no BF16 version
        assert 0 < detect_check.UNMATCHED[name] < 1 and 0 < detect_check.MARGIN[name] < 1
    assert name in {field.name for field in dataclasses.fields(roofline.GpuSpec)}
    assert name in {field.name for field in dataclasses.fields(roofline.PeakRates)}
    assert layers.BYTES[spec.tensorrt] == spec.bits / 8
    assert spec.tensorrt in {dtype for _, dtype in inspector.DTYPES}
    assert kernels.DTYPES[spec.onnx] == name


@pytest.mark.parametrize("name", PRECISIONS)
def test_onnx_type_has_the_bits_of_the_table(name: str) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(PRECISIONS[name].onnx)
    assert 8 * dtype.itemsize == PRECISIONS[name].bits


def test_quantized_types_are_the_calibrated_ones() -> None:
    assert layers.QUANTIZED == ("Int8", "FP8")
    assert [BY_TENSORRT_TYPE[dtype] for dtype in layers.QUANTIZED] == list(CALIBRATED)


@pytest.mark.parametrize(
    ("name", "targets", "lacking"),
    [
        ("int8", ["sm_75", "sm_120"], []),
        ("bf16", ["sm_75", "sm_80", "sm_90"], ["sm_75"]),
        ("fp8", ["sm_86", "sm_87", "sm_89", "sm_90", "sm_121"], ["sm_86", "sm_87"]),
    ],
)
def test_unsupported_targets_are_those_without_the_type(
    name: str, targets: list[str], lacking: list[str]
) -> None:
    assert unsupported(name, targets) == lacking


def test_targets_of_precisions_have_a_gpu_name() -> None:
    known = {*gpu_targets.SERVED, *gpu_targets.UNSERVED}
    assert all(known.issuperset(spec.targets or ()) for spec in PRECISIONS.values())


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.name)
def test_gpu_has_rates_of_the_precisions_of_its_target(gpu: roofline.GpuSpec) -> None:
    target = gpu_targets.target_of(gpu.name)
    assert target is not None
    assert gpu.dtypes == {name for name in PRECISIONS if not unsupported(name, [target])}
    assert {gpu.rates.rate(name) for name in gpu.dtypes} == {
        getattr(gpu, name) * 1e12 for name in gpu.dtypes
    }
