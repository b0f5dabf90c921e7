"""Small made-up results of the commands, and a real browser."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WHERE = {
    "device": "A processor, 2 cores",
    "provider": "ONNX Runtime CPU",
    "threads": 2,
    "versions": {"onnxruntime": "1.32.0"},
}
NETS = {"fp32": (4.0, 91.5), "fp16": (2.5, 91.25), "int8": (1.5, 90.0), "bad": (3.0, 80.0)}


def bench() -> dict[str, Any]:
    results = []
    rng = np.random.default_rng(0)
    for batch in (1, 8):
        for name, (ms, _) in NETS.items():
            samples = (batch * ms * (1 + rng.exponential(0.1, 200))).tolist()
            median = float(np.median(samples))
            results.append(
                {
                    "asked": f"engines/net-{name}.onnx", "measured": f"engines/net-{name}.onnx",
                    "precision": name if name != "bad" else "int8", "untrained": False,
                    "batch": batch, "size": 32, "steady": True, "speed": NETS["fp32"][0] / ms,
                    "samples": samples,
                    "latency": {
                        "n": 200, "median": median, "mean": median, "std": 0.125,
                        "p90": 1.2 * median, "p95": 1.3 * median, "p99": 1.4 * median,
                        "images_per_second": 1e3 * batch / median,
                    },
                }
                | WHERE
            )  # fmt: skip
    return {"notes": [], "results": results}


def evaluated(name: str) -> dict[str, Any]:
    entry = {
        "artifact": f"engines/net-{name}.onnx", "precision": name if name != "bad" else "int8",
        "top1": 1, "n": 846, "top1_percent": NETS[name][1], "top5_percent": None,
        "data": "npz:/somewhere/else/images.npz", "split": "test",
    } | WHERE  # fmt: skip
    return entry | {"members": [entry]}


def profiled(name: str) -> dict[str, Any]:
    def part(block: str, stage: str, ms: float) -> dict[str, Any]:
        return {
            "name": block, "stage": stage, "ms": ms, "share": ms / 4, "other": 0.0,
            "flops_per_second": 2e9, "bytes_per_second": 1e9, "compute": 1.0, "memory": 0.5,
            "bound": "compute",
        }  # fmt: skip

    return {
        "artifact": f"engines/net-{name}.onnx", "precision": name, "batch": 8, "agrees": True,
        "whole": 4.0, "total": 4.0, "layers": [],
        "stages": [part("stem", "stem", 1.0), part("layer1", "layer1", 3.0)],
        "blocks": [part("stem", "stem", 1.0), part("layer1.0", "layer1", 1.25),
                   part("layer1.1", "layer1", 1.75)],
    } | WHERE  # fmt: skip


def searched(what: str, best: float | None) -> dict[str, Any]:
    """Return a result of `bench --find-batch` (what: "batch") or `--find-qps` ("qps")."""
    points = [
        {"load": load, "n": 100, "median": load, "p99": p99, "images_per_second": 125.5,
         "holds": p99 is not None and p99 <= 10}
        for load, p99 in ((1.0, 2.5), (4.0, 6.5), (4.0, 8.75), (4.0, 11.0), (8.0, None))
    ]  # fmt: skip
    results = {"what": what, "p99_ms": 10.0, "best": best, "limit": False, "points": points}
    return {
        "environment": {"remarks": ["other processes used 1.50 of 4 cores"]},
        "searches": [
            {
                "measured": f"engines/net-{name}.onnx", "precision": name, "untrained": False,
                "note": None, "search": results,
            } | WHERE
            for name in ("fp32", "int8")
        ],
    }  # fmt: skip


def write_into(folder: Path, verb: str, result: Any, name: str | None = None) -> Path:
    path = folder / f"{name or verb}.json"
    made_by = {"command": f"rtresnet {verb} a<b>.onnx"}
    path.write_text(json.dumps({"verb": verb, "made_by": made_by, "result": result}))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write("bench", result): the file that the verb would have written."""
    return functools.partial(write_into, tmp_path)


@pytest.fixture
def measured(tmp_path: Path) -> list[Path]:
    """Files of bench, eval, compare and profile for four artifacts of one net."""
    return measured_in(tmp_path)


def measured_in(folder: Path) -> list[Path]:
    write = functools.partial(write_into, folder)
    agreement = {
        "agreement": 0.984375, "n": 846, "data": "digits",
        "reference": {"artifact": "engines/net-fp32.onnx", "precision": "fp32"},
        "candidate": {"artifact": "engines/net-int8.onnx", "precision": "int8"},
    }  # fmt: skip
    return [
        write("bench", bench()),
        *(write("eval", evaluated(name), f"eval-{name}") for name in NETS),
        write("compare", agreement),
        *(write("profile", profiled(name), f"profile-{name}") for name in ("fp32", "int8")),
    ]


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """browser(page): the DOM after scripts ran, in a real browser that had nothing to complain of.

    `browser(page, "--flag")` starts it with more flags. Skips where none is installed.
    """
    result = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
    )
    if not result:
        pytest.skip("no browser here")

    def render(page: str, *more: str) -> str:
        file = tmp_path / "rendered.html"
        file.write_text(page, encoding="utf-8")
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
            "--hide-scrollbars",  # a phone lays them over the page
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no network, whatever the page asks for
        ]  # fmt: skip
        done = subprocess.run(
            [result, *flags, *more, file.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return render
