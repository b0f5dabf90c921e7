"""What `rtresnet train` shows: the recipe, the progress, the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common

if TYPE_CHECKING:
    from rtresnet.train.distributed import World
    from rtresnet.train.job import Job, Listener, Progress

LINE_SECONDS = 60  # where there is no terminal, a line this often within an epoch
Say = Callable[[str], None]
OnEpoch = Callable[[dict[str, Any]], None]


def announce(job: Job, world: World, say: Say) -> None:
    """The net, the data and the recipe as it is used."""
    from rtresnet.train.recipes import describe

    together = f", {world.size} processes" if world.size > 1 else ""
    say(
        f"{job.spec.name} on {job.source.name}: {len(job.source)} images, "
        f"{len(job.source.classes)} classes, {job.preprocess.size} px, {job.device}{together}"
    )
    for line in describe(job.recipe):
        say(line)


@contextlib.contextmanager
def listeners(job: Job, say: Say, events: Any = None) -> Iterator[tuple[Listener, OnEpoch]]:
    """What shows the progress: a bar on a terminal, lines elsewhere, event files if asked.

    Args:
        job: What is trained.
        say: Takes a line.
        events: From `event_writer`.
    """
    writer = events(str(job.out / "tensorboard")) if events else None
    told = time.monotonic()
    with common.progress("training", total=1.0) as update:

        def on_step(p: Progress) -> None:
            nonlocal told
            text = (
                f"epoch {p.epoch + 1}  loss {p.loss:.3f}  lr {p.lr:.2g}  "
                f"{p.images_per_second:,.0f} img/s  {_clock(p.seconds_left)} left"
            )
            update(completed=p.step / p.total, description=text)
            if not common.on_terminal() and time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                say(f"step {p.step}/{p.total}  {text}")
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
            yield on_step, on_epoch
        finally:
            if writer:
                writer.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def event_writer() -> Any:
    """TensorBoard's writer, or EnvironmentLack where it is not installed."""
    from rtresnet.errors import missing_package

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_package("tensorboard", "--tensorboard") from None
    return SummaryWriter


def report(folder: Path, job: Job, measured: dict[str, Any]) -> None:
    """The result in a line, the curves and the page."""
    from rtresnet import machine

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
    if not machine.installed("matplotlib"):
        common.note("no curves: pip install matplotlib")
        return
    from rtresnet.report import run_page
    from rtresnet.train.recipes import describe

    run_page.write(
        folder,
        title=f"{job.spec.name} on {job.source.name}",
        recipe="\n".join(describe(job.recipe)),
        measured=measured,
    )
