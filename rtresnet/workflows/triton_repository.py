"""Write a plan or an ONNX file as a model of a Triton Inference Server's repository.

    DIR/NAME/config.pbtxt, labels.txt, 1/model.plan (or model.onnx), 1/model.plan.json

Writes the protobuf text itself, so that neither Triton nor protobuf is needed; the tests parse it
with Triton's own schema. Reads no plan and no ONNX file: the caller passes their tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Profile, Sidecar

TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
BACKENDS = {"plan": "tensorrt", "onnx": "onnxruntime"}
KINDS = {"auto": "KIND_AUTO", "cuda": "KIND_GPU", "cpu": "KIND_CPU"}
LABELS = "labels.txt"


def require_model_name(name: str) -> None:
    """Raise InputError if a model cannot have this name, which is a folder and part of URLs."""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise InputError(f"--name {name}: letters, digits, underscores, dots and dashes only")


@dataclass(frozen=True, kw_only=True)
class TritonTensor:
    """An input or output.

    Attributes:
        dtype: NumPy's name of the data type.
        dims: The shape, without the batch if Triton forms batches; -1 for open dimensions.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of a model.

    Attributes:
        kind: "plan" or "onnx".
        precision: From the sidecar; "int8" makes an ONNX file run in TensorRT on a GPU.
        inputs, outputs: In the file's order.
        labels: Class names; empty if unknown.
        labelled_outputs: Whether an output of as many values as there are labels has a score for
            each of them. False for a detector, whose scores are those of its boxes.
        profiles: Optimization profiles of a plan, in its order.
        max_batch: Largest batch that Triton may form; 0 if it cannot form any, because the tensors'
            first dimension is not an open batch.
        max_delay_us: Microseconds that a request may wait for others.
        instances: Copies on each device.
        device: "cuda", "cpu", or "auto": a GPU if the server has one.
        parameters: Further text for the record.
    """

    name: str
    kind: str
    precision: str
    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]
    labels: tuple[str, ...] = ()
    labelled_outputs: bool = True
    profiles: tuple[Profile, ...] = ()
    max_batch: int
    max_delay_us: int
    instances: int
    device: str
    parameters: dict[str, str]

    def __post_init__(self) -> None:
        require_model_name(self.name)
        for tensor in (*self.inputs, *self.outputs):
            if tensor.dtype not in TYPES:
                raise InputError(f"{tensor.name} is {tensor.dtype}, for which Triton has no type")
        for batch in range(1, self.max_batch + 1 if self.profiles else 1):
            if not any(profile.min <= batch <= profile.max for profile in self.profiles):
                raise InputError(
                    f"no profile of {', '.join(map(str, self.profiles))} includes a batch of "
                    f"{batch}, but Triton forms every batch size up to the largest, without "
                    "padding",
                    fix=f"build the plan with --batch 1:8:{self.max_batch}, or lower --max-batch",
                )


def config(model: ModelConfig) -> str:
    """Return the text of config.pbtxt."""
    lines = _interface(model)
    lines += [f"max_batch_size: {model.max_batch}"]
    if model.max_batch:
        # Triton recommends preferred sizes only for TensorRT plans with a profile for each.
        best = sorted({profile.opt for profile in model.profiles if profile.opt <= model.max_batch})
        lines += ["dynamic_batching {"]
        lines += [f"  preferred_batch_size: {_list(best)}"] if best else []
        lines += [f"  max_queue_delay_microseconds: {model.max_delay_us}", "}"]
    lines += ["instance_group {", f"  count: {model.instances}", f"  kind: {_kind(model)}"]
    if len(model.profiles) > 1:  # by default Triton uses the first one only
        lines += [f"  profile: {_text(index)}" for index in range(len(model.profiles))]
    lines += ["}", "version_policy { latest { num_versions: 1 } }"]
    if model.kind == "onnx" and model.precision == "int8" and model.device != "cpu":
        lines += _in_tensorrt(model)
    for key, value in model.parameters.items():
        text = f"value {{ string_value: {_text(value)} }}"
        lines += [f"parameters {{ key: {_text(key)} {text} }}"]
    return "\n".join(lines) + "\n"


def write(
    root: str | os.PathLike[str],
    model: ModelConfig,
    source: str | os.PathLike[str],
    sidecar: Sidecar | None,
    version: int | None = None,
) -> Path:
    """Add a version of a model to a repository atomically.

    Args:
        root: The repository's folder.
        model: What to configure.
        source: The plan or ONNX file, which is copied.
        sidecar: Its sidecar, which is copied with an adjusted path of the parent.
        version: Number of the version; the next one by default.

    Returns:
        The version's folder.

    Raises:
        InputError: The version, a later one or the same file exists, or earlier versions have other
            inputs, outputs or classes, so that their clients would break.
    """
    home, source = Path(root) / model.name, Path(source)
    existing = versions(home)
    digest = atomic_io.sha256(source)
    for number in existing:
        earlier = home / str(number) / f"model{source.suffix.lower()}"
        if earlier.is_file() and atomic_io.sha256(earlier) == digest:
            raise InputError(f"{earlier}: is already the same file; nothing was written")
    number = version or max(existing, default=0) + 1
    if number in existing:
        raise InputError(
            f"{home / str(number)}: exists already, with another file",
            fix=f"leave out --version for {max(existing) + 1}, or remove the folder",
        )
    if existing and number < max(existing):
        raise InputError(
            f"--version {number}: {home} has version {max(existing)}, and Triton serves the latest",
            fix=f"leave out --version for {max(existing) + 1}",
        )
    labels = "".join(f"{' '.join(label.split())}\n" for label in model.labels)
    atomic_io.make_folder(root)
    if not home.exists():
        with atomic_io.new_folder(home) as temporary:
            _texts(temporary, model, labels)
            _version(temporary / str(number), home / str(number), source, sidecar)
        return home / str(number)
    _require_same_interface(home, model, labels)
    # Triton ignores folders whose names are no numbers. The configuration is written first: if the
    # process is killed between the two, the same command can be run again.
    with atomic_io.new_folder(home / str(number)) as temporary:
        _version(temporary, home / str(number), source, sidecar)
        _texts(home, model, labels)
    return home / str(number)


def versions(home: str | os.PathLike[str]) -> list[int]:
    """Return the versions that Triton would see in a model's folder, ascending."""
    home = Path(home)
    names = [entry.name for entry in home.iterdir() if entry.is_dir()] if home.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9]\d*", name, re.ASCII))


