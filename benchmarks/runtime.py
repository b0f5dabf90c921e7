"""The runtime compared with the bare libraries, measured alternately. One function per section.

    python benchmarks/runtime.py [SECTION ...] [--seconds 10]

session: ResNet-18 in FP32, untrained, through `rtresnet.load` against onnxruntime's own
`InferenceSession.run` on the same file, with the same number of threads, at batch 1 and 8; neither
lets them spin between calls, or each would take the other's processors (`runtime/ort.py`). Calls
alternate one by one, and which is first alternates too; overhead is the median over pairs of
neighbouring calls. Goal: at most 3 %. What a call costs by itself is taken on a file of one node
with nothing to compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, markdown, rtresnet, save

from rtresnet import load
from rtresnet.runtime.ort import NO_SPINNING

GOAL = 1.03


def in_turn(
    first: Callable[[], Any], second: Callable[[], Any], seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the milliseconds of each call of both, [n] each, called alternately for `seconds`."""
    took: tuple[list[float], list[float]] = ([], [])
    calls = (first, second)
    for call in calls * 5:
        call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        order = (0, 1) if len(took[0]) % 2 == 0 else (1, 0)
        for which in order:
            before = time.perf_counter_ns()
            calls[which]()
            took[which].append((time.perf_counter_ns() - before) / 1e6)
    return np.array(took[0]), np.array(took[1])


def resampled(ratios: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Return a 95 % interval of the median, by resampling pairs."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (draws, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def cost_of_a_call(folder: Path, seconds: float) -> float:
    """Return the microseconds by which a call exceeds the bare one, with nothing to compute."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"])],
        "nothing",
        [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", 192])],
    )
    path = folder / "nothing.onnx"
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    bare = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    with load(path, provider="cpu") as ours:
        images = ours.example(1)
        theirs, mine = in_turn(
            lambda: bare.run(None, {"images": images}), lambda: ours(images), seconds
        )
    return 1000 * float(statistics.median(mine - theirs))


def session(seconds: float) -> tuple[dict[str, Any], str]:
    """Compare `Session` with `InferenceSession.run`."""
    import onnxruntime as ort

    results = []
    with tempfile.TemporaryDirectory() as folder:
        options = ("--model", "resnet18", "--weights", "untrained", "--fp32", "--no-plan")
        rtresnet("export", *options, cwd=Path(folder))
        path = Path(folder) / "engines" / "resnet18.onnx"
        with load(path, provider="cpu") as ours:
            settings = ort.SessionOptions()
            settings.intra_op_num_threads = ours.backend.threads
            settings.add_session_config_entry(*NO_SPINNING)
            bare = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
            name = bare.get_inputs()[0].name
            for batch in (1, 8):
                images = ours.example(batch)
                np.testing.assert_array_equal(ours(images), bare.run(None, {name: images})[0])
                theirs, mine = in_turn(
                    lambda images=images: bare.run(None, {name: images}),
                    lambda images=images: ours(images),
                    seconds,
                )
                ratios = mine / theirs
                low, high = resampled(ratios)
                results.append(
                    {
                        "batch": batch,
                        "bare_ms": statistics.median(theirs),
                        "session_ms": statistics.median(mine),
                        "ratio": statistics.median(ratios),
                        "low": low,
                        "high": high,
                        "n": len(ratios),
                    }
                )
            where: dict[str, Any] = ours.describe()
        cost = cost_of_a_call(Path(folder), seconds / 10)
    headings = (
        "batch", "InferenceSession.run, ms", "rtresnet session, ms", "time", "95 % interval", "n",
    )  # fmt: skip
    rows = [
        (
            e["batch"], f"{e['bare_ms']:.2f}", f"{e['session_ms']:.2f}", f"{e['ratio']:.3f}",
            f"{e['low']:.3f} to {e['high']:.3f}", e["n"],
        )
        for e in results
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    caption = (
        f"resnet18 in FP32, untrained, on {where['device']}, {where['provider']}, "
        f"{where['threads']} threads, {versions}; alternating calls, medians; time: the median "
        f"over n pairs of neighbouring calls; the goal is {GOAL} at most. With an empty "
        f"model, a call takes {cost:+.1f} us compared with the bare call."
    )
    met = all(e["ratio"] <= GOAL for e in results)
    return (
        {"results": results, "goal": GOAL, "held": met, "cost_us": cost} | where,
        markdown(headings, rows) + "\n\n" + caption,
    )


SECTIONS: dict[str, Callable[[float], tuple[dict[str, Any], str]]] = {"session": session}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    for name in options.sections or SECTIONS:
        before = os.getloadavg()[0]
        record, table = SECTIONS[name](options.seconds)
        # A file a section: one can be measured again, on another machine, without the others.
        target = "runtime" if name == "session" else f"runtime-{name}"
        save(target, record | {"load_before": before}, table)
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
