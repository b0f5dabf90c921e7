"""Progress of a training run: bar, lines, and loggers (TensorBoard, MLflow, Weights & Biases)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from typing_extensions import Self

from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError, missing_package
from rtresnet.core.reporter import Reporter, Update, plural
from rtresnet.workflows.train_text import data_lines

if TYPE_CHECKING:
    from rtresnet.training.config import EpochRecord
    from rtresnet.training.data_report import DataReport
    from rtresnet.training.loop import Progress

Target = Literal["tensorboard", "mlflow", "wandb"]
TARGETS: tuple[Target, ...] = ("tensorboard", "mlflow", "wandb")
FIXES = {
    "tensorboard": "make the run's folder writable",
    "mlflow": "set MLFLOW_TRACKING_URI, as in MLFLOW_TRACKING_URI=http://127.0.0.1:5000",
    "wandb": "wandb login, or set WANDB_MODE=offline",
}


def parse_targets(text: str) -> tuple[str, ...]:
    """Read "tensorboard,mlflow".

    Raises:
        InputError: Nothing is named.
        UnknownNameError: No such logger.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError("no logger named", fix="as in tensorboard,mlflow")
    for name in names:
        if name not in TARGETS:
            raise UnknownNameError("logger", name, TARGETS)
    return names


class RunLogger(Protocol):
    """Receives a run's numbers.

    Attributes:
        name: One of TARGETS.
    """

    name: Target

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name after a step."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Complete the log of a run that ended, or failed."""
        ...


def require(targets: tuple[Target, ...]) -> None:
    """Check that the packages are installed.

    Raises:
        UnavailableError: One is not.
    """
    for target in targets:
        try:
            if target == "tensorboard":
                import torch.utils.tensorboard  # noqa: F401
            else:
                __import__(target)
        except ImportError:
            raise missing_package(target, f"--log {target}") from None


def open_loggers(
    targets: tuple[Target, ...], folder: Path, parameters: Mapping[str, Any]
) -> list[RunLogger]:
    """Open the loggers of a run.

    Args:
        targets: Some of TARGETS; see `require`.
        folder: Folder of the run; its name is the run's name.
        parameters: The recipe and what it is applied to.

    Raises:
        UnavailableError: A logger cannot start, for example without a server or a key.
    """
    kinds: dict[Target, Callable[[Path, dict[str, Any]], RunLogger]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _WandB,
    }
    opened: list[RunLogger] = []
    for target in targets:
        try:
            opened.append(kinds[target](folder, dict(parameters)))
        except Exception as error:  # each package has its own
            for logger in opened:
                logger.close(failed=True)
            raise UnavailableError(
                f"--log {target}: {first_line(error)}", fix=FIXES[target]
            ) from None
    return opened


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _TensorBoard:
    """Event files in the run's folder."""

    name: Target = "tensorboard"

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        lines = "\n".join(f"    {name} = {value}" for name, value in parameters.items())
        self._writer.add_text("parameters", lines)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


class _MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    name: Target = "mlflow"

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params({name: str(value)[:500] for name, value in parameters.items()})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _WandB:
    """A run of Weights & Biases; WANDB_PROJECT and WANDB_MODE=offline are its own settings."""

    name: Target = "wandb"

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(dir=str(folder), name=folder.name, config=parameters)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class TrainProgress:
    """Shows a run through the reporter, and sends its numbers to loggers.

    Args:
        reporter: Receives a bar for each stage, and a line for each epoch.
        loggers: Closed at the end; one that fails is left out from then on, with a warning.
    """

    rate = ",.0f"  # format of images/s

    def __init__(self, reporter: Reporter, loggers: Sequence[RunLogger]) -> None:
        self._reporter, self._loggers = reporter, list(loggers)
        self._is_first = True
        self._stage, self._bar = "", contextlib.ExitStack()
        self._update: Update | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        for logger in self._loggers:
            self._with(logger, lambda logger: logger.close(failed=error[0] is not None))

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
        for line in data_lines(report):
            self._reporter.note(line)

    def step(self, progress: Progress) -> None:
        """Show a step."""
        text = (
            f"epoch {progress.epoch + 1}  loss {progress.loss:.3f}  lr {progress.lr:.2g}  "
            f"{progress.images_per_second:{self.rate}} img/s"
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
            self._reporter.note(
                f"input: {rate}training waited for data {waiting:.0f} % of the time"
            )

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in list(self._loggers):
            if not self._with(logger, lambda logger: logger.scalars(values, step)):
                self._loggers.remove(logger)

    def _with(self, logger: RunLogger, act: Callable[[RunLogger], None]) -> bool:
        """Call a logger; if it fails, warn and continue the run without it."""
        try:
            act(logger)
        except Exception as error:  # each package has its own
            self._reporter.note(
                f"warning: --log {logger.name} failed, and the run goes on without it "
                f"({first_line(error)})"
            )
            return False
        return True
