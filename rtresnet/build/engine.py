"""Parse, build, attest, publish: a typed ONNX file to a plan.

TensorRT reports most failures in its log and returns False or None; the log is kept, and what it
said ends up in the exception. `rtresnet build` reaches this.
"""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rtresnet import artifacts
from rtresnet.artifacts import Model, Plan, Profile, Sidecar, Weights
from rtresnet.build import attest, header, targets
from rtresnet.errors import ArtifactError, GateMissed, InputError
from rtresnet.preprocess import Preprocess

EXPECTED = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}


def build(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    profiles: Sequence[Profile],
    target: Sequence[str] = (),
    builder: str = "auto",
    progress: Callable[[str], None] = lambda phase: None,
) -> Sidecar:
    """Compiles an ONNX file into a plan with a sidecar.

    Args:
        source: FP32, FP16 or Q/DQ INT8 ONNX file.
        out: Where the plan goes.
        profiles: At least one.
        target: Compute capabilities; empty for the builder's default.
        builder: See `targets.builder`.
        progress: Called with the name of each phase.

    Returns:
        The plan's sidecar, with what the layer dump attests.

    Raises:
        ArtifactError: The file does not parse; every complaint is in the message.
        GateMissed: A convolution does not take the precision the file promises. Nothing is
            written then.
    """
    try:
        return _build(Path(source), out, tuple(profiles), target, builder, progress)
    except BaseException as error:
        # TensorRT-RTX 1.7 locks up when a builder is destroyed while another is being made. One
        # that a traceback keeps is destroyed when Python happens to collect it: let go of it now.
        traceback.clear_frames(error.__traceback__)
        raise


def _build(
    source: Path,
    out: str | os.PathLike[str],
    profiles: tuple[Profile, ...],
    target: Sequence[str],
    builder: str,
    progress: Callable[[str], None],
) -> Sidecar:
    parent = artifacts.verify(source)
    trt = targets.builder(builder)
    log = _log(trt)
    maker = trt.Builder(log)
    network = maker.create_network(_creation_flags(trt))
    progress("parse")
    _parse(trt, network, log, source)
    parent = parent or _stranger(trt, network, source)
    config = maker.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    targets.apply(trt, config, target)
    tensor = network.get_input(0)
    for profile in profiles:
        entry = maker.create_optimization_profile()
        shapes = [(n, *tuple(tensor.shape)[1:]) for n in (profile.min, profile.opt, profile.max)]
        entry.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(entry) < 0:
            raise InputError(f"the builder refuses the profile {profile}: {log.complaints()}")
    progress("build")
    started = time.perf_counter()
    serialized = maker.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if serialized is None:
        raise ArtifactError(f"{source}: the build failed: {log.complaints()}")
    attested = attest.read_dump(log.layers, _convolutions(trt, network))
    _hold(source, parent, attested)
    return _publish(trt, serialized, out, source, parent, profiles, attested, seconds)


def _publish(
    trt: Any,
    serialized: Any,
    out: str | os.PathLike[str],
    source: Path,
    parent: Sidecar,
    profiles: tuple[Profile, ...],
    attested: artifacts.Attestation | None,
    seconds: float,
) -> Sidecar:
    data = memoryview(serialized)
    # The targets of a plan built without --target are known from its header only.
    head = header.parse(bytes(data[: header.SIZE]))
    plan = Plan(
        builder=trt.__name__,
        version=trt.__version__,
        targets=head.targets if head else (),
        profiles=profiles,
        seconds=round(seconds, 3),
        attested=attested,
    )
    sidecar = dataclasses.replace(
        parent,
        kind="plan",
        parent=artifacts.link_to(source, out),
        plan=plan,
        measured={},
        made_by={},
    )
    return artifacts.publish(out, lambda temporary: temporary.write_bytes(data), sidecar)


def _hold(source: Path, parent: Sidecar, attested: artifacts.Attestation | None) -> None:
    """The gate: every convolution takes what the file's name promises, but for those left out."""
    precision = parent.precision
    if attested is None or precision not in EXPECTED:
        return
    wanted = EXPECTED[precision]
    wrong = {t: n for t, n in attested.dtypes.items() if t not in (wanted, attest.UNKNOWN)}
    if sum(wrong.values()) > (len(parent.calibration.kept) if parent.calibration else 0):
        raise GateMissed(
            f"{source}: {precision} was asked for, and of {attested.convolutions} convolutions "
            + ", ".join(f"{count} take {dtype}" for dtype, count in wrong.items()),
            fix="make the ONNX file anew with: rtresnet quantize",
        )


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, and the layer dump that goes by at VERBOSE."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            elif message.startswith("Layers:\n"):
                self.layers = message

        def complaints(self) -> str:
            return " | ".join(dict.fromkeys(self.errors)) or "the builder gave no reason"

    return Log()


def _creation_flags(trt: Any) -> int:
    """TensorRT 10 must be told what 11 and RTX always do: types come from the file alone."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
    return 1 << int(strongly_typed) if strongly_typed is not None else 0


def _parse(trt: Any, network: Any, log: Any, source: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse(source.read_bytes()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        what = "; ".join(map(_complaint, errors)) or log.complaints()
        raise ArtifactError(f"{source}: TensorRT cannot parse it ({what[:500]})")
    if not network.num_inputs or not network.num_outputs:  # of some other files it parses nothing
        raise ArtifactError(f"{source}: not an ONNX file, or a graph without input or output")


def _complaint(error: Any) -> str:
    """Which node, what it is, and what the parser says of it: at times no more than `false`."""
    node = f"{error.node_name() or 'a node'} ({error.node_operator()})"
    where = node if error.node_operator() else "file"
    return f"{where}: {error.code().name} {error.desc()}"


def _convolutions(trt: Any, network: Any) -> list[str]:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [layer.name for layer in layers if layer.type == trt.LayerType.CONVOLUTION]


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
    return Sidecar(
        kind="onnx",
        file=source.name,
        model=Model(
            architecture="unknown",
            classes=tuple(str(index) for index in range(out[1])),
            shortcut="unknown",
            stride_in="unknown",
        ),
        input=Preprocess.for_size(shape[2]),
        weights=Weights(origin="file", sha256=artifacts.sha256(source), source=str(source)),
        precision="unknown",
        assumed=("model", "input"),
    )
