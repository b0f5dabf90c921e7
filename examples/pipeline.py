"""From images to a measured TensorRT plan, on a machine without a GPU."""

import logging

import rtresnet as rt

logging.basicConfig(level=logging.INFO, format="%(message)s")

run = rt.train(rt.TrainConfig(model="resnet20", data="digits"))
onnx = rt.export(run.checkpoint, "engines/resnet20.onnx")
int8 = rt.quantize(onnx.path, rt.QuantizeConfig(precision="int8", calib="digits"))
plan = rt.build(int8.path, rt.BuildConfig(targets=("sm_89",)))

accuracy = rt.evaluate(int8.path, data="digits")
print(f"INT8: {accuracy.top1_percent:.2f} % of {accuracy.n} images")
agreement = rt.compare(run.checkpoint, int8.path, data="digits")
print(f"same answer as the checkpoint: {100 * agreement.agreement:.2f} %")
result = rt.benchmark([onnx.path, int8.path], rt.BenchmarkConfig(batch=(1, 8), seconds=1))
for row in result.results:
    print(f"{row.name}: {row.measurement.latency.median:.3f} ms")
print(f"{plan.path}: for {', '.join(plan.plan.targets)}, {plan.plan.attested.dtypes}")
