"""Compare the backbones of a detector under one recipe and equal pre-training (section 4.3)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import atomic_io, locks, provenance, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.reporter import Reporter
from rtresnet.detection.average_precision import DetectionAccuracy
from rtresnet.workflows.detect_train import TrainDetectorConfig, detection_job
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch, torch_device

if TYPE_CHECKING:
    from rtresnet.detection.training import DetectionJob
    from rtresnet.study.ablations import Spread
    from rtresnet.training.loop import Progress

DIVERGED = "diverged.json"


@dataclass(frozen=True, kw_only=True)
class DetectionStudyConfig(Config):
    """Which backbones are compared, and how they are trained.

    Attributes:
        settings: Fields of the recipe or of the net, each "FIELD=VALUE".
    """

    backbones: tuple[str, ...] = option(
        ("vgg16_bn", "resnet18", "resnet34"),
        "A backbone; may be repeated.",
        names=("--backbone",),
        metavar="NET",
        default_text="vgg16_bn, resnet18, resnet34",
    )
    test_data: str | None = option(
        None, "Images with boxes to test on.", default_text="the data's own test split"
    )
    pretrain: Literal["objects", "imagenet", "none"] = option(
        "objects",
        "Pre-training of every backbone: classifying the objects of the training images, "
        "torchvision's ImageNet weights, or none.",
    )
    pretrain_steps: int = option(
        300, "Length of the pre-training on objects, in steps of 32 objects.", minimum=1
    )
    recipe: str | None = option(
        None,
        "Recipe: paper-detection or scratch-detection.",
        default_text="paper-detection with ImageNet weights, else scratch-detection",
    )
    epochs: int | None = option(
        None, "Length of each run in epochs.", minimum=1, default_text="the recipe's"
    )
    seeds: int = option(3, "Number of runs of each backbone, with seeds from 0.", minimum=1)
    settings: tuple[str, ...] = option(
        (),
        "Set a field of the recipe or the net, as in width=0.25; may be repeated.",
        names=("--set",),
        metavar="FIELD=VALUE",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device to train on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(setting.partition("=")[0] == "seed" for setting in self.settings):
            raise InputError(
                "--set seed: a study uses several seeds",
                fix="choose their number with --seeds N, for seeds 0 to N - 1",
            )


@dataclass(frozen=True, kw_only=True)
class DetectorRun:
    """A backbone's run with one seed.

    Attributes:
        seed: Random seed.
        folder: Folder of the run.
        diverged: Reason why there is no result, or None.
        measured: Average precision on the test images; None if the run diverged.
        steps: Steps at the end of each epoch.
        loss: Mean loss of each epoch.
    """

    seed: int
    folder: Path
    diverged: str | None
    measured: DetectionAccuracy | None
    steps: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BackboneRecord:
    """A backbone and its runs; precisions in %, over the seeds that did not diverge.

    Attributes:
        backbone: Its name.
        parameters: Parameters of the detector.
        ap50: COCO's AP at an overlap of 0.5.
        ap: COCO's mean over ten overlaps.
        voc07: VOC 2007's mean over 11 recalls.
        runs: One for each seed.
    """

    backbone: str
    parameters: int
    ap50: Spread | None
    ap: Spread | None
    voc07: Spread | None
    runs: tuple[DetectorRun, ...]


@dataclass(frozen=True, kw_only=True)
class DetectionStudyResult:
    """A finished comparison of backbones.

    Attributes:
        data: Training images as they were named.
        images: Number of training images.
        test_images: Number of test images.
        pretrain: "objects", "imagenet" or "none".
        pretrain_steps: Length of the pre-training on objects.
        recipe: Recipe and net, as text.
        note: Length, data and seeds in words.
        backbones: A record of each backbone.
        out: The study's folder.
    """

    data: str
    images: int
    test_images: int
    pretrain: str
    pretrain_steps: int
    recipe: tuple[str, ...]
    note: str
    backbones: tuple[BackboneRecord, ...]
    out: Path = dataclasses.field(default=Path(), metadata={"hidden": True})


def study_detection(
    data: str = "shapes:200",
    config: DetectionStudyConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> DetectionStudyResult:
    """Train Faster R-CNN with several backbones under one recipe and equal pre-training.

    Every run is a folder in `out`; finished runs are not repeated.

    Args:
        data: Images with boxes, as for `train_detector`.
        config: Backbones, recipe, length and seeds.
        out: Folder; runs/study-detection by default.
        reporter: Receives progress and a line for each run.

    Returns:
        Average precision and losses of each backbone, over all seeds.

    Raises:
        InputError: Unknown names, no test images, or a folder of a different study.
        DataError: Broken annotations or images.
        LockedError: Another process runs a study in the folder.
    """
    require_torch("a study")
    from rtresnet.detection.recipe import describe

    config = config or DetectionStudyConfig()
    folder = Path(out or "runs/study-detection")
    device = torch_device(config.device)
    with locks.hold_folder(folder, warn=reporter.note):
        jobs = [
            (name, seed, _job(folder, name, seed, data, config, device, reporter))
            for seed in range(config.seeds)
            for name in dict.fromkeys(config.backbones)
        ]
        runs: dict[str, list[DetectorRun]] = {}
        try:
            for number, (name, seed, job) in enumerate(jobs, 1):
                where = f"{name}, seed {seed} ({number} of {len(jobs)})"
                runs.setdefault(name, []).append(_run(job, config, where, reporter))
        except KeyboardInterrupt:
            reporter.note(f"saved; resume with the same command: {provenance.command_line()}")
            raise
    first = jobs[0][2]
    assert first.test is not None
    seeds = "1 seed" if config.seeds == 1 else f"mean ± std of {config.seeds} seeds"
    before = {
        "objects": f"{config.pretrain_steps:,} steps on objects",
        "imagenet": "ImageNet",
        "none": "none",
    }[config.pretrain]
    total = first.recipe.total(int(sum((~t.ignored).any() for t in first.source.targets)))
    return DetectionStudyResult(
        data=data, images=len(first.source), test_images=len(first.test),
        pretrain=config.pretrain, pretrain_steps=config.pretrain_steps,
        recipe=tuple(describe(first.recipe, first.detection)),
        note=f"{total:,} steps of {first.recipe.batch} of {len(first.source):,} images of {data} "
        f"(the paper's: 80,000 of 1 on VOC); pre-training: {before}; {len(first.test):,} test "
        f"images; {seeds}",
        backbones=tuple(
            _record(name, next(job for other, _, job in jobs if other == name), own)
            for name, own in runs.items()
        ),
        out=folder,
    )  # fmt: skip


def _record(name: str, job: DetectionJob, runs: Sequence[DetectorRun]) -> BackboneRecord:
    """Summarize the runs of a backbone, one of whose jobs is given."""
    from rtresnet.detection import net
    from rtresnet.study.ablations import spread

    built = net.build(job.spec, job.detection, len(job.source.classes), device="meta")
    measured = [run.measured for run in runs if run.measured is not None]
    values = {
        field: [v for m in measured if (v := getattr(m, field)) is not None]
        for field in ("ap50", "ap", "voc07")
    }
    return BackboneRecord(
        backbone=name, parameters=sum(p.numel() for p in built.parameters()),
        **{field: spread(v) if v else None for field, v in values.items()}, runs=tuple(runs),
    )  # fmt: skip


def _job(
    folder: Path,
    name: str,
    seed: int,
    data: str,
    config: DetectionStudyConfig,
    device: str,
    reporter: Reporter,
) -> DetectionJob:
    options = TrainDetectorConfig(
        backbone=name, data=data, test_data=config.test_data, recipe=config.recipe,
        epochs=config.epochs, settings=config.settings, seed=seed,
        weights="imagenet" if config.pretrain == "imagenet" else None,
    )  # fmt: skip
    job = detection_job(folder / f"{name}-seed{seed}", options, InputConfig(), reporter)
    if job.test is None:
        raise InputError(f"{data}: has no test split", fix="name test images: --test-data SPEC")
    return dataclasses.replace(job, device=device)


def _run(
    job: DetectionJob, config: DetectionStudyConfig, where: str, reporter: Reporter
) -> DetectorRun:
    """Make a run, resume it, or read a finished one."""
    from rtresnet.detection import pretrain, training

    seed = job.recipe.seed
    identity = _identity(job, config)
    path = job.out / "study.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != identity:
            raise InputError(
                f"{job.out}: its run has a different recipe, net or images",
                fix="choose another --out",
            )
    else:
        atomic_io.make_folder(job.out)
        atomic_io.write_text(path, json.dumps(identity, indent=1) + "\n")
    failed = job.out / DIVERGED
    if failed.exists():
        message = json.loads(failed.read_text(encoding="utf-8"))["message"]
        return DetectorRun(seed=seed, folder=job.out, diverged=message, measured=None)
    resume = (job.out / "last.pt").exists()
    with reporter.progress(where, total=1.0) as update:

        def on_step(progress: Progress) -> None:
            update(progress.step / progress.total, f"{where}  loss {progress.loss:.3f}")

        try:
            if config.pretrain == "objects" and not resume:
                recipe = pretrain.PretrainRecipe(steps=config.pretrain_steps)
                start = pretrain.pretrain(
                    job, recipe,
                    lambda step, loss: update(
                        step / recipe.steps, f"{where}  pre-training  loss {loss:.3f}"
                    ),
                )  # fmt: skip
                job = dataclasses.replace(job, start=start)
            best = training.train(job, resume=resume, on_step=on_step)
        except CheckFailedError as error:
            atomic_io.write_text(failed, json.dumps({"message": error.message}) + "\n")
            reporter.note(f"{where}: diverged, {error.message}")
            return DetectorRun(seed=seed, folder=job.out, diverged=error.message, measured=None)
    measured = training.accuracy_of(best)
    assert measured is not None
    reporter.note(f"{where}: AP50 {measured.ap50 or 0:.1f} %, AP {measured.ap or 0:.1f} %")
    lines = (job.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return DetectorRun(
        seed=seed, folder=job.out, diverged=None, measured=measured,
        steps=tuple(entry["step"] for entry in log), loss=tuple(entry["loss"] for entry in log),
    )  # fmt: skip


def _identity(job: DetectionJob, config: DetectionStudyConfig) -> dict[str, Any]:
    """Return the settings that determine a run, for JSON."""
    assert job.test is not None
    identity = {
        "backbone": dataclasses.asdict(job.spec), "net": dataclasses.asdict(job.detection),
        "recipe": dataclasses.asdict(job.recipe), "fingerprint": job.source.fingerprint(),
        "test": job.test.fingerprint(), "pretrain": config.pretrain,
        "pretrain_steps": config.pretrain_steps,
    }  # fmt: skip
    record: dict[str, Any] = json.loads(json.dumps(identity))
    return record
