"""Create a version of a model in a Triton model repository from a plan or an ONNX file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import artifacts, atomic_io, plan_info
from rtresnet.core.config import Config, option, parse_wait
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.workflows.triton_repository import LABELS

if TYPE_CHECKING:
    from rtresnet.core.sidecar import Detection, Profile, Sidecar
    from rtresnet.workflows.triton_repository import ModelConfig, TritonTensor

LARGEST = 32  # largest batch of an ONNX file, which has no profile


@dataclass(frozen=True, kw_only=True)
class PackageConfig(Config):
    """The model's configuration in Triton.

    Attributes:
        name: Name of the model; None for the file's.
        version: Number of the version; None for the next one.
        max_batch: Largest batch that Triton forms.
        max_wait_ms: How long a request waits for others to share its batch, in milliseconds.
        instances: Copies of the model on each device.
        device: Device of an ONNX file; "auto" uses a GPU if the server has one.
    """

    name: str | None = option(None, "Name of the model.", default_text="the file's name")
    version: int | None = option(
        None, "Number of the version.", minimum=1, default_text="the next one; 1 for an image"
    )
    max_batch: int | None = option(
        None,
        "Largest batch that the server forms.",
        metavar="N",
        minimum=1,
        default_text=f"the plan's largest; {LARGEST} for an ONNX file",
    )
    max_wait_ms: float = option(
        0.5,
        "Longest time that a request waits for its batch to fill, as in 2ms.",
        names=("--max-wait",),
        metavar="TIME",
        parse=parse_wait,
        minimum=0,
        default_text="0.5ms",
    )
    instances: int = option(1, "Number of model instances on each device.", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        "Device of an ONNX file; auto uses Triton's GPU if it has one, and the CPU in an image.",
    )


@dataclass(frozen=True, kw_only=True)
class PackageResult:
    """A version that was written.

    Attributes:
        artifact: The file it was made from.
        root: The model repository.
        folder: The version's folder.
        name: Name of the model.
        version: Its number.
        backend: Triton's backend.
        max_batch: Largest batch that Triton forms; 0 if the file takes a fixed batch, which is
            then a dimension of the tensors.
        bytes: Size of the file.
        notes: What the server needs.
    """

    artifact: Path
    root: Path
    folder: Path
    name: str
    version: int
    backend: str
    max_batch: int
    bytes: int
    notes: tuple[str, ...]


def package(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    config: PackageConfig | None = None,
) -> PackageResult:
    """Write config.pbtxt, labels, and the file with its sidecar as a version of a model.

    Args:
        path: An ONNX file, or a plan by TensorRT next to the ONNX file it was built from.
        root: The model repository; created if it does not exist.
        config: The model's configuration.

    Returns:
        The folder of the model's new version.

    Raises:
        InputError: A file or an option that Triton cannot serve, or a version that exists.
        ArtifactError: Not a valid ONNX file, or a plan by TensorRT-RTX, which Triton does not load.
        UnavailableError: The package onnx is not installed.
    """
    from rtresnet.workflows import triton_repository as triton

    config, root = config or PackageConfig(), Path(root)
    path = atomic_io.require_file(path, fix="create it with: rtresnet export")
    kind = artifacts.kind_of(path)
    if kind not in triton.BACKENDS:
        raise InputError(f"{path}: Triton runs only plans and ONNX files", fix="rtresnet export")
    sidecar = artifacts.verify(path)
    if kind == "onnx" and sidecar is not None and sidecar.precision == "fp8":
        raise ArtifactError(
            f"{path}: is an FP8 file. Triton's ONNX Runtime computes FP8 wrongly, because its "
            "optimizer removes ReLUs",
            fix="build a plan on the server's GPU with --builder tensorrt, or use package --docker",
        )
    if kind == "onnx" and sidecar is not None and sidecar.precision == "bf16":
        raise ArtifactError(
            f"{path}: BF16, which Triton's ONNX Runtime cannot run (it has no BF16 convolutions)",
            fix="build a plan on the server's GPU with --builder tensorrt, or package FP16",
        )
    profiles: tuple[Profile, ...] = ()
    graph = path
    if kind == "plan":
        profiles, graph = _check_plan(path, sidecar, config.device)
    inputs, outputs, fixed = _tensors(graph)
    precision = sidecar.precision if sidecar else "unknown"
    model = triton.ModelConfig(
        name=config.name or path.stem,
        kind=kind,
        precision=precision,
        inputs=inputs,
        outputs=outputs,
        labels=sidecar.model.classes if sidecar else (),
        labelled_outputs=sidecar is None or sidecar.detection is None,
        profiles=() if fixed else profiles,
        max_batch=_max_batch(path, graph, config, profiles, fixed),
        max_delay_us=round(1000 * config.max_wait_ms),
        instances=config.instances,
        device=config.device,
        parameters=_record(path, sidecar),
    )
    folder = triton.write(root, model, path, sidecar, config.version)
    return PackageResult(
        artifact=path,
        root=root,
        folder=folder,
        name=model.name,
        version=int(folder.name),
        backend=triton.BACKENDS[kind],
        max_batch=model.max_batch,
        bytes=path.stat().st_size,
        notes=tuple(_notes(model, sidecar, fixed)),
    )


def _check_plan(
    path: Path, sidecar: Sidecar | None, device: str
) -> tuple[tuple[Profile, ...], Path]:
    """Return a plan's profiles, and the ONNX file that names its tensors.

    Raises:
        ArtifactError: Triton would not load the plan, or its origin is unknown.
    """
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    plan = sidecar.plan if sidecar else None
    if (plan and plan.builder == "tensorrt_rtx") or plan_info.read_header(path) is not None:
        raise ArtifactError(
            f"{path}: was built by TensorRT-RTX, but Triton's backend loads only plans of TensorRT",
            fix=f"package {parent or 'its ONNX file'}, or build with --builder tensorrt on a "
            "machine with the server's GPU and its container's TensorRT",
        )
    if sidecar is None or plan is None:
        raise ArtifactError(
            f"{path}: no sidecar, so its batches and the TensorRT it needs are unknown",
            fix="also copy the sidecar, or build the plan again with rtresnet build",
        )
    if device == "cpu":
        raise InputError(f"{path}: a plan runs on a GPU only", fix=f"package {parent} for a CPU")
    if parent is None or sidecar.parent is None or not parent.exists():
        raise InputError(
            f"{path}: its tensor names are unknown, because {parent or 'its ONNX file'} is missing",
            fix="also copy the ONNX file",
        )
    if atomic_io.sha256(parent) != sidecar.parent.sha256:
        raise ArtifactError(
            f"{parent}: has changed since {path} was built from it", fix=f"rtresnet build {parent}"
        )
    return plan.profiles, parent


def _tensors(path: Path) -> tuple[tuple[TritonTensor, ...], tuple[TritonTensor, ...], bool]:
    """Read inputs and outputs of an ONNX file, and whether its batch is fixed.

    Triton batches requests along a first dimension that is dynamic in all tensors and omitted from
    their shapes. Where it is fixed, Triton cannot batch (max_batch_size 0), and shapes are whole.

    Raises:
        ArtifactError: Not a valid ONNX file.
        InputError: Its weights are in another file.
    """
    from rtresnet.workflows.triton_repository import TritonTensor

    graph = require_single_file(path).graph
    import onnx

    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    shapes: dict[str, list[int]] = {}
    for value in (*inputs, *graph.output):
        shapes[value.name] = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        if not shapes[value.name]:
            raise InputError(
                f"{path}: {value.name} has no dimensions, which Triton does not support",
                fix="export it with a batch dimension, as rtresnet export does",
            )
    fixed = any(shape[0] != -1 for shape in shapes.values())

    def tensors(values: Any) -> tuple[TritonTensor, ...]:
        return tuple(
            TritonTensor(
                name=value.name,
                dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                dims=tuple(shapes[value.name][0 if fixed else 1 :]),
            )
            for value in values
        )

    return tensors(inputs), tensors(graph.output), fixed


def require_single_file(path: Path) -> Any:
    """Return the ModelProto of an ONNX file that contains its weights.

    Raises:
        ArtifactError: Not a valid ONNX file.
        InputError: Its weights are in another file.
        UnavailableError: The package onnx is not installed.
    """
    from rtresnet.onnxlib import io

    io.load(path)
    import onnx

    model = onnx.load(path, load_external_data=False)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise InputError(
            f"{path}: its weights are in another file, which is not part of the package",
            fix="save both as one file: onnx.save(onnx.load(FILE), NEW)",
        )
    return model


def _max_batch(
    path: Path, graph: Path, config: PackageConfig, profiles: tuple[Profile, ...], fixed: bool
) -> int:
    """Return the largest batch that Triton may form; 0 for a file with a fixed batch."""
    if fixed and config.max_batch is not None:
        raise InputError(
            f"{path}: its batch is fixed, so Triton cannot form batches",
            fix="leave --max-batch out, or export it with a dynamic batch: rtresnet export",
        )
    if fixed:
        return 0
    largest = max((profile.max for profile in profiles), default=LARGEST)
    if profiles and config.max_batch is not None and config.max_batch > largest:
        raise InputError(
            f"--max-batch {config.max_batch}: the plan accepts at most {largest}",
            fix=f"rtresnet build {graph} "
            f"--batch 1:{max(1, config.max_batch // 2)}:{config.max_batch}",
        )
    return config.max_batch or largest


def _record(path: Path, sidecar: Sidecar | None) -> dict[str, str]:
    """Return the model's metadata for the server's operator, who does not have the sidecar."""
    if sidecar is None:
        return {"sha256": atomic_io.sha256(path)}
    preprocess = sidecar.input
    record = {
        "sha256": sidecar.sha256,
        "architecture": sidecar.model.architecture,
        "precision": sidecar.precision,
        "weights": sidecar.weights.source or sidecar.weights.origin,
        "made_by": sidecar.made_by.get("command", ""),
    }
    if sidecar.parent is not None:
        record["parent_sha256"] = sidecar.parent.sha256
    if sidecar.input_known:
        size = f"{preprocess.size} px of {preprocess.resize} ({preprocess.interpolation})"
        if sidecar.detection is not None:
            size = _canvas(sidecar.detection, preprocess.interpolation)
            record["extent"] = "height and width of the resized image on the canvas, in pixels"
            record["labels"] = f"lines of {LABELS}, counted from 0; -1 in unused rows"
        record["input"] = (
            f"{preprocess.layout}, {size}, mean {preprocess.mean}, std {preprocess.std}"
        )
    if sidecar.assumed:
        record["assumed"] = "; ".join(sidecar.assumed)
    if sidecar.plan is not None:
        record["tensorrt"] = sidecar.plan.version
        record["targets"] = ", ".join(sidecar.plan.targets)
    return record


def _canvas(detection: Detection, interpolation: str) -> str:
    """Describe how an image is put onto a detector's input."""
    assert detection.canvas is not None
    height, width = detection.canvas
    return (
        f"one image, shorter side {detection.shorter} px, longer side at most {detection.longer} "
        f"px ({interpolation}), in the upper left corner of a canvas of {height} x {width} px "
        "whose remainder is 0"
    )


def _notes(model: ModelConfig, sidecar: Sidecar | None, fixed: bool) -> list[str]:
    notes = []
    if sidecar is not None and sidecar.detection is not None:
        notes.append(
            "a request is one image on its canvas and the extent of the image on it; Triton does "
            "not form batches"
        )
    elif fixed:
        (size, *_) = model.inputs[0].dims
        notes.append(
            f"the file's batch is fixed at {size}: clients send complete batches, and Triton does "
            "not form batches"
        )
    if model.kind == "plan":
        assert sidecar is not None and sidecar.plan is not None
        targets = f" and a GPU of {', '.join(sidecar.plan.targets)}" if sidecar.plan.targets else ""
        notes.append(f"the container needs TensorRT {sidecar.plan.version}{targets}")
    elif model.precision == "int8" and model.device == "cpu":
        notes.append("on a CPU, Triton's ONNX Runtime runs INT8 files slower than FP32 files")
    elif model.precision == "int8":
        notes.append(
            "on a GPU, ONNX Runtime builds a TensorRT engine each time the model is loaded"
        )
    return notes
