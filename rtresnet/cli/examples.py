"""An example of every command, shown at the end of its help text."""

from __future__ import annotations

EXAMPLES = {
    "quickstart": "rtresnet quickstart",
    "pack": "rtresnet pack photos --out shards",
    "train": "rtresnet train --data photos --model resnet18 --epochs 30",
    "export": "rtresnet export --model resnet18 --int8 --calib photos",
    "adopt": "rtresnet adopt model.onnx --preset imagenet --classes classes.txt",
    "quantize": "rtresnet quantize engines/resnet18.onnx --calib photos --eval photos",
    "lint": "rtresnet lint model-int8.onnx --fix repaired.onnx",
    "build": "rtresnet build engines/resnet18-int8.onnx --target 'RTX 4090'",
    "eval": "rtresnet eval engines/resnet18-int8.onnx --data photos",
    "predict": "rtresnet predict photos --with engines/resnet18-int8.onnx --out classes.csv",
    "compare": "rtresnet compare best.pt engines/resnet18-int8.onnx --data photos",
    "check": "rtresnet check engines/resnet18-int8.onnx --data photos",
    "package": "rtresnet package engines/resnet18-int8.onnx --triton models",
    "serve": "rtresnet serve engines/resnet18-int8.onnx --max-wait 2ms",
    "bench": "rtresnet bench engines/resnet18.onnx engines/resnet18-int8.onnx --batch 1,8",
    "profile": "rtresnet profile engines/resnet18.onnx --batch 8",
    "estimate": "rtresnet estimate resnet50 --gpu 'RTX 4090' --precision int8 --batch 32",
    "report": "rtresnet report bench.json engines --out report.html",
    "study": "rtresnet study shortcuts --data digits --epochs 2 --seeds 1",
    "study degradation": "rtresnet study degradation --data cifar10:DIR --depths 20,56",
    "study shortcuts": "rtresnet study shortcuts --data digits --model resnet20",
    "study responses": "rtresnet study responses runs/resnet20-digits/best.pt --data digits",
    "inspect": "rtresnet inspect engines/resnet18-int8.plan --layers",
    "models": "rtresnet models --json models.json",
    "doctor": "rtresnet doctor",
}
