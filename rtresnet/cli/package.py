"""`rtresnet package`: an artifact as a server's model repository takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from rtresnet.core.sidecar import Profile, Sidecar
    from rtresnet.serving.triton import Tensor

LARGEST = 32  # of an ONNX file, which has no profile to say


@click.command("package", short_help="Lay a plan or ONNX file out for Triton.")
@click.argument("path", metavar="PLAN|ONNX", type=click.Path(path_type=Path))
@click.option(
    "--triton", "root", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="The model repository; made where there is none.",
)  # fmt: skip
@click.option("--name", help="Of the model [the file's].")
@click.option("--version", type=click.IntRange(min=1), help="[the next one]")
@click.option(
    "--max-batch", type=click.IntRange(min=1),
    help=f"Largest batch to form [the plan's largest; {LARGEST} of an ONNX file].",
)  # fmt: skip
@click.option(
    "--max-delay-us", type=click.IntRange(min=0), default=500, show_default=True,
    help="Microseconds a request waits for others to share its batch.",
)  # fmt: skip
@click.option(
    "--instances", type=click.IntRange(min=1), default=1, show_default=True,
    help="Copies on each device.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True,
    help="Of an ONNX file; auto: a GPU where the server has one.",
)  # fmt: skip
@common.json_option
def command(json_file: str | None, **options: Any) -> None:
    """Write config.pbtxt, labels and the file with its sidecar as a version of a Triton model.

    A plan must come from `tensorrt`, of the version in the server's container: Triton's backend
    does not read TensorRT-RTX's. Needs no GPU and no Triton.
    """
    result = run(**options)
    for line in result["notes"]:
        common.note(f"note: {line}")
    common.out_console().print(
        f"{result['folder']}: {result['backend']}, batches to {result['max_batch']}, "
        f"{result['bytes'] / 1e6:.1f} MB\nnext: tritonserver --model-repository {result['root']}",
        soft_wrap=True,
        markup=False,
    )
    common.write_json(json_file, "package", result)


def run(
    path: Path,
    root: Path,
    *,
    name: str | None = None,
    version: int | None = None,
    max_batch: int | None = None,
    max_delay_us: int = 500,
    instances: int = 1,
    device: str = "auto",
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    from rtresnet.core import artifacts, atomic_io
    from rtresnet.serving import triton

    kind = artifacts.kind_of(atomic_io.require_file(path, fix="make one with: rtresnet export"))
    if kind not in triton.BACKENDS:
        raise InputError(f"{path}: Triton takes plans and ONNX files", fix="rtresnet export")
    sidecar = artifacts.verify(path)
    profiles: tuple[Profile, ...] = ()
    graph = path
    if kind == "plan":
        profiles, graph = _plan(path, sidecar, device)
    inputs, outputs = _tensors(graph)
    largest = max((profile.max for profile in profiles), default=LARGEST)
    if profiles and max_batch is not None and max_batch > largest:
        raise InputError(
            f"--max-batch {max_batch}: the plan takes {largest} at most",
            fix=f"rtresnet build {graph} --batch 1:{max(1, max_batch // 2)}:{max_batch}",
        )
    precision = sidecar.precision if sidecar else "unknown"
    model = triton.Model(
        name=name or path.stem,
        kind=kind,
        precision=precision,
        inputs=inputs,
        outputs=outputs,
        labels=sidecar.model.classes if sidecar else (),
        profiles=profiles,
        max_batch=max_batch or largest,
        max_delay_us=max_delay_us,
        instances=instances,
        device=device,
        parameters=_record(path, sidecar),
    )
    folder = triton.write(root, model, path, sidecar, version)
    return {
        "artifact": str(path),
        "root": str(root),
        "folder": str(folder),
        "name": model.name,
        "version": int(folder.name),
        "backend": triton.BACKENDS[kind],
        "max_batch": model.max_batch,
        "bytes": path.stat().st_size,
        "notes": _notes(model.kind, precision, sidecar, device),
    }


def _plan(path: Path, sidecar: Sidecar | None, device: str) -> tuple[tuple[Profile, ...], Path]:
    """A plan's profiles, and the ONNX file that tells what its tensors are called.

    Raises:
        ArtifactError: Triton would not load it, or it is not known what it is.
    """
    from rtresnet.builder import header
    from rtresnet.core import artifacts, atomic_io

    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    plan = sidecar.plan if sidecar else None
    if (plan and plan.builder == "tensorrt_rtx") or header.read(path) is not None:
        raise ArtifactError(
            f"{path}: built by TensorRT-RTX, and Triton's backend loads plans of TensorRT only",
            fix=f"package {parent or 'its ONNX file'}, or build with --builder tensorrt on a "
            "machine with the server's GPU and its container's TensorRT",
        )
    if sidecar is None or plan is None:
        raise ArtifactError(
            f"{path}: no sidecar, so its batches and the TensorRT it needs are unknown",
            fix="copy the sidecar along, or build it anew with rtresnet build",
        )
    if device == "cpu":
        raise InputError(f"{path}: a plan runs on a GPU only", fix=f"package {parent} for a CPU")
    if parent is None or sidecar.parent is None or not parent.exists():
        raise InputError(
            f"{path}: its tensors' names stand in {parent or 'its ONNX file'}, which is not here",
            fix="bring the ONNX file along",
        )
    if atomic_io.sha256(parent) != sidecar.parent.sha256:
        raise ArtifactError(
            f"{parent}: no longer the file {path} was built from", fix=f"rtresnet build {parent}"
        )
    return plan.profiles, parent


def _tensors(path: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of an ONNX file, without the batch.

    Raises:
        ArtifactError: Not an ONNX file.
        InputError: Its batch is fixed, or its weights are elsewhere.
    """
    from rtresnet.core import hardware
    from rtresnet.core.errors import missing_package

    if not hardware.installed("onnx"):
        raise missing_package("onnx", "reading an ONNX file")
    import onnx

    from rtresnet.serving.triton import Tensor

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own, of no common base
        raise ArtifactError(f"{path}: not an ONNX file, or truncated") from error
    weights = {tensor.name for tensor in graph.initializer}
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer):
        raise InputError(
            f"{path}: its weights lie in a file beside it, and Triton would be given half a net",
            fix="make one of both: onnx.save(onnx.load(FILE), WHOLE)",
        )

    def read(values: Any) -> tuple[Tensor, ...]:
        found = []
        for value in values:
            if value.name in weights:
                continue
            kind = value.type.tensor_type
            dims = [dim.dim_value or -1 for dim in kind.shape.dim]
            if not dims or dims[0] != -1:
                raise InputError(
                    f"{path}: {value.name} has a fixed batch ({dims[0] if dims else 'none'}), and "
                    "there is nothing for Triton to batch",
                    fix="export it with a batch left open, as rtresnet export does",
                )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            found.append(Tensor(name=value.name, dtype=dtype, dims=tuple(dims[1:])))
        return tuple(found)

    inputs, outputs = read(graph.input), read(graph.output)
    if not inputs or not outputs:
        raise ArtifactError(f"{path}: not an ONNX file, or truncated (it holds no graph)")
    return inputs, outputs


