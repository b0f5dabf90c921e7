from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rtresnet.quantization import qdq
from rtresnet.quantization.calibrate import calibrate, observe, references
from rtresnet.quantization.equalization import bias_corrections
from rtresnet.quantization.sensitivity import blocks, sensitivity
from rtresnet.quantization.simulate import Simulation, make_session, noise_ratio

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


def test_every_node_that_can_be_quantized_lies_in_one_block(exported: Exported) -> None:
    for name, size, count in (("resnet8", 32, 5), ("resnet18", 64, 10), ("resnet50", 64, 18)):
        model = exported(name, size)
        results = [node for nodes in blocks(model).values() for node in nodes]
        expected = [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "Add")]
        assert sorted(results) == sorted(expected) and len(blocks(model)) == count


def test_the_block_with_a_bad_range_is_found_first_and_leaving_it_in_float_helps(
    exported: Exported, images: Images
) -> None:
    model = exported("resnet8", 32)
    tensors = list(qdq.placement(model))
    calibration = calibrate(model, tensors, lambda: [images(32, 32)], "max")
    scales = calibration.scales | {"layer2.0.relu1": calibration.scales["layer2.0.relu1"] * 60}
    calibration = dataclasses.replace(calibration, scales=scales)
    held_out, reference = references(model, [images(32, 32)])
    ranked = sensitivity(calibration, held_out, reference)
    assert ranked[0].name == "layer2.0" and ranked[0].gain > 3
    assert ranked[0].alone == min(block.alone for block in ranked)
    assert sum(block.weights for block in ranked) == pytest.approx(1)
    gains = [block.gain for block in ranked]
    assert gains == sorted(gains, reverse=True)


def test_nodes_that_are_kept_are_in_float_weights_and_all(
    exported: Exported, images: Images
) -> None:
    model, batch = exported("resnet8", 32), images(4, 32)
    everything = [node for nodes in blocks(model).values() for node in nodes]
    assert qdq.placement(model, everything) == {}
    nothing = qdq.insert(model, {}, everything)
    first, second = (make_session(m).run(None, {"images": batch})[0] for m in (model, nothing))
    assert np.array_equal(first, second)


def test_the_simulation_is_the_file_that_is_written(exported: Exported, images: Images) -> None:
    model, batch = exported("resnet8", 32), images(8, 32)
    calibration = calibrate(model, list(qdq.placement(model)), lambda: [batch], "max")
    keep = blocks(model)["layer1.0"]
    simulated = Simulation(model, keep).logits([batch], calibration.scales)
    written = make_session(qdq.insert(model, calibration.scales, keep)).run(
        None, {"images": batch}
    )[0]
    assert noise_ratio(written, simulated) > 60


def test_a_block_left_in_float_keeps_its_own_biases(exported: Exported, images: Images) -> None:
    # A bias that makes up for rounded weights would be wrong where they are not rounded.
    model, batch = exported("resnet8", 32), images(96, 32) + 1
    calibration = calibrate(model, list(qdq.placement(model)), lambda: [batch], "max")
    shifts = bias_corrections(model, observe(model, [*calibration.scales], [batch]))
    calibration = dataclasses.replace(calibration, bias_corrections=shifts)
    keep = blocks(model)["layer1.0"]
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in m.graph.initializer}
        for m in (model, calibration.quantized(keep))
    )
    for node in model.graph.node:
        if node.op_type in qdq.WEIGHTED:
            same = np.array_equal(before[node.input[2]], after[node.input[2]])
            assert same == (node.name in keep), node.name
