"""`rtresnet bench --find-batch` and `--find-qps`: the most that holds a p99, and the curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import bench_load, common
from rtresnet.core.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from rtresnet.bench.load import Measurement
    from rtresnet.bench.search import Found, Point
    from rtresnet.runtime.session import Session

LARGEST_BATCH = 1024  # --max-batch says another
FEWEST = 100
"""Requests that a p99 takes."""
FEWEST_ARRIVALS = 200
ALONE = 3
"""Measurements without any queue: where most of them miss the bound, every rate would."""
STEP = 1.02
"""Rates that are told apart: a p99 of a few seconds does not know them any better."""


def search(session: Session, load: bench_load.Load, *, what: str, bound: float) -> Found:
    """Searches with one session.

    Args:
        session: What serves.
        load: Seconds of each measurement, seed, batcher, images.
        what: "batch" or "qps".
        bound: Of the p99, in ms.
    """
    from rtresnet.bench import search as searching

    seeds = iter(range(load.seed, load.seed + 10_000))
    unit = "images a batch" if what == "batch" else "requests/s"

    def told(point: Point) -> None:
        p99 = "too many late" if point.p99 is None else f"p99 {point.p99:.3g} ms"
        common.note(f"{point.load:.6g} {unit}: {p99}, n {point.n}")

    def at_batch(count: float) -> Measurement:
        formed = load.max_batch if what == "qps" else 1
        asked = dataclasses.replace(
            load, scenario="closed", concurrency=1, max_batch=formed, seed=next(seeds)
        )
        return bench_load.arriving(
            session, bench_load.candidate(session, asked, int(count)), asked, int(count),
            fewest=FEWEST, give_up=searching.early_stop(bound),
        )  # fmt: skip

    def at_rate(rate: float) -> Measurement:
        arrivals = load.queries or max(FEWEST_ARRIVALS, round(load.seconds * rate))
        asked = dataclasses.replace(
            load, scenario="server", qps=rate, queries=arrivals, seed=next(seeds)
        )
        return bench_load.arriving(session, one, asked, give_up=searching.early_stop(bound))

    if what == "batch":
        most = load.max_batch if load.max_batch > 1 else LARGEST_BATCH
        most = min(most, getattr(session.backend, "largest", most))
        return searching.largest(
            range(1, most + 1), at_batch, bound=bound, gallop=True, on_point=told
        )
    one = bench_load.candidate(session, load, 1)
    alone = [at_batch(1) for _ in range(ALONE)]
    if sum((m.latency.p99 or bound + 1) > bound for m in alone) > ALONE / 2:
        point = searching.point(0.0, alone[0], bound)
        return searching.Found(best=None, limit=False, points=(point,))
    rates = rates_below(1.1 * capacity(session, load))
    return searching.largest(rates, at_rate, bound=bound, gallop=False, on_point=told)


def capacity(session: Session, load: bench_load.Load) -> float:
    """Images a second with more clients than a batch has room for."""
    asked = dataclasses.replace(
        load, scenario="closed", concurrency=2 * load.max_batch, queries=None,
        seconds=min(load.seconds, 1.0),
    )  # fmt: skip
    one = bench_load.candidate(session, load, 1)
    rate = bench_load.arriving(session, one, asked, fewest=10).latency.images_per_second
    assert rate is not None
    return rate


def rates_below(highest: float) -> list[float]:
    """From a fiftieth of `highest` to it, 2 % apart, to three digits."""
    rates: list[float] = []
    rate = highest / 50
    while rate < highest:
        rates.append(float(f"{rate:.3g}"))
        rate *= STEP
    return [*dict.fromkeys(rates)]


def as_json(found: Found, what: str, bound: float) -> dict[str, Any]:
    """The search for `--json`."""
    return {"what": what, "p99_ms": bound} | dataclasses.asdict(found)


def show(path: str, found: dict[str, Any], bound: float) -> None:
    """The curve as a table, and the answer."""
    from rtresnet.reporting import tables

    console = common.out_console()
    what = found["what"]
    rows = [
        (
            f"{point['load']:g}", point["median"], point["p99"], point["images_per_second"],
            point["n"], "yes" if point["holds"] else "no",
        )
        for point in found["points"]
    ]  # fmt: skip
    tables.show(console, [what, "median", "p99", "img/s", "n", "holds"], rows)
    if found["best"] is not None:
        more = ", the largest that was tried" if found["limit"] else ""
        console.print(
            f"{Path(path).name}: {what} {found['best']:g} holds a p99 of {bound:g} ms{more}.",
            markup=False,
        )


def require_best(path: str, found: dict[str, Any], bound: float) -> None:
    """Raises CheckFailedError where no load held the bound."""
    if found["best"] is None:
        smallest = found["points"][0]
        least = f"{found['what']} {smallest['load']:g}" if smallest["load"] else "one alone"
        p99 = "most are later" if smallest["p99"] is None else f"p99 {smallest['p99']:.3g} ms"
        raise CheckFailedError(
            f"{path}: no {found['what']} holds a p99 of {bound:g} ms; {least}: {p99}"
        )


def write_plot(target: str, searches: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """The curves as SVG or PNG, by the file's suffix.

    Raises:
        InputError: Another suffix.
        UnavailableError: matplotlib is not installed.
    """
    from rtresnet.core import atomic_io
    from rtresnet.reporting import plots

    check_plot(target)
    drawn = plots.search_figure(searches)
    if target.lower().endswith(".svg"):
        atomic_io.write_text(target, plots.svg(drawn, "latency against load") + "\n")
    else:
        with atomic_io.atomic_path(target) as temporary:
            drawn.savefig(temporary, format="png", dpi=150)


def check_plot(target: str) -> None:
    """Raises InputError where a plot could not be written under this name."""
    if not target.lower().endswith((".svg", ".png")):
        raise InputError(f"--plot {target}: .svg or .png")