def _interface(model: ModelConfig) -> list[str]:
    """Return names, types and shapes, equal for every version because clients rely on them."""
    lines = [f"name: {_text(model.name)}", f"backend: {_text(BACKENDS[model.kind])}"]
    for tensor in model.inputs:
        lines += ["input {", *_tensor(tensor)]
        if len(tensor.dims) == 3:
            planes = tensor.dims[0] == 3
            lines += [f"  format: {'FORMAT_NCHW' if planes else 'FORMAT_NHWC'}"]
        lines += ["}"]
    for tensor in model.outputs:
        lines += ["output {", *_tensor(tensor)]
        # Labels go by position, so they apply to one score for each class, not to the top K.
        per_class = bool(model.labels) and tensor.dims[-1:] == (len(model.labels),)
        if model.labelled_outputs and per_class and tensor.dims[:-1] in ((), (1,)):
            lines += [f"  label_filename: {_text(LABELS)}"]
        lines += ["}"]
    return lines


def _tensor(tensor: TritonTensor) -> list[str]:
    return [
        f"  name: {_text(tensor.name)}",
        f"  data_type: {TYPES[tensor.dtype]}",
        f"  dims: {_list(tensor.dims)}",
    ]


def _in_tensorrt(model: ModelConfig) -> list[str]:
    """Make ONNX Runtime use TensorRT: its CUDA provider would compute a Q/DQ file in float.

    The engine is built when the model is loaded, and only once if all shapes are stated.
    """
    options = {"precision_mode": "INT8"}
    if model.max_batch and all(side > 0 for tensor in model.inputs for side in tensor.dims):
        batches = (("min", 1), ("opt", min(8, model.max_batch)), ("max", model.max_batch))
        for name, batch in batches:
            options[f"trt_profile_{name}_shapes"] = ",".join(
                f"{tensor.name}:{'x'.join(map(str, (batch, *tensor.dims)))}"
                for tensor in model.inputs
            )
    lines = ["optimization { execution_accelerators { gpu_execution_accelerator {"]
    lines += ['  name: "tensorrt"']
    for key, value in options.items():
        lines += [f"  parameters {{ key: {_text(key)} value: {_text(value)} }}"]
    return [*lines, "} } }"]


def _kind(model: ModelConfig) -> str:
    return "KIND_GPU" if model.kind == "plan" else KINDS[model.device]


def _text(value: object) -> str:
    """Return a quoted string of protobuf's text format."""
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda c: f"\\{ord(c[0]):03o}", escaped) + '"'


def _list(values: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"


def _require_same_interface(home: Path, model: ModelConfig, labels: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        text = (home / "config.pbtxt").read_text(encoding="utf-8")
        if not text.startswith("\n".join(_interface(model)) + "\n"):
            raise InputError(
                f"{home / 'config.pbtxt'}: has another backend, inputs or outputs, or was not "
                "written by rtresnet",
                fix="choose another --name",
            )
        if (home / LABELS).exists() and (home / LABELS).read_text(encoding="utf-8") != labels:
            raise InputError(f"{home / LABELS}: names other classes", fix="choose another --name")


def _texts(home: Path, model: ModelConfig, labels: str) -> None:
    if labels:
        atomic_io.write_text(home / LABELS, labels)
    atomic_io.write_text(home / "config.pbtxt", config(model))


def _version(folder: Path, final: Path, source: Path, sidecar: Sidecar | None) -> None:
    folder.mkdir(exist_ok=True)
    target = folder / f"model{source.suffix.lower()}"
    if sidecar is None:
        shutil.copyfile(source, target)
        return
    parent = artifacts.parent_path(source, sidecar)
    if parent is not None and sidecar.parent is not None:
        file = os.path.relpath(parent.resolve(), final.resolve())
        sidecar = dataclasses.replace(
            sidecar, parent=dataclasses.replace(sidecar.parent, file=file)
        )
    artifacts.publish(target, lambda path: shutil.copyfile(source, path), sidecar)
