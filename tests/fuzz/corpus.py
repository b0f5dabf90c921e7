"""Small valid files of every kind that rtresnet reads."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rtresnet.builder import layers
from rtresnet.cli.main import main
from rtresnet.core import artifacts, atomic_io, hardware
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Attestation, Link, Plan, Profile, Sidecar, Weights
from rtresnet.models import checkpoint, zoo
from rtresnet.workflows.prediction_table import Journal, TableHead
from tests.reporting.conftest import bench, evaluated, profiled, searched

JOURNAL = TableHead(
    model="0" * 64, provider="cpu", preprocess=Preprocess.for_size(32), top=2, batch=1, images=3,
    list_of_images="1" * 64,
)  # fmt: skip


def make(folder: Path) -> None:
    """Write the corpus: a folder for each target or group of targets."""
    rng = np.random.default_rng(0)
    chain = folder / "chain"
    chain.mkdir()
    torch.manual_seed(0)
    net = checkpoint.untrained(zoo.spec("resnet8"), Preprocess.for_size(32))
    net = dataclasses.replace(net, weights=Weights(origin="trained"))
    saved, fp32, int8 = (chain / name for name in ("net.pt", "resnet8.onnx", "resnet8-int8.onnx"))
    checkpoint.save(saved, net)
    here = Path.cwd()
    os.chdir(folder)  # quantize writes to calib/
    try:
        _run("export", "--weights", saved, "--out", chain, "--no-plan")
        _run("quantize", fp32, "--int8", "--calib", "none", "--out", int8)
    finally:
        os.chdir(here)
    _plan(chain, artifacts.read_sidecar(fp32))
    plan = chain / "net.plan"
    alone = {"checkpoint": saved, "onnx": fp32, "onnx-int8": int8, "plan": plan}
    for name, file in alone.items():  # without sidecar
        (folder / name).mkdir()
        shutil.copy(file, folder / name)
    (folder / "foreign").mkdir()
    torch.save({"state_dict": net.state}, folder / "foreign" / "net.pth")
    if hardware.installed("safetensors"):
        from safetensors.torch import save_file

        save_file(net.state, folder / "foreign" / "net.safetensors")
    _images(folder, rng.integers(0, 256, (4, 24, 32, 3), dtype=np.uint8))
    _sets(folder, rng)
    _journal(folder / "journal")
    _results(folder / "results")


def _run(*arguments: object) -> None:
    if main([str(argument) for argument in arguments]):
        raise RuntimeError(f"rtresnet {arguments[0]} failed")


def _plan(chain: Path, parent: Sidecar | None) -> None:
    """Write a plan's header and the files next to a plan; only TensorRT reads the engine."""
    assert parent is not None
    data = bytearray(2000)
    data[:4] = b"vtrt"
    struct.pack_into("<QBBBBxxxxQ", data, 16, len(data), 1, 7, 1, 116, 0b10100)
    data[1000:1030] = b'{"rtresnet":"0.1","input":32} '
    tensor = layers.LayerTensor(name="t", shape=(-1, 16, 32, 32), dtype="Half")
    layer = layers.Layer(
        name="a", kind="correlation", role="conv", operation="conv 3x3 + add", stage="layer1",
        block="layer1.0", profile=0, nodes=("layer1.0.conv1", "layer1.0.add"), rounds=("q",),
        inputs=(tensor,), outputs=(tensor,), weights=4608,
    )  # fmt: skip
    record = layers.Layers(
        batches=(4,), activations=(65536,), convolutions=("layer1.0.conv1",),
        adds=("layer1.0.add",), layers=(layer, layer),
    )  # fmt: skip
    path = chain / "net.plan"
    place = layers.path_for(path)
    place.write_text(json.dumps(dataclasses.asdict(record), indent=1))
    plan = Plan(
        builder="tensorrt_rtx", version="1.7.1.116", targets=("sm_89",), seconds=1.5,
        profiles=(Profile(min=1, opt=4, max=8),),
        attested=Attestation(convolutions=7, dtypes={"Half": 7}, layers=2),
        layers=Link(file=place.name, sha256=atomic_io.sha256(place)),
    )  # fmt: skip
    sidecar = dataclasses.replace(
        parent, kind="plan", precision="fp16", plan=plan,
        parent=artifacts.link_to(chain / "resnet8.onnx", path),
        measured={"accuracy": {"top1_percent": 91.5, "n": 846, "data": "digits", "split": "test"}},
    )  # fmt: skip
    artifacts.publish(path, lambda temporary: temporary.write_bytes(data), sidecar)


def _images(folder: Path, pixels: np.ndarray) -> None:
    for form in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        (folder / form).mkdir()
        Image.fromarray(pixels[0]).save(folder / form / f"a.{form}")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[1]).save(folder / "jpg" / "a.jpg", exif=exif)
    Image.fromarray(pixels[1]).convert("P").save(folder / "png" / "a.png", transparency=3)
    photos = folder / "photos"
    for index, image in enumerate(pixels):
        (photos / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(photos / "ab"[index % 2] / f"{index}.png")
    (folder / "list").mkdir()
    shutil.copy(folder / "ppm" / "a.ppm", folder / "list")
    (folder / "list" / "images.txt").write_text("# photos\na.ppm\n")
    _run("pack", photos, "--out", folder / "shards")


def _sets(folder: Path, rng: np.random.Generator) -> None:
    for name in ("npz", "idx", "idx-gz", "cifar10"):
        (folder / name).mkdir()
    images, labels = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6) % 2
    np.savez(folder / "npz" / "a.npz", images=images, labels=labels, classes=np.array(["a", "b"]))
    small = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    pairs = (
        (small, "t10k-images-idx3-ubyte"),
        (np.array([0, 1, 2], np.uint8), "t10k-labels-idx1-ubyte"),
    )
    for array, name in pairs:
        head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / "idx" / name).write_bytes(head + array.tobytes())
        (folder / "idx-gz" / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))
    batch: dict[bytes, Any] = {
        b"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8),
        b"labels": [3, 9],
    }
    (folder / "cifar10" / "test_batch").write_bytes(pickle.dumps(batch))


def _results(folder: Path) -> None:
    folder.mkdir()
    results: dict[str, Any] = {
        "bench": bench(), "bench-find": searched("qps", 4.0), "eval": evaluated("fp32"),
        "profile": profiled("int8"),
        "compare": {
            "agreement": 0.984375, "n": 846, "data": "digits",
            "reference": {"artifact": "engines/net-fp32.onnx", "precision": "fp32"},
            "candidate": {"artifact": "engines/net-int8.onnx", "precision": "int8"},
        },
    }  # fmt: skip
    for entry in results["bench"]["results"]:
        entry["samples"] = entry["samples"][:5]
    results["bench"]["results"] = results["bench"]["results"][:2]
    for verb, result in results.items():
        (folder / verb).mkdir()
        record = {
            "verb": verb,
            "made_by": {"command": f"rtresnet {verb} net.onnx"},
            "result": result,
        }
        (folder / verb / "result.json").write_text(json.dumps(record, indent=1))


def _journal(folder: Path) -> None:
    from rtresnet.workflows.predictor import ClassProbability, Prediction

    folder.mkdir()
    best = tuple(ClassProbability(name=n, probability=p) for n, p in (("a", 0.75), ("b", 0.25)))
    with Journal(folder / "out.jsonl", JOURNAL, resume=False) as journal:
        journal.add(
            [
                Prediction(image="a.png", top=best),
                Prediction(image="b.png", error="damaged"),
            ]
        )
