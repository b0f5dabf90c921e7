"""`rtresnet train`: images to a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common

if TYPE_CHECKING:
    from rtresnet.train.loop import Progress

NOT_MIRRORED = ("digits",)  # a mirrored digit is another digit, or none


@click.command("train")
@click.option("--model", default=None, help="See `rtresnet models` [resnet20, or the weights'].")
@click.option("--data", default="digits", show_default=True, help=common.DATA_HELP)
@click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--batch", type=click.IntRange(min=2), help="Images a step [128, fewer on a small set]."
)
@click.option("--lr", type=float, help="Learning rate [0.1 at batch 128; a tenth with --weights].")
@click.option("--weights", metavar="FILE", help="Go on from a checkpoint, ours or a foreign one.")
@click.option("--flip/--no-flip", default=None, help="Mirror images [yes, but digits].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run [runs/MODEL-DATA].")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or the latest.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto")
@common.input_options
@common.json_option
def command(json_file: str | None, **options: Any) -> None:
    """Train a net; the test split is touched once, at the end.

    Writes best.pt, last.pt and log.jsonl into the run's folder.
    """
    result = run(**options)
    common.write_json(json_file, "train", result)


def run(
    *,
    model: str | None,
    data: str,
    epochs: int,
    batch: int | None,
    lr: float | None,
    weights: str | None,
    flip: bool | None,
    seed: int,
    out: Path | None,
    resume: bool,
    device: str,
    size: int | None,
    mean: str | None,
    std: str | None,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    common.require_torch("training")
    from rtresnet.data.sources import open_source
    from rtresnet.models import checkpoint, zoo
    from rtresnet.preprocess import Preprocess
    from rtresnet.train import loop, recipe

    start = checkpoint.load(weights, model=model) if weights else None
    spec = start.spec if start else zoo.spec(model or "resnet20")
    source = open_source(data, "train")
    test = open_source(data, "test") if source.splits else None
    base = start.input if start else Preprocess.for_size(spec.size)
    settings = recipe.scaled(
        len(source) * 9 // 10,
        epochs=epochs,
        batch=batch,
        flip=data not in NOT_MIRRORED if flip is None else flip,
        seed=seed,
    )
    if lr is not None or start is not None:
        settings = dataclasses.replace(settings, lr=lr if lr is not None else settings.lr / 10)
    folder = out or default_folder(spec.name, data, resume)
    loop.check_folder(folder, resume)
    job = loop.Job(
        spec=spec,
        source=source,
        test=test,
        preprocess=common.preprocess_from(base, size, mean, std),
        recipe=settings,
        out=folder,
        device=common.torch_device(device),
        start=start,
    )
    common.note(f"{spec.name} on {data}: {len(source)} images, {len(source.classes)} classes")
    common.note("recipe: " + ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(settings).items()))
    with common.progress("training", total=epochs) as update:

        def on_step(p: Progress) -> None:
            update(
                completed=p.epoch + (p.step + 1) / p.steps,
                description=f"epoch {p.epoch + 1}/{epochs}  loss {p.loss:.3f}  lr {p.lr:.2g}  "
                f"{p.images_per_second:,.0f} img/s",
            )

        def on_epoch(record: dict[str, Any]) -> None:
            common.note(
                f"epoch {record['epoch']:3d}/{epochs}  loss {record['loss']:.4f}  "
                f"train {record['train_top1']:.2f} %  val {record['val_top1']:.2f} %  "
                f"{record['images_per_second']:,.0f} img/s"
            )

        try:
            best = loop.train(
                job, resume=resume, on_step=on_step, on_epoch=on_epoch, warn=common.note
            )
        except KeyboardInterrupt:
            if (folder / "last.pt").exists():
                common.note(
                    f"go on with: rtresnet train --model {spec.name} --data {data} "
                    f"--epochs {epochs} --out {folder} --resume"
                )
            else:
                common.note("no epoch was finished: start again, without --resume")
            raise
    measured = best.measured
    common.out_console().print(
        f"{folder / 'best.pt'}: test top-1 {measured['test_top1']:.2f} % of {measured['test_n']} "
        f"images (epoch {measured['epoch']}, val {measured['val_top1']:.2f} % of "
        f"{measured['val_n']})",
        soft_wrap=True,
    )
    return {
        "checkpoint": str(folder / "best.pt"),
        "recipe": dataclasses.asdict(settings),
        "measured": measured,
        "log": str(folder / "log.jsonl"),
    }


def default_folder(model: str, data: str, resume: bool) -> Path:
    """runs/MODEL-DATA, numbered from the second run on; with `resume` the latest there is."""
    name = f"{model}-{re.sub(r'[^A-Za-z0-9]+', '-', data).strip('-')[-40:]}"
    taken, number = Path("runs") / name, 2
    while taken.exists():
        following = Path("runs") / f"{name}-{number}"
        if resume and not following.exists():
            return taken
        taken, number = following, number + 1
    return taken
