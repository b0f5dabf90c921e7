"""The commands in the order of the work: a line for `rtresnet --help` and an example of each.

A command's file is imported when the command is named, so `rtresnet --help` needs none of them.
"""

from __future__ import annotations

SUMMARIES = {
    "quickstart": "Train, export, build and measure a small net; write a page.",
    "pack": "Put a folder of photographs into a few large files.",
    "train": "Train a net on labelled images.",
    "export": "Turn a checkpoint into ONNX files and plans.",
    "adopt": "State the input and classes of an ONNX file from elsewhere.",
    "quantize": "Write an INT8 or FP16 version of an FP32 ONNX file.",
    "lint": "Check quantized ONNX models for TensorRT problems.",
    "build": "Compile an ONNX file into a TensorRT plan.",
    "eval": "Measure top-1 and top-5 accuracy.",
    "predict": "Print the most probable classes of images.",
    "compare": "Measure how far two artifacts agree.",
    "check": "Check that batches do not change an answer.",
    "package": "Create a Triton model repository.",
    "serve": "Serve models over HTTP and gRPC.",
    "bench": "Measure latency and throughput.",
    "profile": "Show where the time goes, block by block.",
    "estimate": "Estimate the minimum latency on a given GPU.",
    "report": "Create an HTML report from results.",
    "study": "Repeat the paper's analyses on any net and any data.",
    "inspect": "Show an artifact and where it came from.",
    "models": "List the nets with their cost.",
    "doctor": "Show what this machine can do, and what it lacks.",
}
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
