"""torchvision's published ImageNet weights: downloaded once, checked against their hash, kept.

`rtresnet export --weights imagenet` uses them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from rtresnet.core import atomic_io, reporter
from rtresnet.core.errors import InputError
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


def imagenet(architecture: str, reporter: Reporter = reporter.DEFAULT) -> Checkpoint:
    """Loads torchvision's published ImageNet weights, downloaded once and checked.

    Environment: RTRESNET_CACHE is the folder they are kept in (default ~/.cache/rtresnet),
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
    """Downloads a file whose name has the first eight digits of its sha256.

    torch.hub is not used, because it waits forever for a server that stops answering.

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
                    f"{url}: the download's sha256 begins {digest.hexdigest()[:8]}, not {match[1]}",
                    fix="try again; a proxy may have answered instead",
                )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({getattr(error, 'reason', error)})",
            fix=f"put the file at {path}, or give your own with --weights FILE",
        ) from None
    return path
