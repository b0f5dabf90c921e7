"""Train a detector on images with boxes; start a run and resume it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import hardware, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.sidecar import Detection
from rtresnet.detection.average_precision import DetectionAccuracy
from rtresnet.detection.recipe import DetectionRecipe
from rtresnet.training.config import SAVE_SECONDS
from rtresnet.workflows import run_folders
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch, torch_device
from rtresnet.workflows.train_log import TrainProgress

if TYPE_CHECKING:
    from rtresnet.detection.data import DetectionSource
    from rtresnet.detection.training import DetectionJob
    from rtresnet.models.checkpoint import Checkpoint

FEW_STEPS = 600  # fewer leave untrained weights with hardly any detections


@dataclass(frozen=True, kw_only=True)
class TrainDetectorConfig(Config):
    """Detector, data and settings of a training run. None is the default in the help text.

    Attributes:
        settings: Fields of the recipe or of the net, each "FIELD=VALUE".
        save_every: Seconds between saves of the state within an epoch.
    """

    backbone: str | None = option(
        None,
        "Backbone of the detector: an ImageNet or VGG net of `rtresnet models`.",
        default_text="resnet50, or the weights'",
    )
    data: str = option(
        "shapes:400", "Images with boxes: voc:DIR[:SPLIT], coco:JSON:IMAGES or shapes:N."
    )
    test_data: str | None = option(
        None,
        "Images with boxes on which the trained net is tested once.",
        default_text="the data's own test split, if it has one",
    )
    recipe: str | None = option(
        None,
        "Recipe: paper-detection or scratch-detection.",
        default_text="paper-detection with --weights, else scratch-detection",
    )
    epochs: int | None = option(
        None, "Length of the run in epochs.", minimum=1, default_text="the recipe's"
    )
    batch: int | None = option(None, "Images in a step.", minimum=1, default_text="the recipe's")
    lr: float | None = option(None, "Learning rate.", default_text="the recipe's")
    settings: tuple[str, ...] = option(
        (),
        "Set a field of the recipe or the net, as in anchors=32,64,128; may be repeated.",
        names=("--set",),
        metavar="FIELD=VALUE",
    )
    weights: str | None = option(
        None,
        "Start from a checkpoint of the backbone or of a detector, or from imagenet.",
        metavar="FILE|imagenet",
    )
    seed: int | None = option(None, "Random seed.", minimum=0, default_text="0")
    out: Path | None = option(
        None, "Folder of the run.", default_text="a new folder runs/MODEL-DATA"
    )
    resume: bool = option(False, "Resume the run in --out, or the latest one.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device to train on.")
    save_every: float = option(
        SAVE_SECONDS,
        "Seconds between saves of the state within an epoch.",
        metavar="SECONDS",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainDetectorResult:
    """A finished run.

    Attributes:
        checkpoint: The trained detector.
        recipe: Recipe of the run.
        detection: Sizes and numbers of boxes.
        measured: Average precision on the test images in %; None without test images.
        log: A JSON object for each epoch.
    """

    checkpoint: Path
    recipe: DetectionRecipe
    detection: Detection
    measured: DetectionAccuracy | None
    log: Path


def train_detector(
    config: TrainDetectorConfig | None = None,
    *,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> TrainDetectorResult:
    """Train a Faster R-CNN; the test split is used once, at the end.

    Writes best.pt, last.pt and log.jsonl into the run's folder.

    Args:
        config: Net, data and recipe.
        stated: Mean and std that replace the weights' or ImageNet's.
        reporter: Receives progress and a line for each epoch.

    Returns:
        The trained detector and its average precision.

    Raises:
        InputError: Unknown names, or a run that contradicts the options.
        DataError: Broken annotations or images.
        UnavailableError: torch or a device is missing.
        CheckFailedError: The loss is not finite.
        LockedError: Another process trains in the folder.
    """
    config, stated = config or TrainDetectorConfig(), stated or InputConfig()
    hardware.wait_passively()
    require_torch("training")
    from rtresnet.core import locks
    from rtresnet.detection import training
    from rtresnet.training import checkpointing

    device = torch_device(config.device)
    with contextlib.ExitStack() as stack:
        out = config.out
        if out is None and config.resume:
            out = run_folders.latest_folder(config.backbone, config.data)
        if out is None:
            name = config.backbone or "detector"
            new = run_folders.new_folder(name, config.data, warn=reporter.note)
            out = stack.enter_context(new)
        else:
            stack.enter_context(locks.hold_folder(out, warn=reporter.note))
        checkpointing.check_folder(out, config.resume)
        job = (_resumed if config.resume else detection_job)(out, config, stated, reporter)
        job = dataclasses.replace(job, device=device, save_every=config.save_every)
        _announce(job, reporter, fresh=not config.resume)
        with _Progress(reporter, ()) as progress:
            try:
                best = training.train(
                    job, resume=config.resume, on_step=progress.step, on_epoch=progress.epoch
                )
            except KeyboardInterrupt:
                if (out / "last.pt").exists():
                    reporter.note(
                        f"saved; resume with: rtresnet train --task detect --out {out} --resume"
                    )
                raise
    assert best.detection is not None
    return TrainDetectorResult(
        checkpoint=out / "best.pt",
        recipe=job.recipe,
        detection=best.detection,
        measured=training.accuracy_of(best),
        log=out / "log.jsonl",
    )


def _sources(
    config: TrainDetectorConfig, data: str, reporter: Reporter
) -> tuple[DetectionSource, DetectionSource | None]:
    from rtresnet.detection.data import open_detection, report_invalid

    source = open_detection(data, "train")
    for line in report_invalid(source):
        reporter.note(line)
    test = None
    if config.test_data is not None:
        test = open_detection(config.test_data, "test")
        if test.classes != source.classes:
            raise InputError(f"{config.test_data}: has different classes than {data}")
    elif source.splits:
        test = open_detection(data, "test")
    return source, test


def detection_job(
    out: Path, config: TrainDetectorConfig, stated: InputConfig, reporter: Reporter
) -> DetectionJob:
    """Return a new run as the options describe it.

    Args:
        out: Its folder.
        config: The options.
        stated: Mean and std that replace the weights' or ImageNet's.
        reporter: Receives defects of the data.

    Raises:
        InputError: Unknown names or settings.
        DataError: Broken annotations or images.
    """
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.detection import recipe as recipes
    from rtresnet.detection.data import SHAPES_SIDE
    from rtresnet.detection.training import DetectionJob
    from rtresnet.models import zoo

    start = _start(config, reporter)
    if config.backbone is None and start is not None:
        spec = start.spec
    else:
        spec = zoo.spec(config.backbone or "resnet50")
    source, test = _sources(config, config.data, reporter)
    detection = Detection()
    if start is not None and start.detection is not None:
        detection = start.detection
    elif config.data.startswith("shapes:"):
        detection = Detection(
            shorter=SHAPES_SIDE, longer=SHAPES_SIDE, anchors=(16.0, 32.0, 64.0), pool=7,
            candidates=300, regions=50, detections=20,
        )  # fmt: skip
    elif config.data.startswith("coco:"):
        detection = Detection(anchors=(64.0, 128.0, 256.0, 512.0))
    if spec.family == "vgg":
        detection = dataclasses.replace(detection, pool=7)
    default = recipes.SCRATCH if start is None else recipes.PAPER
    recipe = recipes.named(config.recipe) if config.recipe else default
    if config.epochs is not None:
        recipe = dataclasses.replace(recipe, steps=0)
    recipe, detection = recipes.changed(recipe, detection, _settings(config))
    preprocess = start.input if start else Preprocess.for_size(spec.size)
    return DetectionJob(
        spec=spec, detection=detection, source=source, test=test,
        preprocess=stated.applied_to(preprocess), recipe=recipe, out=out, start=start,
    )  # fmt: skip


def _settings(config: TrainDetectorConfig) -> list[str]:
    """Return the fields of recipe and net that the options set, as `--set` takes them."""
    settings = [
        f"{name}={value}"
        for name in ("epochs", "batch", "lr", "seed")
        if (value := getattr(config, name)) is not None
    ]
    return [*settings, *config.settings]


def _start(config: TrainDetectorConfig, reporter: Reporter) -> Checkpoint | None:
    from rtresnet.detection import checkpoint as detectors
    from rtresnet.models import checkpoint, download
    from rtresnet.workflows.detect import is_detector

    if config.weights is None:
        return None
    if config.weights == "imagenet":
        return download.imagenet(config.backbone or "resnet50", reporter)
    if is_detector(config.weights):
        return detectors.load(config.weights)
    return checkpoint.load(config.weights, model=config.backbone)


def _resumed(
    out: Path, config: TrainDetectorConfig, stated: InputConfig, reporter: Reporter
) -> DetectionJob:
    """Return the run's own net, data and recipe; the options must agree with them."""
    from rtresnet.detection import recipe as recipes
    from rtresnet.detection import training
    from rtresnet.detection.training import DetectionJob

    last = training.saved_run(out)
    saved = last.training
    assert last.detection is not None
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in saved["recipe"].items()
    }
    own = recipes.DetectionRecipe(**values)
    stated_recipe, detection = recipes.changed(own, last.detection, _settings(config))
    defaults = TrainDetectorConfig()
    differs = [
        name
        for name, same in (
            ("recipe", stated_recipe == own and config.recipe in (None, own.name)),
            ("net", detection == last.detection and config.backbone in (None, last.spec.name)),
            ("data", config.data in (defaults.data, saved["data"])),
        )
        if not same
    ]
    if differs:
        raise InputError(
            f"{out}: its run has a different {' and '.join(differs)}",
            fix="resume with the same options, or train into another --out",
        )
    source, test = _sources(config, saved["data"], reporter)
    return DetectionJob(
        spec=last.spec, detection=last.detection, source=source, test=test,
        preprocess=stated.applied_to(last.input), recipe=own, out=out,
    )  # fmt: skip


