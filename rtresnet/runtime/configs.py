"""How a plan's execution contexts are made: kernels, CUDA graphs, and whose addresses they read.

Knows TensorRT only as the module it is handed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.errors import EnvironmentLack, UnknownName
from rtresnet.runtime.rtx import KernelCache

KERNELS = ("eager", "lazy")


@dataclass(frozen=True, kw_only=True)
class Configs:
    """An IRuntimeConfig for either kind of context, and what was settled on the way.

    Attributes:
        ours: Of contexts that are bound to a lane's own buffers only.
        theirs: Of those that are bound to callers' addresses, which are in no graph.
        by_hand: Whether lanes capture graphs; None where they can.
        built_in: Whether TensorRT-RTX does so itself.
        cache: The kernels that it compiles, where they are kept.
    """

    ours: Any
    theirs: Any
    by_hand: bool | None = False
    built_in: bool = False
    cache: KernelCache | None = None


def configure(
    trt: Any,
    engine: Any,
    must: Callable[[object, str], None],
    *,
    graphs: bool | None,
    binding_has_graphs: bool,
    kernels: str,
    kernels_beside: Path | None,
) -> Configs:
    """Settles how contexts of an engine are made.

    Args:
        trt: The TensorRT module.
        engine: Its ICudaEngine.
        must: Takes what a call returned and its name, raises where it failed.
        graphs: None: where they are possible; True: or an error; False: none.
        binding_has_graphs: Whether the CUDA binding can capture them.
        kernels: When TensorRT-RTX compiles those of a batch size that is new: "eager": in the
            first call, which waits; "lazy": beside it, while generic ones serve. For TensorRT they
            were chosen in the build.
        kernels_beside: The plan whose compiled kernels are kept; None where they are not.

    Raises:
        UnknownName: Another word for `kernels`.
        EnvironmentLack: Graphs were asked for, and there can be none; or a call failed.
    """
    if kernels not in KERNELS:
        raise UnknownName("kernels", kernels, KERNELS)
    config = _config(trt, engine, must)
    if not hasattr(trt, "IRuntimeCache"):
        if graphs and not binding_has_graphs:
            raise EnvironmentLack(
                "CUDA graphs were asked for, and this CUDA binding has none",
                fix="leave RTRESNET_CUDA unset and pip install cuda-python",
            )
        by_hand = graphs if binding_has_graphs else False
        return Configs(ours=config, theirs=config, by_hand=by_hand)
    # A graph is of fixed addresses; where they are the callers' own each call brings others.
    theirs = _config(trt, engine, must)
    # TensorRT-RTX's own default is lazy, and whatever is timed meanwhile is not the engine.
    when = trt.DynamicShapesKernelSpecializationStrategy
    for each in (config, theirs):
        each.dynamic_shapes_kernel_specialization_strategy = (
            when.EAGER if kernels == "eager" else when.LAZY
        )
    built_in = False
    if graphs is not False:
        whole = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.cuda_graph_strategy = whole
        built_in = config.cuda_graph_strategy == whole  # the binding drops a refusal
        if graphs and not built_in:
            raise EnvironmentLack(
                "CUDA graphs were asked for, and TensorRT-RTX takes none here",
                fix="leave graphs out",
            )
    cache = None
    if kernels_beside is not None:
        cache = KernelCache(config, kernels_beside)
        must(cache.cache, "create_runtime_cache")
        for each in (config, theirs):
            must(each.set_runtime_cache(cache.cache), "set_runtime_cache")
    return Configs(ours=config, theirs=theirs, built_in=built_in, cache=cache)


def _config(trt: Any, engine: Any, must: Callable[[object, str], None]) -> Any:
    config = engine.create_runtime_config()
    must(config, "create_runtime_config")
    # All contexts of a lane share one scratch memory: they never run at the same time.
    config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    return config
