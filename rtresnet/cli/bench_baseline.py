"""`rtresnet bench --baseline FILE`: the file, what must be alike, and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtresnet.cli import common
from rtresnet.core.errors import CheckFailedError, InputError


def percent(given: str) -> float:
    """`3%` or `3` to 0.03.

    Raises:
        InputError: Not a percentage from 0.
    """
    try:
        value = float(given.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000:
        raise InputError(f"--tolerance {given}: a percentage is needed", fix="as in --tolerance 3%")
    return value / 100


def read(path: str) -> list[dict[str, Any]]:
    """The results in a file that `bench --json` wrote.

    Raises:
        InputError: The file is not a valid result of `bench`, or holds no samples.
    """
    from rtresnet.core import atomic_io
    from rtresnet.reporting import result_files

    fix = f"make one with: rtresnet bench ARTIFACT --json {path}"
    atomic_io.require_file(path, fix=fix)
    file = result_files.read(path)
    if file.verb != "bench":
        raise InputError(f"{path}: a result of {file.verb}, expected one of bench", fix=fix)
    results: list[dict[str, Any]] = file.result["results"]
    if not results or not all(entry.get("samples") for entry in results):
        raise InputError(f"{path}: holds no samples to compare with", fix=fix)
    return results


def require_alike(
    path: str, recorded: Sequence[dict[str, Any]], planned: Sequence[dict[str, Any]], force: bool
) -> None:
    """Refuses what cannot be held against each other, before anything is measured.

    Raises:
        InputError: Another number of results; or another file, load, device or version, unless
            `force`.
    """
    from rtresnet.bench import baseline

    if len(recorded) != len(planned):
        raise InputError(
            f"{path}: {len(recorded)} results, and {len(planned)} are to be measured",
            fix="name the same files and batches",
        )
    for now, then in zip(planned, recorded, strict=True):
        if baseline.scenario(now) != baseline.scenario(then):
            raise InputError(f"{path}: {'; '.join(baseline.config_diff(now, then))}")
        if (different := baseline.config_diff(now, then)) and not force:
            raise InputError(
                f"{path}: {'; '.join(different)}", fix="--force compares them all the same"
            )


def gate(
    path: str,
    recorded: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    tolerance: float,
) -> list[dict[str, Any]]:
    """Prints a line a result, and returns what goes into the JSON file."""
    import dataclasses

    from rtresnet.bench import baseline

    console, found = common.out_console(), []
    for now, then in zip(results, recorded, strict=True):
        judged = baseline.judge(now, then, tolerance=tolerance)
        found.append(dataclasses.asdict(judged) | {"tolerance": tolerance, "baseline": path})
        name = f"{Path(now['measured']).name}, batch {now['batch']}"
        if (seen := judged.comparison) is None:
            words = f"too few samples for a {judged.figure}"
        else:
            words = (
                f"{judged.figure} latency {seen.speed:.3f} times as fast "
                f"({seen.low:.3f} to {seen.high:.3f}): "
                + ("REGRESSION" if judged.regression else "no regression shown")
                + f" beyond {100 * tolerance:g} %"
            )
        console.print(f"{name}, against {path}: {words}", markup=False, soft_wrap=True)
    return found


def refuse_regressions(judged: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> None:
    """Raises CheckFailedError where there is a regression, InputError where none could be seen."""
    slower = [
        f"{Path(entry['measured']).name} at batch {entry['batch']}"
        for entry, found in zip(results, judged, strict=True)
        if found["regression"]
    ]
    if slower:
        raise CheckFailedError(f"slower than {judged[0]['baseline']}: {', '.join(slower)}")
    unseen = sorted({found["figure"] for found in judged if found["comparison"] is None})
    if unseen:
        raise InputError(
            f"{judged[0]['baseline']}: too few samples for a {', '.join(unseen)}, so nothing was "
            "held against it",
            fix="measure both for longer: --seconds, --queries",
        )
