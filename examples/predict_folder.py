"""Classify every image in a folder into a CSV file; an interrupted run can be resumed."""

from pathlib import Path

import numpy as np
from PIL import Image

import rtresnet as rt

folder = Path("scans")
folder.mkdir(exist_ok=True)
for number in range(8):
    pixels = np.random.default_rng(number).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")

result = rt.predict_table([folder], "engines/resnet20-int8.onnx", "classes.csv")
print(f"{result.out}: {result.images} images")
print(Path("classes.csv").read_text().splitlines()[1])
