"""How a plan's execution contexts are created: kernels, CUDA graphs, and memory.

Knows TensorRT only as the module it is handed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core.errors import UnavailableError, UnknownNameError
from rtresnet.runtime.rtx import KernelCache

KERNELS = ("eager", "lazy")


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What contexts are created with, and who captures CUDA graphs.

    Attributes:
        owned: Argument of `create_execution_context` for contexts that are only ever bound to one
            stream's own buffers: an IRuntimeConfig, or an allocation strategy.
        external: The same for contexts that are bound to changing addresses, which no graph has.
        capture: Whether the runtime captures graphs; None: where it can.
        built_in: Whether TensorRT-RTX captures them; None: where it can.
        pad: Whether each batch size costs a graph or kernels, so that sizes are padded.
        cache: The kernels that TensorRT-RTX compiles; None where they are not kept.
    """

    owned: Any
    external: Any
    capture: bool | None = False
    built_in: bool | None = False
    pad: bool = False
    cache: KernelCache | None = None


def configure(
    trt: Any,
    engine: Any,
    check_call: Callable[[object, str], None],
    *,
    graphs: bool | None,
    binding_has_graphs: bool,
    kernels: str,
    cache_for: Path | None,
) -> ContextConfig:
    """Decides how contexts of an engine are created.

    Args:
        trt: The TensorRT module.
        engine: Its ICudaEngine.
        check_call: Takes what a call returned and its name, raises where it failed.
        graphs: None: where they are possible; True: or an error; False: none.
        binding_has_graphs: Whether the CUDA binding can capture them.
        kernels: When TensorRT-RTX compiles the kernels of a new batch size: "eager": in the first
            call, which waits; "lazy": in the background, while generic kernels serve. TensorRT
            chose its kernels in the build.
        cache_for: The plan whose compiled kernels are kept; None where they are not.

    Raises:
        UnknownNameError: Another word for `kernels`.
        UnavailableError: Graphs were asked for and are not possible; or a call failed.
    """
    if kernels not in KERNELS:
        raise UnknownNameError("kernels", kernels, KERNELS)
    if not hasattr(trt, "IRuntimeCache"):
        if graphs and not binding_has_graphs:
            raise UnavailableError(
                "CUDA graphs were asked for, and this CUDA binding has none",
                fix="leave RTRESNET_CUDA unset and pip install cuda-python",
            )
        capture = graphs if binding_has_graphs else False
        config = _config(trt, engine, check_call)
        return ContextConfig(
            owned=config, external=config, capture=capture, pad=capture is not False
        )
    owned, external = (_config(trt, engine, check_call) for _ in range(2))
    # TensorRT-RTX's own default is lazy, and whatever is timed meanwhile is not the engine.
    when = trt.DynamicShapesKernelSpecializationStrategy
    for config in (owned, external):
        config.dynamic_shapes_kernel_specialization_strategy = (
            when.EAGER if kernels == "eager" else when.LAZY
        )
    if graphs is not False:
        # Whether it does capture, a context says once it has run: `ExecutionStream`.
        owned.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache = None
    if cache_for is not None:
        cache = KernelCache(owned, cache_for)
        check_call(cache.cache, "create_runtime_cache")
        for config in (owned, external):
            check_call(config.set_runtime_cache(cache.cache), "set_runtime_cache")
    return ContextConfig(owned=owned, external=external, built_in=graphs, pad=True, cache=cache)


def _config(trt: Any, engine: Any, check_call: Callable[[object, str], None]) -> Any:
    # All contexts of a stream share one scratch memory: they never run at the same time.
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(engine, "create_runtime_config"):  # TensorRT before 10.11
        return strategy
    config = engine.create_runtime_config()
    check_call(config, "create_runtime_config")
    config.set_execution_context_allocation_strategy(strategy)
    return config
