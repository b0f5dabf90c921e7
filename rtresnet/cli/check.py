"""`rtresnet check`: is an image's answer its own, whatever batch it comes in?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import bench_show, common, opening
from rtresnet.core.errors import CheckFailedError, DataError

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.bench.consistency import Answers, Check, Infer
    from rtresnet.core.preprocess import Preprocess

BATCHES = (1, 8, 32)  # tried where no profile says what matters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is checked: how to ask it, and what it expects.

    Attributes:
        prepare: uint8 crops [N, S, S, 3] to what it takes.
        preprocess: For images.
        sizes: Batches that matter to it.
        tf32: Whether a GPU may multiply its FP32 as TF32.
        assumed: What the artifact does not state; see `sidecar.Sidecar`.
    """

    infer: Infer
    prepare: Callable[[np.ndarray], np.ndarray]
    preprocess: Preprocess
    size: int
    sizes: tuple[int, ...]
    precision: str
    where: dict[str, Any]
    assumed: tuple[str, ...]
    close: Callable[[], None]
    tf32: bool = True


@click.command("check", short_help="Check that batches do not change an answer.")
@click.argument("path")
@click.option("--data", metavar="SPEC", help=f"Images, labelled or not [noise]: {common.DATA_HELP}")
@click.option(
    "--images", type=click.IntRange(min=2), default=16, show_default=True, help="How many."
)
@common.input_options
@common.device_options
@common.json_option
def command(
    path: str, data: str | None, images: int, json_file: str | None, **options: Any
) -> None:
    """Hold an artifact against itself, and against the FP32 ONNX file it came from.

    An image alone, in a batch, permuted, at every batch of the plan's profiles (1, 8 and 32 of
    other files), at odd batches, after other batches and beside a broken image must get the same
    answer, within what its precision can do. Exit code 1 where it does not.
    """
    result = run(path, data=data, images=images, **options)
    show(result)
    common.write_json(json_file, "check", result)
    failed = [entry for entry in result["checks"] if not entry["ok"]]
    if failed:
        first = failed[0]
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise CheckFailedError(
            f"{path}: {first['name']} ({first['compared']}): {first['why']}{more}",
            fix="noise is not what its ranges were made for: --data SPEC"
            if first["name"] == "parent" and data is None and result["precision"] == "int8"
            else None,
        )


def run(path: str, *, data: str | None = None, images: int = 16, **options: Any) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    from rtresnet.bench import consistency

    subject = _open(path, on_noise=data is None, **options)
    with contextlib.closing(subject), common.progress(f"checking {path}"):
        pixels = _photographs(data, images, subject) if data else _noise(images, subject.size)
        given = subject.prepare(pixels)
        single = consistency.alone(subject.infer, given)
        share = consistency.BATCHES[_bound(subject)]
        checks = consistency.check(subject.infer, given, single, sizes=subject.sizes, share=share)
    parent, missing = _ancestor(path)
    if parent is not None and checks[0].name != "alone":
        with common.progress(f"running {parent}"):
            checks.append(_against(parent, pixels, single, _bound(subject)))
    apart = consistency.discriminability(single, single.allowed(share))
    return {
        "artifact": path,
        "precision": subject.precision,
        "bound": _bound(subject),
        "images": data or "noise",
        "assumed": list(subject.assumed),
        "n": len(pixels),
        "range": float(single.values.max() - single.values.min()),
        "told_apart": apart,
        "parent": str(parent) if parent else None,
        "no_parent": missing,
        "checks": [dataclasses.asdict(entry) | {"ok": entry.ok} for entry in checks],
    } | subject.where


def _open(
    path: str,
    *,
    on_noise: bool,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    **options: Any,
) -> Subject:
    from rtresnet.core import artifacts, atomic_io

    atomic_io.require_file(path, fix="make one with: rtresnet export")
    if artifacts.kind_of(path) == "checkpoint":
        return _open_checkpoint(path, size=size, mean=mean, std=std, **options)
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.runtime.session import load

    session = load(path, **options)
    sidecar = session.sidecar
    unstated = not any((size, mean, std)) and not (sidecar and sidecar.input_known)
    if on_noise and unstated and session.backend.layout == "nchw":
        # Noise needs no meaning, only values of a usual range.
        preprocess = Preprocess.for_size(session.size)
        assumed: tuple[str, ...] = preprocess.assumptions()[:1]
    else:
        preprocess, assumed = opening.input_of(session, size, mean, std)
    profiles = sidecar.plan.profiles if sidecar and sidecar.plan else ()
    sizes = {size for profile in profiles for size in (profile.min, profile.opt, profile.max)}
    return Subject(
        infer=session,
        prepare=preprocess.prepare,
        preprocess=preprocess,
        size=preprocess.size,
        assumed=assumed,
        sizes=(session.batch,) if session.batch else tuple(sorted(sizes)) or BATCHES,
        precision=sidecar.precision if sidecar else _precision(path),
        where=session.describe(),
        close=session.close,
        tf32=not (sidecar and sidecar.plan and sidecar.plan.tf32 is False),
    )


