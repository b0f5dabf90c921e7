"""`rtresnet predict --out FILE`: as many images as there are, here or on Ray.

Rows are made batch by batch and written at once, so that memory does not grow with the images, and
a run that was stopped goes on where it stopped (`predict_out.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rtresnet.cli import common
from rtresnet.cli.predict_out import Journal, check_form
from rtresnet.cli.predict_rows import About, Predictor, Row
from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import DataError

NAMED = 20  # broken images named on the terminal; every one is named in the table


class Maker(Protocol):
    """A `Predictor`, or many of them on Ray."""

    @property
    def about(self) -> About:
        """What decides a row, and where it is made."""
        ...

    def batches(self, names: Sequence[str]) -> Iterator[list[Row]]:
        """Rows in order, `about.batch` at a time."""
        ...

    def close(self) -> None:
        """Gives memory back."""
        ...


def run(
    names: Sequence[str],
    artifact: str,
    out: Path,
    *,
    excel_safe: bool = False,
    resume: bool = False,
    ray: bool = False,
    actors: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes.

    Args:
        names: The image files.
        artifact: Checkpoint, ONNX file or plan.
        out: The table.
        excel_safe: Write names so that a spreadsheet reads none as a formula.
        resume: Go on with `OUT.part`, if there is one.
        ray: On Ray Data, in the cluster that RAY_ADDRESS names or in a local one.
        actors: Processes of Ray; by default one a GPU, or one a machine.
        options: As `Predictor` takes them.
    """
    check_form(out)
    begin = time.perf_counter()
    maker: Maker
    if ray:
        from rtresnet.cli.predict_ray import OnRay

        maker = OnRay(artifact, actors=actors, **options)
    else:
        maker = Predictor(artifact, **options)
    with contextlib.closing(maker):
        about = maker.about
        listed = "\n".join(map(_version, names)).encode("utf-8", "surrogateescape")
        head = {
            "model": atomic_io.sha256(artifact),
            **about.decisive(),
            "images": len(names),
            "list_of_images": hashlib.sha256(listed).hexdigest(),
        }
        with Journal(out, head, batch=about.batch, resume=resume) as journal:
            before = journal.done
            _fill(journal, maker, names)
            if journal.broken == len(names):
                journal.discard()
                raise DataError(f"none of the {len(names)} images could be decoded")
            journal.finish(excel_safe=excel_safe)
    seconds = time.perf_counter() - begin
    return {
        "artifact": artifact,
        "out": str(out),
        "images": len(names),
        "broken": journal.broken,
        "resumed_at": before,
        "seconds": seconds,
        "images_per_second": (len(names) - before) / seconds,
        "batch": about.batch,
        "top": about.top,
        "assumed": list(about.assumed),
    } | about.where


def _version(name: str) -> str:
    """An image's name with what changes when its contents do."""
    try:
        found = Path(name).stat()
    except OSError:
        return name
    return f"{name}\0{found.st_size}\0{found.st_mtime_ns}"


def _fill(journal: Journal, maker: Maker, names: Sequence[str]) -> None:
    """Makes what is not there yet."""
    total = len(names)
    if journal.done:
        common.note(f"going on at image {journal.done:,} of {total:,}")
    rest = names[journal.done :]
    if not rest:
        return
    try:
        with common.progress(f"{total:,} images to {journal.out}", total=total) as update:
            update(completed=journal.done)
            for rows in maker.batches(rest):
                for row in rows:
                    _name(row, journal)
                journal.add(rows)
                update(completed=journal.done)
    except BaseException:
        again = [word for word in artifacts.command.get() if word != "--resume"]
        common.note(
            f"{journal.done:,} of {total:,} images are in {journal.path}"
            + (f"; go on with: {shlex.join(again)} --resume" if again else "")
        )
        raise


def _name(row: Row, journal: Journal) -> None:
    if row.error is None or journal.broken > NAMED:
        return
    named = row.error if row.image in row.error else f"{row.image}: {row.error}"
    common.note(f"broken: {named}")
