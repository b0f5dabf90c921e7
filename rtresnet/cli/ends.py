"""`--input` and `--topk` of export and build: a file with other ends beside the plain one."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.errors import InputError, missing_package

if TYPE_CHECKING:
    from rtresnet.sidecar import Sidecar

INPUTS = ("float32-nchw", "uint8-nhwc")


def ends_options(function: Any) -> Any:
    """`--input`, `--topk`."""
    for option in (
        click.option(
            "--topk",
            type=click.IntRange(min=1),
            metavar="K",
            help="The K most probable classes come out, with probabilities [logits].",
        ),
        click.option(
            "--input",
            "takes",
            type=click.Choice(INPUTS),
            default=INPUTS[0],
            help="uint8-nhwc: pixels go in as they are, the net normalizes them [float32-nchw].",
        ),
    ):
        function = option(function)
    return function


def asked(takes: str, topk: int | None) -> bool:
    """Whether there is anything to change."""
    return takes != INPUTS[0] or topk is not None


def require_classes(topk: int | None, classes: int, net: str) -> None:
    """Raises InputError where more classes are asked for than there are."""
    if topk is not None and topk > classes:
        raise InputError(f"--topk {topk}: {net} has {classes} classes")


def path_with(source: Path, takes: str, topk: int | None) -> Path:
    """resnet50-int8.onnx to resnet50-int8-u8-top5.onnx."""
    pixels = "-u8" if takes == "uint8-nhwc" else ""
    best = f"-top{topk}" if topk is not None else ""
    return source.with_name(f"{source.stem}{pixels}{best}{source.suffix}")


def write_with(source: Path, takes: str, topk: int | None) -> tuple[Path, Sidecar]:
    """Writes `source` with other ends beside it, after both have given the same answers.

    Returns:
        The new file and its sidecar.

    Raises:
        InputError: Nobody knows the mean and std that go inside, or K is too large.
        ArtifactError: Not an ONNX file of a plain net.
        GateMissed: The answers differ.
    """
    from rtresnet import artifacts, machine, onnx_file, storage
    from rtresnet.preprocess import UINT8

    sidecar = artifacts.verify(storage.require_file(source, fix="make one with: rtresnet export"))
    pixels, out = takes == "uint8-nhwc", path_with(source, takes, topk)
    if sidecar is None or (pixels and not sidecar.input_known):
        raise InputError(
            f"{source}: no sidecar, so its mean, std and classes are unknown",
            fix=f"state them once with: rtresnet adopt {source}",
        )
    if not machine.installed("onnx"):
        raise missing_package("onnx", "--input and --topk")

    from rtresnet.export import ends

    changed = ends.rewrite(onnx_file.load(source), sidecar.input, pixels=pixels, topk=topk)
    data = changed.SerializeToString()
    measured = _checked(source, data, sidecar, pixels, topk)
    layout = UINT8 if pixels else sidecar.input.layout
    written = artifacts.publish(
        out,
        lambda temporary: temporary.write_bytes(data),
        dataclasses.replace(
            sidecar,
            input=dataclasses.replace(sidecar.input, layout=layout),
            topk=topk,
            parent=artifacts.link_to(source, out),
            measured=measured,
            made_by={},
        ),
    )
    return out, written


def _checked(
    source: Path, data: bytes, sidecar: Sidecar, pixels: bool, topk: int | None
) -> dict[str, Any]:
    from rtresnet import machine
    from rtresnet.export import ends

    if not machine.installed("onnxruntime"):
        common.note("the changed file was not compared with the plain one: pip install onnxruntime")
        return {}
    from rtresnet.runtime.session import load

    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / source.name
        trial.write_bytes(data)
        with (
            load(source, device="cpu", provider="cpu") as plain,
            load(trial, device="cpu", provider="cpu") as changed,
        ):
            found = ends.check(
                plain.logits, changed, sidecar.input, pixels=pixels, topk=topk
            )  # fmt: skip
            return {"ends": found | {"with": plain.backend.provider}}
