"""INT8 or FP8 against FP32: agreement, accuracy and noise, next to other tools' on the same images.

    python benchmarks/quantize.py --data folder:cifar10 [--data npz:FILE] --calib folder:cifar10 \\
        [--precision fp8 --name quantize-fp8] [--modelopt PYTHON] [--nncf PYTHON] WEIGHTS...

Every file is calibrated on the same 512 training images and compared with the FP32 file on all the
test images of every `--data`: as it is written, by ONNX Runtime without its optimizer, which is
what a builder is given; and as it runs on a CPU, ours through `rtresnet.load`, the others' as
anybody would run them. ONNX Runtime's `quantize_static` is given the flags that TensorRT
needs. NVIDIA ModelOpt and NNCF, this one with its defaults, run in environments of their own, whose
pythons `--modelopt` and `--nncf` name: they are no dependencies. Every file goes through `lint`.
More comparisons: the float rest in FP16; ranges without images next to ranges from noise; and a net
of the same function in which one channel was made a hundred times larger, by the plain method and
by ours. What corrected biases and own ranges bring is what `auto` itself measured.

In FP8 the other tool is ModelOpt, whose files keep float32 between the quantized operations, as
ours do with `--float-dtype fp32`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import markdown, rtresnet, save

import rtresnet as package
from rtresnet.core import hardware, metrics
from rtresnet.core.preprocess import Preprocess
from rtresnet.data import loader
from rtresnet.data.sources import Source, open_images, open_source
from rtresnet.quantization import calibrate, qdq, simulate
from rtresnet.quantization.formats import FP8
from rtresnet.quantization.lint import lint

OURS = ("auto", "max", "percentile", "entropy", "mse")
OURS_FP8 = tuple(method for method in OURS if method != "entropy")
IMAGES = 512
ON_CPU = {
    "INT8": "what its integer kernels compute",
    "FP8": "what ONNX Runtime computes with its optimizer, ours through `rtresnet.load`",
}
TIMES = 100  # what one channel is multiplied by; the next convolution's weights are divided by it

MODELOPT = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
source, images, method, out = sys.argv[1:]
quantize(source, quantize_mode="PRECISION", calibration_data={"images": np.load(images)},
         calibration_method=method, output_path=out, calibration_eps=["cpu"],
         high_precision_dtype="fp32")
"""

NNCF = """
import sys, nncf, numpy as np, onnx
source, images, method, out = sys.argv[1:]
data = nncf.Dataset(np.split(np.load(images), len(np.load(images))), lambda one: {"images": one})
onnx.save(nncf.quantize(onnx.load(source), data), out)
"""


def onnxruntime_file(source: Path, images: np.ndarray, method: str, out: Path) -> Path:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(np.array_split(images, len(images) // 32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantize_static(
        str(source), str(out), Reader(), per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True,
                       "QuantizeBias": False, "DedicatedQDQPair": False},
    )  # fmt: skip
    return out


