"""`rtresnet adopt`: the sidecar of an ONNX file that another tool exported."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.preprocess import UINT8
from rtresnet.core.reporter import plural
from rtresnet.reporting.tables import assumed
from rtresnet.workflows.adopt import adopt
from rtresnet.workflows.input_spec import InputConfig


@click.command("adopt")
@click.argument("path", metavar="FILE.onnx", type=common.PATH)
@click.option(
    "--resize",
    type=click.IntRange(min=1),
    help="Shorter side before the centre crop, in pixels.  [default: 256/224 of the size above 64 "
    "pixels, else the size]",
)
@common.classes_option
@click.option("--force", is_flag=True, help="Replace an existing sidecar.  [default: error]")
@config_options(
    InputConfig,
    argument="stated",
    default_texts={
        "size": "from the file",
        "mean": "none; required unless the file takes uint8 pixels",
        "std": "none; required unless the file takes uint8 pixels",
        "interpolation": "bilinear",
    },
)
@common.json_option
def command(
    path: Path,
    resize: int | None,
    classes: tuple[str, ...] | None,
    force: bool,
    stated: InputConfig,
) -> None:
    """Write the sidecar of an ONNX file that another tool exported.

    State what the file does not contain: mean and std (or --preset), the class names, and the size
    if the file does not fix it. Every command then runs the file without these options.
    """
    result = adopt(
        path, stated, resize=resize, classes=classes, force=force, reporter=common.REPORTER
    )
    sidecar, contract = result.sidecar, result.sidecar.input
    takes = "uint8 pixels, normalized inside the file"
    if contract.layout != UINT8:
        mean, std = (",".join(f"{v:g}" for v in vs) for vs in (contract.mean, contract.std))
        takes = f"mean {mean}, std {std}"
    named = "with names" if result.named else "without class names"
    batch = f", batches of {result.interface.batch}" if result.interface.batch else ""
    common.say(
        f"{path}: {sidecar.precision}, {plural(len(sidecar.model.classes), 'class')} {named}, "
        f"{contract.size} of {contract.resize} px, {takes}{batch}"
    )
    common.say(f"sidecar: {result.file}")
    common.show(assumed(sidecar.assumed))
    common.write_json("adopt", result)
