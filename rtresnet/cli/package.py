"""`rtresnet package`: a plan or an ONNX file as a model of a Triton repository."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.workflows.package import PackageConfig


@click.command("package")
@click.argument("path", metavar="PLAN|ONNX", type=click.Path(path_type=Path))
@click.option(
    "--triton", "root", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="The model repository; it is created if it does not exist.",
)  # fmt: skip
@config_options(PackageConfig)
@common.json_option
def command(path: Path, root: Path, config: PackageConfig, json_file: str | None) -> None:
    """Write config.pbtxt, labels and the file with its sidecar as a version of a Triton model.

    A plan must be built by `tensorrt` in the version of the server's container: Triton's backend
    does not load plans of TensorRT-RTX. Needs no GPU and no Triton.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.package import package

    result = package(path, root, config)
    for line in result.notes:
        REPORTER.note(f"note: {line}")
    batches = f"batches to {result.max_batch}" if result.max_batch else "a fixed batch"
    common.say(f"{result.folder}: {result.backend}, {batches}, {result.bytes / 1e6:.1f} MB")
    common.say(f"next: tritonserver --model-repository {result.root}")
    common.write_json(json_file, "package", result)
