"""Cost of a call of `infer`, over the real CUDA bindings on a stub of libcuda. Needs no GPU.

    python benchmarks/callpath.py [--seconds 3]

Needs gcc and cuda-python. The stub does every operation at once with malloc and memcpy, and the
engine computes nothing: what is left is Python, the bindings, and what the runtime adds to them.
Beside it, in turn, the calls that no inference can do without: copy into pinned memory, copy in,
graph launch, copy out, wait, copy the result. Goals: at most 20 us, and 2.5 times the lean sequence
for `tensorrt`, whose copies are in its graph (TensorRT-RTX captures the engine alone).
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

from rtresnet import machine

TESTS = Path(__file__).parents[1] / "tests" / "runtime"
GOAL_US, GOAL_RATIO = 20.0, 2.5


def measure(seconds: float) -> dict[str, Any]:
    """Cost of a call by the module that built the plan."""
    sys.path.insert(0, str(TESTS))
    import stub_gpu

    with tempfile.TemporaryDirectory() as folder:
        library = stub_gpu.compile_stub(Path(folder))
        return {
            builder: stub_gpu.run(library, "call_cost", builder, seconds)
            for builder in ("tensorrt", "tensorrt_rtx")
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    if shutil.which("gcc") is None or importlib.util.find_spec("cuda") is None:
        sys.exit("this needs gcc and cuda-python (pip install cuda-python)")
    before = os.getloadavg()[0]
    found = measure(options.seconds)
    rows = [
        (
            builder, f"{entry['infer']['min_us']:.1f}", f"{entry['infer']['median_us']:.1f}",
            f"{entry['lean']['min_us']:.1f}", f"{entry['lean']['median_us']:.1f}",
            f"{entry['ratio']:.2f}", entry["driver_calls"],
        )
        for builder, entry in found.items()
    ]  # fmt: skip
    headings = (
        "plan of", "infer, us", "median", "lean sequence, us", "median", "ratio", "driver calls",
    )  # fmt: skip
    versions = machine.versions(("cuda-bindings", "numpy"))
    facts = {"device": machine.cpu(), "versions": versions, "load_before": before}
    caption = (
        "One image of 192 bytes, an engine that computes nothing, a stub of libcuda; minimum and "
        f"median over {found['tensorrt']['rounds']} rounds of 200 calls in turn. "
        f"{facts['device']}, {', '.join(f'{n} {v}' for n, v in versions.items())}. Goals: "
        f"{GOAL_US:.0f} us, and for tensorrt a ratio of {GOAL_RATIO}."
    )
    met = found["tensorrt"]["ratio"] <= GOAL_RATIO and all(
        entry["infer"]["median_us"] <= GOAL_US for entry in found.values()
    )
    record = {"results": found, "goal_us": GOAL_US, "goal_ratio": GOAL_RATIO, "held": met} | facts
    save("callpath", record, markdown(headings, rows) + "\n\n" + caption)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
