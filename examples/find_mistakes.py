"""Find the classes that fail, and the images that are most likely labelled wrongly."""

import rtresnet as rt

result = rt.evaluate(
    "engines/resnet20-int8.onnx", data="digits", config=rt.EvaluateConfig(details=True)
)
report = result.report
assert report is not None
for score in sorted(report.classes, key=lambda score: score.recall.percent or 0)[:3]:
    print(f"class {score.name}: {score.recall.count} of {score.recall.n} images recognized")
for image in report.mistakes[:3]:
    print(f"{image.place}: {image.predicted} ({image.probability:.2f}) instead of {image.label}")
print(f"expected calibration error: {100 * report.ece:.2f} points")
