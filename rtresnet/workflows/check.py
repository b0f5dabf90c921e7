"""Check that an image has the same output in every batch, and as in the FP32 file.

Works on uint8 images: photographs, or noise by default.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rtresnet.bench import consistency
from rtresnet.bench.consistency import Check, Outputs
from rtresnet.core import artifacts, hardware, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened, json_name
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows.detect import is_detector
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import (
    RuntimeConfig,
    close_on_error,
    input_of,
    load_artifact,
)

if TYPE_CHECKING:
    from rtresnet.runtime.session import Session
    from rtresnet.workflows.detect_check import CheckDetectorResult

BATCHES = (1, 8, 32)  # batch sizes to try without a profile


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Config):
    """Options of `check`.

    Attributes:
        images: Number of images.
    """

    images: int = option(16, "Number of images.", minimum=2)


@dataclass(frozen=True, kw_only=True)
class CheckedArtifact:
    """An artifact of either task and its checks; for the fields see the classes made from it."""

    artifact: str
    precision: str
    images: str
    assumed: tuple[str, ...]
    n: int
    checks: tuple[Check, ...]
    runtime: RuntimeInfo = flattened()

    @property
    def failed(self) -> tuple[Check, ...]:
        """The failed checks."""
        return tuple(check for check in self.checks if not check.ok)


@dataclass(frozen=True, kw_only=True)
class CheckResult(CheckedArtifact):
    """Results of the checks of a classifier.

    Attributes:
        artifact: The file.
        precision: Data type of the net.
        bound: Row of the table of tolerances; see `bench.consistency`.
        images: The images as they were named, or "noise".
        assumed: What was assumed of the file.
        n: Number of images.
        range: Largest logit less the smallest.
        discriminability: Share of pairs of images, in [0, 1], that would be noticed if they
            changed places.
        parent: FP32 ONNX file that it was compared with.
        no_parent: Reason why there is no such file.
        checks: The comparisons.
        runtime: Where it ran.
    """

    bound: str
    range: float
    discriminability: float = json_name("told_apart")
    parent: Path | None
    no_parent: str | None


def check(
    path: str | os.PathLike[str],
    data: str | None = None,
    config: CheckConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> CheckResult | CheckDetectorResult:
    """Compare an artifact with itself in other batches, and with the FP32 ONNX file it came from.

    An image alone, in a batch, permuted, at every batch of the plan's profiles (1, 8 and 32 for
    other files), at odd batches, after other batches and next to a broken image must have the same
    output, within the precision's tolerance. Differences are returned, not raised. A detector is
    checked by `check_detector`.

    Args:
        path: Checkpoint, ONNX file or plan.
        data: Images with or without labels, as in "digits" or "folder:DIR"; noise by default, drawn
            shapes for a detector.
        config: Number of images.
        runtime: Where the artifact runs.
        stated: Preprocessing that replaces the sidecar's, or of a file without a sidecar.
        reporter: Receives progress and notes on broken images.

    Returns:
        Each comparison with its difference, tolerance and verdict.

    Raises:
        InputError: No such file, or its preprocessing is unknown and `data` is given.
        DataError: Fewer than two images can be decoded.
        ArtifactError: The file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    if is_detector(path):
        from rtresnet.workflows.detect_check import check_detector

        return check_detector(path, data, config, runtime=runtime, stated=stated, reporter=reporter)
    config, runtime = config or CheckConfig(), runtime or RuntimeConfig()
    place = runtime.for_artifact(str(path), [str(path)])
    with (
        _load(path, place, stated or InputConfig(), on_noise=data is None) as session,
        reporter.progress(f"checking {path}"),
    ):
        if data is None:
            pixels = _noise(config.images, session.preprocess.size)
        else:
            pixels = _photographs(data, config.images, session.preprocess, reporter)
        images = session.prepare(pixels)
        precision = _precision(session)
        bound = _bound(session, precision)
        single, share = consistency.alone(session, images), consistency.BATCHES[bound]
        checks = consistency.check(session, images, single, sizes=_batches(session), share=share)
        assumed, info = session.assumed, session.info
        digest = session.sidecar.sha256 if session.sidecar else None
    parent, missing = fp32_ancestor(path, digest)
    if parent is not None and checks[0].name != "alone":
        with reporter.progress(f"running {parent}"):
            checks.append(_against(parent, pixels, single, bound))
    return CheckResult(
        artifact=str(path),
        precision=precision,
        bound=bound,
        images=data or "noise",
        assumed=assumed,
        n=len(pixels),
        range=float(single.values.max() - single.values.min()),
        discriminability=consistency.discriminability(single, single.allowed(share)),
        parent=parent,
        no_parent=missing,
        checks=tuple(checks),
        runtime=info,
    )


