"""torchvision's published ImageNet weights: downloaded once, checked, kept.

`rtresnet export --weights imagenet` reaches this.
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
}


def imagenet(architecture: str, reporter: Reporter = reporter.DEFAULT) -> Checkpoint:
    """Loads torchvision's published ImageNet weights, downloaded once and checked.

    Environment: RTRESNET_CACHE is the folder kept (default ~/.cache/rtresnet),
    RTRESNET_WEIGHTS_URL a mirror's address.

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
    """Fetches a file whose name carries the first eight digits of its sha256.

    Not with torch.hub, which waits forever for a server that stops answering.

    Raises:
        InputError: Unreachable, or the bytes do not match the name.
    """
    name = url.rsplit("/", 1)[1]
    path = cache / name
    match = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    if match is None:
        raise InputError(f"{url}: the file's name carries no hash to check it against")
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
                    fix="try again; a proxy may have answered in its place",
                )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({getattr(error, 'reason', error)})",
            fix=f"put the file at {path}, or name your own with --weights FILE",
        ) from None
    return path
