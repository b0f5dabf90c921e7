"""What `rtresnet train` shows: the recipe, the progress, the result."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common
from rtresnet.cli.console import on_terminal
from rtresnet.core.terminal import escape_cell

if TYPE_CHECKING:
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.training.config import Job, Listener, Progress
    from rtresnet.training.dataset import DataReport
    from rtresnet.training.distributed import World

LINE_SECONDS = 60  # where there is no terminal, a line this often within an epoch
CLASSES = 20  # up to so many are listed one by one
CHECKS = {
    "arrays": "the images come as arrays, which cannot be broken",
    "decoded": "every image was decoded",
    "files": "the beginning and the end of every file was read; --decode-all decodes every image",
}
Say = Callable[[str], None]
OnEpoch = Callable[[dict[str, Any]], None]


def announce(job: Job, world: World, say: Say) -> None:
    """The net, the data and the recipe as it is used."""
    from rtresnet.training.recipes import describe

    together = f", {world.size} processes" if world.size > 1 else ""
    say(
        f"{job.spec.name} on {job.source.name}: {len(job.source)} images, "
        f"{len(job.source.classes)} classes, {job.preprocess.size} px, {job.device}{together}"
    )
    for line in job.start.assumed if job.start else ():
        say(f"Assumed of the weights: {line}.")
    for line in describe(job.recipe):
        say(line)


def data_lines(report: DataReport) -> list[str]:
    """Images per class and split, how they were checked, and what is doubtful about them."""
    splits, lines = ("train", "val", "test"), []
    if len(report.classes) <= CLASSES:
        rows: list[tuple[str, Sequence[str]]] = [("images", splits)]
        for label, name in enumerate(report.classes):
            rows.append(
                (escape_cell(name), [f"{report.counts[split][label]:,}" for split in splits])
            )
        rows.append(("all", [f"{sum(report.counts[split]):,}" for split in splits]))
        width = max(len(name) for name, _ in rows)
        lines += [f"{name:{width}}" + "".join(f"  {c:>9}" for c in cells) for name, cells in rows]
    else:
        for split in splits:
            ordered = sorted(report.counts[split])
            lines.append(
                f"{split}: {sum(ordered):,} images, {ordered[0]:,} to {ordered[-1]:,} a class, "
                f"median {ordered[len(ordered) // 2]:,}"
            )
    lines.append(f"checked: {CHECKS[report.check]}")
    if any(report.broken.values()):
        counts = " and ".join(f"{len(e)} of {name}" for name, e in report.broken.items() if e)
        lines.append(f"left out, because they cannot be decoded: {counts}")
    if report.transparent:
        lines.append(f"composited on white: {report.transparent:,} images with transparency")
    return lines + [f"warning: {escape_cell(line)}" for line in report.warnings()]


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """What `loop.train` calls; by default nothing happens."""

    step: Listener = lambda progress: None
    epoch: OnEpoch = lambda record: None
    check: Callable[[int, int], None] = lambda done, total: None
    data: Callable[[DataReport], None] = lambda report: None


@contextlib.contextmanager
def listeners(job: Job, say: Say, events: Any = None) -> Iterator[Listeners]:
    """What shows the progress: a bar on a terminal, lines elsewhere, event files if asked.

    Args:
        job: What is trained.
        say: Takes a line.
        events: From `event_writer`.
    """
    writer = events(str(job.out / "tensorboard")) if events else None
    told, stage = time.monotonic(), ""
    with contextlib.ExitStack() as shown:
        update: Callable[..., None]

        def enter(name: str, line: str) -> None:
            """Replaces the bar of the stage before."""
            nonlocal update, stage
            if name != stage:
                shown.close()
                update, stage = shown.enter_context(common.progress(line, total=1.0)), name

        def on_check(done: int, total: int) -> None:
            nonlocal told
            enter("check", f"checking {total:,} images")
            update(completed=done / total)
            if not on_terminal() and time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                say(f"checked {done:,} of {total:,} images")

        def on_data(report: DataReport) -> None:
            for line in data_lines(report):
                say(line)

        def on_step(p: Progress) -> None:
            nonlocal told
            enter("training", "training")
            text = (
                f"epoch {p.epoch + 1}  loss {p.loss:.3f}  lr {p.lr:.2g}  "
                f"{p.images_per_second:,.0f} img/s"
            )
            if on_terminal():
                update(completed=p.step / p.total, description=text)
            elif time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                say(f"step {p.step}/{p.total}  {text}  {_clock(p.seconds_left)} left")
            if writer:
                writer.add_scalar("loss", p.loss, p.step)
                writer.add_scalar("lr", p.lr, p.step)

        def on_epoch(record: dict[str, Any]) -> None:
            nonlocal told
            told = time.monotonic()
            val = "" if record["val_top1"] is None else f"val {record['val_top1']:6.2f} %  "
            say(
                f"epoch {record['epoch']:3d}  step {record['step']:,}  "
                f"loss {record['loss']:.4f}  train {record['train_top1']:6.2f} %  {val}"
                f"{record['images_per_second']:,.0f} img/s"
            )
            if writer:
                for name in ("train_top1", "val_top1"):
                    if record[name] is not None:
                        writer.add_scalar(name, record[name], record["step"])

        try:
            yield Listeners(
                step=on_step,
                epoch=on_epoch,
                check=on_check,
                data=on_data,
            )
        finally:
            if writer:
                writer.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def event_writer() -> Any:
    """TensorBoard's writer, or UnavailableError where it is not installed."""
    from rtresnet.core.errors import missing_package

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_package("tensorboard", "--tensorboard") from None
    return SummaryWriter


def report(folder: Path, job: Job, best: Checkpoint) -> Path | None:
    """Prints the result in a line; writes the curves and the page.

    Returns:
        The page; None where matplotlib is not installed.
    """
    from rtresnet.core import hardware

    measured = best.measured
    chosen = (
        ""
        if measured["val_top1"] is None
        else f", val {measured['val_top1']:.2f} % of {measured['val_n']}"
    )
    rounded = "in INT8, " if job.recipe.qat else ""
    common.out_console().print(
        f"{folder / 'best.pt'}: {rounded}test top-1 {measured['test_top1']:.2f} % of "
        f"{measured['test_n']} images (epoch {measured['epoch']}{chosen})",
        soft_wrap=True,
    )
    page = _write_page(folder, job, best) if hardware.installed("matplotlib") else None
    if page is None:
        common.note("no curves and no page: pip install matplotlib")
    return page


def next_steps(result: Mapping[str, Any]) -> None:
    """Prints the page's path and the command that usually follows.

    Args:
        result: Of `train.run`.
    """
    if result["page"]:
        common.say(f"page: {result['page']}")
    precision = " --int8" if result["recipe"]["qat"] else ""
    common.say(f"next: rtresnet export --weights {shlex.quote(result['checkpoint'])}{precision}")


def _write_page(folder: Path, job: Job, best: Checkpoint) -> Path:
    from rtresnet.reporting import run_page
    from rtresnet.training.dataset import saved_report
    from rtresnet.training.recipes import describe

    images = saved_report(best)
    run_page.write(
        folder,
        title=f"{job.spec.name} on {job.source.name}",
        recipe="\n".join(describe(job.recipe)),
        measured=best.measured,
        images=None if images is None else "\n".join(data_lines(images)),
    )
    return folder / "index.html"
