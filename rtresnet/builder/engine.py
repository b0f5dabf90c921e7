"""Compile an ONNX file into a plan: parse, build, check the layers' types, write.

TensorRT reports most failures in its log and returns False or None. The log is recorded, and its
errors become part of the exception, with the ONNX node and the block that they name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rtresnet.builder import inspector, layers, nodes, preflight, targets
from rtresnet.builder.layers import Layer, Layers
from rtresnet.builder.nodes import ADD, CONVOLUTION, NetworkNode
from rtresnet.core import artifacts, atomic_io, hardware, plan_info, serialization, trt_loading
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError
from rtresnet.core.precisions import FLOAT, PRECISIONS, unsupported
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Attestation, Link, Model, Plan, Profile, Sidecar, Weights

FLOAT_KERNELS = tuple(PRECISIONS[name].tensorrt for name in FLOAT)
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")  # once for each profile


P = ParamSpec("P")
T = TypeVar("T")


def _releases_frames(function: Callable[P, T]) -> Callable[P, T]:
    """Clear the frames of the function's exceptions, which refer to TensorRT's objects.

    TensorRT-RTX 1.7 deadlocks if a builder is destroyed while another one is being created. One
    that a traceback keeps alive would be destroyed whenever Python collects garbage.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise

    return call


@_releases_frames
def check(
    source: str | os.PathLike[str], *, target: Sequence[str] = (), builder: str = "auto"
) -> tuple[str, ...]:
    """Check that a file can be built for some targets, without building it.

    Returns:
        The targets; TensorRT-RTX's defaults that support the file's types if there are none.

    Raises:
        ArtifactError, UnavailableError, InputError: See `build`.
    """
    trt = targets.builder(builder)
    source = Path(source)
    _, network = _create(trt, make_log(trt), source)
    preflight.require_fixed_size(source, network, _stated_size(artifacts.read_sidecar(source)))
    graph = nodes.read(trt, network)
    chosen = _targets(trt, target, graph)
    preflight.check_targets(source, chosen, graph)
    return chosen or targets.DEFAULT


def _targets(trt: Any, target: Sequence[str], graph: Mapping[str, NetworkNode]) -> tuple[str, ...]:
    """Return the targets of a build; empty for TensorRT-RTX's own default."""
    if target or not hasattr(trt, "ComputeCapability"):
        return tuple(target) or _local_target(trt)
    chosen = list(targets.DEFAULT)
    for name in preflight.precisions(graph):
        chosen = [target for target in chosen if target not in unsupported(name, chosen)]
    return () if len(chosen) == len(targets.DEFAULT) else tuple(chosen)


def _create(trt: Any, log: Any, source: Path) -> tuple[Any, Any]:
    """Create a builder, and the network of a file."""
    builder = trt_loading.create(trt, "Builder", log, log.reason)
    network = builder.create_network(_creation_flags(trt))
    preflight.parse(trt, builder, network, log, source)
    return builder, network


