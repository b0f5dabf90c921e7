"""Cost of a call of `infer`, over the real CUDA bindings on a stub of libcuda. Needs no GPU.

    python benchmarks/callpath.py [--seconds 3]

Needs gcc and cuda-python. The stub does every operation at once with malloc and memcpy, and the
engine computes nothing: what is left is Python, the bindings, and what the runtime adds to them.
The same run alternates with the calls that no inference can do without: copy into pinned memory,
copy in, graph launch, copy out, wait, copy the result. Goals: at most 20 us,
and 2.5 times the minimal sequence for `tensorrt`, whose copies are in its graph (TensorRT-RTX
captures the engine alone).

Two more tables: `Batcher` on a device of 5 ms a batch, with and without pinned memory and a second
context; and a call on a device of 0.5 ms next to a Python thread that computes, with Python's
switch interval of 5 ms and with 0.1 ms. The stub's copies are memcpy in the calling thread, so that
only the copies on the host are real; a GPU also overlaps the copies over the bus.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import markdown, save

from rtresnet.core import hardware

TESTS = Path(__file__).parents[1] / "tests" / "runtime"
GOAL_US, GOAL_RATIO = 20.0, 2.5


def measure(seconds: float) -> dict[str, Any]:
    """Measure a call by the module that built the plan, by `Batcher`, and next to a thread."""
    sys.path.insert(0, str(TESTS))
    import stub_gpu

    with tempfile.TemporaryDirectory() as folder:
        library = stub_gpu.compile_stub(Path(folder))
        return {
            "calls": {
                builder: stub_gpu.run(library, "call_cost", builder, seconds)
                for builder in ("tensorrt", "tensorrt_rtx")
            },
            "batcher": stub_gpu.run(library, "gathering", 4 * seconds),
            "gil": stub_gpu.run(library, "gil", max(100, round(200 * seconds))),
        }


def batcher_table(results: dict[str, Any]) -> str:
    """Return images/s through `Batcher`, and how busy the device was."""
    rows = [
        (
            row["dtype"], row["way"], f"{row['images_per_second']:,.0f}",
            f"{100 * row['device_busy']:.0f} %",
        )
        for row in results["rows"]
    ]  # fmt: skip
    return markdown(("images", "batch memory", "images/s", "device busy"), rows) + (
        f"\n\n`Batcher`, 32 images of {results['side']} pixels a batch, a device that takes "
        f"{results['wait_us'] / 1e3:g} ms a batch; median of {results['rounds']} rounds of "
        "20 batches alternately. staged: a session that takes any array, one context."
    )


def gil_table(results: dict[str, Any]) -> str:
    """Measure a call next to a thread that computes."""
    rows = [
        (name, f"{entry['median_ms']:.2f}", f"{entry['p99_ms']:.2f}")
        for name, entry in results.items()
    ]
    return markdown(("`infer`", "median, ms", "p99, ms"), rows) + (
        "\n\nA device of 0.5 ms; the thread is a loop in Python; 1e-4: `sys.setswitchinterval`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    if shutil.which("gcc") is None or importlib.util.find_spec("cuda") is None:
        sys.exit("this needs gcc and cuda-python (pip install cuda-python)")
    before = os.getloadavg()[0]
    measured = measure(options.seconds)
    result = measured["calls"]
    rows = [
        (
            builder, f"{entry['infer']['min_us']:.1f}", f"{entry['infer']['median_us']:.1f}",
            f"{entry['lean']['min_us']:.1f}", f"{entry['lean']['median_us']:.1f}",
            f"{entry['ratio']:.2f}", entry["driver_calls"],
        )
        for builder, entry in result.items()
    ]  # fmt: skip
    headings = (
        "plan of", "infer, us", "median", "minimal sequence, us", "median", "ratio", "driver calls",
    )  # fmt: skip
    versions = hardware.versions(("cuda-bindings", "numpy"))
    facts = {"device": hardware.cpu(), "versions": versions, "load_before": before}
    caption = (
        "One image of 192 bytes, an engine that computes nothing, a stub of libcuda; minimum and "
        f"median over {result['tensorrt']['rounds']} rounds of 200 calls alternately. "
        f"{facts['device']}, {', '.join(f'{n} {v}' for n, v in versions.items())}. Goals: "
        f"{GOAL_US:.0f} us, and for tensorrt a ratio of {GOAL_RATIO}. The machine was "
        f"shared: load {before:.1f} before the start."
    )
    met = result["tensorrt"]["ratio"] <= GOAL_RATIO and all(
        entry["infer"]["median_us"] <= GOAL_US for entry in result.values()
    )
    record = {"results": result, "goal_us": GOAL_US, "goal_ratio": GOAL_RATIO, "held": met} | facts
    record |= {name: measured[name] for name in ("batcher", "gil")}
    tables = (
        markdown(headings, rows) + "\n\n" + caption,
        batcher_table(measured["batcher"]),
        gil_table(measured["gil"]),
    )
    save("callpath", record, "\n\n".join(tables))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