def _load(
    path: str | os.PathLike[str], runtime: RuntimeConfig, stated: InputConfig, *, on_noise: bool
) -> Session:
    session = load_artifact(path, runtime, stated=stated, input_needed=False)
    has_input = session.sidecar is not None and session.sidecar.input_known
    if has_input or not stated.empty or artifacts.kind_of(session.path) == "checkpoint":
        return session
    with close_on_error(session):
        if on_noise and session.backend.layout == "nchw":
            # Any mean and std are suitable for noise, because they result in usual values.
            preprocess = Preprocess.for_size(session.size)
            return session.restated(preprocess, preprocess.assumptions()[:1])
        return session.restated(*input_of(session, stated))


def _batches(session: Session) -> tuple[int, ...]:
    """Return the batch sizes to check for an artifact."""
    if session.batch:
        return (session.batch,)
    plan = session.sidecar.plan if session.sidecar else None
    profiles = plan.profiles if plan else ()
    sizes = {size for profile in profiles for size in (profile.min, profile.opt, profile.max)}
    return tuple(sorted(sizes)) or BATCHES


def _precision(session: Session) -> str:
    """Return the data type of the net; for an ONNX file without a sidecar, by what is in it."""
    kind = artifacts.kind_of(session.path)
    if session.sidecar is not None or kind != "onnx" or not hardware.installed("onnx"):
        return session.precision
    from rtresnet.onnxlib import io
    from rtresnet.onnxlib.interface import precision_of

    return precision_of(io.load(session.path))


def _bound(session: Session, precision: str) -> str:
    """Return the row of the tolerance table. GPUs multiply FP32 as TF32 unless it is off."""
    if precision not in consistency.BATCHES:
        return consistency.UNKNOWN
    tf32 = session.info.tf32 is not False
    if precision == "fp32" and tf32 and session.backend.device != "cpu":
        return "tf32"
    return precision


def _photographs(data: str, count: int, preprocess: Preprocess, reporter: Reporter) -> np.ndarray:
    from rtresnet.data import loader
    from rtresnet.data.sources import open_images

    source = open_images(data)
    errors = loader.DecodeErrors(len(source), reporter.note)
    chosen = loader.sample(source, count)
    crops = loader.indexed(source, chosen, lambda _, image: preprocess.crop(image), errors)
    images = [image for _, image in crops]
    if len(images) < 2:
        raise DataError(f"{data}: fewer than two images could be decoded")
    return np.stack(images)


def _noise(count: int, size: int) -> np.ndarray:
    """Return noise of many tints and strengths, because plain noise always has the same output."""
    rng = np.random.default_rng(0)
    tint, width = rng.integers(0, 192, (count, 1, 1, 3)), rng.integers(8, 64, (count, 1, 1, 1))
    grain = rng.integers(0, 64, (count, size, size, 3)) * width // 64
    return (tint + grain).astype(np.uint8)


def fp32_ancestor(
    path: str | os.PathLike[str], digest: str | None = None
) -> tuple[Path | None, str | None]:
    """Return the FP32 ONNX file of an artifact's chain, or why there is none to compare with."""
    for file, sidecar, state in list(artifacts.chain(path, digest))[1:]:
        if file.suffix.lower() != ".onnx":
            break
        if state == "no sidecar":
            return None, f"{file} has no sidecar; create one with: rtresnet adopt {file}"
        if state != "ok":
            return None, f"{file} is {state}"
        if sidecar is not None and sidecar.precision == "fp32":
            return file, None
    return None, "it was not made from an FP32 ONNX file"


def _against(parent: Path, pixels: np.ndarray, single: Outputs, bound: str) -> Check:
    """Compare the outputs with those of the FP32 file, which `fp32_ancestor` has verified."""
    from rtresnet.runtime.ort import OrtBackend
    from rtresnet.runtime.session import Session

    backend = OrtBackend(parent, provider="cpu")
    with Session(parent, artifacts.read_sidecar(parent), backend) as session:
        expected = consistency.alone(session, session.prepare(pixels))
    if expected.classes is None and single.classes is not None:
        expected = expected.top(single.values.shape[1])
    tolerance = expected.allowed(consistency.PARENT[bound])
    return consistency.compare("parent", parent.name, single, expected, tolerance)