def _announce(job: DetectionJob, reporter: Reporter, *, fresh: bool) -> None:
    from rtresnet.detection.recipe import describe

    boxes = sum(len(targets.boxes) for targets in job.source.targets)
    reporter.note(
        f"Faster R-CNN with {job.spec.name} on {job.source.name}: "
        f"{plural(len(job.source), 'image')}, {boxes:,} boxes, "
        f"{len(job.source.classes)} classes, {job.device}"
    )
    for line in describe(job.recipe, job.detection):
        reporter.note(line)
    images = sum(bool((~targets.ignored).any()) for targets in job.source.targets)
    steps = job.recipe.total(images)
    if fresh and job.start is None and steps < FEW_STEPS:
        epochs = -(-FEW_STEPS // job.recipe.steps_an_epoch(max(images, 1)))
        reporter.note(
            f"NOTE: {plural(steps, 'step')} may be too few for untrained weights; start from "
            f"--weights imagenet, or train longer, as in --epochs {epochs}"
        )


class _Progress(TrainProgress):
    """Shows a run through the reporter."""

    rate = ",.1f"

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Report an epoch."""
        self._reporter.note(
            f"epoch {record['epoch']:3d}  step {record['step']:,}  loss {record['loss']:.4f} "
            f"(proposals {record['rpn_class']:.4f} + {record['rpn_box']:.4f}, regions "
            f"{record['head_class']:.4f} + {record['head_box']:.4f})  "
            f"{record['images_per_second']:,.1f} img/s"
        )
