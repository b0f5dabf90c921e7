"""`rtresnet study degradation` and `rtresnet study shortcuts`: nets side by side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rtresnet.cli import common, study_show

if TYPE_CHECKING:
    from rtresnet.models.zoo import Spec
    from rtresnet.reporting.study_plots import Panel
    from rtresnet.study.compare import Net, Terms
    from rtresnet.study.runs import Outcome, Run
    from rtresnet.training.config import Progress

F = TypeVar("F", bound=Callable[..., Any])

CAPTION = "A band is one standard deviation over the seeds; the first steps may lie above the axes."
ABOUT = (
    "Errors in %: mean and standard deviation over the seeds. Training: of the last epoch, on the "
    "images as they were augmented; validation and test: of the epoch that was best on the "
    "held-out images."
)


def _run_options(function: F) -> F:
    for option in (
        common.json_option,
        click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto"),
        click.option("--out", type=click.Path(path_type=Path), help="Folder [runs/study-NAME]."),
        click.option("--size", type=click.IntRange(min=8), help="Side of the input [the nets']."),
        click.option(
            "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any recipe field."
        ),
        click.option("--steps", type=click.IntRange(min=1), help="Length of each run in steps."),
        click.option("--epochs", type=click.IntRange(min=1), help="Or in epochs [the recipe's]."),
        click.option("--recipe", default="paper-cifar", show_default=True, help="See train."),
        click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True),
        click.option(
            "--images",
            type=click.IntRange(min=20),
            help="Train on so many images only, spread evenly over the classes.",
        ),
        common.max_broken_option,
        click.option("--data", required=True, help=common.DATA_HELP),
    ):
        function = option(function)
    return function


@click.command("degradation")
@click.option("--depths", default="20,32,44,56", show_default=True, help="Of the nets.")
@_run_options
def degradation(depths: str, json_file: str | None, **options: Any) -> None:
    """Plain and residual nets of growing depth (figures 1, 4 and 6, table 2).

    Every run is a folder in --out; what is finished is not run again.
    """
    from rtresnet.study import compare

    common.require_torch("a study")
    nets = compare.degradation_nets(_numbers(depths))
    terms = _terms("degradation", **options)
    title = "Degradation: plain and residual nets of growing depth"
    result = _study(
        "degradation", nets, terms, title, options["data"], study_show.plain_and_residual
    )
    common.write_json(json_file, "study degradation", result)


@click.command("shortcuts")
@click.option("--model", default="resnet20", show_default=True, help="A residual net.")
@_run_options
def shortcuts(model: str, json_file: str | None, **options: Any) -> None:
    """Shortcut options A, B and C, and the plain net (section 4.1, table 3).

    A pads with zeros, B projects where dimensions change, C projects everywhere.
    """
    from rtresnet.study import compare

    common.require_torch("a study")
    nets = compare.shortcut_nets(model)
    terms = _terms("shortcuts", **options)
    title = f"Shortcut options of {model}"
    result = _study(
        "shortcuts", nets, terms, title, options["data"], study_show.training_and_validation
    )
    common.write_json(json_file, "study shortcuts", result)


def _numbers(given: str) -> list[int]:
    from rtresnet.core.errors import InputError

    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise InputError(
            f"--depths {given}: not numbers with commas between", fix="as in --depths 20,32"
        ) from None


def _terms(
    name: str,
    *,
    data: str,
    images: int | None,
    seeds: int,
    recipe: str,
    epochs: int | None,
    steps: int | None,
    settings: tuple[str, ...],
    size: int | None,
    out: Path | None,
    device: str,
    max_broken: float | None,
) -> Terms:
    from rtresnet.core.errors import InputError
    from rtresnet.data.sources import open_source
    from rtresnet.study import runs
    from rtresnet.study.compare import Terms
    from rtresnet.training import recipes
    from rtresnet.workflows.train import NOT_MIRRORED

    if epochs and steps:
        raise InputError("--epochs and --steps both say how long", fix="give one of them")
    given = recipes.parse(settings)
    if "seed" in given:
        raise InputError("--set seed: a study has several", fix="--seeds N takes 0 to N - 1")
    if data in NOT_MIRRORED:
        given = {"flip": "none"} | given
    given |= {key: value for key, value in (("epochs", epochs), ("steps", steps)) if value}
    source = open_source(data, "train")
    test = open_source(data, "test") if source.splits else None
    return Terms(
        source=runs.part(source, images),
        test=test,
        recipe=recipe,
        settings=given,
        seeds=seeds,
        out=out or Path(f"runs/study-{name}"),
        device=common.torch_device(device),
        size=size,
        max_broken=max_broken or 0.0,
    )


def _study(
    name: str,
    nets: Mapping[str, Spec],
    terms: Terms,
    title: str,
    data: str,
    panels: Callable[[Sequence[Net]], list[Panel]],
) -> dict[str, Any]:
    """Makes the runs and all that is drawn from them; returns what `--json` writes."""
    from rtresnet.core import locks

    with locks.hold_folder(terms.out, warn=common.note):
        return _locked_study(name, nets, terms, title, data, panels)


def _locked_study(
    name: str,
    nets: Mapping[str, Spec],
    terms: Terms,
    title: str,
    data: str,
    panels: Callable[[Sequence[Net]], list[Panel]],
) -> dict[str, Any]:
    from rtresnet.core import artifacts
    from rtresnet.reporting import page, study_page, tables
    from rtresnet.study import compare, runs
    from rtresnet.training.recipes import describe

    drawn, able = None, study_show.can_draw()
    planned = compare.plan(nets, terms)
    for run in planned:
        runs.found(run)  # a run that is not this study's is refused before any is made
    summary = compare.summarize(_make(planned))
    length = compare.length(planned[0])
    seeds = "1 seed" if terms.seeds == 1 else f"mean ± std of {terms.seeds} seeds"
    subtitle = f"{length.words(study_show.short(data))}; {seeds}"
    if able and any(net.finished for net in summary):
        from rtresnet.reporting.study_plots import error_curves

        drawn = error_curves(panels(summary), title=title, subtitle=subtitle)
    headings, rows = study_show.table(summary)
    tables.show(common.out_console(), headings, rows)
    common.note(f"{subtitle}.\n{ABOUT}")
    lost = [
        f"{outcome.run.label}, seed {outcome.run.seed}: {outcome.diverged}"
        for net in summary for outcome in net.outcomes if outcome.diverged
    ]  # fmt: skip
    parts = [
        page.table(headings, rows),
        page.paragraph(ABOUT, "dim"),
        *(page.paragraph(f"Diverged: {line}", "note") for line in lost),
        page.heading("Recipe of the first net and seed"),
        page.code("\n".join(describe(planned[0].job.recipe))),
        page.heading("Made by"),
        page.code(artifacts.provenance()["command"]),
    ]
    study_page.write(
        terms.out, name, title=title, drawn=drawn, about=CAPTION,
        parts=parts,
    )  # fmt: skip
    result = {
        "study": name,
        "data": data,
        "length": dataclasses.asdict(length),
        "note": subtitle,
        "nets": [net.record() for net in summary],
    }
    common.write_json(str(terms.out / f"{name}.json"), f"study {name}", result)
    common.note(f"page: {terms.out / 'index.html'}")
    return result


def _make(planned: Sequence[Run]) -> list[Outcome]:
    from rtresnet.core import artifacts
    from rtresnet.study import runs

    outcomes = []
    try:
        for number, run in enumerate(planned):
            where = f"{run.label}, seed {run.seed} ({number + 1} of {len(planned)})"
            before = runs.found(run)
            if before is not None:
                common.note(f"{where}: {study_show.words(before)} (made before)")
                outcomes.append(before)
                continue
            started = time.monotonic()
            with common.progress(where, total=1.0) as update:

                def on_step(p: Progress, update: Any = update, where: str = where) -> None:
                    update(p.step / p.total, f"{where}  loss {p.loss:.3f}")

                outcomes.append(runs.make(run, on_step=on_step, warn=common.note))
            spent = time.monotonic() - started
            common.note(f"{where}: {study_show.words(outcomes[-1])} ({spent:,.0f} s)")
    except KeyboardInterrupt:
        common.note(f"saved; go on with the same command: {artifacts.provenance()['command']}")
        raise
    return outcomes
