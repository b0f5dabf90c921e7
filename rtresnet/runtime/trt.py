"""TensorRT and TensorRT-RTX plans. The only file of the runtime that imports either.

One context, one stream, pinned host buffers and device buffers for the largest batch, made once.
A batch above the profile's largest is split; one below its smallest is filled up and cut.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet import artifacts, machine
from rtresnet.artifacts import Sidecar
from rtresnet.errors import ArtifactError, EnvironmentLack, InputError, missing_package
from rtresnet.runtime.cuda import open_cuda


def check_compatible(path: str | os.PathLike[str], sidecar: Sidecar | None) -> None:
    """Holds a plan's sidecar against what is installed and present, before deserializing.

    Raises:
        ArtifactError: Built by another version, or for other GPUs.
        EnvironmentLack: The module that built it is not installed.
    """
    if sidecar is None or sidecar.plan is None:
        return
    plan = sidecar.plan
    anew = f"build it anew: {sidecar.made_by.get('command', 'rtresnet build')}"
    if not machine.installed(plan.builder):
        raise EnvironmentLack(
            f"{path}: built by {plan.builder} {plan.version}, which is not installed",
            fix=f"pip install {machine.DISTRIBUTIONS.get(plan.builder, plan.builder)}",
        )
    installed = importlib.import_module(plan.builder).__version__
    if installed != plan.version:
        raise ArtifactError(
            f"{path}: built by {plan.builder} {plan.version}, installed is {installed}", fix=anew
        )
    gpus = machine.gpus()
    if gpus and plan.targets and gpus[0].target not in plan.targets:
        raise ArtifactError(
            f"{path}: built for {', '.join(plan.targets)}, and this GPU ({gpus[0].name}) is "
            f"{gpus[0].target}",
            fix=anew,
        )


class TrtBackend:
    """A plan on a GPU. See `runtime.backend.Backend`.

    Args:
        path: The plan.
        sidecar: Its sidecar, where there is one.

    Raises:
        EnvironmentLack: No GPU, no TensorRT, or TensorRT does not accept the plan.
        ArtifactError: Version or target do not match.
    """

    threads: int | None = None

    def __init__(self, path: str | os.PathLike[str], sidecar: Sidecar | None) -> None:
        check_compatible(path, sidecar)
        name = sidecar.plan.builder if sidecar and sidecar.plan else "tensorrt_rtx"
        self._ran = False
        self._undo: list[Callable[[], None]] = []
        cuda = self._cuda = open_cuda()
        if not machine.installed(name):
            raise missing_package(machine.DISTRIBUTIONS[name], "running a plan")
        trt = importlib.import_module(name)
        self.provider = "TensorRT-RTX" if name == "tensorrt_rtx" else "TensorRT"
        self.packages: tuple[str, ...] = (
            "tensorrt-rtx-cu13" if name == "tensorrt_rtx" else "tensorrt",
        )
        self.device = machine.gpus()[0].name
        try:
            self._load(trt, Path(path), cuda)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any, path: Path, cuda: Any) -> None:
        # Kept as long as the engine that came of them.
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EnvironmentLack(
                f"{path}: {self.provider} {trt.__version__} does not accept this plan on "
                f"{self.device}",
                fix="build it on this machine: rtresnet build",
            )
        self._context = self._engine.create_execution_context(_runtime_config(trt, self._engine))
        if self._context is None:
            raise EnvironmentLack(f"{path}: no execution context (GPU memory?)")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {n: self._engine.get_tensor_mode(n) for n in names}
        self._input = next(n for n, mode in modes.items() if mode == trt.TensorIOMode.INPUT)
        self._output = next(n for n, mode in modes.items() if mode == trt.TensorIOMode.OUTPUT)
        smallest, _, largest = self._engine.get_tensor_profile_shape(self._input, 0)
        self.smallest, self.largest = smallest[0], largest[0]
        self._image = tuple(largest[1:])
        self.size: int | None = self._image[-1]
        self._classes = tuple(self._engine.get_tensor_shape(self._output))[-1]
        self._stream = cuda.stream()
        self._undo.append(lambda: cuda.destroy_stream(self._stream))
        self._events = [self._event() for _ in range(4)]
        self._in_size = 4 * int(np.prod(self._image))
        self._out_size = 4 * self._classes
        self._device_in = self._allocate(self._in_size * self.largest)
        self._device_out = self._allocate(self._out_size * self.largest)
        self._host_in = self._allocate_pinned(self._in_size * self.largest)
        self._host_out = self._allocate_pinned(self._out_size * self.largest)
        for tensor, address in ((self._input, self._device_in), (self._output, self._device_out)):
            if not self._context.set_tensor_address(tensor, address):
                raise EnvironmentLack(f"{path}: {self.provider} refuses a buffer for {tensor}")

    def _event(self) -> Any:
        event = self._cuda.event()
        self._undo.append(lambda: self._cuda.destroy_event(event))
        return event

    def _allocate(self, size: int) -> int:
        address = self._cuda.allocate(size)
        self._undo.append(lambda: self._cuda.free(address))
        return address

    def _allocate_pinned(self, size: int) -> np.ndarray:
        buffer = self._cuda.allocate_pinned(size)
        self._undo.append(lambda: self._cuda.free_pinned(buffer))
        return buffer

    def infer(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, S, S] to float32 logits [N, classes]; any N from 1."""
        if images.dtype != np.float32 or images.shape[1:] != self._image or not len(images):
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}, the plan takes float32 "
                f"[N, {', '.join(map(str, self._image))}]"
            )
        logits = np.empty((len(images), self._classes), np.float32)
        for start in range(0, len(images), self.largest):
            part = images[start : start + self.largest]
            logits[start : start + len(part)] = self._run(np.ascontiguousarray(part))
        return logits

    def _run(self, images: np.ndarray) -> np.ndarray:
        count = max(len(images), self.smallest)
        source, size = images.reshape(-1).view(np.uint8), count * self._in_size
        self._host_in[: len(source)] = source
        self._host_in[len(source) : size] = 0
        if not self._context.set_input_shape(self._input, (count, *self._image)):
            raise InputError(f"the plan refuses a batch of {count}")
        cuda, stream, events = self._cuda, self._stream, self._events
        cuda.record(events[0], stream)
        cuda.to_device(self._device_in, self._host_in, size, stream)
        cuda.record(events[1], stream)
        if not self._context.execute_async_v3(stream):
            raise EnvironmentLack(f"execute_async_v3 failed on {self.device}")
        cuda.record(events[2], stream)
        cuda.to_host(self._host_out, self._device_out, count * self._out_size, stream)
        cuda.record(events[3], stream)
        cuda.synchronize(stream)
        self._ran = True
        out = self._host_out[: len(images) * self._out_size].view(np.float32)
        return out.reshape(len(images), self._classes)

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last part's copy in, compute and copy out; empty before the first."""
        if not self._ran:
            return {}
        e, elapsed = self._events, self._cuda.elapsed
        return {
            "h2d": elapsed(e[0], e[1]),
            "compute": elapsed(e[1], e[2]),
            "d2h": elapsed(e[2], e[3]),
        }

    def close(self) -> None:
        """Frees every buffer, event and stream, last made first."""
        self._context = self._engine = self._runtime = None
        while self._undo:
            self._undo.pop()()


def _runtime_config(trt: Any, engine: Any) -> Any:
    config = engine.create_runtime_config()
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        # The default first runs fallback kernels: whatever is timed meanwhile is not the engine.
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return config


def plan_needs_gpu(path: str | os.PathLike[str], *, here: bool = False) -> EnvironmentLack:
    """The error for a plan on a machine without a GPU, or (`here`) asked onto the CPU of one."""
    sidecar = artifacts.read_sidecar(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    fix = f"on a CPU use {parent}" if parent else "on a CPU use its ONNX file"
    why = "a plan runs on an NVIDIA GPU" + ("" if here else ", and there is none here")
    return EnvironmentLack(f"{path}: {why}", fix=fix)
