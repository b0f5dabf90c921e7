"""Load any artifact: a checkpoint in torch, an ONNX file or a plan in the runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import artifacts, atomic_io, hardware
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError, UnavailableError, missing_package
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import restated
from rtresnet.workflows import detect
from rtresnet.workflows.input_spec import InputConfig

if TYPE_CHECKING:
    from rtresnet.runtime.session import Session


def parse_provider(name: str) -> str:
    """Check a provider's name.

    Raises:
        InputError: There is no such provider, or it is not supported.
    """
    from rtresnet.runtime.providers import find_provider

    if name != "auto":
        find_provider(name)
    return name


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Config):
    """Where an artifact runs.

    Attributes:
        device: "auto" takes the GPU for plans and the CPU for ONNX files.
        provider: For ONNX files; "auto" takes openvino if it is installed and serves this CPU.
        threads: CPU threads.
        contexts: For plans: number of calls that may run at the same time.
        graphs: For plans: whether calls are CUDA graphs; None if possible.
        tf32: For provider "cuda": whether FP32 layers may run as TF32.
    """

    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device to run on.")
    provider: str = option(
        "auto",
        "Execution provider for ONNX files; auto chooses openvino if it is installed and supports "
        "this CPU, else cpu.",
        metavar="[auto|cpu|openvino|cuda|tensorrt-rtx]",
        parse=parse_provider,
    )
    threads: int | None = option(
        None, "Number of CPU threads.", minimum=1, maximum=1024, default_text="all cores"
    )
    contexts: int | None = option(
        None,
        "Number of execution contexts of a plan, which is the number of concurrent calls.",
        minimum=1,
        default_text="1, or 2 when batches are formed",
    )
    graphs: bool | None = option(
        None,
        "Run a plan's calls as CUDA graphs.",
        names=("--graphs/--no-graphs",),
        default_text="where possible",
    )
    tf32: bool | None = option(
        None,
        "Let the CUDA provider compute FP32 layers in TF32 (10 mantissa bits), on GPUs from sm_80 "
        "on.",
        names=("--tf32/--no-tf32",),
        default_text="allowed",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_provider(self.provider)

    def for_artifact(
        self, path: str, paths: Sequence[str], *, batches: bool = False
    ) -> RuntimeConfig:
        """Return the options that apply to `path`, one of several artifacts of a command.

        `provider`, `threads` and `tf32` apply to the ONNX files among them; if there are none,
        they stay and the plan rejects them. `contexts` and `graphs` apply to the plans.

        Args:
            path: The artifact.
            paths: All artifacts of the command.
            batches: Whether the command forms batches. A plan of a classifier then has two contexts
                by default, so that the GPU computes one batch while another is copied.

        Raises:
            InputError: `contexts` or `graphs` is given, and no artifact is a plan.
        """
        kinds = [artifacts.SUFFIXES.get(Path(name).suffix.lower()) for name in (path, *paths)]
        kind = kinds[0]
        plan_options = [name for name in ("contexts", "graphs") if getattr(self, name) is not None]
        if plan_options and "plan" not in kinds:
            raise InputError(
                f"{path}: not a plan; --{plan_options[0]} applies to plans only",
                fix="leave it out, or use a plan: rtresnet build",
            )
        changes: dict[str, Any] = {}
        if kind != "plan":
            changes |= {"contexts": None, "graphs": None}
        elif batches and self.contexts is None and not detect.is_detector(path):
            changes |= {"contexts": 2}
        if kind != "onnx" and "onnx" in kinds:
            changes |= {"provider": "auto", "tf32": None}
            if kind == "plan":
                changes |= {"threads": None}
        return dataclasses.replace(self, **changes)


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
    tf32: bool | None = None,
    model: str | None = None,
    stated: InputConfig | None = None,
) -> Session:
    """Load a checkpoint (in torch), an ONNX file or a plan (in the runtime).

    Args:
        path: A .pt, .onnx or .plan file.
        device: "cpu", "cuda", or "auto": a plan runs on the GPU, an ONNX file on the CPU, and a
            checkpoint on the GPU if torch has one.
        provider: For an ONNX file: "auto", "cpu", "openvino", "cuda" or "tensorrt-rtx". A named
            provider runs the whole net, or loading fails.
        threads: CPU threads; all cores by default.
        contexts: For a plan: calls that may run at the same time, each with its own buffers;
            further calls wait. An ONNX file takes any number of calls.
        graphs: For a plan: whether calls are CUDA graphs; None if possible, True or an error.
        kernels: For a plan of TensorRT-RTX, which compiles kernels for each batch size on this
            machine. "eager": the first call waits for them. "lazy": generic kernels serve the
            calls until they are compiled, which suits servers and not measurements.
        cache: For a plan of TensorRT-RTX: whether the kernels that it compiles on first use are
            kept next to it, in PLAN.cache.
        timings: For a plan: whether `session.backend.timings()` has the times of copies and
            computation; recording them costs every call some microseconds.
        blocking: For a plan: whether a thread that waits for the GPU sleeps. It then wakes up some
            tens of microseconds late, where spinning keeps a processor busy.
        tf32: For provider "cuda": whether FP32 layers may run as TF32, which rounds inputs to a
            mantissa of 10 bits, on GPUs from sm_80 on. ONNX Runtime allows it by default. For a
            plan this is decided when it is built.
        model: Architecture of a checkpoint from elsewhere; recognized by default.
        stated: Preprocessing that replaces the sidecar's. A file for which neither states it
            runs, and `prepare` raises InputError.

    Next to other Python threads that compute, a call waits up to 5 ms for the GIL when the GPU is
    done: see `Batcher` and `sys.setswitchinterval`. That setting applies to the process, so `load`
    does not change it.

    Returns:
        A session, which is also a context manager.

    Raises:
        InputError: No such file, another kind of file, or an argument out of range.
        ArtifactError: The file does not match its sidecar, this version or this GPU.
        UnavailableError: The device, the provider or a package is not available.
    """
    runtime = RuntimeConfig(
        device=typing.cast(Any, device),
        provider=provider,
        threads=threads,
        contexts=contexts,
        graphs=graphs,
        tf32=tf32,
    )
    return load_artifact(
        path, runtime, stated=stated, model=model, input_needed=False, kernels=kernels,
        cache=cache, timings=timings, blocking=blocking,
    )  # fmt: skip


def load_artifact(
    path: str | os.PathLike[str],
    runtime: RuntimeConfig | None = None,
    *,
    stated: InputConfig | None = None,
    model: str | None = None,
    input_needed: bool = True,
    **options: Any,
) -> Session:
    """Load a checkpoint (in torch), an ONNX file or a plan (in the runtime).

    Args:
        path: The artifact.
        runtime: Where it runs.
        stated: Preprocessing that replaces the sidecar's, or of a file without a sidecar.
        model: Architecture of a checkpoint from elsewhere; recognized by default.
        input_needed: Whether unknown preprocessing is an error.
        **options: Further options of `runtime.loading.load` for ONNX files and plans; they take
            precedence over `runtime`.

    Raises:
        InputError: No such file; or neither a sidecar nor `stated` has the preprocessing.
        ArtifactError: The file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    runtime, stated = runtime or RuntimeConfig(), stated or InputConfig()
    path = atomic_io.require_file(path, fix="create it with: rtresnet export")
    if artifacts.kind_of(path) == "checkpoint":
        session = _load_checkpoint(path, runtime, model)
        with close_on_error(session):
            detect.require_no_size(session, stated)
            preprocess = stated.applied_to(session.preprocess)
            return session.restated(
                preprocess, restated(session.assumed, session.preprocess, preprocess)
            )
    from rtresnet.runtime.loading import load as load_file

    settings: dict[str, Any] = {
        "device": runtime.device,
        "provider": runtime.provider,
        "threads": runtime.threads,
        "contexts": runtime.contexts or 1,
        "graphs": runtime.graphs,
        "tf32": runtime.tf32,
    }
    session = load_file(path, **(settings | options))
    with close_on_error(session):
        detect.require_no_size(session, stated)
        if not input_needed and stated.empty:
            return session
        return session.restated(*input_of(session, stated))


