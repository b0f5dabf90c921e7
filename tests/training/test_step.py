"""Precision of a training step, and loss scaling for fp16, which the CPU also supports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.models import checkpoint, zoo
from rtresnet.training import step
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import ALONE, World
from rtresnet.training.loader import MicroBatch
from rtresnet.training.step import Stepper, resolve_precision

RECIPE = Recipe(epochs=1, batch=8)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """gpu_of((7, 5)): torch sees such a GPU, and emulates bf16 on it as it really does."""

    def pretend(capability: tuple[int, int]) -> None:
        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or capability >= (8, 0)

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    return pretend


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")],
)
def test_resolve_precision_auto_on_a_gpu_is_what_its_tensor_cores_compute_in(
    capability: tuple[int, int], expected: str, gpu_of: Callable[[tuple[int, int]], None]
) -> None:
    gpu_of(capability)
    assert resolve_precision(RECIPE, "cuda:0") == expected
    quantized = dataclasses.replace(RECIPE, qat=True)
    assert resolve_precision(quantized, "cuda") == "fp32"


def test_resolve_precision_fp16_without_gpu_is_refused() -> None:
    with pytest.raises(InputError):
        resolve_precision(dataclasses.replace(RECIPE, precision="fp16"), "cpu")


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """fp16(init_scale=...): fp16 recipes run on the CPU, with torch's own scaler.

    Convolutions in fp16 take minutes there: they are computed in bf16, and the gradient of the FC
    is rounded to fp16, beyond whose range it overflows.
    """
    original_init = Stepper.__init__

    def with_range_of_fp16(self: Stepper, *arguments: Any, **options: Any) -> None:
        original_init(self, *arguments, **options)
        self.net.fc.weight.register_hook(lambda gradient: gradient.half().float())  # type: ignore[union-attr]

    def arrange(**options: float) -> None:
        monkeypatch.setattr(Stepper, "__init__", with_range_of_fp16)
        original = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(original, **options))
        monkeypatch.setitem(step.AUTOCAST, "fp16", torch.bfloat16)
        monkeypatch.setattr(
            "rtresnet.training.loop.resolve_precision", lambda recipe, device: "fp16"
        )

    return arrange


def stepper_of(**fields: object) -> Stepper:
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPE, precision="fp16", **fields)  # type: ignore[arg-type]
    return Stepper(zoo.build(zoo.spec("resnet8"), 4), recipe, ALONE, "cpu")


def micro() -> MicroBatch:
    inputs = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 4
    return MicroBatch(inputs=inputs, labels=labels, others=labels, share=1.0)


def weights(stepper: Stepper) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in stepper.net.parameters()]


def test_step_gradients_overflow_changes_no_weight_and_halves_the_scale(
    fp16: Callable[..., None],
) -> None:
    fp16(init_scale=2.0**30)
    stepper = stepper_of()
    stepper.train()
    before = weights(stepper)
    loss, _ = stepper.step([micro()], 0.1)
    assert torch.isfinite(loss) and stepper.loss_scale() == 2.0**29
    assert all(torch.equal(a, b) for a, b in zip(weights(stepper), before, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_step_after_a_skipped_first_step_equals_a_first_step(
    momentum: float, clip: float, fp16: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused SGD leaves momentum uninitialized where its first step is skipped."""
    original = torch.empty_like

    def dirty(like: torch.Tensor, **options: object) -> torch.Tensor:
        return original(like, **options).fill_(torch.nan)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "empty_like", dirty)
    fp16(init_scale=2.0**30, backoff_factor=2.0**-20)
    skipped, plain = (stepper_of(momentum=momentum, clip=clip) for _ in range(2))
    plain.scaler.load_state_dict(plain.scaler.state_dict() | {"scale": 2.0**10})
    for stepper, steps in ((skipped, 2), (plain, 1)):
        stepper.train()
        for _ in range(steps):
            stepper.step([micro()], 0.1)
    for ours, theirs in zip(weights(skipped), weights(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_loss_scale_is_none_unless_fp16() -> None:
    net = zoo.build(zoo.spec("resnet8"), 4)
    recipe = dataclasses.replace(RECIPE, precision="bf16")
    assert Stepper(net, recipe, ALONE, "cpu").loss_scale() is None


def train(data: str, out: Path, *more: str) -> int:
    arguments = ["--model", "resnet8", "--data", data, "--epochs", "2", "--out", str(out)]
    return main(["train", *arguments, *more])


def test_train_scale_too_small_ends_with_exit_1_and_a_fix(
    tints: str, tmp_path: Path, fp16: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fp16(init_scale=step.MIN_LOSS_SCALE / 2)
    assert train(tints, tmp_path / "run") == 1
    assert "precision=fp32" in capsys.readouterr().err
    with pytest.raises(CheckFailedError):
        stepper_of().loss_scale()


def test_train_fp16_resumed_after_skipped_steps_equals_the_unbroken_run(
    tints: str, tmp_path: Path, fp16: Callable[..., None], interrupt_in: Callable[[int], None]
) -> None:
    # Skipped until the scale is small enough, and again whenever it has grown, every second step.
    fp16(init_scale=2.0**20, growth_interval=2)
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    assert train(tints, unbroken) == 0
    interrupt_in(5)
    assert train(tints, out) == 130
    scaler = checkpoint.load(out / "last.pt").training["scaler"]
    assert scaler["scale"] < 2.0**20
    assert main(["train", "--out", str(out), "--resume"]) == 0
    ours, theirs = (checkpoint.load(run / "last.pt") for run in (out, unbroken))
    assert ours.training["scaler"] == theirs.training["scaler"]
    for name, tensor in ours.state.items():
        assert torch.equal(tensor, theirs.state[name]), name
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (out, unbroken)
    ]
    assert [r["loss_scale"] for r in logs[0]] == [r["loss_scale"] for r in logs[1]]
    rates = [record["lr"] for record in logs[0]]
    plain = tmp_path / "plain"
    fp16(init_scale=1.0)  # nothing is skipped: the schedule is the same
    assert train(tints, plain) == 0
    lines = (plain / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == rates


class Second(World):
    """Rank 1 of two, whose rank 0 has resolve_job on bf16."""

    def broadcast(self, value: object) -> object:  # type: ignore[override]
        assert isinstance(value, Recipe) and value.precision == "fp32"
        raise Shared


class Shared(Exception):
    pass


def test_train_several_processes_take_rank_0s_recipe(tints: str, tmp_path: Path) -> None:
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.data.sources import open_source
    from rtresnet.training import loop
    from rtresnet.training.config import TrainJob

    job = TrainJob(
        spec=zoo.spec("resnet8"), source=open_source(tints), test=None,
        preprocess=Preprocess.for_size(32), out=tmp_path / "run",
        recipe=dataclasses.replace(RECIPE, precision="fp32"),
    )  # fmt: skip
    with pytest.raises(Shared):
        loop.train(job, world=Second(rank=1, size=2))


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_cudnn_benchmark_is_on_for_a_gpu_and_restored(
    device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with pytest.raises(ZeroDivisionError), step.cudnn_benchmark(device):
        assert torch.backends.cudnn.benchmark is expected
        raise ZeroDivisionError
    assert torch.backends.cudnn.benchmark is False