def _record(path: Path, sidecar: Sidecar | None) -> dict[str, str]:
    """What a person at the server wants to know of the model, without the sidecar at hand."""
    from rtresnet.core import atomic_io

    if sidecar is None:
        return {"sha256": atomic_io.sha256(path)}
    ours = sidecar.input
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
        record["input"] = (
            f"{ours.layout}, {ours.size} px of {ours.resize}, mean {ours.mean}, std {ours.std}"
        )
    if sidecar.assumed:
        record["assumed"] = "; ".join(sidecar.assumed)
    if sidecar.plan is not None:
        record["tensorrt"] = sidecar.plan.version
        record["targets"] = ", ".join(sidecar.plan.targets)
    return record


def _notes(kind: str, precision: str, sidecar: Sidecar | None, device: str) -> list[str]:
    if kind == "plan":
        assert sidecar is not None and sidecar.plan is not None
        targets = f" and a GPU of {', '.join(sidecar.plan.targets)}" if sidecar.plan.targets else ""
        return [f"the container needs TensorRT {sidecar.plan.version}{targets}, or it refuses it"]
    if precision == "int8" and device == "cpu":
        return ["on a CPU Triton's ONNX Runtime runs an INT8 file slower than the FP32 file"]
    if precision == "int8":
        return ["on a GPU ONNX Runtime builds a TensorRT engine of it whenever it is loaded"]
    return []
