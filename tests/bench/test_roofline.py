from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rtresnet.bench import kernels, roofline
from rtresnet.bench.kernels import Kernel
from rtresnet.bench.roofline import PeakRates
from rtresnet.core import gpu_targets
from rtresnet.core.errors import InputError, UnknownNameError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "roofline.json"


def counter(calls: list[int]) -> Callable[[int], PeakRates]:
    def measure(threads: int) -> PeakRates:
        calls.append(threads)
        return PeakRates(fp32=1e9 * threads, int8=2e9, bandwidth=3e9)

    return measure


def test_of_this_machine_measures_once_per_number_of_threads(cache: Path) -> None:
    calls: list[int] = []
    measure = counter(calls)
    source = "measured just now"
    assert roofline.of_this_machine(2, measure=measure).source == source
    roof = roofline.of_this_machine(2, measure=measure)
    assert roof.source.startswith("measured earlier") and roof.fp32 == 2e9
    assert roofline.of_this_machine(1, measure=measure).source == source
    assert roofline.of_this_machine(2, remeasure=True, measure=measure).source == source
    assert calls == [2, 1, 2]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"%s": {"fp32": 1.0}}',
                '{"%s": {"fp32": 0.0, "int8": 1.0, "bandwidth": 1.0}}', "\x00\xff"]
)  # fmt: skip
def test_of_this_machine_broken_cache_is_replaced(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content.replace("%s", roofline.key(2)), encoding="utf-8")
    calls: list[int] = []
    assert roofline.of_this_machine(2, measure=counter(calls)).fp32 == 2e9
    assert calls == [2]
    again = roofline.of_this_machine(2, measure=counter(calls))
    assert again.source.startswith("measured earlier") and calls == [2]


def test_of_this_machine_unwritable_cache_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "file"))
    assert roofline.of_this_machine(1, measure=counter([])).int8 == 2e9


def test_measure_roof_gives_plausible_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(roofline, "SECONDS", 0.02)
    monkeypatch.setattr(roofline, "SIDES", (128,))
    monkeypatch.setattr(roofline, "COPY", 8 << 20)
    roof = roofline.measure_roof(1)
    assert 1e7 < roof.fp32 < 1e13 and 1e7 < roof.int8 < 1e14 and 1e7 < roof.bandwidth < 1e12
    assert roof.rate("fp16") == roof.fp32 and roof.rate("int8") == roof.int8
    with pytest.raises(InputError, match="FP8"):
        roof.rate("fp8")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("Tesla T4", "T4"), ("h200", "H200 SXM"),
    ],
)  # fmt: skip
def test_find_gpu_by_names_of_people_and_drivers(text: str, result: str) -> None:
    assert roofline.find_gpu(text).name == result


@pytest.mark.parametrize("other", ["A10G", "H100 NVL", "RTX 4090 Laptop", "RTX", "4090", ""])
def test_find_gpu_of_an_unlisted_card_is_refused(other: str) -> None:
    with pytest.raises(UnknownNameError):
        roofline.find_gpu(other)


def test_gpus_rates_are_consistent() -> None:
    for gpu in roofline.GPUS:
        # The tensor cores of every one of these do INT8 at twice the rate of FP16.
        assert gpu.int8 == pytest.approx(2 * gpu.fp16, rel=0.03), gpu.name
        assert gpu.fp32 < gpu.fp16 and gpu.source
        # FP8 from Ada (sm_89) on, at the rate of INT8.
        target = gpu_targets.target_of(gpu.name) or ""
        newer = int(target.removeprefix("sm_")) >= 89
        assert gpu.fp8 == (pytest.approx(gpu.int8) if newer else None), gpu.name
        assert roofline.find_gpu(gpu.name) is gpu


def test_gpus_rates_follow_from_their_parts() -> None:
    """A figure and its parts were entered separately, so that a mistyped one is found."""
    for gpu in roofline.GPUS:
        assert gpu.fp16 == pytest.approx(gpu.parts.fp16, rel=0.01), gpu.name
        assert gpu.bandwidth == pytest.approx(gpu.parts.bandwidth, rel=0.01), gpu.name
        assert "from memory" in gpu.described and str(gpu.parts) in gpu.described
        target = gpu_targets.target_of(gpu.name) or ""
        geforce = gpu.name.startswith("RTX")
        # FP32 runs as TF32 from Ampere on: at half the rate of FP16 with FP32 accumulation.
        tf32 = {"sm_75": 1 / 8}.get(target, 1 / 4 if geforce else 1 / 2)
        assert gpu.fp32 == pytest.approx(tf32 * gpu.fp16, rel=0.01), gpu.name
        bf16 = None if target == "sm_75" else pytest.approx(gpu.fp16 / (2 if geforce else 1), 0.01)
        assert gpu.bf16 == bf16, gpu.name


def kernel(macs: int, read: int, written: int, weights: int) -> Kernel:
    return Kernel(
        name="k", block="b", stage="s", op="Conv", nodes=("k",), dtype="int8",
        multiply_adds=macs, weights=weights, read=(read,), written=written,
    )  # fmt: skip


def test_minimum_times_equal_a_calculation_by_hand() -> None:
    gpu = roofline.find_gpu("T4")  # 130 TOP/s, 320 GB/s, 4 MB
    (bound,) = roofline.minimum_times(
        [kernel(65_000_000, 3_000_000, 1_000_000, 8_000_000)], gpu, 10
    )
    assert bound.compute == pytest.approx(0.01)
    assert bound.memory == pytest.approx((40e6 + 8e6) / 320e9 * 1e3)
    # 30 MB in, 10 MB out and 8 MB of weights, of each of which the cache holds 4 MiB.
    cached = 4 * 2**20
    assert bound.beyond_cache == pytest.approx((48e6 - 3 * cached) / 320e9 * 1e3)
    assert bound.least == bound.beyond_cache and bound.through_memory == bound.memory


def test_minimum_times_are_below_published_measurements(net_file: Callable[..., Path]) -> None:
    """NVIDIA of one A100, ResNet-18, batch 32: 0.863 ms in FP16, 0.500 ms in INT8."""
    torch = pytest.importorskip("torch")
    from rtresnet.exporter.fold import fold
    from rtresnet.exporter.writer import to_onnx
    from rtresnet.models import zoo

    torch.manual_seed(0)
    model = to_onnx(fold(zoo.build(zoo.spec("resnet18")).eval()), size=224, name="resnet18")
    counted = kernels.count(model).kernels
    for precision, measured in (("fp16", 0.863), ("int8", 0.500)):
        bounds = roofline.minimum_times(
            kernels.at(counted, precision), roofline.find_gpu("A100"), 32
        )
        assert sum(bound.through_memory for bound in bounds) < measured
        assert sum(bound.least for bound in bounds) > measured / 10  # and says something
        assert all(bound.least <= bound.through_memory for bound in bounds)


def test_minimum_times_batch_below_1_is_refused() -> None:
    with pytest.raises(InputError, match="--batch 0"):
        roofline.minimum_times([kernel(1, 1, 1, 1)], roofline.GPUS[0], 0)
