"""Run the complete pipeline on a small net: train, export, quantize, build, evaluate, measure."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import hardware, locks, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import UnavailableError
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import json_name
from rtresnet.training.config import EpochRecord
from rtresnet.workflows.benchmark import BenchmarkConfig, BenchmarkResult, benchmark
from rtresnet.workflows.build import BuildConfig
from rtresnet.workflows.compare import CompareResult, compare
from rtresnet.workflows.evaluate import EvaluateResult, evaluate, record_accuracy
from rtresnet.workflows.export import ExportConfig, ExportResult, export
from rtresnet.workflows.quantize import QuantizeConfig
from rtresnet.workflows.train import TrainResult, train
from rtresnet.workflows.train_job import TrainConfig

MODEL, DATA = "resnet20", "digits"
NEEDED = ("torch", "onnx", "onnxruntime", "tensorrt_rtx", "sklearn", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Config):
    """Options of `quickstart`: the duration of training and measurement."""

    epochs: int = option(10, "Epochs of training.", minimum=1)
    seconds: float = option(
        2.0, "Duration of each measurement, in seconds.", minimum=0.01, maximum=3600
    )


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """The results of every step.

    Attributes:
        log: A record for each epoch.
        evaluations: By precision.
        comparisons: With the checkpoint, by precision.
        seconds: Total duration.
    """

    model: str
    data: str
    train: TrainResult
    log: tuple[EpochRecord, ...]
    export: ExportResult
    evaluations: dict[str, EvaluateResult] = json_name("eval")
    comparisons: dict[str, CompareResult] = json_name("compare")
    bench: BenchmarkResult
    seconds: float


def quickstart(
    out: str | os.PathLike[str] = "runs/quickstart",
    config: QuickstartConfig | None = None,
    *,
    reporter: Reporter = reporter.DEFAULT,
) -> QuickstartResult:
    """Train ResNet-20 on scikit-learn's digits, and run every step on it.

    Args:
        out: Folder; an earlier quickstart in it is replaced.
        config: Length.
        reporter: Receives the progress of every step.

    Returns:
        The results of every step.

    Raises:
        UnavailableError: A package is missing.
        LockedError: Another quickstart runs in the folder.
    """
    config, out = config or QuickstartConfig(), Path(out)
    missing = [hardware.DISTRIBUTIONS.get(m, m) for m in NEEDED if not hardware.installed(m)]
    if missing:
        raise UnavailableError(
            f"quickstart needs {', '.join(missing)}", fix="pip install 'rtresnet[all-cpu]'"
        )
    begin = time.monotonic()
    with locks.hold_folder(out, warn=reporter.note):
        if (out / "quickstart.json").exists():
            for name in ("train", "engines"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in ("quickstart.json", "index.html"):
                (out / name).unlink(missing_ok=True)
        return _run(out, config, reporter, begin)


def _run(out: Path, config: QuickstartConfig, reporter: Reporter, begin: float) -> QuickstartResult:
    trained = train(
        TrainConfig(
            model=MODEL, data=DATA, epochs=config.epochs, seed=0, out=out / "train", device="cpu"
        ),
        reporter=reporter,
    )
    exported = export(
        trained.checkpoint,
        out / "engines",
        ExportConfig(precisions=("fp32", "fp16", "int8"), plan=True),
        quantize=QuantizeConfig(calib=DATA),
        build=BuildConfig(batch=("1:8:32",), builder="rtx"),
        reporter=reporter,
    )
    evaluations, comparisons = {}, {}
    for file in exported.onnx:
        evaluations[file.precision] = evaluate(file.path, DATA, reporter=reporter)
        record_accuracy(evaluations[file.precision], reporter=reporter)
        compared = compare(trained.checkpoint, file.path, DATA, reporter=reporter)
        assert isinstance(compared, CompareResult)
        comparisons[file.precision] = compared
    measured = benchmark(
        [file.path for file in exported.onnx],
        BenchmarkConfig(batch=(1, 8), seconds=config.seconds),
        reporter=reporter,
    )
    log = trained.log.read_text().splitlines()
    return QuickstartResult(
        model=MODEL,
        data=DATA,
        train=trained,
        log=tuple(json.loads(line) for line in log),
        export=exported,
        evaluations=evaluations,
        comparisons=comparisons,
        bench=measured,
        seconds=round(time.monotonic() - begin, 1),
    )
