"""`rtresnet.load(path)`: an artifact ready to run, with everything its sidecar knows.

    with rtresnet.load("engines/resnet50.plan") as session:
        crops = np.stack([session.preprocess.crop(image) for image in images])
        logits = session(session.prepare(crops))          # float32 [N, classes]

What a file takes (normalized planes, or pixels as they are) and gives (logits, or the K most
probable classes) is the file's: `prepare` does what it does not do itself. The sidecar is checked
before anything is deserialized. Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from rtresnet.core import artifacts, atomic_io, hardware
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Sidecar
from rtresnet.runtime.backend import Backend, TopK, logits

DEVICES = ("auto", "cpu", "cuda")


class Session:
    """A loaded ONNX file or plan; use it in a `with` block, or call `close`.

    Attributes:
        path: The file that runs.
        sidecar: Its record, or None for a stranger's file.
        backend: What runs it.
    """

    def __init__(self, path: Path, sidecar: Sidecar | None, backend: Backend) -> None:
        self.path = path
        self.sidecar = sidecar
        self.backend = backend

    def __call__(self, images: np.ndarray) -> np.ndarray | TopK:
        """Runs a batch of any N from 1.

        Args:
            images: What `prepare` returns: normalized float32 [N, 3, S, S]; for a file that takes
                pixels, uint8 [N, S, S, 3].

        Returns:
            float32 logits [N, classes]; of a top-K file indices int64 [N, K] and probabilities
            float32 [N, K], the most probable first.

        Raises:
            InputError: Images of another type or shape.
        """
        return self.backend.infer(images)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """As calling it, where nothing but logits will do.

        Raises:
            InputError: The file gives the most probable classes only.
        """
        return logits(self(images), self.path)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """uint8 crops [N, S, S, 3] to what the file takes.

        Raises:
            InputError: The file takes normalized images, and nobody knows its mean and std.
        """
        if self.backend.input_dtype == np.uint8:
            return images
        return self.preprocess.normalize(images)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes input.

        Raises:
            InputError: The file has no sidecar, or one that does not say it.
        """
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
        """`count` random images of the type and shape the file takes, for timing it.

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
        if self.backend.size is None and self.sidecar is not None and self.sidecar.input_known:
            return self.sidecar.input.size
        if self.backend.size is None:
            raise InputError(
                f"{self.path}: its input has no fixed size",
                fix=f"state it once with: rtresnet adopt {self.path} --size S",
            )
        return self.backend.size

    @property
    def batch(self) -> int | None:
        """The only batch size that the file takes; None where it takes several.

        A call of another number of images is cut into such batches, and the last filled up.
        """
        profiles = getattr(self.backend, "profiles", ())
        sizes = {size for profile in profiles for size in (profile.min, profile.max)}
        return sizes.pop() if len(sizes) == 1 else getattr(self.backend, "batch", None)

    @property
    def batch_note(self) -> str | None:
        """What a fixed batch means for a call, for people; None where any batch is taken."""
        if self.batch is None:
            return None
        how = "images run one by one" if self.batch == 1 else "a smaller batch is filled up"
        return f"{self.path}: takes batches of {self.batch}; {how}"

    def describe(self) -> dict[str, object]:
        """Device, provider, threads and versions, as they belong with every figure.

        `contexts` and `graphs` ("built in", "by hand" or "none") are of a plan, else None.
        `placement` is the number of nodes on each of ONNX Runtime's execution providers; empty of
        a plan, which is one piece. `int8_note` says how an INT8 file runs on a CPU whose integer
        sums would saturate, and is None elsewhere; `batch_note` says that the file takes one batch
        size only (`fixed_batch`).
        """
        return {
            "device": hardware.cpu() if self.backend.device == "cpu" else self.backend.device,
            "provider": self.backend.provider,
            "threads": self.backend.threads,
            "contexts": getattr(self.backend, "contexts", None),
            "graphs": getattr(self.backend, "graphs", None),
            "placement": getattr(self.backend, "placement", {}),
            "int8_note": getattr(self.backend, "int8_note", None),
            "fixed_batch": self.batch,
            "batch_note": self.batch_note,
            "versions": hardware.versions(("rtresnet", "numpy")) | dict(self.backend.versions),
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
    contexts: int = 1,
    graphs: bool | None = None,
    kernels: str = "eager",
    cache: bool = True,
    timings: bool = False,
    blocking: bool = False,
) -> Session:
    """Loads an ONNX file or a plan.

    Args:
        path: A .onnx or .plan file.
        device: "cpu", "cuda", or "auto": a plan on the GPU, an ONNX file on the CPU.
        provider: For an ONNX file: "cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx", or
            "auto". What is asked for runs the whole net, or loading fails.
        threads: Intra-op threads on a CPU; every core by default.
        contexts: Of a plan: calls that may run at the same time, each with buffers of its own;
            one more waits for its turn. An ONNX file takes any number.
        graphs: Of a plan: whether calls are CUDA graphs; None where they can be, True or an error.
        kernels: Of a plan of TensorRT-RTX, which compiles kernels for each batch size on this
            machine: "eager": in its first call, which waits for it; "lazy": beside the calls,
            which generic kernels serve until then. The second is for servers, not for measuring.
        cache: Of a plan of TensorRT-RTX: whether the kernels that it compiles on first use are
            kept beside it, in PLAN.cache.
        timings: Of a plan: whether `session.backend.timings()` has the times of copies and
            computation; recording them costs every call some microseconds.
        blocking: Of a plan: whether a thread that waits for the GPU sleeps. It then wakes up some
            tens of microseconds late, where spinning keeps a processor busy.

    Next to other Python threads that compute, a call waits for the GIL when the GPU is done: up to
    5 ms, the interpreter's default. With a device of 0.5 ms and one such thread a call takes
    6.25 ms (median; p99 15.7) instead of 0.82, and 0.99 ms after `sys.setswitchinterval(1e-4)`.
    That setting is the process's, so `load` leaves it alone.

    Raises:
        InputError: No such file, or not an ONNX file or a plan; or an argument out of range.
        ArtifactError: The file does not match its sidecar, or another version or GPU.
        UnavailableError: The device, the provider or a package is not here, or the provider would
            leave part of the net to another.
    """
    if device not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    for name, number in (("threads", threads), ("contexts", contexts)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}, at least 1 is needed")
    path = atomic_io.require_file(path, fix="make one with: rtresnet export")
    kind = artifacts.kind_of(path)
    sidecar = artifacts.verify(path)
    backend: Backend
    if kind == "plan":
        from rtresnet.runtime import compatibility

        if provider != "auto" or threads is not None:
            raise InputError(
                f"{path}: a plan runs in the TensorRT that built it; --provider and --threads are "
                "for ONNX files"
            )
        if not hardware.gpus() or device == "cpu":
            compatibility.check_compatible(path, sidecar)
            raise compatibility.plan_needs_gpu(path, here=bool(hardware.gpus()))
        from rtresnet.runtime.trt import TrtBackend

        backend = TrtBackend(
            path, sidecar, contexts=contexts, graphs=graphs, kernels=kernels, cache=cache,
            timings=timings, blocking=blocking,
        )  # fmt: skip
    elif kind == "onnx":
        from rtresnet.runtime.ort import OrtBackend, find_provider

        if device == "cuda" and provider == "auto":
            provider = "cuda"
        on_gpu = provider != "auto" and find_provider(provider).gpu
        if device != "auto" and (device == "cuda") != on_gpu:
            raise InputError(f"--device {device} and --provider {provider} contradict each other")
        backend = OrtBackend(path, provider=provider, threads=threads)
    else:
        raise InputError(f"{path}: the runtime takes ONNX files and plans", fix="rtresnet export")
    return Session(path, sidecar, backend)
