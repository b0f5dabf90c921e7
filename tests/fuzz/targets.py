"""Fuzzing targets: one reader of one kind of file each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtresnet.cli.main import main as rtresnet
from rtresnet.core import atomic_io, hardware
from rtresnet.data.decode import decode
from rtresnet.data.sources import open_images, open_source
from tests.fuzz import corpus
from tests.fuzz import mutators as by


@dataclass(frozen=True, kw_only=True)
class Target:
    """One way of reading one kind of file.

    Attributes:
        file: Path in the corpus; its folder is copied for each case.
        mutate: Makes another file of it.
        read: Reads the file; returns an exit code, or None for 0.
        codes: Exit codes that are right for a damaged file.
        hashed: Whether the file's hash is recorded, so that no change may be accepted.
        intact: Exit code for the file as it is.
        examples: Cases of the test.
    """

    name: str
    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], int | None]
    codes: tuple[int, ...] = (0, 2)
    hashed: bool = False
    intact: int = 0
    examples: int = 150


def _inspect(path: Path) -> int:
    return rtresnet(["inspect", str(path)])


def _checkpoint(path: Path) -> None:
    from rtresnet.models import checkpoint

    checkpoint.load(path).net()


def _lint(path: Path) -> int:
    return rtresnet(["lint", str(path)])


def _session(path: Path) -> None:
    from rtresnet.runtime.loading import load

    with load(path, provider="cpu", threads=1) as session:
        session(np.zeros((2, 3, 32, 32), np.float32))


def _quantize(path: Path) -> int:
    return rtresnet(["quantize", str(path), "--fp16", "--out", f"{path}.half.onnx"])


def _sidecar(path: Path) -> int:
    return _inspect(path.with_suffix(""))


def _layers(path: Path) -> int:
    plan = path.with_suffix("").with_suffix("")
    return rtresnet(["inspect", str(plan), "--layers", "--svg", f"{plan}.svg"])


def _rehashed_layers(path: Path) -> int:
    sidecar = path.with_name("net.plan.json")
    record = json.loads(sidecar.read_text())
    record["plan"]["layers"]["sha256"] = atomic_io.sha256(path)
    sidecar.write_text(json.dumps(record))
    return _layers(path)


def _scales(path: Path) -> None:
    from rtresnet.quantization import scales

    origin = scales.ScalesOrigin(
        onnx_sha256="", preprocessing={}, images="", images_sha256="", n=0, calibrator=""
    )
    scales.differences(scales.read(path), origin)


def _image(path: Path) -> None:
    decode(path)
    decode(path, at_least=6)


def _source(form: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        source = open_source(f"{form}:{path if form == 'npz' else path.parent}", "test")
        source.fingerprint()
        for index in range(min(len(source), 4)):
            source.image(index)

    return read


def _list(path: Path) -> None:
    source = open_images(str(path))
    source.image(0)


def _report(path: Path) -> int:
    return rtresnet(["report", str(path), "--out", f"{path}.html", "--markdown", f"{path}.md"])


def _baseline(path: Path) -> None:
    from rtresnet.bench import verdict
    from rtresnet.cli.bench import BaselineOptions

    baseline = BaselineOptions(baseline=str(path)).read()
    assert baseline
    for entry in baseline.results:
        verdict.judge(entry, entry, tolerance=0.03)


def _journal(path: Path) -> None:
    from rtresnet.workflows.prediction_table import Journal

    with Journal(path.with_suffix(""), corpus.JOURNAL, resume=True) as journal:
        journal.finish()


T = Target
RESULTS = ("bench", "bench-find", "eval", "compare", "profile")
SAFETENSORS = (
    T(name="safetensors", file="foreign/net.safetensors", mutate=by.damaged, read=_inspect),
)
if not hardware.installed("safetensors"):
    SAFETENSORS = ()
TARGETS = (
    T(name="checkpoint", file="checkpoint/net.pt", mutate=by.checkpoint, read=_checkpoint),
    T(name="checkpoint-foreign", file="foreign/net.pth", mutate=by.checkpoint, read=_inspect),
    *SAFETENSORS,
    T(name="checkpoint-hashed", file="chain/net.pt", mutate=by.damaged, read=_inspect, hashed=True),
    T(name="onnx-inspect", file="onnx/resnet8.onnx", mutate=by.onnx_graph, read=_inspect),
    T(
        name="onnx-lint",
        file="onnx-int8/resnet8-int8.onnx",
        mutate=by.onnx_graph,
        read=_lint,
        codes=(0, 1, 2),
    ),
    T(
        name="onnx-run",
        file="onnx/resnet8.onnx",
        mutate=by.onnx_graph,
        read=_session,
        codes=(0, 2, 3),
    ),
    T(
        name="onnx-int8-run",
        file="onnx-int8/resnet8-int8.onnx",
        mutate=by.onnx_graph,
        read=_session,
        codes=(0, 2, 3),
    ),
    T(name="onnx-quantize", file="onnx/resnet8.onnx", mutate=by.onnx_graph, read=_quantize),
    T(
        name="onnx-hashed",
        file="chain/resnet8-int8.onnx",
        mutate=by.damaged,
        read=_inspect,
        hashed=True,
    ),
    T(name="plan", file="plan/net.plan", mutate=by.damaged, read=_inspect),
    T(name="plan-hashed", file="chain/net.plan", mutate=by.damaged, read=_inspect, hashed=True),
    T(name="sidecar-onnx", file="chain/resnet8-int8.onnx.json", mutate=by.json_text, read=_sidecar),
    T(name="sidecar-plan", file="chain/net.plan.json", mutate=by.json_text, read=_sidecar),
    T(name="layers", file="chain/net.plan.layers.json", mutate=by.json_text, read=_rehashed_layers),
    T(
        name="layers-hashed",
        file="chain/net.plan.layers.json",
        mutate=by.json_text,
        read=_layers,
        hashed=True,
    ),
    T(name="scales", file="calib/resnet8-int8.json", mutate=by.json_text, read=_scales),
    *(
        T(name=f"image-{form}", file=f"{form}/a.{form}", mutate=by.damaged, read=_image)
        for form in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")
    ),
    T(name="image-list", file="list/images.txt", mutate=by.text_lines, read=_list),
    T(name="npz", file="npz/a.npz", mutate=by.arrays, read=_source("npz")),
    T(name="idx", file="idx/t10k-images-idx3-ubyte", mutate=by.idx, read=_source("fashion-mnist")),
    T(
        name="idx-gz",
        file="idx-gz/t10k-labels-idx1-ubyte.gz",
        mutate=by.damaged,
        read=_source("fashion-mnist"),
    ),
    T(name="cifar10", file="cifar10/test_batch", mutate=by.cifar_batch, read=_source("cifar10")),
    T(name="shards-index", file="shards/index.json", mutate=by.json_text, read=_source("shards")),
    T(
        name="shards-hashed",
        file="shards/index.npz",
        mutate=by.damaged,
        read=_source("shards"),
        hashed=True,
    ),
    T(name="shards-tar", file="shards/all-00000.tar", mutate=by.damaged, read=_source("shards")),
    *(
        T(
            name=f"report-{verb}",
            file=f"results/{verb}/result.json",
            mutate=by.json_text,
            read=_report,
            examples=25,
        )
        for verb in RESULTS
    ),
    T(name="baseline", file="results/bench/result.json", mutate=by.json_text, read=_baseline),
    T(name="journal", file="journal/out.jsonl.part", mutate=by.json_text, read=_journal),
)
