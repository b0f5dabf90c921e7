"""Use an ONNX file from another tool: state its preprocessing once, then check and measure it."""

import torch
from torch import nn

import rtresnet as rt

net = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
)  # fmt: skip
torch.onnx.export(
    net.eval(), (torch.zeros(1, 3, 32, 32),), "mine.onnx", dynamo=False,
    input_names=["images"], output_names=["logits"], dynamic_axes={"images": {0: "batch"}},
)  # fmt: skip

adopted = rt.adopt(
    "mine.onnx", rt.InputConfig(preset="half"), classes=[str(digit) for digit in range(10)],
    force=True,
)  # fmt: skip
print(f"{adopted.file}: {adopted.sidecar.precision}, assumed: {adopted.sidecar.assumed}")
accuracy = rt.evaluate("mine.onnx", data="digits")
print(f"untrained: {accuracy.top1_percent:.1f} % of {accuracy.n} images")
print("outputs do not depend on the batch:", not rt.check("mine.onnx").failed)
