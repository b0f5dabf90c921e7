"""Choose what `bench` measures for a plan without a GPU: the ONNX file it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtresnet.core import artifacts, atomic_io, hardware
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.reporter import Reporter


def with_fallbacks(
    names: Sequence[str], device: str, reporter: Reporter
) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Choose the file to measure for each name; drop a plan's ONNX file that is in the list.

    A file that is named twice itself is measured twice, as a check of the measurement.

    Returns:
        The remaining names, and the result of `fallback_for` for each.
    """
    kept: dict[Path, bool] = {}  # file to whether it replaces a plan
    remaining, chosen = [], []
    for name in names:
        target, note = fallback_for(name, device)
        place = Path(target).resolve()
        if place in kept and (note or kept[place]):
            reporter.note(
                f"NOTE: {name}: not measured separately; without a GPU it is the same as {target}, "
                "which is measured once"
            )
            continue
        kept[place] = note is not None
        remaining.append(name)
        chosen.append((target, note))
        if note:
            reporter.note(f"NOTE: {note}")
    return remaining, chosen


def fallback_for(path: str, device: str) -> tuple[str, str | None]:
    """Choose the file to measure for `path`: without a GPU, the ONNX file of a plan.

    Args:
        path: An artifact.
        device: "auto", "cpu" or "cuda".

    Returns:
        The file, and a sentence on it if it is not `path`.

    Raises:
        InputError: No such file, or the ONNX file has changed since the plan was built.
        UnavailableError: The plan has no sidecar that names its ONNX file.
    """
    atomic_io.require_file(path, fix="create it with: rtresnet export")
    if artifacts.kind_of(path) != "plan" or hardware.gpus() or device == "cuda":
        return path, None
    sidecar = artifacts.verify(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    if sidecar is None or parent is None:
        raise UnavailableError(
            f"{path}: this machine has no GPU to run the plan, and no sidecar names its ONNX file",
            fix="use its ONNX file instead",
        )
    atomic_io.require_file(parent, fix="also copy the ONNX file, or run on a GPU")
    if sidecar.parent is not None and atomic_io.sha256(parent) != sidecar.parent.sha256:
        raise InputError(
            f"{parent}: has changed since {path} was built from it", fix=f"rtresnet build {parent}"
        )
    return str(parent), (
        f"this machine has no GPU; measuring {parent}, the ONNX file of {path}, on the CPU instead"
    )
