"""Progress of a training run: bar, lines, loggers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rtresnet.core.reporter import Reporter, Update, plural

if TYPE_CHECKING:
    from rtresnet.training.config import EpochRecord
    from rtresnet.training.data_report import DataReport
    from rtresnet.training.loop import Progress
    from rtresnet.workflows.train_log import RunLogger


class TrainProgress:
    """Shows a run through the reporter, and sends its numbers to loggers.

    Args:
        reporter: Receives a bar for each stage, and a line for each epoch.
        loggers: Closed at the end.
    """

    def __init__(self, reporter: Reporter, loggers: Sequence[RunLogger]) -> None:
        self._reporter, self._loggers = reporter, loggers
        self._is_first = True
        self._stage, self._bar = "", contextlib.ExitStack()
        self._update: Update | None = None

    def __enter__(self) -> TrainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        for logger in self._loggers:
            logger.close()

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
        self._log({"loss": progress.loss, "lr": progress.lr}, progress.step)

    def epoch(self, record: EpochRecord) -> None:
        """Note an epoch's results."""
        val = "" if record["val_top1"] is None else f"val {record['val_top1']:6.2f} %  "
        self._reporter.note(
            f"epoch {record['epoch']:3d}  step {record['step']:,}  loss {record['loss']:.4f}  "
            f"train {record['train_top1']:6.2f} %  {val}{record['images_per_second']:,.0f} img/s"
        )
        values = {name: record[name] for name in ("train_top1", "images_per_second")}
        if record["val_top1"] is not None:
            values["val_top1"] = record["val_top1"]
        self._log(values, record["step"])
        if self._is_first:
            self._is_first = False
            decoded = record.get("decoded_per_core")
            rate = "" if decoded is None else f"{decoded:,.0f} images/s decoded per core; "
            waiting = 100 * record.get("waiting", 0)
            self._reporter.note(f"input: {rate}the net waited {waiting:.0f} % of the time for data")

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.scalars(values, step)
