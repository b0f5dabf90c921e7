from __future__ import annotations

from rtresnet.onnxlib import blocks


def assigned(*nodes: tuple[str, str]) -> list[str]:
    return blocks.assign(nodes)


def test_names_say_the_block() -> None:
    assert assigned(
        ("conv1", "Conv"), ("relu", "Relu"), ("layer1.0.conv1", "Conv"), ("layer1.0.add", "Add"),
        ("layer2.1.conv1", "Conv"), ("avgpool", "GlobalAveragePool"), ("flatten", "Flatten"),
        ("fc", "Gemm"),
    ) == ["stem", "stem", "layer1.0", "layer1.0", "layer2.1", "head", "head", "head"]  # fmt: skip


def test_a_weights_node_before_its_layer_is_not_the_head() -> None:
    assert assigned(
        ("layer1.0.conv1.weight.dq", "DequantizeLinear"), ("conv1", "Conv"),
        ("fc.weight.dq", "DequantizeLinear"), ("layer1.0.conv1", "Conv"), ("fc", "Gemm"),
    ) == ["layer1.0", "stem", "stem", "layer1.0", "head"]  # fmt: skip


def test_without_names_additions_end_blocks() -> None:
    ops = ["Conv", "Relu", "MaxPool",
           "Conv", "Relu", "Conv", "Add", "Relu",
           "Conv", "Relu", "Conv", "Conv", "Add", "Relu",
           "GlobalAveragePool", "Flatten", "Gemm"]  # fmt: skip
    found = assigned(*((f"n{index}", op) for index, op in enumerate(ops)))
    assert found == ["stem"] * 3 + ["block1"] * 5 + ["block2"] * 6 + ["head"] * 3


def test_a_net_without_a_convolution_is_all_stem() -> None:
    assert assigned(("a", "Relu"), ("b", "Relu")) == ["stem", "stem"]
