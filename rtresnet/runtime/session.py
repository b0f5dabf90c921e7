"""`rtresnet.load(path)`: an artifact ready to run, with everything its sidecar knows.

    with rtresnet.load("engines/resnet50.plan") as session:
        logits = session(images)          # float32 [N, 3, S, S] to [N, classes]

The sidecar is checked before anything is deserialized.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from rtresnet import artifacts, machine
from rtresnet.artifacts import Sidecar
from rtresnet.errors import InputError, UnknownName
from rtresnet.preprocess import Preprocess
from rtresnet.runtime.backend import Backend

DEVICES = ("auto", "cpu", "cuda")


class Session:
    """A loaded ONNX file or plan.

    Attributes:
        path: The file that runs.
        sidecar: Its record, or None for a stranger's file.
        backend: What runs it.
    """

    def __init__(self, path: Path, sidecar: Sidecar | None, backend: Backend) -> None:
        self.path = path
        self.sidecar = sidecar
        self.backend = backend

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 [N, 3, S, S] to float32 logits [N, classes]."""
        return self.backend.infer(images)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes input.

        Raises:
            InputError: The file has no sidecar, or one that had to guess: nobody knows.
        """
        if self.sidecar is None or "input" in self.sidecar.assumed:
            raise InputError(
                f"{self.path}: no sidecar ({artifacts.sidecar_path(self.path).name}) of an export, "
                "so its mean and std are unknown",
                fix="export it with rtresnet, or copy the sidecar along",
            )
        return self.sidecar.input

    @property
    def size(self) -> int:
        """Side of the input, in pixels.

        Raises:
            InputError: The file leaves it open.
        """
        if self.backend.size is None:
            raise InputError(f"{self.path}: its input has no fixed size")
        return self.backend.size

    def describe(self) -> dict[str, object]:
        """Device, provider, threads and versions, as they belong beside every figure."""
        return {
            "device": machine.cpu() if self.backend.device == "cpu" else self.backend.device,
            "provider": self.backend.provider,
            "threads": self.backend.threads,
            "versions": machine.versions(("rtresnet", "numpy", *self.backend.packages)),
        }

    def close(self) -> None:
        """Gives back what the backend holds."""
        self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
) -> Session:
    """Loads an ONNX file or a plan.

    Args:
        path: A .onnx or .plan file.
        device: "cpu", "cuda", or "auto": a plan on the GPU, an ONNX file on the CPU.
        provider: For an ONNX file: see `runtime.ort.OrtBackend`.
        threads: Intra-op threads on a CPU; every core by default.

    Raises:
        InputError: No such file, or not an ONNX file or a plan.
        ArtifactError: The file does not match its sidecar, or another version or GPU.
        EnvironmentLack: The device, the provider or a package is not here.
    """
    if device not in DEVICES:
        raise UnknownName("device", device, DEVICES)
    path = artifacts.require_file(path)
    kind = artifacts.kind_of(path)
    sidecar = artifacts.verify(path)
    backend: Backend
    if kind == "plan":
        from rtresnet.runtime import trt

        if not machine.gpus() or device == "cpu":
            trt.check_compatible(path, sidecar)
            raise trt.plan_needs_gpu(path, here=bool(machine.gpus()))
        backend = trt.TrtBackend(path, sidecar)
    elif kind == "onnx":
        from rtresnet.runtime.ort import OrtBackend

        if device == "cuda" and provider == "auto":
            provider = "cuda"
        if device != "auto" and (device == "cuda") != (provider == "cuda"):
            raise InputError(f"--device {device} and --provider {provider} contradict each other")
        backend = OrtBackend(path, provider=provider, threads=threads)
    else:
        raise InputError(f"{path}: the runtime takes ONNX files and plans", fix="rtresnet export")
    return Session(path, sidecar, backend)
