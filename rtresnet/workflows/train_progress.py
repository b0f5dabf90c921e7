"""Progress of a training run: bar, lines, TensorBoard events."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rtresnet.core.errors import missing_package
from rtresnet.core.reporter import Reporter, Update, plural

if TYPE_CHECKING:
    from rtresnet.training.config import EpochRecord
    from rtresnet.training.data_report import DataReport
    from rtresnet.training.loop import Progress


class TrainProgress:
    """Shows a run through the reporter, and writes event files.

    Args:
        reporter: Receives a bar for each stage, and a line for each epoch.
        events: TensorBoard's writer, or None.
    """

    def __init__(self, reporter: Reporter, events: Any) -> None:
        self._reporter, self._events = reporter, events
        self._stage, self._bar = "", contextlib.ExitStack()
        self._update: Update | None = None

    def __enter__(self) -> TrainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._events:
            self._events.close()

    def _show(self, stage: str, done: float, text: str | None = None) -> None:
        """Move the stage's bar, which replaces the bar of the stage before."""
        if stage != self._stage or self._update is None:
            self._bar.close()
            self._stage = stage
            self._update = self._bar.enter_context(self._reporter.progress(stage, total=1.0))
        self._update(completed=done, description=text)

    def check(self, done: int, total: int) -> None:
        """Show how many images are checked."""
        self._show(f"checking {plural(total, 'image')}", done / total)

    def data(self, report: DataReport) -> None:
        """Note what the check of the images found."""
        for line in report.lines():
            self._reporter.note(line)

    def step(self, progress: Progress) -> None:
        """Show a step."""
        text = (
            f"epoch {progress.epoch + 1}  loss {progress.loss:.3f}  lr {progress.lr:.2g}  "
            f"{progress.images_per_second:,.0f} img/s"
        )
        self._show("training", progress.step / progress.total, text)
        if self._events:
            self._events.add_scalar("loss", progress.loss, progress.step)
            self._events.add_scalar("lr", progress.lr, progress.step)

    def epoch(self, record: EpochRecord) -> None:
        """Note an epoch's results."""
        val = "" if record["val_top1"] is None else f"val {record['val_top1']:6.2f} %  "
        self._reporter.note(
            f"epoch {record['epoch']:3d}  step {record['step']:,}  loss {record['loss']:.4f}  "
            f"train {record['train_top1']:6.2f} %  {val}{record['images_per_second']:,.0f} img/s"
        )
        if self._events:
            self._events.add_scalar("train_top1", record["train_top1"], record["step"])
            if record["val_top1"] is not None:
                self._events.add_scalar("val_top1", record["val_top1"], record["step"])


def event_writer() -> Any:
    """Return TensorBoard's writer class.

    Raises:
        UnavailableError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_package("tensorboard", "--tensorboard") from None
    return SummaryWriter
