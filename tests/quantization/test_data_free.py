from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata
from rtresnet.quantization import calibrators, qdq
from rtresnet.quantization.calibrate import calibrate_data_free, observe, sample_activations

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]
LOW, HIGH = np.full(3, -2.0), np.full(3, 2.0)


@pytest.mark.parametrize("options", [{}, {"shortcut": "B"}, {"shortcut": "C"}])
def test_every_tensor_gets_a_scale(exported: Exported, options: dict[str, str]) -> None:
    model = exported("resnet8", 32, **options)
    tensors = list(qdq.placement(model))
    calibration = calibrate_data_free(model, tensors, LOW, HIGH)
    assert set(calibration.scales) == set(tensors)
    assert all(np.isfinite(scale) and scale > 0 for scale in calibration.scales.values())
    calibration.quantized()


def test_the_input_has_the_range_of_its_pixels(exported: Exported) -> None:
    model = exported("resnet8", 32)
    result = sample_activations(model, ["images"], np.array([-2.0, -1, 0]), np.array([2.0, 1, 2.5]))
    assert result["images"].largest == pytest.approx(2.5, abs=0.01)


def test_ranges_match_those_of_images_if_the_statistics_are_theirs(
    exported: Exported, images: Images
) -> None:
    import torch

    from rtresnet.exporter.fold import fold
    from rtresnet.exporter.writer import to_onnx
    from rtresnet.models import zoo

    torch.manual_seed(0)
    net = zoo.build(zoo.spec("resnet8"))
    batch = images(64, 32)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    net.train()(torch.from_numpy(batch))  # the statistics become those of the batch
    model = to_onnx(fold(net.eval()), size=32, name="resnet8")
    tensors = [name for name in qdq.placement(model) if name != "images"]
    guessed, observed = (
        sample_activations(model, tensors, LOW, HIGH),
        observe(model, tensors, [batch]),
    )
    for name in tensors:
        if "flatten" in name:  # pooling is assumed to change nothing: on the wide side
            assert calibrators.mse(guessed[name]) > calibrators.mse(observed[name])
            continue
        ratio = calibrators.mse(guessed[name]) / calibrators.mse(observed[name])
        assert 0.6 < ratio < 1.7, (name, ratio)


def test_a_file_without_batch_norm_statistics_needs_images(exported: Exported) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("resnet8", 32))
    del model.metadata_props[:]
    with pytest.raises(ArtifactError, match="needs images"):
        sample_activations(model, ["images"], LOW, HIGH)


def test_statistics_survive_encoding_and_damage_is_an_error() -> None:
    statistics = {"conv1": (np.arange(4, dtype=np.float32), np.ones(4, np.float32))}
    back = metadata.NORM_STATISTICS.decode(metadata.NORM_STATISTICS.encode(statistics))
    assert np.array_equal(back["conv1"], statistics["conv1"])
    for text in ("", "{", "[]", '{"a": 3}', '{"a": "!!!"}', '{"a": "AAAA"}'):
        with pytest.raises(ArtifactError, match="damaged"):
            metadata.NORM_STATISTICS.decode(text)
