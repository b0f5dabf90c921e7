"""Execution contexts of an engine: creation, binding, and CUDA graphs.

TensorRT-RTX keeps one graph for each context, and a graph captured here reads the state of its
context. So each batch size that runs as a graph has a separate context.

Receives the TensorRT module as an argument and never imports it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.io_spec import PADDED_UP_TO, IoSpec

KERNELS = ("eager", "lazy")
GRAPH_CONTEXTS = 16  # batch sizes with a separate context and graph, for each stream

CheckCall = Callable[[object, str], None]
"""Takes the return value of a TensorRT call and the call's name. Raises if the call failed."""
MakeContext = Callable[[int, int, int, bool], Any]
"""Creates an execution context from a profile, a scratch address, a stream, and whether only the
stream's own buffers will be bound."""
GraphKey = tuple[int, int, int]
"""Profile, batch size, index of the set of buffers."""


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Settings of execution contexts, and who captures CUDA graphs.

    Attributes:
        owned: Argument of `create_execution_context` for contexts that are only ever bound to the
            buffers of one stream: an IRuntimeConfig, or an allocation strategy.
        external: The same for contexts that are bound to changing addresses and have no graph.
        capture: Whether the runtime captures graphs; None if possible.
        built_in: Whether TensorRT-RTX captures graphs; None if possible.
        pad: Whether each batch size costs a graph or kernels, so that batches are padded to few
            sizes.
        cache: The kernels that TensorRT-RTX compiles; None if they are not stored.
    """

    owned: Any
    external: Any
    capture: bool | None = False
    built_in: bool | None = False
    pad: bool = False
    cache: KernelCache | None = None


def configure_contexts(
    trt: Any,
    engine: Any,
    check_call: CheckCall,
    *,
    graphs: bool | None,
    binding_has_graphs: bool,
    kernels: str,
    cache_for: Path | None,
) -> ContextConfig:
    """Decide how the contexts of an engine are created.

    Args:
        trt: The TensorRT module.
        engine: Its ICudaEngine.
        check_call: See `CheckCall`.
        graphs: None uses graphs where possible, True requires them, False uses none.
        binding_has_graphs: Whether the CUDA binding can capture graphs.
        kernels: When TensorRT-RTX compiles the kernels of a new batch size. "eager": in the first
            call, which waits for them. "lazy": in the background, while generic kernels run.
            TensorRT chooses its kernels during the build.
        cache_for: The plan whose compiled kernels are stored; None stores none.

    Raises:
        UnknownNameError: `kernels` is neither "eager" nor "lazy".
        UnavailableError: Graphs are required and not possible, or a call failed.
    """
    if kernels not in KERNELS:
        raise UnknownNameError("kernels", kernels, KERNELS)
    if not hasattr(trt, "IRuntimeCache"):
        if graphs and not binding_has_graphs:
            raise UnavailableError(
                "CUDA graphs were requested, but this CUDA binding does not support them",
                fix="leave RTRESNET_CUDA unset and pip install cuda-python",
            )
        capture = graphs if binding_has_graphs else False
        config = _runtime_config(trt, engine, check_call)
        return ContextConfig(
            owned=config, external=config, capture=capture, pad=capture is not False
        )
    owned, external = (_runtime_config(trt, engine, check_call) for _ in range(2))
    # TensorRT-RTX compiles lazily by default. Measurements would then include generic kernels.
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    for config in (owned, external):
        config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if kernels == "eager" else strategies.LAZY
        )
    if graphs is not False:
        # Only a context that has run can tell whether it captures: see `GraphContexts`.
        owned.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache = None
    if cache_for is not None:
        cache = KernelCache(owned, cache_for)
        check_call(cache.cache, "create_runtime_cache")
        for config in (owned, external):
            check_call(config.set_runtime_cache(cache.cache), "set_runtime_cache")
    return ContextConfig(owned=owned, external=external, built_in=graphs, pad=True, cache=cache)


def _runtime_config(trt: Any, engine: Any, check_call: CheckCall) -> Any:
    # All contexts of a stream share one scratch memory, because they never run at the same time.
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(engine, "create_runtime_config"):  # TensorRT before 10.11
        return strategy
    config = engine.create_runtime_config()
    check_call(config, "create_runtime_config")
    config.set_execution_context_allocation_strategy(strategy)
    return config


class KernelCache:
    """Kernels that TensorRT-RTX compiled for this GPU, stored next to the plan.

    Args:
        config: An IRuntimeConfig of the contexts that will use the kernels.
        path: The plan.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self.path = cache_path(path)
        self.cache = config.create_runtime_cache()
        self._stored = b""
        blob = self.path.read_bytes() if self.path.is_file() else b""
        # False: the file is of another version, GPU or driver. It is then replaced.
        if self.cache is not None and blob and self.cache.deserialize(blob):
            self._stored = blob

    def save(self) -> None:
        """Write the kernels if the file does not have them. Warns if writing fails."""
        memory = self.cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if not blob or blob == self._stored:
            return
        try:
            with atomic_io.atomic_path(self.path) as temporary:
                temporary.write_bytes(blob)
        except (OSError, InputError) as error:  # the file only saves time at the next load
            warnings.warn(
                f"{self.path}: the compiled kernels are not stored ({error})",
                RuntimeWarning,
                stacklevel=3,
            )


def cache_path(path: str | os.PathLike[str]) -> Path:
    """Return the file for a plan's compiled kernels: `engines/resnet50.plan.cache`."""
    return Path(f"{os.fspath(path)}.cache")


