"""Quantize with an accuracy gate: blocks that cost too much accuracy stay in float."""

import rtresnet as rt

config = rt.QuantizeConfig(calib="digits", eval_data="digits", max_drop=1.0, gate="point")
try:
    result = rt.quantize("engines/resnet20.onnx", config)
except rt.CheckFailedError as error:
    raise SystemExit(f"INT8 loses too much accuracy: {error}") from None
assert result.gate is not None
print(*result.gate.summary, sep="\n")
for block in result.gate.blocks:
    print(f"{block.name}: {block.alone_db:.1f} dB alone, runs in {block.runs_in}")
