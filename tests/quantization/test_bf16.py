"""BF16 files: their types, and their results in ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.exporter.fold import fold
from rtresnet.models import zoo
from rtresnet.onnxlib.interface import precision_of
from rtresnet.quantization.half import to_half
from rtresnet.quantization.lint import lint
from rtresnet.quantization.simulate import make_session, noise_ratio
from rtresnet.runtime.cpu_rewrite import emulate_bf16

pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def bf16(exported: Exported) -> onnx.ModelProto:
    return to_half(exported("resnet8", 32), "bf16")


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_weights_are_rounded_to_bf16_and_input_and_output_stay_float(
    bf16: onnx.ModelProto, exported: Exported
) -> None:
    assert precision_of(bf16) == "bf16"
    assert bf16.opset_import[0].version >= 22  # the first with BF16 convolutions
    before, after = arrays(exported("resnet8", 32)), arrays(bf16)
    for name, values in before.items():
        if values.dtype != np.float32:
            continue
        expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
        assert np.array_equal(after[name].astype(np.float32), expected), name
    ends = (bf16.graph.input[0], bf16.graph.output[0])
    assert {end.type.tensor_type.elem_type for end in ends} == {TensorProto.FLOAT}
    assert all(entry.severity == "note" for entry in lint(bf16))


def test_a_weight_beyond_fp16_is_no_problem(exported: Exported) -> None:
    model = onnx.ModelProto.FromString(exported("resnet8", 32).SerializeToString())
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "fc.bias"]
    values = numpy_helper.to_array(bias).copy()
    values[0] = 1e6
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    with pytest.raises(ArtifactError, match=r"fc\.bias reaches 1e\+06.*--bf16"):
        to_half(model)
    assert float(arrays(to_half(model, "bf16"))["fc.bias"][0]) == pytest.approx(1e6, rel=2**-8)


def test_onnx_runtime_refuses_it_and_computes_the_emulation(
    bf16: onnx.ModelProto, exported: Exported, images: Images
) -> None:
    batch = images(32, 32)
    with pytest.raises(Exception, match="Conv"):
        make_session(bf16)
    emulated = emulate_bf16(bf16)
    assert emulate_bf16(exported("resnet8", 32)) is None
    onnx.checker.check_model(emulated, full_check=True)
    tensors = [node.output[0] for node in emulated.graph.node if node.op_type in ("Conv", "Add")]
    rounded = [name.removesuffix(".float") for name in tensors]
    values = make_session(emulated, rounded).run(rounded, {"images": batch})
    for name, value in zip(rounded, values, strict=True):  # also with ONNX Runtime's optimizer
        assert np.array_equal(torch.from_numpy(value).bfloat16().float().numpy(), value), name
    logits = make_session(emulated).run(None, {"images": batch})[0]
    reference = make_session(exported("resnet8", 32)).run(None, {"images": batch})[0]
    assert 30 < noise_ratio(reference, logits) < 60


def test_it_computes_what_torch_computes_in_bf16(images: Images) -> None:
    """But for the order of sums, after which a result is rounded to another BF16 at times."""
    from rtresnet.exporter.writer import to_onnx

    torch.manual_seed(0)
    net = fold(zoo.build(zoo.spec("resnet8")).eval())
    model = to_half(to_onnx(net, size=32, name="resnet8"), "bf16")
    batch = images(32, 32)
    logits = make_session(emulate_bf16(model)).run(None, {"images": batch})[0]
    with torch.inference_mode():
        tensor = torch.from_numpy(batch)
        plain = net(tensor).numpy()
        half = net.bfloat16()(tensor.bfloat16()).float().numpy()
    assert noise_ratio(half, logits) > noise_ratio(plain, logits) - 1
    assert noise_ratio(half, logits) > 35
