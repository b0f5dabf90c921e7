"""Published weights by name: a local server stands in for the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError
from rtresnet.core.preprocess import Preprocess
from rtresnet.models import checkpoint, download, zoo

hub = pytest.importorskip("huggingface_hub")
safetensors = pytest.importorskip("safetensors.torch")

CFG = {
    "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.95,
    "crop_mode": "center", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
    "num_classes": 10, "license": "apache-2.0",
}  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def files(architecture: str = "resnet18", **changes: Any) -> dict[str, bytes]:
    """Return the two files of a repository in timm's form, with a net of ten classes."""
    torch.manual_seed(3)
    net = zoo.build(zoo.spec("resnet18" if "18" in architecture else "resnet50"), 10)
    config = {"architecture": architecture, "num_classes": 10, "pretrained_cfg": CFG | changes}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.save(net.state_dict(), {"format": "pt"}),
    }


class Hub:
    """A mirror of the hub with one repository."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content, self.requests = content, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.reply(body=False)

            def do_GET(self) -> None:
                self.reply(body=True)

            def reply(self, body: bool) -> None:
                outer.requests += 1
                prefix, _, name = self.path.partition("/resolve/")
                name = name.partition("/")[2]
                if prefix != "/timm/net.a1" or name not in outer.content:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = outer.content[name]
                large = name.endswith(".safetensors")
                git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                etag = outer.etags.get(name) or (hashlib.sha256(data).hexdigest() if large else git)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.etags: dict[str, str] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(files())
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"),
                        raising=False)  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_huggingface_config_gives_net_input_and_license(mirror: Hub) -> None:
    loaded = download.huggingface("hf:timm/net.a1")
    assert loaded.spec == zoo.spec("resnet18") and len(loaded.model.classes) == 10
    assert loaded.input == Preprocess(
        size=224, resize=235, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bicubic"
    )
    digest = hashlib.sha256(mirror.content["model.safetensors"]).hexdigest()
    weights = loaded.weights
    assert (weights.origin, weights.source) == ("huggingface", "timm/net.a1")
    assert (weights.sha256, weights.license) == (digest, "apache-2.0")
    assert loaded.assumed == ()


def test_huggingface_without_a_connection_reads_the_cache(
    mirror: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = download.huggingface("hf:timm/net.a1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = mirror.requests
    assert download.huggingface("hf:timm/net.a1").weights == first.weights
    assert mirror.requests == before


def test_huggingface_wrong_hash_is_refused(mirror: Hub) -> None:
    mirror.etags["model.safetensors"] = "0" * 64
    with pytest.raises(InputError, match="the hub states 0000000000000000"):
        download.huggingface("hf:timm/net.a1")


def test_huggingface_net_with_the_same_tensors_and_other_pooling_is_refused(mirror: Hub) -> None:
    mirror.content = files("resnetaa50")
    with pytest.raises(ArtifactError, match="resnetaa50"):
        download.huggingface("hf:timm/net.a1")


@pytest.mark.parametrize(
    "change", [{"crop_mode": "squash"}, {"input_size": [3, 224, 192]}, {"crop_pct": 0}, {"std": 1}]
)
def test_huggingface_input_that_cannot_be_used_is_refused(
    mirror: Hub, change: dict[str, Any]
) -> None:
    mirror.content = files(**change)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        download.huggingface("hf:timm/net.a1")


@pytest.mark.parametrize("name", ["hf:timm/other", "hf:", "hf:a/b/c", "hf:timm/net.a1@gone"])
def test_huggingface_unknown_repository_says_what_to_do(mirror: Hub, name: str) -> None:
    if "@" in name:
        mirror.content = {}
    with pytest.raises(InputError, match=r"put config\.json"):
        download.huggingface(name)


def test_huggingface_package_missing_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UnavailableError, match=r"rtresnet\[hub\]"):
        download.huggingface("hf:timm/net.a1")


def test_files_of_a_repository_load_from_a_folder(tmp_path: Path) -> None:
    for name, data in files(label_names=[f"class {n}" for n in range(10)]).items():
        (tmp_path / name).write_bytes(data)
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert loaded.input.resize == 235 and loaded.model.classes[3] == "class 3"
    (tmp_path / "config.json").unlink()
    assert checkpoint.load(tmp_path / "model.safetensors").input == Preprocess.for_size(224)


def test_export_and_train_take_a_repository(
    mirror: Hub, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = ["--weights", "hf:timm/net.a1"]
    assert main(["export", *weights, "--fp32", "--no-plan", "--out", "engines"]) == 0
    sidecar = json.loads((tmp_path / "engines/resnet18.onnx.json").read_text())
    assert sidecar["weights"]["source"] == "timm/net.a1"
    assert sidecar["weights"]["license"] == "apache-2.0"
    assert sidecar["input"]["interpolation"] == "bicubic"
    assert main(["train", *weights, "--data", tints, "--size", "32", "--epochs", "1",
                 "--batch", "64", "--out", "run"]) == 0  # fmt: skip
    best = checkpoint.load("run/best.pt")
    assert best.spec.name == "resnet18" and best.input.interpolation == "bicubic"
    assert (best.weights.origin, best.weights.license) == ("trained", "apache-2.0")


def test_train_from_imagenet_weights_of_a_mirror(
    tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save(zoo.build(zoo.spec("resnet18")).state_dict(), tmp_path / "net.pth")
    data = (tmp_path / "net.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(data)
    monkeypatch.setitem(download.IMAGENET_FILES, "resnet18", name)
    monkeypatch.setenv("RTRESNET_WEIGHTS_URL", tmp_path.as_uri())
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "cache"))
    assert main(["train", "--weights", "imagenet", "--data", tints, "--size", "32", "--epochs",
                 "1", "--batch", "64", "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    assert "recipe finetune" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / "best.pt").spec.name == "resnet18"