@contextlib.contextmanager
def close_on_error(session: Session) -> Iterator[None]:
    """Close a session if the block raises: its caller does not receive it."""
    try:
        yield
    except BaseException:
        session.close()
        raise


def input_of(session: Session, stated: InputConfig) -> tuple[Preprocess, tuple[str, ...]]:
    """Return the preprocessing of an ONNX file or a plan, and which parts of it are assumed.

    Args:
        session: The loaded file.
        stated: Preprocessing that replaces the sidecar's.

    Raises:
        InputError: Neither a sidecar nor `stated` has the preprocessing, or `stated` has another
            size than the file.
    """
    path, sidecar, backend = session.path, session.sidecar, session.backend
    pixels = backend.layout == "nhwc"
    if pixels and (stated.mean or stated.std):
        raise InputError(
            f"{path}: the file normalizes its input itself, so --mean and --std have no effect",
            fix="leave them out, or use the file without embedded normalization",
        )
    stated.require_size(path, backend.size)
    if sidecar is not None and sidecar.input_known:
        preprocess = stated.applied_to(sidecar.input)
        return preprocess, restated(sidecar.assumed, sidecar.input, preprocess)
    preprocess = stated.complete(path, fixed=backend.size, pixels=pixels)
    return preprocess, restated(sidecar.assumed if sidecar else (), None, preprocess)


def states_input(path: str | os.PathLike[str]) -> bool:
    """Return whether a sidecar states the preprocessing, so that no option has to."""
    sidecar = artifacts.read_sidecar(path)
    return sidecar is not None and sidecar.input_known


def _load_checkpoint(path: Path, runtime: RuntimeConfig, model: str | None) -> Session:
    if runtime.provider != "auto":
        raise InputError(f"{path}: is a checkpoint, which runs in torch; --provider does not apply")
    if runtime.tf32 is not None:
        raise InputError(
            f"{path}: is a checkpoint, which runs in torch; --tf32 and --no-tf32 do not apply"
        )
    require_torch("reading a checkpoint")
    import torch

    from rtresnet.models import checkpoint
    from rtresnet.models.nets import TorchBackend
    from rtresnet.runtime.session import Session

    device = torch_device(runtime.device)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if detect.is_detector(path):
        return detect.load_checkpoint(path, device)
    loaded = checkpoint.load(path, model=model)
    return Session(
        path,
        artifacts.read_sidecar(path),
        TorchBackend(loaded.net().to(device), loaded.input.size),
        input=loaded.input,
        classes=loaded.model.classes,
        precision="fp32",
        weights=loaded.weights.sha256,
        assumed=loaded.assumed,
    )


def require_torch(purpose: str) -> None:
    """Raise UnavailableError if torch is not installed."""
    if not hardware.installed("torch"):
        raise missing_package("torch", purpose)


def torch_device(choice: str) -> str:
    """Return the torch device; "auto" is the GPU if torch sees one.

    Raises:
        UnavailableError: CUDA was requested, but torch finds no CUDA device.
    """
    import torch

    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("torch finds no CUDA device", fix="see: rtresnet doctor")
    return choice
