"""Run the plan of a detector with TensorRT or TensorRT-RTX: one image at a time, fixed shapes."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Literal

import numpy as np

from rtresnet.core.detector_preprocess import INPUTS, OUTPUTS
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError
from rtresnet.runtime.contexts import configure_contexts
from rtresnet.runtime.cuda import host_view
from rtresnet.runtime.execution import allocate
from rtresnet.runtime.trt_plan import PlanBackend


class TrtDetector(PlanBackend):
    """A detector's plan on a GPU. Calls from several threads run one after another.

    `contexts` is always 1, there are no CUDA graphs and no timings.

    Raises:
        InputError: Several contexts or CUDA graphs are requested.
        UnavailableError: See `PlanBackend`.
        ArtifactError: See `PlanBackend`, or the engine is not a detector.
    """

    batch = 1
    size: int | None = None
    input_dtype: np.dtype[Any] = np.dtype("float32")
    layout: Literal["nchw", "nhwc"] = "nchw"

    def _load(
        self, trt: Any, contexts: int, graphs: bool | None, kernels: str, cache: bool
    ) -> None:
        if graphs:
            raise InputError(
                f"{self.path}: a detector's plan runs without CUDA graphs", fix="leave out --graphs"
            )
        if contexts > 1:
            raise InputError(
                f"{self.path}: a detector's plan runs in one context", fix="leave out --contexts"
            )
        self._lock = threading.Lock()
        engine = self._deserialize(trt)
        self._shapes = self._read_tensors(trt, engine)
        sizes = {
            name: int(np.prod(shape)) * dtype.itemsize
            for name, (shape, dtype) in self._shapes.items()
        }
        scratch = engine.device_memory_size_v2
        self._check_memory(sum(sizes.values()) + scratch, "activations and buffers")
        settings = configure_contexts(
            trt, engine, self._check_call, graphs=False, binding_has_graphs=False, kernels=kernels,
            cache_for=self.path if cache else None,
        )  # fmt: skip
        self._cache = settings.cache
        self._errors.clear()
        self._stack.callback(self._forget, [settings.cache])
        cuda, stack = self._cuda, self._stack
        self._stream = cuda.stream()
        stack.callback(cuda.destroy_stream, self._stream)
        self._device, self._host = dict[str, int](), dict[str, tuple[int, np.ndarray]]()
        for name, (shape, dtype) in self._shapes.items():
            self._device[name] = allocate(cuda, sizes[name], stack)
            address = cuda.allocate_pinned(sizes[name])
            stack.callback(cuda.free_pinned, address)
            view = host_view(address, sizes[name]).view(dtype).reshape(shape)
            self._host[name] = (address, view)
        memory = allocate(cuda, scratch, stack)
        context = engine.create_execution_context(settings.owned)
        self._check_call(context, "create_execution_context")
        self._context: list[Any] = [context]
        stack.callback(self._context.clear)
        if scratch:
            context.set_device_memory(memory, scratch)
        succeeded = context.set_optimization_profile_async(0, self._stream)
        self._check_call(succeeded, "set_optimization_profile_async(0)")
        cuda.synchronize(self._stream)
        for name, address in self._device.items():
            self._check_call(
                context.set_tensor_address(name, address), f"set_tensor_address({name})"
            )

    def _read_tensors(
        self, trt: Any, engine: Any
    ) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return shape and type of each input and output, inputs first."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        fixed = all(side > 0 for shape in shapes.values() for side in shape)
        if set(inputs) != set(INPUTS) or set(names) != {*INPUTS, *OUTPUTS} or not fixed:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ArtifactError(f"{self.path}: not a detector with fixed shapes: {listed}")
        return {
            name: (shapes[name], np.dtype(trt.nptype(engine.get_tensor_dtype(name))))
            for name in (*INPUTS, *OUTPUTS)
        }

    def detect(self, images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
        """Run one image. See `runtime.ort.OrtBackend.detect`.

        Args:
            images: float32 [1, 3, H, W], of the plan's size.
            extent: Height and width of the image on that canvas, float32 [1, 2].

        Returns:
            The outputs by name.

        Raises:
            InputError: Another type or shape, or the backend is closed.
            UnavailableError: A call of CUDA or TensorRT failed; the message names it.
        """
        inputs = {"images": images, "extent": extent}
        for name, values in inputs.items():
            shape, dtype = self._shapes[name]
            if values.shape != shape or values.dtype != dtype:
                raise InputError(
                    f"{name} is {values.dtype} {list(values.shape)}; the plan takes {dtype} "
                    f"{list(shape)}"
                )
        cuda = self._cuda
        with self._lock:
            if self._closed:
                raise InputError(f"{self.path}: detect: the session is closed")
            with cuda.active():
                self._errors.clear()
                try:
                    for name, values in inputs.items():
                        address, view = self._host[name]
                        view[...] = values
                        cuda.to_device(self._device[name], address, view.nbytes, self._stream)
                    self._check_call(
                        self._context[0].execute_async_v3(self._stream), "execute_async_v3"
                    )
                    for name in OUTPUTS:
                        address, view = self._host[name]
                        cuda.to_host(address, self._device[name], view.nbytes, self._stream)
                    cuda.synchronize(self._stream)
                except BaseException:
                    with contextlib.suppress(UnavailableError):
                        cuda.synchronize(self._stream)  # nothing may still write into the buffers
                    raise
            self._used = True
            return {name: self._host[name][1].copy() for name in OUTPUTS}

    _used = False

    def infer(self, images: Any, out: Any = None) -> Any:
        """Raise InputError: a detector has no logits."""
        raise InputError("a detector has no logits", fix="call detect(image)")

    def close(self) -> None:
        """Wait for a running call, save the compiled kernels, free everything."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._release(save=self._used)
