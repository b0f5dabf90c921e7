"""`rtresnet serve`: an inference server."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.serving.config import ServeConfig
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.serve import serve


@click.command("serve")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT|REPOSITORY...",
                type=common.PATH)  # fmt: skip
@config_options(ServeConfig)
@config_options(RuntimeConfig, argument="runtime")
def command(artifacts: tuple[Path, ...], config: ServeConfig, runtime: RuntimeConfig) -> int:
    """Serve ONNX files and plans with the Open Inference Protocol (KServe v2, Triton's clients).

    POST an image to /v1/classify, or open / in a browser. After SIGTERM the server answers running
    requests and exits. The log is written to standard error as JSON lines.
    """

    def ready(lines: list[str]) -> None:
        from rtresnet.serving.server import log_to_stderr

        for line in lines:
            common.say(line)
        log_to_stderr()

    return serve(artifacts, config, runtime=runtime, on_ready=ready, reporter=common.REPORTER)