def elsewhere(python: str, script: str, source: Path, images: Path, method: str, out: Path) -> Path:
    """A file that another tool makes in its own environment."""
    subprocess.run(
        [python, "-c", script, str(source), str(images), method, str(out)], check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return out


def linted(path: Path) -> str:
    """What `rtresnet lint` counts."""
    counts = Counter(entry.severity for entry in lint(onnx.load(path)))
    worse = [f"{n} {name}s" for name, n in sorted(counts.items()) if name != "note"]
    return ", ".join(worse) or "passes"


def search(scales: Path) -> dict[str, Any]:
    """What `auto` tried and kept, as its file of scales says."""
    saved = json.loads(scales.read_text())
    names = ("method", "biases_corrected", "brought_down", "own_factors", "signal_to_noise_db")
    return {name: saved[name] for name in names}


def plainly(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits by ONNX Runtime's CPU provider as anybody calls it, but for sums that saturate.

    Without VNNI its integer kernels saturate at 16 bits unless told not to, which would be a loss
    of this processor and not of the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if hardware.int8_sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = np.array_split(images, max(1, len(images) // 128))
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


def written(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits as the file says, node by node."""
    session = simulate.make_session(onnx.load(path))
    name = session.get_inputs()[0].name
    batches = np.array_split(images, max(1, len(images) // 128))
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


def ours(path: Path, images: np.ndarray) -> np.ndarray:
    with package.load(str(path), provider="cpu") as session:
        batches = np.array_split(images, max(1, len(images) // 128))
        return np.concatenate([session(batch) for batch in batches])


def noise_ratio(reference: np.ndarray, logits: np.ndarray) -> float:
    noise = np.square(reference.astype(np.float64) - logits).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise))


def with_an_outlier(source: Path, out: Path) -> Path:
    """The same function, with one channel inside the middle block a hundred times larger."""
    model = onnx.load(source)
    readers = {name: node for node in model.graph.node for name in node.input}
    pairs = []
    for node in model.graph.node:
        after = readers.get(node.output[0])
        following = readers.get(after.output[0]) if after and after.op_type == "Relu" else None
        alone = sum(after.output[0] in n.input for n in model.graph.node) == 1 if after else False
        if node.op_type == "Conv" and following and following.op_type == "Conv" and alone:
            pairs.append((node, following))
    first, second = pairs[len(pairs) // 2]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, factor, axis in (
        (first.input[1], TIMES, 0), (first.input[2], TIMES, 0), (second.input[1], 1 / TIMES, 1),
    ):  # fmt: skip
        values = onnx.numpy_helper.to_array(constants[name]).copy()
        channel = values[:, 0] if axis else values[:1]
        channel *= np.float32(factor)
        constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, out)
    return out


def quantized(source: Path, out: Path, calib: str, method: str, *more: str) -> Path:
    rtresnet("quantize", str(source), "--calib", calib, "--calib-images", str(IMAGES),
             "--calibrator", method, "--out", str(out), *more, cwd=source.parent)  # fmt: skip
    return out


def measure(weights: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    exported = rtresnet("export", "--weights", weights, "--fp32", "--no-plan", cwd=folder)
    source = folder / exported["onnx"][0]["file"]
    with package.load(str(source), provider="cpu") as session:
        contract = session.preprocess
    fp8 = options.precision == "fp8"
    calib = open_images(options.calib)
    chosen = loader.sample(calib, IMAGES)
    batches = loader.batches(calib, contract, 128, indices=chosen)
    seen = np.concatenate([batch for batch, _ in batches])
    np.save(folder / "calib.npy", seen)
    files: list[tuple[str, Path, bool]] = []
    methods = options.calibrators or (OURS_FP8 if fp8 else OURS)
    for method in methods:
        out = folder / f"{source.stem}-{method}.onnx"
        quantized(source, out, options.calib, method, *(("--fp8", "--rest", "fp32") if fp8 else ()))
        files.append((f"rtresnet, {method}", out, True))
    best = methods[0]
    saved = source.parent / "calib" / f"{source.stem}-{best}.json"
    found = search(saved) if best == "auto" else None
    half = folder / f"{source.stem}-half.onnx"
    more = ("--fp8",) if fp8 else ()
    shutil.copy(saved, saved.with_name(f"{half.stem}.json"))  # the same search
    quantized(source, half, options.calib, best, "--rest", "fp16", *more)
    files.append((f"rtresnet, {best}, rest FP16", half, True))
    if fp8:
        files += fp8_files(source, options, folder, seen)
    else:
        files += int8_files(source, options, folder, seen, contract)
    return [
        {"net": exported["model"], "data": data, "search": found, **entry}
        for data in options.data
        for entry in compared(source, files, open_source(data, "test"), contract)
    ]


def quantized_nodes(model: onnx.ModelProto) -> set[str]:
    """Convolutions, matrix products and additions that read a quantized activation."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Cast":  # between a pair and FP16
            made_by[node.output[0]] = made_by.get(node.input[0], "")
    return {
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "Add")
        for name in (node.input if node.op_type == "Add" else node.input[:1])
        if made_by.get(name) == "DequantizeLinear"
    }


def fp8_files(
    source: Path, options: argparse.Namespace, folder: Path, seen: np.ndarray
) -> list[tuple[str, Path, bool]]:
    out = folder / f"{source.stem}-none.onnx"
    quantized(source, out, "none", "auto", "--fp8", "--rest", "fp32")
    files = [("rtresnet, no images", out, True)]
    for method in ("max", "entropy") if options.modelopt else ():
        out = folder / f"{source.stem}-modelopt-{method}.onnx"
        script = MODELOPT.replace("PRECISION", "fp8")
        elsewhere(options.modelopt, script, source, folder / "calib.npy", method, out)
        files.append((f"ModelOpt, {method}", out, False))
    for method in (options.calibrators or ("auto", "max", "mse")) if options.modelopt else ():
        # ModelOpt leaves convolutions with few channels in float: ours with the same ones.
        model = onnx.load(source)
        same = quantized_nodes(onnx.load(folder / f"{source.stem}-modelopt-max.onnx"))
        kept = tuple(
            node.name
            for node in model.graph.node
            if node.op_type in ("Conv", "Gemm", "Add") and node.name not in same
        )
        calibrated = calibrate.calibrate(
            model, list(qdq.placement(model, kept)), lambda: np.array_split(seen, 4), method,
            number_format=FP8, float_nodes=kept,
        )  # fmt: skip
        out = folder / f"{source.stem}-same-{method}.onnx"
        onnx.save(calibrated.quantized(), out)
        files.append((f"rtresnet, {method}, ModelOpt's convolutions", out, True))
    return files


def int8_files(
    source: Path,
    options: argparse.Namespace,
    folder: Path,
    seen: np.ndarray,
    contract: Preprocess,
) -> list[tuple[str, Path, bool]]:
    files: list[tuple[str, Path, bool]] = []
    out = quantized(source, folder / f"{source.stem}-none.onnx", "none", "auto")
    files.append(("rtresnet, no images", out, True))
    noise = quantized(source, folder / f"{source.stem}-noise.onnx", f"synthetic:{IMAGES}", "auto")
    files.append(("rtresnet, auto, on noise", noise, True))
    larger = with_an_outlier(source, folder / f"{source.stem}-outlier.onnx")
    triples = {n: ",".join(map(str, getattr(contract, n))) for n in ("mean", "std")}
    said = ("--size", str(contract.size), "--mean", triples["mean"], "--std", triples["std"])
    for method in ("max", "auto"):
        out = folder / f"{larger.stem}-{method}.onnx"
        quantized(larger, out, options.calib, method, *said)
        files.append((f"rtresnet, {method}, a channel x{TIMES}", out, True))
    for method in ("MinMax", "Percentile", "Entropy"):
        out = onnxruntime_file(source, seen, method, folder / f"{source.stem}-ort-{method}.onnx")
        files.append((f"ONNX Runtime, {method}", out, False))
    for method in ("max", "entropy") if options.modelopt else ():
        out = folder / f"{source.stem}-modelopt-{method}.onnx"
        script = MODELOPT.replace("PRECISION", "int8")
        elsewhere(options.modelopt, script, source, folder / "calib.npy", method, out)
        files.append((f"ModelOpt, {method}", out, False))
    if options.nncf:
        out = folder / f"{source.stem}-nncf.onnx"
        elsewhere(options.nncf, NNCF, source, folder / "calib.npy", "", out)
        files.append(("NNCF", out, False))
    return files


def compared(
    source: Path, files: list[tuple[str, Path, bool]], test: Source, contract: Preprocess
) -> Iterator[dict[str, Any]]:
    found = list(loader.batches(test, contract, 128))
    images, labels = (np.concatenate([batch[n] for batch in found]) for n in (0, 1))
    reference = ours(source, images)
    right = reference.argmax(1) == labels
    convolutions = {n.name for n in onnx.load(source).graph.node if n.op_type == "Conv"}
    for name, path, is_ours in files:
        logits = written(path, images)
        ran = (ours if is_ours else plainly)(path, images)
        drop = metrics.paired_drop(right, logits.argmax(1) == labels)
        yield {
            "by": name,
            "n": len(images),
            "fp32_top1": int(right.sum()),
            "top1": int((logits.argmax(1) == labels).sum()),
            "agreement": 100 * metrics.parity(reference, logits).agreement,
            "on_cpu": 100 * metrics.parity(reference, ran).agreement,
            "drop": drop.points,
            "low": drop.low,
            "high": drop.high,
            "noise_ratio": noise_ratio(reference, logits),
            "lint": linted(path),
            "quantized_convolutions": len(
                [name for name in quantized_nodes(onnx.load(path)) if name in convolutions]
            ),
            "pairs": sum(n.op_type == "QuantizeLinear" for n in onnx.load(path).graph.node),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--data", required=True, action="append")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--precision", choices=["int8", "fp8"], default="int8")
    parser.add_argument(
        "--calibrators", type=lambda text: tuple(text.split(",")), help="ours, separated by commas"
    )
    parser.add_argument("--modelopt", metavar="PYTHON")
    parser.add_argument("--nncf", metavar="PYTHON")
    parser.add_argument("--name", default="quantize")
    options = parser.parse_args()
    results = []
    for weights in options.weights:
        with tempfile.TemporaryDirectory() as folder:
            results += measure(str(Path(weights).resolve()), options, Path(folder))
    names = ("rtresnet", "numpy", "onnx", "onnxruntime")
    versions = hardware.versions(names)
    if options.modelopt:
        command = "import importlib.metadata as m; print(m.version('nvidia-modelopt'))"
        versions["nvidia-modelopt"] = subprocess.check_output(
            [options.modelopt, "-c", command], text=True
        ).strip()
    record = {"results": results, "calib": options.calib, "precision": options.precision,
              "versions": versions}  # fmt: skip
    save(options.name, record, table(record))


def in_words(found: dict[str, Any]) -> str:
    """What each step of the search brought."""
    ratios, method = found["signal_to_noise_db"], found["method"]
    corrected = ratios.get(f"{method}, biases corrected")
    return (
        f"{method} {ratios[method]:.1f} dB, with biases corrected {corrected:.1f}, with ranges of "
        f"their own for {len(found['own_factors'])} tensors {ratios['kept']:.1f}, "
        f"{len(found['brought_down'])} tensors brought down"
    )


def table(record: dict[str, Any]) -> str:
    """The first set's rows; what `auto` does on the others in words."""
    first, precision = record["results"][0]["data"], record["precision"].upper()
    headings = (
        "net", f"{precision} by", "agreement %", "drop, points", "95 %", "SNR dB", "on a CPU %",
        "lint", "images", *(("FP8 convolutions",) if precision == "FP8" else ()),
    )  # fmt: skip
    rows = [
        (
            e["net"], e["by"], f"{e['agreement']:.2f}", f"{e['drop']:.2f}",
            f"{e['low']:.2f} to {e['high']:.2f}", f"{e['noise_ratio']:.1f}",
            f"{e['on_cpu']:.2f}", e["lint"], e["n"],
            *((e["quantized_convolutions"],) if precision == "FP8" else ()),
        )
        for e in record["results"]
        if e["data"] == first
    ]  # fmt: skip
    auto = [e for e in record["results"] if e["by"] == "rtresnet, auto"]
    others = ", ".join(
        f"{e['net']} {e['top1']} right of {e['n']} in {precision} and {e['fp32_top1']} in FP32"
        for e in auto
        if e["data"] != first
    )
    searched = "; ".join(f"{e['net']} {in_words(e['search'])}" for e in auto if e["data"] == first)
    versions = ", ".join(f"{n} {v}" for n, v in record["versions"].items())
    caption = (
        f"Agreement and drop of the file as it is written, against the FP32 file on the same "
        f"images; on a CPU: agreement of {ON_CPU[precision]}; calibrated on {IMAGES} "
        f"training images of {Path(record['calib'].partition(':')[2]).name}; ONNX Runtime CPU on "
        f"{hardware.cpu()}, {versions}."
    )
    if auto:
        caption += f" What auto found, on images held back: {searched}."
    if others:
        caption += f" On the other sets, auto: {others}."
    return markdown(headings, rows) + "\n\n" + caption


if __name__ == "__main__":
    main()