@_releases_frames
def build(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    profiles: Sequence[Profile] = (),
    target: Sequence[str] = (),
    builder: str = "auto",
    tf32: bool = True,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda phase: None,
    described: Sidecar | None = None,
) -> Sidecar:
    """Compile an ONNX file into a plan, with a sidecar and a file of its layers.

    Args:
        source: FP32, FP16, BF16 or Q/DQ INT8 or FP8 ONNX file.
        out: The plan.
        profiles: Optimization profiles; by default 1:8:32, or the fixed batch of the file.
        target: Compute capabilities; empty for the builder's default, from which FP8 files use
            those with FP8.
        builder: See `targets.builder`.
        tf32: Whether FP32 convolutions and matrix products may run as TF32, which rounds inputs to
            a mantissa of 10 bits, on GPUs from sm_80 on.
        timing_cache: File with kernel measurements of `tensorrt`, which is read and updated.
        progress: Called with the name of each phase.
        described: Record from the file's metadata, used if it has no sidecar.

    Returns:
        The plan's sidecar, with the types of its layers.

    Raises:
        ArtifactError: The file cannot be parsed or built; the message has TensorRT's errors.
        InputError: The builder does not support a target, a profile or an option.
        UnavailableError: The builder is not installed or does not start.
        CheckFailedError: A convolution does not run in the file's precision. Nothing is written.
        KeyboardInterrupt: Ctrl-C. Nothing is written.
    """
    source, out = Path(source), Path(out)
    artifacts.require_name(out, "plan")
    trt = targets.builder(builder)
    preflight.check_timing_cache(trt, timing_cache)
    log = make_log(trt)
    progress("parse")
    maker, network, parent = _parsed(trt, log, source, described)
    batch = int(network.get_input(0).shape[0])
    profiles = targets.profiles_for(source, profiles, batch if batch > 0 else None)
    graph = nodes.read(trt, network)
    target = _targets(trt, target, graph)
    preflight.check_targets(source, target, graph)
    planned = dataclasses.replace(
        parent,
        kind="plan",
        parent=artifacts.link_to(source, out, parent.sha256),
        plan=Plan(
            builder=trt.__name__, version=trt.__version__, profiles=profiles, seconds=0.0,
            targets=target, tf32=tf32,
        ),
        measured={},
        made_by={},
    )  # fmt: skip
    network.name = plan_info.name_field(planned)
    assert planned.plan is not None
    config = _configure(trt, maker, network.get_input(0), planned.plan, log)
    progress("build")
    started = time.perf_counter()
    with _timing_cache(config, timing_cache):
        serialized = run_builder(trt, maker, network, config, progress)
    seconds = round(time.perf_counter() - started, 3)
    if serialized is None:
        reason = log.reason()
        raise ArtifactError(
            f"{source}: the build failed{preflight.locate_node(reason, graph)}: {reason}"
        )
    progress("check layers")
    built = dataclasses.replace(planned, plan=dataclasses.replace(planned.plan, seconds=seconds))
    return _publish(
        memoryview(serialized), out, source, built, graph,
        _layers(trt, log, serialized, len(profiles), graph), log.activations,
    )  # fmt: skip


def _parsed(
    trt: Any, log: Any, source: Path, described: Sidecar | None
) -> tuple[Any, Any, Sidecar]:
    """Parse and verify a file at the same time; hashing takes about as long as parsing.

    Returns:
        The builder, the network, and the file's record.
    """
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(artifacts.verify, source)
        try:
            maker, network = _create(trt, log, source)
        finally:
            stated = verified.result() or described  # a damaged file is reported first
    preflight.require_fixed_size(source, network, _stated_size(stated))
    return maker, network, stated or _unknown_net(trt, network, source)


def _layers(
    trt: Any, log: Any, serialized: Any, profiles: int, graph: Mapping[str, NetworkNode]
) -> tuple[Layer, ...]:
    """Return the fused layers, from TensorRT-RTX's log or TensorRT's inspector."""
    if hasattr(trt, "ComputeCapability"):
        return layers.read_dump(log.layers, graph)
    texts = inspector.inspect_engine(trt, log, log.reason, serialized, profiles)
    return inspector.read_inspector(texts, graph)


def require_user_allocation(trt: Any, config: Any) -> None:
    """Make the engine allocate nothing while it runs, which CUDA graphs need.

    Only TensorRT-RTX has this flag; plans of `tensorrt` can be captured without it.
    """
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:
        config.set_flag(flag)


def _local_target(trt: Any) -> tuple[str, ...]:
    """Return the GPU that `tensorrt` builds for; empty for TensorRT-RTX, which needs none."""
    rtx = hasattr(trt, "ComputeCapability")
    return () if rtx else tuple(gpu.target for gpu in hardware.gpus()[:1])


def _stated_size(sidecar: Sidecar | None) -> int | None:
    return sidecar.input.size if sidecar is not None and sidecar.input_known else None


