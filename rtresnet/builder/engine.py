"""Parse, build, attest, publish: a typed ONNX file to a plan.

TensorRT reports most failures in its log and returns False or None; the log is kept, and what it
said ends up in the exception, with the ONNX node and the block it speaks of. `rtresnet build`
reaches this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rtresnet.builder import (
    header,
    inspector,
    layers,
    manifest,
    monitor,
    nodes,
    preflight,
    targets,
    verify_precision,
)
from rtresnet.builder.layers import Layer, Layers
from rtresnet.builder.nodes import ADD, CONVOLUTION, Node
from rtresnet.builder.profiles import fitting
from rtresnet.core import artifacts, atomic_io, hardware, serialization, trt_loading
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Attestation, Link, Model, Plan, Profile, Sidecar, Weights

EXPECTED = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")  # one a profile


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
    """Compiles an ONNX file into a plan with a sidecar and a file of its layers.

    Args:
        source: FP32, FP16 or Q/DQ INT8 ONNX file.
        out: Where the plan goes.
        profiles: By default 1:8:32, or the batch of a file that takes one only.
        target: Compute capabilities; empty for the builder's default.
        builder: See `targets.builder`.
        tf32: Whether FP32 convolutions and matrix products may run as TF32, which rounds inputs to
            a mantissa of 10 bits, on GPUs from sm_80 on.
        timing_cache: For `tensorrt` only: measured kernels are read from and kept in this file.
        progress: Called with the name of each phase.
        described: What the file says of itself, for one without a sidecar.

    Returns:
        The plan's sidecar, with what the layer dump attests.

    Raises:
        ArtifactError: The file does not parse, or does not build; every complaint is in the
            message.
        InputError: A target, a profile or an option that the builder does not take.
        UnavailableError: The builder is not installed or does not start here.
        CheckFailedError: A convolution does not take the precision the file promises. Nothing is
            written then.
        KeyboardInterrupt: Ctrl-C; nothing is written then.
    """
    try:
        return _build(
            Path(source), Path(out), tuple(profiles), target, builder, tf32, timing_cache, progress,
            described,
        )  # fmt: skip
    except BaseException as error:
        # TensorRT-RTX 1.7 locks up when a builder is destroyed while another is being made. One
        # that a traceback keeps is destroyed when Python happens to collect it: let go of it now.
        traceback.clear_frames(error.__traceback__)
        raise


def check(
    source: str | os.PathLike[str], *, target: Sequence[str] = (), builder: str = "auto"
) -> None:
    """Refuses a file that cannot be built for these targets, without building it.

    Raises:
        ArtifactError: As `build`.
        UnavailableError: As `build`.
        InputError: As `build`.
    """
    trt = targets.builder(builder)
    log = _log(trt)
    try:
        maker = trt_loading.create(trt, "Builder", log, log.complaints)
        network = maker.create_network(_creation_flags(trt))
        preflight.parse(trt, maker, network, log, Path(source))
        preflight.require_fixed_size(
            Path(source), network, _stated_size(artifacts.read_sidecar(source))
        )
        preflight.check_targets(Path(source), target, nodes.read(trt, network))
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # as in build
        raise


def _build(
    source: Path,
    out: Path,
    chosen: tuple[Profile, ...],
    target: Sequence[str],
    builder: str,
    tf32: bool,
    timing_cache: str | os.PathLike[str] | None,
    progress: Callable[[str], None],
    described: Sidecar | None,
) -> Sidecar:
    artifacts.require_name(out, "plan")
    trt = targets.builder(builder)
    if timing_cache is not None and hasattr(trt, "ComputeCapability"):
        raise InputError(
            "--timing-cache: TensorRT-RTX measures no kernels while it builds, there is nothing "
            "to keep",
            fix="leave it out, or use --builder tensorrt",
        )
    log = _log(trt)
    maker = trt_loading.create(trt, "Builder", log, log.complaints)
    network = maker.create_network(_creation_flags(trt))
    progress("parse")
    with ThreadPoolExecutor(1) as pool:  # hashing takes about as long as parsing
        verified = pool.submit(artifacts.verify, source)
        try:
            preflight.parse(trt, maker, network, log, source)
        finally:
            known = (
                verified.result() or described
            )  # what is wrong with the file comes before what follows of it
    preflight.require_fixed_size(source, network, _stated_size(known))
    parent = known or _stranger(trt, network, source)
    batch = int(network.get_input(0).shape[0])
    profiles = fitting(source, chosen, batch if batch > 0 else None)
    graph = nodes.read(trt, network)
    preflight.check_targets(source, target, graph)
    network.name = manifest.write(parent, profiles)
    config = maker.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    require_user_allocation(trt, config)
    if not tf32:  # on by default in both builders
        config.clear_flag(trt.BuilderFlag.TF32)
    targets.apply(trt, config, target)
    _add_profiles(maker, config, network.get_input(0), profiles, log)
    progress("build")
    started = time.perf_counter()
    with _timing_cache(config, timing_cache):
        serialized = monitor.run(trt, maker, network, config, progress)
    seconds = time.perf_counter() - started
    if serialized is None:
        said = log.complaints()
        raise ArtifactError(
            f"{source}: the build failed{preflight.locate_node(said, graph)}: {said}"
        )
    plan = Plan(
        builder=trt.__name__,
        version=trt.__version__,
        targets=_own_target(trt),
        profiles=profiles,
        seconds=round(seconds, 3),
        tf32=tf32,
    )
    progress("attest")
    engine_layers = _layers(trt, log, serialized, len(profiles), graph)
    return _publish(
        memoryview(serialized), out, source, parent, plan, graph, engine_layers, log.activations
    )


def _layers(
    trt: Any, log: Any, serialized: Any, profiles: int, graph: Mapping[str, Node]
) -> tuple[Layer, ...]:
    """The engine's fused layers: TensorRT-RTX logged them, TensorRT's inspector describes them."""
    if hasattr(trt, "ComputeCapability"):
        return layers.read_dump(log.layers, graph)
    texts = inspector.inspect_engine(trt, log, log.complaints, serialized, profiles)
    return inspector.read_inspector(texts, graph)


def require_user_allocation(trt: Any, config: Any) -> None:
    """Builds an engine that allocates nothing while it runs, which CUDA graphs depend on.

    TensorRT-RTX has the flag; `tensorrt` plans can be captured without it.
    """
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:
        config.set_flag(flag)


def _own_target(trt: Any) -> tuple[str, ...]:
    """The only GPU that `tensorrt` builds for; empty for TensorRT-RTX, which needs none."""
    rtx = hasattr(trt, "ComputeCapability")
    return () if rtx else tuple(gpu.target for gpu in hardware.gpus()[:1])


def _stated_size(sidecar: Sidecar | None) -> int | None:
    return sidecar.input.size if sidecar is not None and sidecar.input_known else None


def _add_profiles(
    maker: Any, config: Any, tensor: Any, profiles: tuple[Profile, ...], log: Any
) -> None:
    for profile in profiles:
        entry = maker.create_optimization_profile()
        shapes = [(n, *tuple(tensor.shape)[1:]) for n in (profile.min, profile.opt, profile.max)]
        entry.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(entry) < 0:
            raise InputError(f"the builder refuses the profile {profile}: {log.complaints()}")


@contextlib.contextmanager
def _timing_cache(config: Any, path: str | os.PathLike[str] | None) -> Iterator[None]:
    """What `tensorrt` measured, from an earlier build to this one and on to the next."""
    if path is None:
        yield
        return
    path = Path(path)
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ArtifactError(
            f"{path}: not a timing cache of this GPU and this version of TensorRT",
            fix="remove it, and the build makes it again",
        )
    yield
    kept = memoryview(config.get_timing_cache().serialize())
    with atomic_io.atomic_path(path) as temporary:
        temporary.write_bytes(kept)


def _kept(dump: Sequence[Layer], graph: Mapping[str, Node], plan: Plan) -> str | None:
    """The text of the layer file; None where the builder wrote no dump."""
    if not dump:
        return None
    named = {word: tuple(n.name for n in graph.values() if n.operation == word)
             for word in (CONVOLUTION, ADD)}  # fmt: skip
    return serialization.to_json(
        Layers(
            batches=tuple(profile.opt for profile in plan.profiles),
            activations=plan.attested.activations or () if plan.attested else (),
            convolutions=named[CONVOLUTION],
            adds=named[ADD],
            layers=tuple(dump),
        )
    )


def _publish(
    data: memoryview,
    out: Path,
    source: Path,
    parent: Sidecar,
    plan: Plan,
    graph: Mapping[str, Node],
    dump: tuple[Layer, ...],
    activations: Sequence[int],
) -> Sidecar:
    """Attests the engine, holds it to what was asked for, and writes its three files."""
    place = layers.path_for(out)
    with contextlib.ExitStack() as stack:

        def describe() -> Sidecar:
            attested = verify_precision.verify_precision(dump, graph, activations)
            if attested is not None:
                _hold(source, parent, attested, verify_precision.kernel_types(dump, graph))
            # What TensorRT-RTX builds for without --target is in the plan's header only.
            head = header.parse(bytes(data[: header.SIZE]))
            found = dataclasses.replace(
                plan, attested=attested, targets=head.targets if head else plan.targets
            )
            kept = _kept(dump, graph, found)
            if kept is not None:
                # Put in place last: until then the sidecar's hash is not that of the old file.
                temporary = stack.enter_context(atomic_io.atomic_path(place, durable=False))
                temporary.write_text(kept, encoding="utf-8")
                link = Link(file=place.name, sha256=atomic_io.sha256(temporary))
                found = dataclasses.replace(found, layers=link)
            return dataclasses.replace(
                parent,
                kind="plan",
                parent=artifacts.link_to(source, out, parent.sha256),
                plan=found,
                measured={},
                made_by={},
            )

        sidecar = artifacts.publish_bytes(out, data, describe)
    if sidecar.plan is not None and sidecar.plan.layers is None:
        place.unlink(missing_ok=True)
    return sidecar


def _hold(source: Path, parent: Sidecar, attested: Attestation, types: Mapping[str, str]) -> None:
    """The gate: every convolution takes what the file's name promises, but for those left out.

    One whose type is not known counts as wrong. Where none is known, the record is of a form that
    cannot be read, which says nothing of the engine: the plan is written, and not attested.
    """
    wanted = EXPECTED.get(parent.precision)
    if wanted is None or set(types.values()) <= {layers.UNKNOWN}:
        return
    wrong = {name: t for name, t in types.items() if t != wanted}
    if len(wrong) <= (len(parent.calibration.kept) if parent.calibration else 0):
        return
    counts = {t: n for t, n in attested.dtypes.items() if t in wrong.values()}
    named = ", ".join(list(wrong)[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    raise CheckFailedError(
        f"{source}: {parent.precision} was asked for, and of {attested.convolutions} convolutions "
        + ", ".join(
            f"{count} are in no kernel whose type is known"
            if dtype == layers.UNKNOWN
            else f"{count} take {dtype}"
            for dtype, count in counts.items()
        )
        + f" ({named})",
        fix="make the ONNX file again with: rtresnet quantize",
    )


def _log(trt: Any) -> Any:
    error, warning = trt.ILogger.ERROR.value, trt.ILogger.WARNING.value

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings, and the layer dump that goes by at VERBOSE."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.activations: list[int] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            level = severity.value  # an INT8 net's build says 8,000 lines, and enums compare slowly
            if level <= error:
                self.errors.append(message.strip())
            elif level == warning:
                self.warnings.append(message.strip())
            elif message.startswith("Layers:\n"):
                self.layers = message
            elif memory := ACTIVATIONS.match(message):
                self.activations.append(int(memory[1]))

        def complaints(self) -> str:
            return " | ".join(dict.fromkeys(self.errors)) or "the builder gave no reason"

    return Log()


def _creation_flags(trt: Any) -> int:
    """TensorRT 10 must be told what 11 and RTX always do: types come from the file alone."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
    return 1 << int(strongly_typed) if strongly_typed is not None else 0


def _stranger(trt: Any, network: Any, source: Path) -> Sidecar:
    """What can be said of an ONNX file that came without a sidecar: its shapes."""
    images, logits = network.get_input(0), network.get_output(0)
    shape, out = tuple(images.shape), tuple(logits.shape)
    square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] > 0
    floats = images.dtype == logits.dtype == trt.float32
    if not square or not floats or len(out) != 2 or out[1] < 1:
        raise ArtifactError(
            f"{source}: {images.dtype.name} {list(shape)} to {logits.dtype.name} {list(out)}: not "
            "a net from float32 [N, 3, S, S] to float32 [N, classes]"
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
