"""Is it slower than it was? Results of now held against those of a file that bench wrote.

Only like is held against like: the same load of the same file on the same device by the same
versions. Knows no files; `--baseline` of `rtresnet bench` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rtresnet.bench import compare

FIGURES = {
    "single-stream": "median",
    "multi-stream": "median",
    "offline": "mean",
    "closed": "mean",
    "server": "p99",
}
"""What of the latencies is compared under each load. In a closed loop throughput is the number of
requests in flight over their mean latency, so that offline's and closed's is compared with it."""

LOAD = ("qps", "concurrency", "max_batch", "in_flight")
PLAN = ("contexts", "graphs")
"""Compared where both results have them: earlier files do not."""
ALIKE = ("batch", "device", "provider", "threads", "versions", "precision", "with_preprocess")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One result against its predecessor.

    Attributes:
        figure: What was compared: median, mean or p99 of the latencies.
        comparison: Of now against then; None where a percentile has too few samples.
        regression: Whether it is slower by more than the tolerance, with the whole interval.
    """

    figure: str
    comparison: compare.Comparison | None
    regression: bool


def config_diff(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """In what two results differ that ought to be alike, as "device: A, was B"."""
    both = (now, then)
    pairs: dict[str, list[Any]] = {
        "scenario": [scenario(entry) for entry in both],
        "file": [PurePath(str(entry.get("measured"))).name for entry in both],
    }
    pairs |= {name: [entry.get(name) for entry in both] for name in ALIKE}
    pairs |= {
        name: values for name in PLAN if None not in (values := [entry.get(name) for entry in both])
    }
    for name in LOAD:
        pairs[name] = [(entry.get("load") or {}).get(name) for entry in both]
    return [f"{name}: {_words(a)}, was {_words(b)}" for name, (a, b) in pairs.items() if a != b]


def scenario(entry: Mapping[str, Any]) -> str:
    """The load of a result; files from before there was more than one do not say."""
    return str(entry.get("scenario") or "single-stream")


def judge(now: Mapping[str, Any], then: Mapping[str, Any], *, tolerance: float) -> Judgement:
    """Compares the samples of two results.

    Args:
        now: As `--json` holds it, samples included.
        then: The same of the baseline.
        tolerance: 0.03 lets it be 3 % slower.
    """
    figure = FIGURES[scenario(now)]
    found = compare.compare_unpaired(then["samples"], now["samples"], figure=figure)
    regression = found is not None and found.high < 1 / (1 + tolerance)
    return Judgement(figure=figure, comparison=found, regression=regression)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {entry}" for name, entry in value.items())
    return "unknown" if value is None else str(value)
