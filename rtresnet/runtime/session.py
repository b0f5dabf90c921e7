"""Run an ONNX file or a plan as its sidecar specifies.

    with rtresnet.load("engines/resnet50.plan") as session:
        crops = np.stack([session.preprocess.crop(image) for image in images])
        logits = session(session.prepare(crops))          # float32 [N, classes]

A file takes normalized float32 planes or uint8 pixels, and returns logits or the K most probable
classes: `prepare` makes its input from any uint8 images. Imports no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.core import artifacts, detector_preprocess, hardware, labels, metrics
from rtresnet.core.detector_preprocess import Detections
from rtresnet.core.errors import InputError
from rtresnet.core.labels import LabelMap
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import LOGGER
from rtresnet.core.serialization import json_name, to_builtins
from rtresnet.core.sidecar import Detection, Sidecar
from rtresnet.runtime.backend import Backend, TopK, logits


@dataclass(frozen=True, kw_only=True)
class RuntimeInfo:
    """Device and library that ran an artifact; reported with every figure.

    Attributes:
        device: The CPU's or GPU's name.
        provider: The provider that ran the net.
        threads: CPU threads; None on a GPU.
        contexts: Execution contexts of a plan.
        graphs: CUDA graphs of a plan: "built in", "by hand" or "none".
        placement: Number of nodes on each of ONNX Runtime's providers; empty for a plan.
        cpu_note: How an INT8 file runs on a CPU whose integer sums would saturate, and how a BF16
            file runs on a CPU; else None.
        fixed_batch: The only batch size that the file accepts; None if it accepts several.
        batch_note: How a call runs with `fixed_batch`.
        versions: Versions of the libraries.
        tf32: Whether FP32 layers may run as TF32 (a mantissa of 10 bits, on GPUs from sm_80 on):
            from a plan's sidecar or ONNX Runtime's CUDA provider; None elsewhere.
    """

    device: str
    provider: str
    threads: int | None
    contexts: int | None
    graphs: str | None
    placement: dict[str, int]
    cpu_note: str | None = json_name("int8_note")
    fixed_batch: int | None
    batch_note: str | None
    versions: dict[str, str]
    tf32: bool | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """`cpu_note` and `batch_note`, without those that are None."""
        return tuple(note for note in (self.cpu_note, self.batch_note) if note)

    def __str__(self) -> str:
        """Return device, provider, threads, contexts and versions on one line."""
        threads = f", {self.threads} threads" if self.threads else ""
        if self.contexts:
            plural = "s" if self.contexts > 1 else ""
            threads += f", {self.contexts} context{plural}, CUDA graphs: {self.graphs}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device}; {self.provider}{threads}; {versions}"


class Session:
    """A loaded artifact; use it in a `with` block, or call `close`.

    Args:
        path: The file that runs.
        sidecar: Its sidecar, or None for a file of another tool.
        backend: The backend that runs it.
        input: Preprocessing that was stated for the file; by default its sidecar's.
        classes: Class names; by default the sidecar's.
        precision: Data type of the net; by default from the sidecar.
        weights: sha256 of the checkpoint that the weights came from; by default the sidecar's.
        assumed: Assumptions on what the file does not state; by default the sidecar's list.
        order: Maps the file's outputs to `classes`, where these are in another order.
        detection: Detection settings; by default the sidecar's. None for a classifier.
    """

    def __init__(
        self,
        path: Path,
        sidecar: Sidecar | None,
        backend: Backend,
        *,
        input: Preprocess | None = None,
        classes: tuple[str, ...] | None = None,
        precision: str | None = None,
        weights: str | None = None,
        assumed: tuple[str, ...] | None = None,
        order: LabelMap | None = None,
        detection: Detection | None = None,
    ) -> None:
        self.path = path
        self.sidecar = sidecar
        self.backend = backend
        self.precision = precision or (sidecar.precision if sidecar else "unknown")
        self.topk = sidecar.topk if sidecar else None
        self.weights = weights or (sidecar.weights.sha256 if sidecar else None)
        self.order = order
        self.detection = detection or (sidecar.detection if sidecar else None)
        stated = sidecar.assumed if sidecar else ()
        self.assumed = stated if assumed is None else assumed
        self._input = input
        self._classes = classes

    def __call__(self, images: np.ndarray) -> np.ndarray | TopK:
        """Run a batch of any N from 1.

        Args:
            images: Output of `prepare`: normalized float32 [N, 3, S, S]; for a file that takes
                pixels, uint8 [N, S, S, 3].

        Returns:
            float32 logits [N, classes]; for a top-K file, indices int64 [N, K] and probabilities
            float32 [N, K], the most probable first. Both in the order of `classes`.

        Raises:
            InputError: Images of the wrong type or shape.
        """
        if self.detection is not None:
            raise InputError(f"{self.path}: is a detector, which has no logits",
                             fix="session.detect(image)")  # fmt: skip
        answer = self.backend.infer(images)
        if self.order is None:
            return answer
        if isinstance(answer, tuple):
            return self.order.apply(answer[0]), answer[1]
        return self.order.reorder(answer)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Run a batch, for callers that need logits.

        Raises:
            InputError: The file returns only the most probable classes.
        """
        return logits(self(images), self.path)

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Run a batch; scores of all classes, also from a top-K file (see `metrics.from_best`).

        Raises:
            InputError: A top-K file with an unknown number of classes.
        """
        answer = self(images)
        if isinstance(answer, tuple) and self.classes:
            return metrics.from_best(*answer, len(self.classes))
        return logits(answer, self.path)

    def detect(self, image: np.ndarray) -> Detections:
        """Detect objects in one image.

        Args:
            image: uint8 RGB [H, W, 3] of any size.

        Returns:
            Boxes in the image's own pixels, scores and classes, from high scores to low ones. A
            warning is logged if `unsettled` is not 0.

        Raises:
            InputError: The artifact is a classifier, or the image has the wrong type or shape.
        """
        spec, run = self.detection, getattr(self.backend, "detect", None)
        if spec is None:
            raise InputError(
                f"{self.path}: is a classifier, which returns no boxes",
                fix="session(session.prepare(images)), or: rtresnet train --task detect",
            )
        if run is None:
            raise InputError(f"{self.path}: {self.backend.provider} does not run detectors")
        images, extent = detector_preprocess.to_canvas(image, spec, self.preprocess)
        outputs = run(images, extent)
        result = detector_preprocess.from_outputs(outputs, image.shape[0], image.shape[1], extent)
        if result.unsettled:
            LOGGER.warning(
                "%s: non-maximum suppression did not converge for %d boxes; export it again with "
                "--nms-rounds %d", self.path, result.unsettled, 2 * spec.rounds,
            )  # fmt: skip
        return result

    def restated(self, input: Preprocess, assumed: tuple[str, ...]) -> Session:
        """Return the same artifact with different preprocessing.

        Args:
            input: Replaces the preprocessing.
            assumed: Assumed parts of the preprocessing.
        """
        return self._changed(_input=input, assumed=assumed)

    def matched(
        self, reference: Session, names: Sequence[str] | None = None
    ) -> tuple[Session, LabelMap]:
        """Return the same artifact with its outputs in the order of another one's classes.

        Args:
            reference: The other one.
            names: Class names for the one that has none.

        Returns:
            The artifact, and how its classes were matched with the reference's.

        Raises:
            InputError: The classes differ.
        """
        for entry in (reference, self):
            entry.require_classes()
        same = self.weights is not None and self.weights == reference.weights
        unnamed = labels.numbered(self.classes)
        mapping = labels.match(
            reference.classes,
            self.classes,
            data_named=same or not unnamed,
            names=names if unnamed or labels.numbered(reference.classes) else None,
            model_name=str(reference.path),
            data_name=str(self.path),
        )
        if not mapping.is_permutation:
            raise InputError(
                f"{self.path} has {len(self.classes)} classes, but {reference.path} has "
                f"{len(reference.classes)}",
                fix="use artifacts with the same classes",
            )
        order = None if mapping.in_order else mapping
        return self._changed(order=order, _classes=reference.classes), mapping

    def with_backend(self, backend: Backend) -> Session:
        """Return the same artifact, run by another backend."""
        return self._changed(backend=backend)

    def _changed(self, **changes: Any) -> Session:
        session = copy.copy(self)
        for name, value in changes.items():
            setattr(session, name, value)
        return session

    def require_classes(self) -> None:
        """Raise InputError for a top-K file with an unknown number of classes."""
        if not self.classes:
            raise InputError(
                f"{self.path}: returns the most probable classes, but no sidecar states how many "
                "classes exist",
                fix="use the file it was made from",
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; their numbers if the file has no names.

        Empty for a top-K file with an unknown number of classes. Runs one image if the
        file leaves the number of classes open.
        """
        if self._classes is None and self.sidecar is not None:
            self._classes = self.sidecar.model.classes
        if self._classes is None:
            answer = self.backend.infer(self.example(1))
            count = 0 if isinstance(answer, tuple) else answer.shape[1]
            self._classes = tuple(map(str, range(count)))
        return self._classes

    def prepare(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Convert uint8 RGB images to the file's input.

        Args:
            images: Crops [N, S, S, 3], or images [H, W, 3] of any sizes, which are resized and
                cropped first.

        Raises:
            InputError: The file takes normalized images, and its mean and std are unknown.
        """
        side = self.size
        if not len(images) or not all(isinstance(image, np.ndarray) for image in images):
            raise InputError(
                "prepare needs at least one uint8 image [H, W, 3] as a NumPy array",
                fix="rtresnet.data.decode.decode(FILE) reads an image file",
            )
        if not isinstance(images, np.ndarray) or images.shape[1:3] != (side, side):
            images = np.stack([self.preprocess.crop(image) for image in images])
        if self.backend.input_dtype == np.uint8:
            return images
        return self.preprocess.normalize(images)

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of an image.

        Raises:
            InputError: The file has no sidecar, or the sidecar does not state it.
        """
        if self._input is not None:
            return self._input
        if self.sidecar is None or not self.sidecar.input_known:
            onnx = artifacts.kind_of(self.path) == "onnx"
            raise InputError(
                f"{self.path}: no sidecar ({artifacts.sidecar_path(self.path).name}) that states "
                "its mean and std",
                fix=f"state them once with: rtresnet adopt {self.path}"
                if onnx
                else "build it again from an ONNX file with a sidecar: rtresnet adopt, then "
                "rtresnet build",
            )
        return self.sidecar.input

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image as the file takes it: (3, S, S), or (S, S, 3) of pixels.

        Raises:
            InputError: The file leaves the size open.
        """
        side = self.size
        return (side, side, 3) if self.backend.layout == "nhwc" else (3, side, side)

    def example(self, count: int, seed: int = 0) -> np.ndarray:
        """Make `count` random images of the type and shape the file takes, for timing.

        Raises:
            InputError: The file leaves the size open.
        """
        rng, shape = np.random.default_rng(seed), (count, *self.image_shape)
        if self.backend.input_dtype == np.uint8:
            return rng.integers(0, 256, shape, dtype=np.uint8)
        return rng.standard_normal(shape, dtype=np.float32)

    @property
    def size(self) -> int:
        """Side of the input, in pixels.

        Raises:
            InputError: The file leaves it open, and no sidecar states it.
        """
        if self._input is not None:
            return self._input.size
        if self.backend.size is not None:
            return self.backend.size
        if self.sidecar is not None and self.sidecar.input_known:
            return self.sidecar.input.size
        raise InputError(
            f"{self.path}: its input has no fixed size",
            fix=f"state it once with: rtresnet adopt {self.path} --size S",
        )

    @property
    def batch(self) -> int | None:
        """The only batch size that the file accepts; None if it accepts several.

        A call with another number of images is split into such batches, and the last one is padded.
        """
        profiles = getattr(self.backend, "profiles", ())
        sizes = {size for profile in profiles for size in (profile.min, profile.max)}
        return sizes.pop() if len(sizes) == 1 else getattr(self.backend, "batch", None)

    @property
    def batch_note(self) -> str | None:
        """Message on how a call runs with a fixed batch; None if any batch size is accepted."""
        if self.batch is None or self.detection is not None:
            return None
        how = "images run one by one" if self.batch == 1 else "a smaller batch is padded"
        return f"{self.path}: its batch is fixed at {self.batch}; {how}"

    @property
    def info(self) -> RuntimeInfo:
        """Device, provider, threads and versions."""
        backend = self.backend
        return RuntimeInfo(
            device=hardware.cpu() if backend.device == "cpu" else backend.device,
            provider=backend.provider,
            threads=backend.threads,
            contexts=getattr(backend, "contexts", None),
            graphs=getattr(backend, "graphs", None),
            placement=getattr(backend, "placement", {}),
            cpu_note=getattr(backend, "cpu_note", None),
            fixed_batch=self.batch,
            batch_note=self.batch_note,
            versions=hardware.versions(("rtresnet", "numpy")) | dict(backend.versions),
            tf32=getattr(backend, "tf32", None),
        )

    def describe(self) -> dict[str, object]:
        """Return `info` as a dict, as JSON files contain it."""
        description: dict[str, object] = to_builtins(self.info)
        return description

    def close(self) -> None:
        """Free the backend's memory and handles."""
        self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
