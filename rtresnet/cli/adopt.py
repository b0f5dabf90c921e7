"""`rtresnet adopt`: a sidecar for an ONNX file that another tool exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import InputError

if TYPE_CHECKING:
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.onnxlib.interface import Interface


@click.command("adopt", short_help="Write the sidecar of an ONNX file made elsewhere.")
@click.argument("path", metavar="FILE.onnx", type=click.Path(path_type=Path))
@click.option(
    "--resize",
    type=click.IntRange(min=1),
    help="Shorter side before the centre crop, in pixels [default: 256/224 of the size above 64 "
    "pixels, else the size].",
)
@common.classes_option
@click.option("--force", is_flag=True, help="Replace a sidecar that exists.")
@common.input_options
@common.json_option
def command(path: Path, json_file: str | None, **options: Any) -> None:
    """Write the sidecar of an ONNX file that another tool exported.

    State once what the file does not say: mean and std (or --preset), the class names, and the
    size where the file leaves it open. After that every command takes the file without them.
    """
    result = run(path, **options)
    sidecar = result["sidecar"]
    interface = result["interface"]
    takes = "uint8 pixels, normalized inside the file"
    if not interface["pixels"]:
        mean, std = (",".join(f"{v:g}" for v in sidecar["input"][n]) for n in ("mean", "std"))
        takes = f"mean {mean}, std {std}"
    size, resize = sidecar["input"]["size"], sidecar["input"]["resize"]
    named = "named" if result["named"] else "without names"
    batch = f", batches of {interface['batch']}" if interface["batch"] else ""
    common.say(
        f"{path}: {sidecar['precision']}, {len(sidecar['model']['classes'])} classes {named}, "
        f"{size} of {resize} px, {takes}{batch}"
    )
    common.say(f"sidecar: {result['file']}")
    common.footer(f"Assumed: {line}." for line in sidecar["assumed"])
    common.write_json(json_file, "adopt", result)


def run(
    path: Path,
    *,
    size: int | None = None,
    resize: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    classes: tuple[str, ...] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the sidecar; returns what `--json` writes.

    Raises:
        InputError: A sidecar exists, the preprocessing is not stated, or does not fit the file.
        ArtifactError: The file is not an image classifier that the other commands can run.
    """
    from rtresnet.core import artifacts, locks
    from rtresnet.onnxlib import io
    from rtresnet.onnxlib.interface import read_interface
    from rtresnet.workflows import adopt

    artifacts.require_name(artifacts.require_onnx(path, "adopt"), "onnx")
    place = artifacts.sidecar_path(path)
    if place.exists() and not force:
        raise InputError(
            f"{path}: has a sidecar, {place}",
            fix=f"see: rtresnet inspect {path}; replace it with --force",
        )
    with locks.hold_file(path, warn=common.note):
        model = io.load(path, checked=True, fix="export it again")
        interface = read_interface(model, path)
        preprocess = _preprocess(path, interface, size, resize, mean, std)
        sidecar = artifacts.record(
            path,
            adopt.describe(
                path,
                classes=adopt.class_names(path, interface, classes),
                preprocess=preprocess,
                precision=interface.precision,
                topk=interface.topk,
                assumed=preprocess.crop_assumption() if resize is None else (),
            ),
        )
    return {
        "file": str(place),
        "named": classes is not None,
        "interface": dataclasses.asdict(interface),
        "sidecar": dataclasses.asdict(sidecar),
    }


def _preprocess(
    path: Path,
    interface: Interface,
    size: int | None,
    resize: int | None,
    mean: str | None,
    std: str | None,
) -> Preprocess:
    if interface.pixels and (mean or std):
        raise InputError(
            f"{path}: takes uint8 pixels and normalizes inside, so --mean and --std change nothing",
            fix="leave --mean, --std and --preset out",
        )
    preprocess = common.stated_input(
        path, size, mean, std, fixed=interface.size, pixels=interface.pixels
    )
    return preprocess if resize is None else dataclasses.replace(preprocess, resize=resize)
