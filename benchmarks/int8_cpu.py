"""INT8 accuracy on CPUs with and without VNNI: the file as written against what each CPU runs.

    python benchmarks/int8_cpu.py --data npz:FILE --calib folder:cifar10 WEIGHTS...

Every net is exported, calibrated on 512 images and run on all test images: by ONNX Runtime without
its optimizer, which is the file as written, and through `rtresnet.load` by each provider that is
installed, on this CPU as it is and with AVX-512, VNNI and AMX hidden (tests/runtime/hide_vnni.py:
gcc, objdump and Linux on x86-64; skipped elsewhere). "saturating" is what ONNX Runtime would
compute if the runtime took no notice of the missing VNNI.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import markdown, rtresnet, save

import rtresnet as package
from rtresnet.core import hardware, metrics
from rtresnet.data import loader
from rtresnet.data.sources import open_source
from rtresnet.quantization import simulate
from rtresnet.runtime import providers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runtime"))
import hide_vnni

RUN = """
import sys, numpy as np
from rtresnet import load
from rtresnet.core import hardware
path, provider, images, out, unaware = sys.argv[1:]
if unaware == "True":
    hardware.int8_sums_saturate = lambda: False
images = np.load(images)
with load(path, provider=provider) as session:
    batches = np.array_split(images, max(1, len(images) // 128))
    np.save(out, np.concatenate([session(batch) for batch in batches]))
    print(session.describe()["provider"])
"""
HEADINGS = ("net", "CPU", "provider", "top-1", "of", "agreement with FP32 %", "SNR dB")


def hidden(folder: Path) -> dict[str, str] | None:
    """Return environment variables that hide VNNI from a process; None if impossible."""
    try:
        return hide_vnni.environment(folder)
    except hide_vnni.CannotHideError as error:
        print(f"VNNI cannot be hidden: {error}", file=sys.stderr)
        return None


def run(
    path: Path, provider: str, folder: Path, env: dict[str, str], unaware: bool = False
) -> tuple[np.ndarray, str]:
    """Return logits of `folder`/images.npy in a process of its own, and the provider's name."""
    out = folder / "logits.npy"
    arguments = [str(path), provider, str(folder / "images.npy"), str(out), str(unaware)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=os.environ | env, check=True, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return np.load(out), done.stdout.strip()


def measure(weights: str, data: str, calib: str, folder: Path) -> list[dict[str, Any]]:
    exported = rtresnet(
        "export", "--weights", weights, "--fp32", "--int8", "--calib", calib, "--no-plan",
        cwd=folder,
    )  # fmt: skip
    float_file, int8_file = (folder / entry["file"] for entry in exported["onnx"])
    with package.load(str(float_file), provider="cpu") as session:
        batches = list(loader.batches(open_source(data, "test"), session.preprocess, 128))
        images, labels = (np.concatenate([batch[n] for batch in batches]) for n in (0, 1))
        reference = np.concatenate([session(batch) for batch, _ in batches])
    np.save(folder / "images.npy", images)
    written = simulate.make_session(onnx.load(int8_file))
    parts = np.array_split(images, max(1, len(images) // 128))
    name = written.get_inputs()[0].name
    answers = [
        ("-", "file as written", np.concatenate([written.run(None, {name: p})[0] for p in parts]))
    ]
    cpus: list[tuple[str, dict[str, str]]] = [
        ("without VNNI" if hardware.int8_sums_saturate() else "with VNNI", {})
    ]
    if not hardware.int8_sums_saturate() and (variables := hidden(folder)) is not None:
        cpus.append(("VNNI hidden", variables))
    for cpu, env in cpus:
        for provider in ("cpu", *(["openvino"] if providers.openvino() else [])):
            logits, shown = run(int8_file, provider, folder, env)
            answers.append((cpu, shown, logits))
        if cpu != "with VNNI":
            logits, shown = run(int8_file, "cpu", folder, env, unaware=True)
            answers.append((cpu, f"{shown}, saturating", logits))
    return [
        {
            "net": exported["model"],
            "cpu": cpu,
            "provider": provider,
            "top1": int((logits.argmax(1) == labels).sum()),
            "fp32_top1": int((reference.argmax(1) == labels).sum()),
            "n": len(labels),
            "agreement": 100 * metrics.parity(reference, logits).agreement,
            "snr_db": float(
                10 * np.log10(np.square(reference).sum() / np.square(reference - logits).sum())
            ),
        }
        for cpu, provider, logits in answers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--name", default="int8-cpu", help="name of the results' files")
    options = parser.parse_args()
    results = []
    for weights in options.weights:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(weights).resolve())
            results += measure(path, options.data, options.calib, Path(folder))
    versions = hardware.versions(("rtresnet", "numpy", "onnxruntime", "onnxruntime-ep-openvino"))
    rows = [
        (e["net"], e["cpu"], e["provider"], e["top1"], e["n"], f"{e['agreement']:.2f}",
         f"{e['snr_db']:.1f}")
        for e in results
    ]  # fmt: skip
    float_top1 = {e["net"]: e["fp32_top1"] for e in results}
    caption = (
        f"INT8 files, calibrated on 512 training images of {Path(options.calib).name}, on "
        f"{Path(options.data).name}; FP32: "
        + ", ".join(f"{net} {count}" for net, count in float_top1.items())
        + f" right. {hardware.cpu()}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )
    record = {"results": results, "cpu": hardware.cpu(), "versions": versions}
    save(options.name, record, markdown(HEADINGS, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
