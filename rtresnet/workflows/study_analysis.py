"""Analyses that train nothing, or a few steps: cost, gradients, lesions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rtresnet.core import artifacts, atomic_io, locks, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.reporter import Reporter
from rtresnet.study.results import GradientNorms
from rtresnet.workflows.loading import require_torch, torch_device

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.data.sources import Source
    from rtresnet.models.checkpoint import Checkpoint

VGG = "vgg19"
CALIBRATION_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class NetCost:
    """Parameters and multiply-adds of a net for one image of its customary size.

    Attributes:
        size: Side of the image, in pixels.
        fc_parameters: Share of the fully connected layers in the parameters, in [0, 1].
        fc_multiply_adds: Share of the fully connected layers in the multiply-adds, in [0, 1].
        of_vgg19: Multiply-adds over those of VGG-19.
    """

    model: str
    size: int
    parameters: int
    multiply_adds: int
    fc_parameters: float
    fc_multiply_adds: float
    of_vgg19: float


@dataclass(frozen=True, kw_only=True)
class CostResult:
    """The cost of every net."""

    nets: tuple[NetCost, ...]


def study_cost() -> CostResult:
    """Count parameters and multiply-adds of every net against VGG-19 (section 3.3, table 1).

    Returns:
        A row for each net, in the order of `rtresnet models`.
    """
    from rtresnet.models import zoo

    vgg = zoo.cost(zoo.spec(VGG)).multiply_adds
    rows = []
    for name in zoo.names():
        spec = zoo.spec(name)
        cost = zoo.cost(spec)
        rows.append(
            NetCost(
                model=name,
                size=spec.size,
                parameters=cost.parameters,
                multiply_adds=cost.multiply_adds,
                fc_parameters=cost.fc_parameters / cost.parameters,
                fc_multiply_adds=cost.fc_multiply_adds / cost.multiply_adds,
                of_vgg19=cost.multiply_adds / vgg,
            )
        )
    return CostResult(nets=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class GradientsConfig(Config):
    """Which gradients are measured."""

    models: tuple[str, ...] = option(
        ("plain20", "plain56", "resnet20", "resnet56"),
        "Net to measure; may be repeated.",
        names=("--model",),
        metavar="NET",
        default_text="plain20, plain56, resnet20, resnet56",
    )
    steps: int = option(
        100, "Length of the run, in steps; 0 measures at initialization only.", minimum=0
    )
    batch: int = option(128, "Images in a batch.", minimum=2)
    seed: int = option(0, "Seed of the weights and of the order of the images.", minimum=0)
    size: int | None = option(
        None, "Side of the input, in pixels.", minimum=8, default_text="the nets'"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device to run on.")


@dataclass(frozen=True, kw_only=True)
class NetGradients:
    """The gradients of a net at initialization and along a run."""

    model: str
    points: tuple[GradientNorms, ...]


@dataclass(frozen=True, kw_only=True)
class GradientsResult:
    """The gradients of several nets under one recipe."""

    data: str
    images: int
    batch: int
    seed: int
    device: str
    nets: tuple[NetGradients, ...]


def study_gradients(
    data: str,
    config: GradientsConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> GradientsResult:
    """Measure the gradient of every 3x3 layer at initialization and along a run (section 4.1).

    Args:
        data: As for `train`.
        config: Nets and length of the run.
        out: Folder, where finished nets are kept; runs/study-gradients by default.
        reporter: Receives progress.

    Returns:
        The norms by net and layer.

    Raises:
        InputError: Unknown names, data that cannot be read, or a folder of a different study.
        LockedError: Another process runs a study in the folder.
    """
    require_torch("a study")
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.data.sources import open_source
    from rtresnet.models import zoo
    from rtresnet.study import analyses
    from rtresnet.study.results import PartialResults

    config = config or GradientsConfig()
    device = torch_device(config.device)
    specs = {name: zoo.spec(name) for name in config.models}
    source = open_source(data, "train")
    folder = atomic_io.make_folder(Path(out or "runs/study-gradients"))
    points = sorted({0, config.steps // 4, config.steps // 2, config.steps})
    about = {"data": source.fingerprint(), "steps": config.steps, "batch": config.batch,
             "seed": config.seed, "size": config.size, "device": device}  # fmt: skip
    nets = []
    with locks.hold_folder(folder, warn=reporter.note):
        partial = PartialResults(folder / "gradients-nets.json", about)
        for name, spec in specs.items():

            def run(name: str = name, spec: zoo.Spec = spec) -> tuple[GradientNorms, ...]:
                preprocess = Preprocess.for_size(config.size or spec.size)
                run = analyses.along_a_run(
                    spec, source, preprocess, steps=points, batch=config.batch, seed=config.seed,
                    device=device,
                )  # fmt: skip
                with reporter.progress(f"gradients of {name}", total=config.steps) as update:
                    results = []
                    for point in run:
                        results.append(point)
                        update(point.step)
                return tuple(results)

            points_of_net = partial.get(name, tuple[GradientNorms, ...], run)
            nets.append(NetGradients(model=name, points=points_of_net))
    return GradientsResult(
        data=data, images=len(source), batch=config.batch, seed=config.seed, device=device,
        nets=tuple(nets),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A net without one block.

    Attributes:
        block: As in "layer1.0".
        top1: Accuracy without the block, in %.
        drop: What the block's absence costs, in points.
        int8_db: Signal-to-noise ratio at the logits with this block alone in INT8, in dB.
    """

    block: str
    top1: float
    drop: float
    int8_db: float