def _configure(trt: Any, builder: Any, tensor: Any, plan: Plan, log: Any) -> Any:
    """Create the builder's configuration for a plan whose input is `tensor`."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    require_user_allocation(trt, config)
    if not plan.tf32:  # on by default in both builders
        config.clear_flag(trt.BuilderFlag.TF32)
    targets.apply(trt, config, plan.targets)
    for profile in plan.profiles:
        entry = builder.create_optimization_profile()
        shapes = [(n, *tuple(tensor.shape)[1:]) for n in (profile.min, profile.opt, profile.max)]
        entry.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(entry) < 0:
            raise InputError(f"the builder rejects the profile {profile}: {log.reason()}")
    return config


@contextlib.contextmanager
def _timing_cache(config: Any, path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Read `tensorrt`'s kernel measurements before a build, and write them after it."""
    if path is None:
        yield
        return
    path = Path(path)
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ArtifactError(
            f"{path}: not a timing cache of this GPU and this version of TensorRT",
            fix="delete it; the build writes a new one",
        )
    yield
    data = memoryview(config.get_timing_cache().serialize())
    with atomic_io.atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _layer_file(
    engine_layers: Sequence[Layer], graph: Mapping[str, NetworkNode], plan: Plan
) -> str:
    names = {
        word: tuple(node.name for node in graph.values() if node.operation == word)
        for word in (CONVOLUTION, ADD)
    }
    return serialization.to_json(
        Layers(
            batches=tuple(profile.opt for profile in plan.profiles),
            activations=plan.attested.activations or () if plan.attested else (),
            convolutions=names[CONVOLUTION],
            adds=names[ADD],
            layers=tuple(engine_layers),
        )
    )


def _publish(
    data: memoryview,
    out: Path,
    source: Path,
    built: Sidecar,
    graph: Mapping[str, NetworkNode],
    engine_layers: tuple[Layer, ...],
    activations: Sequence[int],
) -> Sidecar:
    """Check the precision of the layers, and write the plan, its sidecar and its layer file."""
    layer_path = layers.path_for(out)
    with contextlib.ExitStack() as stack:

        def describe() -> Sidecar:
            assert built.plan is not None
            attested = layers.verify_precision(engine_layers, graph, activations)
            if attested is not None:
                _require_precision(
                    source, built, attested, layers.kernel_types(engine_layers, graph)
                )
            # Without --target, only the plan's header has the targets of TensorRT-RTX.
            header = plan_info.parse_header(bytes(data[: plan_info.HEADER_SIZE]))
            plan = dataclasses.replace(
                built.plan, attested=attested, targets=(header or built.plan).targets
            )
            if engine_layers:
                # Replaced last: until then, the new sidecar's hash does not match the old file.
                temporary = stack.enter_context(atomic_io.atomic_path(layer_path, durable=False))
                text = _layer_file(engine_layers, graph, plan)
                temporary.write_text(text, encoding="utf-8")
                link = Link(file=layer_path.name, sha256=atomic_io.sha256(temporary))
                plan = dataclasses.replace(plan, layers=link)
            return dataclasses.replace(built, plan=plan)

        sidecar = artifacts.publish_bytes(out, data, describe)
    if not engine_layers:
        layer_path.unlink(missing_ok=True)
    return sidecar


