"""`rtresnet package`: an ONNX file or a plan, packaged for Triton, Docker or KServe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import InputError
from rtresnet.workflows.package import PackageConfig
from rtresnet.workflows.package_server import ImageConfig


@click.command("package")
@click.argument("path", metavar="PLAN|ONNX", type=common.PATH)
@click.option(
    "--triton", metavar="DIR", type=common.PATH,
    help="Write a version of a model into this Triton model repository.  [default: none]",
)  # fmt: skip
@click.option(
    "--docker", metavar="DIR", type=common.PATH,
    help="Write a Dockerfile and its files into this new folder; the image runs rtresnet serve.  "
    "[default: none]",
)  # fmt: skip
@click.option(
    "--kserve", metavar="FILE", type=common.PATH,
    help="Write a KServe manifest that runs the image, with probes and autoscaling.  "
    "[default: none]",
)  # fmt: skip
@config_options(PackageConfig)
@click.option("--max-delay-us", type=click.IntRange(min=0), hidden=True)  # older --max-wait
@config_options(ImageConfig, argument="image")
@common.json_option
def command(
    path: Path,
    triton: Path | None,
    docker: Path | None,
    kserve: Path | None,
    config: PackageConfig,
    image: ImageConfig,
    max_delay_us: int | None,
) -> None:
    """Package a model for a Triton Inference Server, for Docker, or for KServe on Kubernetes.

    For Triton, a plan must be built by `tensorrt` in the version of the server's container: its
    backend does not load plans of TensorRT-RTX. The image of --docker runs every artifact. Needs
    no GPU, no Docker, no Triton and no Kubernetes.
    """
    if (triton is None) == (docker is None and kserve is None):
        raise InputError("choose --triton DIR, or --docker DIR and/or --kserve FILE")
    if max_delay_us is not None:
        config = dataclasses.replace(config, max_wait_ms=max_delay_us / 1000)
    if triton is not None:
        _triton(path, triton, config)
    else:
        _server(path, docker, kserve, config, image)


def _triton(path: Path, root: Path, config: PackageConfig) -> None:
    from rtresnet.workflows.package import package

    result = package(path, root, config)
    for line in result.notes:
        common.note(f"note: {line}")
    batches = f"batches to {result.max_batch}" if result.max_batch else "a fixed batch"
    common.say(f"{result.folder}: {result.backend}, {batches}, {result.bytes / 1e6:.1f} MB")
    common.say(f"next: tritonserver --model-repository {result.root}")
    common.write_json("package", result)


def _server(
    path: Path,
    docker: Path | None,
    kserve: Path | None,
    config: PackageConfig,
    image: ImageConfig,
) -> None:
    from rtresnet.workflows.package_server import package_server

    result = package_server(path, docker=docker, kserve=kserve, config=config, image=image)
    for line in result.notes:
        common.note(f"note: {line}")
    if result.docker is not None:
        common.say(f"{result.docker}: Dockerfile, {result.name} version {result.version}")
        common.say(f"next: docker build -t {result.image} {result.docker}")
    if result.manifest is not None:
        common.say(f"{result.manifest}: KServe InferenceService of {result.image}")
        common.say(f"next: kubectl apply -f {result.manifest}")
    common.write_json("package", result)
