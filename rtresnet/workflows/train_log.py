"""Loggers of a training run: TensorBoard, MLflow and Weights & Biases, through their packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from rtresnet.core.errors import InputError, UnknownNameError, missing_package

Target = Literal["tensorboard", "mlflow", "wandb"]
TARGETS: tuple[Target, ...] = ("tensorboard", "mlflow", "wandb")


def parse_targets(text: str) -> tuple[str, ...]:
    """Read "tensorboard,mlflow".

    Raises:
        InputError: Nothing is named.
        UnknownNameError: No such logger.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError("names no logger", fix="as in tensorboard,mlflow")
    for name in names:
        if name not in TARGETS:
            raise UnknownNameError("logger", name, TARGETS)
    return names


class RunLogger(Protocol):
    """Receives a run's numbers."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name after a step."""
        ...

    def close(self) -> None:
        """Complete the log."""
        ...


def require(targets: tuple[str, ...]) -> None:
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
    targets: tuple[str, ...], folder: Path, parameters: Mapping[str, Any]
) -> list[RunLogger]:
    """Open the loggers of a run.

    Args:
        targets: Some of TARGETS; see `require`.
        folder: Of the run; its name is the run's name.
        parameters: The recipe and what it is applied to.
    """
    kinds: dict[str, Callable[[Path, dict[str, Any]], RunLogger]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _WandB,
    }
    return [kinds[target](folder, dict(parameters)) for target in targets]


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        lines = "\n".join(f"    {name} = {value}" for name, value in parameters.items())
        self._writer.add_text("parameters", lines)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where."""

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params({name: str(value)[:500] for name, value in parameters.items()})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _WandB:
    """A run of Weights & Biases; WANDB_PROJECT and WANDB_MODE=offline are its own settings."""

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(dir=str(folder), name=folder.name, config=parameters)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
