from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rtresnet.core.errors import CheckFailedError
from rtresnet.exporter.fold import fold
from rtresnet.exporter.verify import check_folded, check_parity, operations
from rtresnet.models.resnet import ResNet

Forward = Callable[[np.ndarray], np.ndarray]
SIZE = 32
FACTOR, FLOOR = 10, 1e-5  # as the docstring promises


def forward_of(net: nn.Module) -> Forward:
    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = net(torch.from_numpy(images)).numpy()
        return logits

    return forward


@pytest.fixture(scope="module")
def net(make_net: Callable[..., ResNet]) -> ResNet:
    return make_net("resnet8")


@pytest.fixture(scope="module")
def folded(net: ResNet) -> Forward:
    return forward_of(fold(net))


class Cancels(nn.Module):
    """Means of images, with an offset that costs float32 most of its digits."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)) + self.offset) - self.offset


def test_a_good_file_passes_and_says_how_near_it_is(net: ResNet, folded: Forward) -> None:
    parity = check_parity(net, folded, size=SIZE, n=5)
    assert parity["n"] == 5
    assert 0 < parity["rounding"] < 1e-6
    assert 0 <= parity["relative"] < 1e-6
    assert 0 <= parity["largest"] < 1e-4


@pytest.mark.parametrize("factor", [1.001, 1 + 5 * FLOOR, 0.0, -1.0])
def test_logits_that_are_off_are_refused(net: ResNet, folded: Forward, factor: float) -> None:
    with pytest.raises(CheckFailedError, match="differs") as caught:
        check_parity(net, lambda images: folded(images) * np.float32(factor), size=SIZE)
    assert caught.value.exit_code == 1


def test_one_logit_of_one_image_off_is_refused(net: ResNet, folded: Forward) -> None:
    def candidate(images: np.ndarray) -> np.ndarray:
        logits = folded(images)
        logits[-1, 3] += 1e-3 * np.abs(logits).max()
        return logits

    with pytest.raises(CheckFailedError):
        check_parity(net, candidate, size=SIZE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_refused(net: ResNet, folded: Forward, value: float) -> None:
    def candidate(images: np.ndarray) -> np.ndarray:
        logits = folded(images)
        logits[0, 0] = value
        return logits

    with pytest.raises(CheckFailedError):
        check_parity(net, candidate, size=SIZE)


def test_a_net_whose_logits_are_all_zero_hides_nothing(make_net: Callable[..., ResNet]) -> None:
    net = make_net("resnet8")
    nn.init.zeros_(net.fc.weight)
    good = forward_of(fold(net))
    check_parity(net, good, size=SIZE)
    for wrong in (1.0, np.nan):
        with pytest.raises(CheckFailedError):
            check_parity(net, lambda images, w=wrong: good(images) + np.float32(w), size=SIZE)


def test_a_net_that_overflows_float32_is_refused(make_net: Callable[..., ResNet]) -> None:
    net = make_net("resnet8")
    nn.init.constant_(net.fc.weight, 3e38)
    candidate = forward_of(fold(net))
    assert np.isinf(candidate(np.ones((1, 3, SIZE, SIZE), np.float32))).any()
    with pytest.raises(CheckFailedError):
        check_parity(net, candidate, size=SIZE)


def test_a_candidate_that_answers_every_row_with_the_first_is_refused(
    net: ResNet, folded: Forward
) -> None:
    def frozen(images: np.ndarray) -> np.ndarray:
        return np.repeat(folded(images[:1]), len(images), axis=0)

    with pytest.raises(CheckFailedError):
        check_parity(net, frozen, size=SIZE)


def test_a_file_with_a_frozen_batch_does_not_pass(
    net: ResNet, exported: Callable[..., tuple[ResNet, onnx.ModelProto]]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    _, model = exported("resnet8", SIZE)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    check_parity(net, lambda images: session.run(None, {"images": images})[0], size=SIZE)
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    frozen.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    session = onnxruntime.InferenceSession(
        frozen.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|off by"):
        check_parity(net, lambda images: session.run(None, {"images": images})[0], size=SIZE)


def test_the_tolerance_grows_with_the_rounding_of_float32() -> None:
    def off_by(net: nn.Module, amount: float) -> Forward:
        exact = forward_of(Cancels(0.0))
        return lambda images: exact(images) * np.float32(1 + amount)

    rough, exact = Cancels(1e3), Cancels(0.0)
    rounding = check_parity(rough, off_by(rough, 0), size=SIZE)["rounding"]
    assert rounding * FACTOR > 10 * FLOOR
    allowed = rounding * FACTOR
    check_parity(rough, off_by(rough, allowed * 0.8), size=SIZE)
    for net, amount in ((rough, allowed * 1.2), (exact, allowed * 0.8)):
        with pytest.raises(CheckFailedError):
            check_parity(net, off_by(net, amount), size=SIZE)


def test_the_floor_is_allowed_to_every_net(net: ResNet, folded: Forward) -> None:
    check_parity(net, lambda images: folded(images) * np.float32(1 + 0.5 * FLOOR), size=SIZE)


def test_a_batch_norm_or_a_convolution_without_bias_is_found(
    exported: Callable[..., tuple[ResNet, onnx.ModelProto]],
) -> None:
    _, model = exported("resnet8", SIZE)
    check_folded(model)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del next(node for node in bare.graph.node if node.op_type == "Conv").input[2]
    with pytest.raises(CheckFailedError):
        check_folded(bare)
    unfolded = onnx.ModelProto()
    unfolded.CopyFrom(model)
    next(n for n in unfolded.graph.node if n.op_type == "Relu").op_type = "BatchNormalization"
    assert operations(unfolded)["BatchNormalization"] == 1
    with pytest.raises(CheckFailedError):
        check_folded(unfolded)