class BoundContext:
    """An execution context, and its current shape and addresses.

    Attributes:
        has_run: Whether it has executed. TensorRT's first execution cannot be captured.
        settled: Whether it is known if its batch size can run as a CUDA graph.
        whole: Graph of copy in, engine and copy out, or None.
        engine: Graph of the engine, or None.
    """

    def __init__(self, context: Any, io: IoSpec, check_call: CheckCall) -> None:
        self.context = context
        self.has_run = self.settled = False
        self.whole: Any = None
        self.engine: Any = None
        self._io, self._check_call = io, check_call
        self._run = 0
        self._addresses: dict[str, int] = {}
        self._bound: tuple[int, tuple[int, ...]] | None = None

    def bind(self, run: int, addresses: tuple[int, ...]) -> None:
        """Set the batch size and the addresses of input and outputs if they have changed."""
        if self._bound == (run, addresses):
            return
        self._bound = None  # unknown if a call fails
        if self._run != run:
            self._run = 0
            shape = (run, *self._io.input.row)
            name = self._io.input.name
            self._check_call(self.context.set_input_shape(name, shape), f"set_input_shape({shape})")
            self._run = run
        for tensor, address in zip((self._io.input, *self._io.outputs), addresses, strict=True):
            if self._addresses.get(tensor.name) != address:
                succeeded = self.context.set_tensor_address(tensor.name, address)
                self._check_call(succeeded, f"set_tensor_address({tensor.name})")
                self._addresses[tensor.name] = address
        self._bound = run, addresses

    def execute(self, stream: int) -> None:
        """Enqueue the engine on a stream."""
        if not self.context.execute_async_v3(stream):
            self._check_call(False, "execute_async_v3")
        self.has_run = True


class GraphContexts:
    """The contexts of one stream whose batch sizes run as CUDA graphs.

    A batch size runs without a graph the first time and is captured before its second run. The
    context that was used longest ago makes room for a new one.

    Args:
        cuda: See `runtime.cuda`.
        io: The engine's input, outputs and profiles.
        stream: The stream that is captured.
        create: Creates a context for a profile, to be bound to the stream's own buffers only.
        enqueue_all: Takes a prepared call and its context, enqueues copy in, engine and copy out.
        capture: Whether to capture graphs here; None if possible.
        built_in: Whether TensorRT-RTX captures graphs; None if possible.
        engine_only: Whether graphs hold the engine without copies, also for the first set of
            buffers.

    Attributes:
        capture: The argument; False after a failed capture.
        built_in: The argument; False after a context that cannot be captured.
    """

    def __init__(
        self,
        cuda: Cuda,
        io: IoSpec,
        stream: int,
        create: Callable[[int], BoundContext],
        enqueue_all: Callable[[Any, BoundContext], None],
        *,
        capture: bool | None,
        built_in: bool | None,
        engine_only: bool,
    ) -> None:
        self.capture, self.built_in = capture, built_in
        self._cuda, self._io, self._stream = cuda, io, stream
        self._create, self._enqueue_all = create, enqueue_all
        self._engine_only = engine_only
        self._contexts: OrderedDict[GraphKey, BoundContext] = OrderedDict()

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._contexts

    @property
    def enabled(self) -> bool:
        """Whether batches run as CUDA graphs, captured by either library."""
        return self.capture is not False or self.built_in is not False

    def get(self, key: GraphKey, call: Any) -> BoundContext | None:
        """Return the context for a batch size and set of buffers; None if it has no graph.

        Args:
            key: Profile, batch size and index of the buffers.
            call: Passed to `enqueue_all` when a graph is captured.
        """
        bound = self._contexts.get(key)
        if bound is not None:
            self._contexts.move_to_end(key)
            if bound.settled or not bound.has_run:
                return bound
            self.settle(key, call)
            return self._contexts.get(key)
        profile, run = self._io.profiles[key[0]], key[1]
        usual = run <= PADDED_UP_TO or run in (profile.min, profile.opt, profile.max)
        if not self.enabled or not usual:
            return None
        if len(self._contexts) == GRAPH_CONTEXTS:
            self._destroy_graphs(self._contexts.popitem(last=False)[1])
        bound = self._contexts[key] = self._create(key[0])
        return bound

    def settle(self, key: GraphKey, call: Any) -> None:
        """Find out whether a batch size that has run can be a graph, and capture it if so."""
        bound = self._contexts[key]
        bound.settled = True
        try:
            is_capturable = getattr(bound.context, "is_stream_capturable", None)
            if is_capturable is not None and not is_capturable(self._stream):
                raise UnavailableError(
                    f"TensorRT cannot capture a batch of {key[1]}",
                    fix="build the plan again, or load it with graphs=False",
                )
            if self.capture is not False:
                if self._engine_only or key[2]:
                    bound.engine = self.capture_engine(bound)
                else:
                    bound.whole = self._captured(lambda: self._enqueue_all(call, bound))
        except UnavailableError as error:
            if self.capture or self.built_in:
                raise
            self.capture = self.built_in = False
            self.clear()
            warnings.warn(f"no CUDA graphs: {error}", RuntimeWarning, stacklevel=2)

    def capture_engine(self, bound: BoundContext) -> Any:
        """Capture a graph of the engine without copies."""
        return self._captured(lambda: bound.execute(self._stream))

    def _captured(self, enqueue: Callable[[], None]) -> Any:
        self._cuda.begin_capture(self._stream)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(UnavailableError):  # the capture is incomplete
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)

    def clear(self) -> None:
        """Destroy all graphs and their contexts."""
        while self._contexts:
            self._destroy_graphs(self._contexts.popitem()[1])

    def _destroy_graphs(self, bound: BoundContext) -> None:
        """Destroy a context's graphs, which has to come before the context."""
        for graph in (bound.whole, bound.engine):
            if graph is not None:
                self._cuda.destroy_graph(graph)
