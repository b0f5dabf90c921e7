"""Building ResNet-50 through `build.engine` next to the bare API of TensorRT-RTX.

    python benchmarks/build.py [rounds]

Weights are untrained: build time does not depend on them. Both ways alternately, each build in a
process of its own, as people build: in one process the second finds the first one's memory. The
clock starts with the modules imported; from the file on the disk to the plan on the disk. Ours also
hashes, reads the layer dump, attests and writes the sidecar and the layers.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import markdown, rtresnet, save

from rtresnet.builder import engine
from rtresnet.core import hardware
from rtresnet.core.sidecar import Profile

HEADINGS = ("net", "precision", "bare API s", "rtresnet s", "ratio", "of rounds", "n")
BATCHES = (1, 8, 32)


def bare(source: Path, out: Path) -> None:
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.ERROR)
    maker = trt.Builder(log)
    network = maker.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(source.read_bytes())
    config = maker.create_builder_config()
    entry, images = maker.create_optimization_profile(), network.get_input(0)
    entry.set_shape(images.name, *[(n, *tuple(images.shape)[1:]) for n in BATCHES])
    config.add_optimization_profile(entry)
    out.write_bytes(memoryview(maker.build_serialized_network(network, config)))


def ours(source: Path, out: Path) -> None:
    smallest, best, largest = BATCHES
    profile = Profile(min=smallest, opt=best, max=largest)
    engine.build(source, out, profiles=[profile], builder="rtx")


WAYS = {"bare": bare, "ours": ours}


def timed(way: str, source: Path, out: Path) -> float:
    """Return seconds of one build in a process of its own."""
    out.unlink(missing_ok=True)  # what replacing an old file costs is the file system's
    command = [sys.executable, __file__, way, str(source), str(out)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def once(way: str, source: str, out: str) -> None:
    import tensorrt_rtx  # noqa: F401

    started = time.perf_counter()
    WAYS[way](Path(source), Path(out))
    print(time.perf_counter() - started)


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        once(*sys.argv[1:4])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("rounds", type=int, nargs="?", default=7)
    rounds = parser.parse_args().rounds
    rows, record = [], {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        exported = rtresnet(
            "export", "--model", "resnet50", "--weights", "untrained", "--no-plan", "--fp32",
            "--fp16", "--int8", "--calibrator", "max", "--calib-images", "8", cwd=place,
        )  # fmt: skip
        for entry in exported["onnx"]:
            source = place / entry["file"]
            pairs = []
            for index in range(rounds + 1):  # the first warms the page cache
                variants = list(WAYS) if index % 2 else list(WAYS)[::-1]
                durations = {way: timed(way, source, place / f"{way}.plan") for way in variants}
                pairs.append((durations["bare"], durations["ours"]))
            pairs = pairs[1:]
            ratios = [own / plain for plain, own in pairs]
            record[entry["precision"]] = pairs
            rows.append(
                (
                    "resnet50",
                    entry["precision"],
                    f"{statistics.median(p for p, _ in pairs):.2f}",
                    f"{statistics.median(o for _, o in pairs):.2f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    rounds,
                )
            )
    versions = hardware.versions(("rtresnet", "tensorrt-rtx-cu13"))
    caption = (
        f"ONNX file to plan on disk, alternately; medians, and the median of the rounds' ratios; "
        f"{hardware.cpu()}, {', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
    record = {"seconds": record, "device": hardware.cpu(), "versions": versions}
    save("build", record, markdown(HEADINGS, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
