"""`rtresnet serve` with plans, on the fake GPU."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import CLASSES, Bench

import rtresnet
from rtresnet.core import artifacts
from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection, Plan, Profile, Sidecar, Weights
from rtresnet.models import checkpoint, zoo
from rtresnet.workflows.loading import RuntimeConfig
from tests.serving.conftest import served


def publish(path: Path, **fields: Any) -> Path:
    """Write a sidecar for the bench's plan."""
    data, names = path.read_bytes(), tuple("abcde"[:CLASSES])
    artifacts.publish(
        path,
        lambda target: target.write_bytes(data),
        Sidecar(
            kind="plan", file=path.name, input=Preprocess.for_size(4), precision="fp32",
            model=checkpoint.model_of(zoo.spec("resnet18"), names),
            weights=Weights(origin="untrained"),
            plan=Plan(builder="tensorrt_rtx", version="1.7.1.116", targets=("sm_89",),
                      profiles=(Profile(min=1, opt=4, max=8),), seconds=1.0),
            **fields,
        ),
    )  # fmt: skip
    return path


def runtimes(
    sources: list[Path], runtime: RuntimeConfig | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """Return each model's runtime according to /v1/status."""

    def ask(lines: list[str]) -> Any:
        with urllib.request.urlopen(f"{lines[0]}/v1/status", timeout=30) as response:
            return json.load(response)

    config = rtresnet.ServeConfig(port=0, grpc=False, grace=0, **options)
    models = served(sources, ask, config, runtime)["models"]
    return {model["name"]: model["describe"] for model in models}


@pytest.mark.parametrize(
    ("max_batch", "contexts", "expected"), [(8, None, 2), (1, None, 1), (8, 1, 1), (8, 3, 3)]
)
def test_serve_plan_has_two_contexts_where_batches_are_formed(
    bench: Bench, max_batch: int, contexts: int | None, expected: int
) -> None:
    runtime = RuntimeConfig(contexts=contexts)
    result = runtimes([publish(bench.path)], runtime, max_batch=max_batch)
    assert result["net"]["contexts"] == expected


def test_serve_onnx_file_and_plan_have_their_own_options(
    bench: Bench, onnx_file: Callable[..., Path]
) -> None:
    onnx = onnx_file("resnet8", "fp32")
    runtime = RuntimeConfig(contexts=3, threads=1, provider="cpu")
    result = runtimes([publish(bench.path), onnx], runtime, max_batch=8)
    assert result["net"]["contexts"] == 3 and result["net"]["threads"] is None
    assert result[onnx.stem]["threads"] == 1 and result[onnx.stem]["contexts"] is None


def test_serve_without_a_plan_refuses_contexts(onnx_file: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="--contexts"):
        rtresnet.serve([onnx_file("resnet8", "fp32")], runtime=RuntimeConfig(contexts=2))


def test_for_artifact_leaves_a_detectors_plan_one_context(bench: Bench) -> None:
    path = str(publish(bench.path, detection=Detection(canvas=(64, 96))))
    assert RuntimeConfig().for_artifact(path, [path], batches=True).contexts is None
