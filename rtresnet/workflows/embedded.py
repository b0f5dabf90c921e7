"""Write a file with pixels as input or the top-K classes as output, next to the plain one."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtresnet.core import artifacts, atomic_io, hardware, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError, missing_package
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.sidecar import Measurements, Sidecar


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(Config):
    """Input and output of an exported file.

    Attributes:
        input: "uint8-nhwc": pixels [N, S, S, 3] that the file itself normalizes.
        topk: Number K of most probable classes to return with probabilities instead of logits.
    """

    input: Literal["float32-nchw", "uint8-nhwc"] = option(
        "float32-nchw", "Input of the file; with uint8-nhwc, the file normalizes pixels itself."
    )
    topk: int | None = option(
        None,
        "Return the K most probable classes with their probabilities.",
        metavar="K",
        minimum=1,
        default_text="logits",
    )

    @property
    def pixels(self) -> bool:
        """Whether the file takes uint8 pixels."""
        return self.input == "uint8-nhwc"

    @property
    def changes_anything(self) -> bool:
        """Whether the file differs from a plain one."""
        return self.pixels or self.topk is not None


def require_classes(topk: int | None, classes: int, net: str) -> None:
    """Raise InputError if more classes are asked for than there are."""
    if topk is not None and topk > classes:
        raise InputError(f"--topk {topk}: {net} has {plural(classes, 'class')}")


def path_with(source: Path, config: EmbedConfig) -> Path:
    """Return a file's name with its embedded ends, such as resnet50-int8-u8-top5.onnx."""
    pixels = "-u8" if config.pixels else ""
    best = f"-top{config.topk}" if config.topk is not None else ""
    return source.with_name(f"{source.stem}{pixels}{best}{source.suffix}")


def write(
    source: Path, config: EmbedConfig, *, reporter: Reporter = reporter.DEFAULT
) -> tuple[Path, Sidecar]:
    """Write the changed file next to `source` after comparing the outputs of both.

    Returns:
        The new file and its sidecar.

    Raises:
        InputError: The mean and std that go inside are unknown, or K is too large.
        ArtifactError: Not an ONNX file of a plain net.
        CheckFailedError: The outputs differ.
    """
    from rtresnet.core.preprocess import UINT8
    from rtresnet.exporter import embed_io
    from rtresnet.onnxlib import io, metadata

    path = atomic_io.require_file(source, fix="create it with: rtresnet export")
    sidecar, out = artifacts.verify(path), path_with(source, config)
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "--input and --topk")
    model = io.load(path)
    sidecar = sidecar or metadata.described(path, model)
    if sidecar is None or (config.pixels and not sidecar.input_known):
        raise InputError(
            f"{source}: no sidecar, so its mean, std and classes are unknown",
            fix=f"state them once with: rtresnet adopt {source}",
        )
    changed = embed_io.rewrite(model, sidecar.input, pixels=config.pixels, topk=config.topk)
    layout = UINT8 if config.pixels else sidecar.input.layout
    record = dataclasses.replace(
        sidecar,
        file=out.name,
        input=dataclasses.replace(sidecar.input, layout=layout),
        topk=config.topk,
        parent=artifacts.link_to(source, out),
        measured={},
        made_by={},
    )
    metadata.DESCRIPTION.set(changed, record)
    data = changed.SerializeToString()
    record = dataclasses.replace(record, measured=_compare(source, data, sidecar, config, reporter))
    written = artifacts.publish(out, lambda temporary: temporary.write_bytes(data), record)
    return out, written


def _compare(
    source: Path, data: bytes, sidecar: Sidecar, config: EmbedConfig, reporter: Reporter
) -> Measurements:
    """Run both files on the same images; return the record for the sidecar's `measured`."""
    from rtresnet.exporter import embed_io
    from rtresnet.runtime.loading import load

    if not hardware.installed("onnxruntime"):
        reporter.note(
            "the changed file was not compared with the original: pip install onnxruntime"
        )
        return {}
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / source.name
        trial.write_bytes(data)
        with (
            load(source, device="cpu", provider="cpu") as plain,
            load(trial, device="cpu", provider="cpu") as changed,
        ):
            result = embed_io.check(
                plain.logits, changed, sidecar.input, pixels=config.pixels, topk=config.topk
            )
            return {"ends": {**result, "with": plain.backend.provider}}