@dataclass(frozen=True, kw_only=True)
class LesionsResult:
    """A net without each of its blocks.

    Attributes:
        n: Number of images.
        top1: Accuracy of the whole net, in %.
        calibration_images: Number of images that the INT8 ranges come from: of the train split, if
            there is one, else of all.
        assumed: What the checkpoint does not state.
        remarks: Where the test images include training images.
    """

    checkpoint: str
    model: str
    data: str
    n: int
    top1: float
    calibration_images: int
    assumed: tuple[str, ...]
    remarks: tuple[str, ...]
    blocks: tuple[Lesion, ...]


def study_lesions(
    checkpoint: str | os.PathLike[str],
    data: str,
    images: int | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> LesionsResult:
    """Measure the accuracy of a trained net without each of its blocks.

    Also measures how much noise the same block, alone in INT8, adds to the logits. The test split
    is evaluated; the INT8 ranges come from training images.

    Args:
        checkpoint: Checkpoint of a residual net.
        data: As for `train`.
        images: Number of test images; None: all.
        out: Folder, where results are kept as they are made; runs/study-lesions by default.
        reporter: Receives progress.

    Returns:
        Accuracy and INT8 noise by block.

    Raises:
        InputError: Not a checkpoint of a residual net, or a folder of a different study.
        DataError: No labels, or labels of other classes.
        LockedError: Another process runs a study in the folder.
    """
    require_torch("a study")
    from rtresnet.data import loader
    from rtresnet.data.sources import for_model, open_source
    from rtresnet.models import checkpoint as checkpoints
    from rtresnet.models.nets import TorchBackend
    from rtresnet.study import analyses
    from rtresnet.study.results import PartialResults
    from rtresnet.training.evaluate import evaluate
    from rtresnet.workflows.training_overlap import trained_on

    path = Path(checkpoint)
    loaded, sidecar = checkpoints.load(path), artifacts.read_sidecar(path)
    net = loaded.net().eval()
    blocks = analyses.removable_blocks(net, loaded.model.architecture)
    classes = loaded.model.classes
    source = for_model(open_source(data, "test"), classes, model_name=str(path))
    chosen = loader.sample(source, images or len(source))
    calibrating = open_source(data, "train")
    folder = atomic_io.make_folder(Path(out or "runs/study-lesions"))
    backend = TorchBackend(net)

    def accuracy() -> float:
        return evaluate(backend, source, loaded.input, indices=chosen).top1_percent

    about = {"checkpoint": atomic_io.sha256(path), "data": source.fingerprint(), "n": len(chosen)}
    with (
        locks.hold_folder(folder, warn=reporter.note),
        reporter.progress(f"lesions of {path}", total=len(blocks) + 1) as update,
    ):
        partial = PartialResults(folder / "lesions-blocks.json", about)
        whole = partial.get("whole", float, accuracy)
        top1 = {}
        for number, block in enumerate(blocks, 1):
            update(number, block)
            with analyses.without(net, block):
                top1[block] = partial.get(block, float, accuracy)
        noise = partial.get("int8", dict[str, float], lambda: _int8_noise(loaded, calibrating))
    return LesionsResult(
        checkpoint=str(path), model=loaded.model.architecture, data=data, n=len(chosen),
        top1=whole, calibration_images=min(CALIBRATION_IMAGES, len(calibrating)),
        assumed=tuple(loaded.assumed),
        remarks=trained_on([(path, sidecar.weights if sidecar else None)], source, "test"),
        blocks=tuple(
            Lesion(block=block, top1=value, drop=whole - value, int8_db=noise[block])
            for block, value in top1.items()
        ),
    )  # fmt: skip


def _int8_noise(loaded: Checkpoint, source: Source) -> dict[str, float]:
    """Return the signal-to-noise at the logits with each block alone in INT8, in dB."""
    from rtresnet.data import loader
    from rtresnet.exporter.fold import fold
    from rtresnet.exporter.writer import to_onnx
    from rtresnet.quantization import calibrate, qdq
    from rtresnet.quantization.sensitivity import sensitivity

    size = loaded.input.size
    model = to_onnx(fold(loaded.net()), size=size, name=loaded.model.architecture)
    chosen = loader.sample(source, CALIBRATION_IMAGES)

    def batches() -> list[np.ndarray]:
        per_batch = loader.batch_size(loaded.input)
        return [x for x, _ in loader.batches(source, loaded.input, per_batch, indices=chosen)]

    calibrated = calibrate.calibrate(model, list(qdq.placement(model)), batches)
    held_out, logits = calibrate.references(model, batches())
    return {block.name: block.alone for block in sensitivity(calibrated, held_out, logits)}
