"""Published weights by name, downloaded once and checked against their hash.

`train` and `export` take them: `--weights imagenet` is torchvision's, `--weights hf:timm/NAME` a
repository on the Hugging Face hub with timm's config.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io, reporter
from rtresnet.core.errors import InputError, RtresnetError, missing_package
from rtresnet.core.reporter import Reporter
from rtresnet.core.sidecar import Weights
from rtresnet.models.checkpoint import Checkpoint, load

TIMEOUT = 60  # seconds without a byte
# torchvision's IMAGENET1K_V1 files; the eight digits in a name begin the file's sha256.
WEIGHTS_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
}


HUB = "hf:"
HUB_FILES = ("config.json", "model.safetensors")  # the config first: it is small


def published(
    weights: str, model: str | None, reporter: Reporter = reporter.DEFAULT
) -> Checkpoint | None:
    """Load published weights by name.

    Args:
        weights: "imagenet" or "hf:OWNER/NAME[@REVISION]".
        model: Architecture; "imagenet" needs it.
        reporter: Receives progress.

    Returns:
        None if `weights` is neither.

    Raises:
        InputError: The weights are not published, or the server is not reachable.
    """
    if weights == "imagenet":
        if model is None:
            raise InputError("--weights imagenet needs a net", fix="add --model NAME")
        return imagenet(model, reporter)
    return huggingface(weights, model, reporter) if weights.startswith(HUB) else None


def huggingface(
    name: str, model: str | None = None, reporter: Reporter = reporter.DEFAULT
) -> Checkpoint:
    """Load a net from the Hugging Face hub: model.safetensors, and timm's config.json for the rest.

    The hub's own package downloads and caches the files. Its environment variables apply:
    HF_ENDPOINT is the address of a mirror, HF_HOME the cache, and with HF_HUB_OFFLINE=1 only the
    cache is read. Each file is compared with the hash that the hub states for it.

    Args:
        name: "hf:OWNER/NAME", optionally with "@REVISION".
        model: The architecture that it must have.
        reporter: Receives progress.

    Raises:
        InputError: No such repository, not reachable, or a file does not match its hash.
        ArtifactError: Not a net of the zoo.
        UnavailableError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise missing_package("huggingface_hub", f"--weights {name}") from None
    repository, _, revision = name.removeprefix(HUB).partition("@")
    where: dict[str, Any] = {
        "revision": revision or None,
        "endpoint": os.environ.get("HF_ENDPOINT"),
    }
    paths = []
    try:
        with reporter.progress(f"downloading {repository}"):
            for file in HUB_FILES:
                path = Path(hub.hf_hub_download(repository, file, **where))
                etag = path.resolve().name
                if path.resolve() == path:  # the cache has no links on this file system
                    url = hub.hf_hub_url(repository, file, **where)
                    etag = hub.get_hf_file_metadata(url).etag or ""
                _check_etag(path, etag)
                paths.append(path)
    except RtresnetError:
        raise
    except Exception as error:  # the package's errors, and those of the HTTP library below it
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{name}: cannot be downloaded ({reason})",
            fix=f"check the name; without a connection put {' and '.join(HUB_FILES)} into a "
            f"folder and use --weights FOLDER/{HUB_FILES[1]}",
        ) from None
    checkpoint = load(paths[-1], model=model)
    source = dataclasses.replace(checkpoint.weights, origin="huggingface", source=repository)
    return dataclasses.replace(checkpoint, weights=source)


def _check_etag(path: Path, etag: str) -> None:
    """Compare a file with the hub's hash: sha256 of a large file, git's sha1 of a small one."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = atomic_io.sha256(path)
    elif re.fullmatch("[0-9a-f]{40}", etag):
        content = path.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        raise InputError(f"{path}: the hub states no hash for this file")
    if digest != etag:
        raise InputError(
            f"{path}: its hash is {digest[:16]}..., but the hub states {etag[:16]}...",
            fix="remove the file and download it again",
        )


def imagenet(architecture: str, reporter: Reporter = reporter.DEFAULT) -> Checkpoint:
    """Load torchvision's published ImageNet weights, downloaded once and checked.

    Environment: RTRESNET_CACHE is their folder (default ~/.cache/rtresnet),
    RTRESNET_WEIGHTS_URL the address of a mirror.

    Raises:
        InputError: No published weights for this net, or the download failed.
    """
    if architecture not in IMAGENET_FILES:
        raise InputError(
            f"no published ImageNet weights for {architecture}",
            fix="they exist for " + ", ".join(IMAGENET_FILES),
        )
    base = os.environ.get("RTRESNET_WEIGHTS_URL", WEIGHTS_URL)
    cache = Path(os.environ.get("RTRESNET_CACHE", Path.home() / ".cache" / "rtresnet"))
    name = IMAGENET_FILES[architecture]
    path = download(base.rstrip("/") + "/" + name, cache, reporter)
    checkpoint = load(path, model=architecture)
    source = Weights(origin="imagenet", sha256=checkpoint.weights.sha256, source=name)
    return dataclasses.replace(checkpoint, weights=source, assumed=())


def download(url: str, cache: Path, reporter: Reporter = reporter.DEFAULT) -> Path:
    """Download a file whose name has the first eight digits of its sha256.

    torch.hub is not used, because it waits forever for a server that stops responding.

    Raises:
        InputError: Unreachable, or the bytes do not match the name.
    """
    name = url.rsplit("/", 1)[1]
    path = cache / name
    match = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    if match is None:
        raise InputError(f"{url}: the file's name has no hash to check it against")
    if path.exists() and atomic_io.sha256(path).startswith(match[1]):
        return path
    digest = hashlib.sha256()
    try:
        with (
            reporter.progress(f"downloading {name}") as update,
            atomic_io.atomic_path(path) as temporary,
            urllib.request.urlopen(url, timeout=TIMEOUT) as reply,
            open(temporary, "wb") as file,
        ):
            length = reply.headers.get("Content-Length")
            update(0, total=float(length) if length else None)
            while block := reply.read(1 << 20):
                file.write(block)
                digest.update(block)
                update(file.tell())
            if not digest.hexdigest().startswith(match[1]):
                raise InputError(
                    f"{url}: the download's sha256 begins with {digest.hexdigest()[:8]}, not "
                    f"{match[1]}",
                    fix="try again; a proxy may have replaced the file",
                )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({getattr(error, 'reason', error)})",
            fix=f"put the file at {path}, set RTRESNET_WEIGHTS_URL to the address of a mirror, or "
            "use your own with --weights FILE",
        ) from None
    return path
