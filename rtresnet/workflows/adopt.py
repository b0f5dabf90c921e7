"""Sidecars of ONNX files that another tool exported.

The file says its shapes and precision (`interface.py`); a person says the preprocessing and
the class names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtresnet.core import atomic_io
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Model, Sidecar, Weights
from rtresnet.onnxlib.interface import Interface


def class_names(path: Path, interface: Interface, names: Sequence[str] | None) -> tuple[str, ...]:
    """Checks class names against a file; without names, returns the classes' numbers.

    Args:
        path: The file, for messages.
        interface: What the file says.
        names: In the order of the outputs; None where nobody stated them.

    Raises:
        InputError: Another number of names than the file has classes, or too few for its top-K.
        ArtifactError: Neither the file nor the names say how many classes there are.
    """
    count = interface.classes
    if names is None:
        if count is None and interface.topk is not None:
            raise InputError(
                f"{path}: gives the {interface.topk} most probable classes and does not say how "
                "many there are",
                fix="name them in the order of their numbers: --classes FILE",
            )
        if count is None:
            raise _open_classes(path)
        return tuple(map(str, range(count)))
    if interface.topk is not None and len(names) < interface.topk:
        raise InputError(
            f"--classes has {len(names)} names, and {path} gives the {interface.topk} most "
            "probable classes"
        )
    if interface.topk is None and count is None:
        raise _open_classes(path)
    if count is not None and len(names) != count:
        raise InputError(
            f"--classes has {len(names)} names, and {path} has {count} classes",
            fix="name every class once, in the order of the outputs",
        )
    return tuple(names)


def describe(
    path: Path,
    *,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    precision: str,
    topk: int | None = None,
    assumed: tuple[str, ...] = (),
) -> Sidecar:
    """Returns the sidecar of an ONNX file of unknown architecture; reads the file for its hash.

    Args:
        path: The file.
        classes: Names or numbers, in the order of the outputs.
        preprocess: As somebody stated it.
        precision: "fp32", "fp16", "int8" or "unknown".
        topk: As in `Sidecar`.
        assumed: As in `Sidecar`.
    """
    digest = atomic_io.sha256(path)
    return Sidecar(
        kind="onnx",
        file=path.name,
        model=Model(
            architecture="unknown", classes=classes, shortcut="unknown", stride_in="unknown"
        ),
        input=preprocess,
        weights=Weights(origin="file", sha256=digest, source=path.as_posix()),
        precision=precision,
        topk=topk,
        assumed=assumed,
        sha256=digest,
    )


def _open_classes(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path}: its output has no fixed number of classes",
        fix="export it with logits [N, classes]",
    )
