from __future__ import annotations

import numpy as np
import pytest
import torch

from rtresnet.data import augment


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64, np.bool_])
def test_to_device_copies_values_and_dtype(dtype: type) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)[:, ::-1]
    assert np.array_equal(augment.to_device(values, "cpu").numpy(), values)


def test_stack_to_device_stacks_in_order() -> None:
    arrays = [np.full((2, 3), n, np.uint8) for n in range(4)]
    assert np.array_equal(augment.stack_to_device(arrays, "cpu").numpy(), np.stack(arrays))


def test_stack_to_device_on_a_gpu_copies_from_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[torch.Tensor] = []
    empty = torch.empty

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        pinned.append(empty(shape, dtype=dtype))
        return pinned[0]

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: (device, tensor))
    arrays = [np.full((2, 3), n, np.uint8) for n in range(4)]
    assert augment.stack_to_device(arrays, "cuda")[0] == "cuda"
    assert np.array_equal(pinned[0].numpy(), np.stack(arrays))


def test_constant_created_in_an_evaluation_takes_part_in_training() -> None:
    with torch.inference_mode():
        vector = augment.constant((1.5, 2.5), torch.device("cpu"))
    weight = torch.ones(2, requires_grad=True)
    (weight * vector).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.5, 2.5]
    assert augment.constant((1.5, 2.5), torch.device("cpu")) is vector