def _require_precision(
    source: Path, sidecar: Sidecar, attested: Attestation, types: Mapping[str, str]
) -> None:
    """Raise CheckFailedError unless every convolution runs in the file's precision.

    Convolutions that quantization left in float on purpose may run in float. An unknown type
    counts as wrong, unless all are unknown: then the builder's format has changed, which is no
    evidence about the engine.
    """
    if sidecar.precision not in PRECISIONS or set(types.values()) <= {layers.UNKNOWN}:
        return
    expected = {PRECISIONS[sidecar.precision].tensorrt}
    if sidecar.calibration and sidecar.calibration.int8:
        expected.add(PRECISIONS["int8"].tensorrt)
    wrong = {name: dtype for name, dtype in types.items() if dtype not in expected}
    float_nodes = set(sidecar.calibration.kept) if sidecar.calibration else set()
    wrong = {
        name: dtype
        for name, dtype in wrong.items()
        if name not in float_nodes or dtype not in FLOAT_KERNELS
    }
    if not wrong:
        return
    counts = {dtype: n for dtype, n in attested.dtypes.items() if dtype in wrong.values()}
    names = ", ".join(list(wrong)[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    raise CheckFailedError(
        f"{source}: {sidecar.precision} was requested, but of {attested.convolutions} convolutions "
        + ", ".join(
            f"{count} are in no kernel of a known type"
            if dtype == layers.UNKNOWN
            else f"{count} run in {dtype}"
            for dtype, count in counts.items()
        )
        + f" ({names})",
        fix="create the ONNX file again with: rtresnet quantize",
    )


def make_log(trt: Any) -> Any:
    """Create an ILogger that stores errors, warnings and the layer dump."""
    error, warning = trt.ILogger.ERROR.value, trt.ILogger.WARNING.value

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.activations: list[int] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            level = severity.value  # INT8 builds log 8,000 lines, and comparing enums is slow
            if level <= error:
                self.errors.append(message.strip())
            elif level == warning:
                self.warnings.append(message.strip())
            elif message.startswith("Layers:\n"):
                self.layers = message
            elif memory := ACTIVATIONS.match(message):
                self.activations.append(int(memory[1]))

        def reason(self) -> str:
            return " | ".join(dict.fromkeys(self.errors)) or "the builder gave no reason"

    return Log()


def run_builder(
    trt: Any, builder: Any, network: Any, config: Any, progress: Callable[[str], None]
) -> Any:
    """Run the builder in a separate thread, without the GIL, so that Ctrl-C is noticed.

    TensorRT can be cancelled only between two of its steps, the longest of which takes seconds.

    Returns:
        The serialized engine; None if the builder failed.

    Raises:
        KeyboardInterrupt: Ctrl-C, once the builder has stopped.
    """
    monitor = make_monitor(trt, progress)
    config.progress_monitor = monitor
    result: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    # Thread.join is not used: before Python 3.13, an interrupted join marks the thread as ended.
    done = threading.Event()
    thread = threading.Thread(target=work, name="build")
    thread.start()
    while not done.is_set():
        try:
            done.wait()
        except KeyboardInterrupt:
            if not monitor.cancelled:
                progress("cancelling: waiting for the builder's current step")
            monitor.cancelled = True
    thread.join()
    config.progress_monitor = None  # the builder's objects must not outlive it
    if monitor.cancelled:
        raise KeyboardInterrupt
    if failure:
        raise failure[0]
    return result[0]


def make_monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    """Create an IProgressMonitor that reports the innermost phase, and can cancel the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self.phases: list[str] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.append(phase_name)
            self._report()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.phases:
                self.phases.remove(phase_name)
            self._report()

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not self.cancelled

        def _report(self) -> None:
            if self.phases and not self.cancelled:
                progress(self.phases[-1].lower())

    return Monitor()


def _creation_flags(trt: Any) -> int:
    """Return flags that make TensorRT 10 strongly typed, as TensorRT 11 and TensorRT-RTX are."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
    return 1 << int(strongly_typed) if strongly_typed is not None else 0


def _unknown_net(trt: Any, network: Any, source: Path) -> Sidecar:
    """Describe an ONNX file that has neither a sidecar nor a description: its shapes."""
    images, logits = network.get_input(0), network.get_output(0)
    shape, out = tuple(images.shape), tuple(logits.shape)
    square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] > 0
    floats = images.dtype == logits.dtype == trt.float32
    if not square or not floats or len(out) != 2 or out[1] < 1:
        raise ArtifactError(
            f"{source}: {images.dtype.name} {list(shape)} to {logits.dtype.name} {list(out)}; "
            "expected a net from float32 [N, 3, S, S] to float32 [N, classes]"
        )
    digest = atomic_io.sha256(source)
    return Sidecar(
        kind="onnx",
        file=source.name,
        sha256=digest,
        model=Model(
            architecture="unknown",
            classes=tuple(str(index) for index in range(out[1])),
            shortcut="unknown",
            stride_in="unknown",
        ),
        input=Preprocess.for_size(shape[2]),
        weights=Weights(origin="file", sha256=digest, source=str(source)),
        precision="unknown",
        assumed=("model", "input"),
    )
