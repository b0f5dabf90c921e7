"""Building ResNet-50 through `build.engine` beside the bare API of TensorRT-RTX.

    python benchmarks/build.py [rounds]

Weights are untrained: build time does not depend on them. Both ways in turn, in one process, from
the file on the disk to the plan on the disk; ours also hashes, reads the layer dump, attests and
writes the sidecar and the layers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import markdown, rtresnet, save

from rtresnet import machine
from rtresnet.artifacts import Profile
from rtresnet.build import engine

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


def timed(way, source: Path, out: Path) -> float:
    started = time.perf_counter()
    way(source, out)
    return time.perf_counter() - started


def main() -> None:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 7
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
            for index in range(rounds + 1):  # the first warms the page cache and the modules
                ways = [(bare, "bare.plan"), (ours, "ours.plan")]
                taken = {
                    way: timed(way, source, place / name)
                    for way, name in (ways if index % 2 else ways[::-1])
                }
                pairs.append((taken[bare], taken[ours]))
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
    versions = machine.versions(("rtresnet", "tensorrt-rtx-cu13"))
    caption = (
        f"ONNX file to plan on the disk, in turn, medians and the median of the rounds' ratios; "
        f"{machine.cpu()}, {', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
    record = {"seconds": record, "device": machine.cpu(), "versions": versions}
    save("build", record, markdown(HEADINGS, rows) + "\n\n" + caption)


if __name__ == "__main__":
    main()
