"""INT8 or FP8 against FP32: agreement, accuracy and noise, next to other tools' on the same images.

    python benchmarks/quantize.py --data folder:cifar10 [--data npz:FILE] --calib folder:cifar10 \\
        [--precision fp8 --name quantize-fp8] [--modelopt PYTHON] [--nncf PYTHON] WEIGHTS...

Every file is calibrated on the same 512 training images and compared with the FP32 file on the test
images of every `--data`: as it is written, by ONNX Runtime without its optimizer, which is what a
builder reads; and, on the first `--data`, as it runs on a CPU: rtresnet's files through
`rtresnet.load`, the others with ONNX Runtime's defaults. `quantize_static` of ONNX Runtime gets the
flags that TensorRT needs. NVIDIA ModelOpt and NNCF, the latter with its defaults, are not
dependencies: `--modelopt` and `--nncf` name the Python of an environment that has them. `lint`
checks every file. INT8 also compares ranges without images with ranges from noise, and a net with
the same function in which one channel is a hundred times larger.

In FP8 the other tool is ModelOpt, whose files keep float32 between the quantized operations, as
rtresnet's do with `--float-dtype fp32`. ModelOpt leaves convolutions with 16 input channels in
float. rtresnet is also measured with the same convolutions, and with `--fp8-min-channels 32`.
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
from rtresnet.quantization.lint import lint
from rtresnet.quantization.number_formats import FP8

OURS = ("auto", "max", "percentile", "entropy", "mse")
OURS_FP8 = tuple(method for method in OURS if method != "entropy")
IMAGES = 512
ON_CPU = {
    "INT8": "the file run by integer kernels",
    "FP8": "the file run with ONNX Runtime's optimizer, rtresnet's through `rtresnet.load`",
}
WIDE = 32  # input channels of the convolutions that ModelOpt quantizes to FP8
TIMES = 100  # factor of one channel; the next convolution's weights are divided by it

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
    """Run another tool in its own environment; return its file."""
    subprocess.run(
        [python, "-c", script, str(source), str(images), method, str(out)], check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return out


def linted(path: Path) -> str:
    """Return the counts of `rtresnet lint`."""
    counts = Counter(entry.severity for entry in lint(onnx.load(path)))
    worse = [f"{n} {name}s" for name, n in sorted(counts.items()) if name != "note"]
    return ", ".join(worse) or "passes"


def search(scales: Path) -> dict[str, Any]:
    """Return the candidates and the choice of `auto`, from its file of scales."""
    saved = json.loads(scales.read_text())
    names = ("method", "biases_corrected", "brought_down", "own_factors", "signal_to_noise_db")
    return {name: saved[name] for name in names}


def plainly(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits of ONNX Runtime's CPU provider with its defaults.

    Without VNNI its integer kernels saturate at 16 bits by default. That is turned off, because it
    would be a loss of this processor and not of the file.
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
    """Return the logits of the file as it is written, node by node."""
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
    """Write the same function with one channel inside the middle block a hundred times larger."""
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
    images = np.concatenate([batch for batch, _ in batches])
    np.save(folder / "calib.npy", images)
    files: list[tuple[str, Path, bool]] = []
    methods = options.calibrators or (OURS_FP8 if fp8 else OURS)
    for method in methods:
        out = folder / f"{source.stem}-{method}.onnx"
        quantized(source, out, options.calib, method, *(("--fp8", "--rest", "fp32") if fp8 else ()))
        files.append((f"rtresnet, {method}", out, True))
    best = methods[0]
    saved = source.parent / "calib" / f"{source.stem}-{best}.json"
    searched = search(saved) if best == "auto" else None
    half = folder / f"{source.stem}-half.onnx"
    more = ("--fp8",) if fp8 else ()
    shutil.copy(saved, saved.with_name(f"{half.stem}.json"))  # the same search
    quantized(source, half, options.calib, best, "--rest", "fp16", *more)
    files.append((f"rtresnet, {best}, rest FP16", half, True))
    if fp8:
        files += fp8_files(source, options, folder, images)
    else:
        files += int8_files(source, options, folder, images, contract)
    return [
        {"net": exported["model"], "data": data, "search": searched, **entry}
        for data in options.data
        for entry in compared(
            source, files, open_source(data, "test"), contract, options.images,
            on_cpu=data == options.data[0],
        )
    ]  # fmt: skip


def quantized_nodes(model: onnx.ModelProto) -> set[str]:
    """Return convolutions, matrix products and additions that read a quantized activation."""
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
    source: Path, options: argparse.Namespace, folder: Path, images: np.ndarray
) -> list[tuple[str, Path, bool]]:
    methods = options.calibrators or ("auto", "max", "mse")
    out = folder / f"{source.stem}-none.onnx"
    quantized(source, out, "none", "auto", "--fp8", "--rest", "fp32")
    wide = folder / f"{source.stem}-wide.onnx"
    quantized(source, wide, options.calib, methods[0], "--fp8", "--rest", "fp32",
              "--fp8-min-channels", str(WIDE))  # fmt: skip
    files = [
        ("rtresnet, no images", out, True),
        (f"rtresnet, {methods[0]}, from {WIDE} channels", wide, True),
    ]
    for method in ("max", "entropy") if options.modelopt else ():
        out = folder / f"{source.stem}-modelopt-{method}.onnx"
        script = MODELOPT.replace("PRECISION", "fp8")
        elsewhere(options.modelopt, script, source, folder / "calib.npy", method, out)
        files.append((f"ModelOpt, {method}", out, False))
    for method in methods if options.modelopt else ():
        model = onnx.load(source)
        same = quantized_nodes(onnx.load(folder / f"{source.stem}-modelopt-max.onnx"))
        excluded = tuple(
            node.name
            for node in model.graph.node
            if node.op_type in ("Conv", "Gemm", "Add") and node.name not in same
        )
        calibrated = calibrate.calibrate(
            model, list(qdq.placement(model, excluded)), lambda: np.array_split(images, 4), method,
            number_format=FP8, float_nodes=excluded,
        )  # fmt: skip
        out = folder / f"{source.stem}-same-{method}.onnx"
        onnx.save(calibrated.quantized(), out)
        files.append((f"rtresnet, {method}, ModelOpt's convolutions", out, True))
    return files


def int8_files(
    source: Path,
    options: argparse.Namespace,
    folder: Path,
    images: np.ndarray,
    contract: Preprocess,
) -> list[tuple[str, Path, bool]]:
    files: list[tuple[str, Path, bool]] = []
    out = quantized(source, folder / f"{source.stem}-none.onnx", "none", "auto")
    files.append(("rtresnet, no images", out, True))
    noise = quantized(source, folder / f"{source.stem}-noise.onnx", f"synthetic:{IMAGES}", "auto")
    files.append(("rtresnet, auto, on noise", noise, True))
    larger = with_an_outlier(source, folder / f"{source.stem}-outlier.onnx")
    triples = {n: ",".join(map(str, getattr(contract, n))) for n in ("mean", "std")}
    stated = ("--size", str(contract.size), "--mean", triples["mean"], "--std", triples["std"])
    for method in ("max", "auto"):
        out = folder / f"{larger.stem}-{method}.onnx"
        quantized(larger, out, options.calib, method, *stated)
        files.append((f"rtresnet, {method}, a channel x{TIMES}", out, True))
    for method in ("MinMax", "Percentile", "Entropy"):
        out = onnxruntime_file(source, images, method, folder / f"{source.stem}-ort-{method}.onnx")
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
    source: Path,
    files: list[tuple[str, Path, bool]],
    test: Source,
    contract: Preprocess,
    count: int,
    *,
    on_cpu: bool,
) -> Iterator[dict[str, Any]]:
    batches = list(loader.batches(test, contract, 128, indices=loader.sample(test, count)))
    images, labels = (np.concatenate([batch[n] for batch in batches]) for n in (0, 1))
    reference = ours(source, images)
    right = reference.argmax(1) == labels
    convolutions = {n.name for n in onnx.load(source).graph.node if n.op_type == "Conv"}
    for name, path, is_ours in files:
        logits = written(path, images)
        ran = (ours if is_ours else plainly)(path, images) if on_cpu else None
        drop = metrics.paired_drop(right, logits.argmax(1) == labels)
        yield {
            "by": name,
            "n": len(images),
            "fp32_top1": int(right.sum()),
            "top1": int((logits.argmax(1) == labels).sum()),
            "agreement": 100 * metrics.parity(reference, logits).agreement,
            "on_cpu": None if ran is None else 100 * metrics.parity(reference, ran).agreement,
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
    parser.add_argument("--images", type=int, default=10_000, help="test images of each --data")
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


def in_words(choice: dict[str, Any]) -> str:
    """Describe the gain of each step of the search."""
    ratios, method = choice["signal_to_noise_db"], choice["method"]
    corrected = ratios.get(f"{method}, biases corrected")
    return (
        f"{method} {ratios[method]:.1f} dB, with biases corrected {corrected:.1f}, with individual "
        f"ranges for {len(choice['own_factors'])} tensors {ratios['kept']:.1f}, "
        f"{len(choice['brought_down'])} tensors scaled down"
    )


def table(record: dict[str, Any]) -> str:
    precision = record["precision"].upper()
    headings = (
        "net", f"{precision} by", "agreement %", "drop, points", "95 %", "SNR dB", "on a CPU %",
        "lint", "images", *(("FP8 convolutions",) if precision == "FP8" else ()),
    )  # fmt: skip
    rows = [
        (
            e["net"], e["by"], f"{e['agreement']:.2f}", f"{e['drop']:.2f}",
            f"{e['low']:.2f} to {e['high']:.2f}", f"{e['noise_ratio']:.1f}",
            "-" if e["on_cpu"] is None else f"{e['on_cpu']:.2f}", e["lint"], e["n"],
            *((e["quantized_convolutions"],) if precision == "FP8" else ()),
        )
        for e in record["results"]
    ]  # fmt: skip
    searches = {e["net"]: e["search"] for e in record["results"] if e["search"]}
    searched = "; ".join(f"{net} {in_words(search)}" for net, search in searches.items())
    versions = ", ".join(f"{n} {v}" for n, v in record["versions"].items())
    caption = (
        f"Agreement and drop of the file as it is written, against the FP32 file on the same "
        f"images; on a CPU: agreement of {ON_CPU[precision]}; calibrated on {IMAGES} "
        f"training images of {Path(record['calib'].partition(':')[2]).name}; ONNX Runtime CPU on "
        f"{hardware.cpu()}, {versions}."
    )
    if searches:
        caption += f" The search of auto, on held-out calibration images: {searched}."
    return markdown(headings, rows) + "\n\n" + caption


if __name__ == "__main__":
    main()