def _precision(path: str) -> str:
    """Of a file without a sidecar, by what is in it."""
    from rtresnet.core import artifacts, hardware

    if artifacts.kind_of(path) != "onnx" or not hardware.installed("onnx"):
        return "unknown"
    from rtresnet.onnxlib import io
    from rtresnet.onnxlib.interface import precision_of

    return precision_of(io.load(path))


def _open_checkpoint(path: str, **options: Any) -> Subject:
    opened = opening.open_artifact(path, **options)
    return Subject(
        infer=opened.forward,
        prepare=opened.preprocess.normalize,
        preprocess=opened.preprocess,
        size=opened.preprocess.size,
        sizes=BATCHES,
        precision=opened.precision,
        where=opened.where,
        assumed=opened.assumed,
        close=opened.close,
    )


def _bound(subject: Subject) -> str:
    """The row of the tolerances' table. On a GPU FP32 is multiplied as TF32, if not forbidden."""
    from rtresnet.bench import consistency
    from rtresnet.core import hardware

    precision = subject.precision if subject.precision in consistency.BATCHES else None
    if precision == "fp32" and subject.tf32 and subject.where["device"] != hardware.cpu():
        return "tf32"
    return precision or consistency.UNKNOWN


def _photographs(data: str, count: int, subject: Subject) -> np.ndarray:
    import numpy as np

    from rtresnet.data import loader
    from rtresnet.data.sources import open_images

    crop, source = subject.preprocess.crop, open_images(data)
    tally = loader.DecodeErrors(len(source), common.note)
    chosen = loader.sample(source, count)
    found = [image for _, image in loader.indexed(source, chosen, lambda _, i: crop(i), tally)]
    if len(found) < 2:
        raise DataError(f"{data}: fewer than two images could be decoded")
    return np.stack(found)


def _noise(count: int, size: int) -> np.ndarray:
    """Noise of many tints and strengths: a net answers plain noise alike, whatever the seed."""
    import numpy as np

    rng = np.random.default_rng(0)
    tint, width = rng.integers(0, 192, (count, 1, 1, 3)), rng.integers(8, 64, (count, 1, 1, 1))
    grain = rng.integers(0, 64, (count, size, size, 3)) * width // 64
    return (tint + grain).astype(np.uint8)


def _ancestor(path: str) -> tuple[Path | None, str | None]:
    """The FP32 ONNX file of an artifact's chain, or why there is none to compare with."""
    from rtresnet.core import artifacts

    for place, sidecar, state in list(artifacts.chain(path))[1:]:
        if place.suffix.lower() != ".onnx":
            break
        if state != "ok":
            if state == "no sidecar":
                return None, f"{place} has no sidecar; write one with: rtresnet adopt {place}"
            return None, f"{place} is {state}"
        if sidecar is not None and sidecar.precision == "fp32":
            return place, None
    return None, "no FP32 ONNX file in its chain"


def _against(parent: Path, pixels: np.ndarray, single: Answers, bound: str) -> Check:
    from rtresnet.bench import consistency
    from rtresnet.runtime.session import load

    with load(parent, provider="cpu") as session:
        want = consistency.alone(session, session.prepare(pixels))
    if want.classes is None and single.classes is not None:
        want = want.top(single.values.shape[1])
    tolerance = want.allowed(consistency.PARENT[bound])
    return consistency.compare("parent", parent.name, single, want, tolerance)


def show(result: dict[str, Any]) -> None:
    """The table, with what was compared and where under it."""
    from rtresnet.reporting import tables

    console = common.out_console()
    rows = [
        (entry["name"], entry["compared"], entry["n"], entry["largest"], entry["tolerance"],
         "ok" if entry["ok"] else "FAILED")
        for entry in result["checks"]
    ]  # fmt: skip
    headings = ("check", "compared", "n", "difference", "tolerance", "verdict")
    tables.show(console, headings, rows)
    unknown = ", as its precision is unknown" if result["precision"] == "unknown" else ""
    lines = [
        f"{result['n']} images ({result['images']}), held to what {result['bound']} can do"
        f"{unknown}; "
        f"answers range over {tables.number(result['range'])}."
    ]
    if result["parent"] is None:
        lines.append(f"Not compared with an FP32 file: {result['no_parent']}.")
    if result["told_apart"] < 0.5:
        lines.append(
            f"WEAK: {100 * (1 - result['told_apart']):.0f} % of the pairs of images get the same "
            "answer within the tolerance; rows could change places unseen. Name others: --data SPEC"
        )
    lines += bench_show.where_lines([result])
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    common.footer(f"Assumed: {line}." for line in result["assumed"])
