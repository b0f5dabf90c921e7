"""Write the sidecar of an ONNX file that another tool exported.

The file has its shapes and precision (`onnxlib/interface.py`); the user states the preprocessing
and the class names.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import artifacts, atomic_io, locks, reporter
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.labels import wrong_number
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.sidecar import Model, Sidecar, Weights
from rtresnet.onnxlib.interface import Interface
from rtresnet.workflows.input_spec import InputConfig


@dataclass(frozen=True, kw_only=True)
class AdoptResult:
    """A sidecar that was written.

    Attributes:
        file: The sidecar's path.
        named: Whether class names were stated.
        interface: Interface of the ONNX file.
    """

    file: Path
    named: bool
    interface: Interface
    sidecar: Sidecar


def adopt(
    path: str | os.PathLike[str],
    stated: InputConfig | None = None,
    *,
    resize: int | None = None,
    classes: Sequence[str] | None = None,
    force: bool = False,
    reporter: Reporter = reporter.DEFAULT,
) -> AdoptResult:
    """State preprocessing and class names of an ONNX file once, for all later steps.

    Args:
        path: The ONNX file.
        stated: Size if the file leaves it open; mean and std, or a preset.
        resize: Shorter side before the centre crop, in pixels; 256/224 of the size by default.
        classes: Class names in the order of the outputs; numbers by default.
        force: Whether a sidecar that exists is replaced.
        reporter: Receives notes.

    Returns:
        The ONNX file and the sidecar that was written.

    Raises:
        InputError: A sidecar exists, the preprocessing is not stated, or does not fit the file.
        ArtifactError: The file is not an image classifier that the other steps can run.
        LockedError: Another process writes the file.
    """
    from rtresnet.onnxlib import io
    from rtresnet.onnxlib.interface import read_interface

    path = Path(path)
    artifacts.require_name(artifacts.require_onnx(path, "adopt"), "onnx")
    place = artifacts.sidecar_path(path)
    if place.exists() and not force:
        raise InputError(
            f"{path}: has a sidecar already ({place})",
            fix=f"show it with: rtresnet inspect {path}; replace it with --force",
        )
    with locks.hold_file(path, warn=reporter.note):
        interface = read_interface(io.load(path, checked=True, fix="export it again"), path)
        preprocess = _preprocess(path, interface, stated or InputConfig(), resize)
        sidecar = artifacts.record(
            path,
            describe(
                path,
                classes=class_names(path, interface, classes),
                preprocess=preprocess,
                precision=interface.precision,
                topk=interface.topk,
                assumed=preprocess.crop_assumption() if resize is None else (),
            ),
        )
    return AdoptResult(file=place, named=classes is not None, interface=interface, sidecar=sidecar)


def _preprocess(
    path: Path, interface: Interface, stated: InputConfig, resize: int | None
) -> Preprocess:
    if interface.pixels and (stated.mean or stated.std):
        raise InputError(
            f"{path}: the file normalizes uint8 pixels itself, so --mean and --std have no effect",
            fix="leave --mean, --std and --preset out",
        )
    preprocess = stated.complete(path, fixed=interface.size, pixels=interface.pixels)
    return preprocess if resize is None else dataclasses.replace(preprocess, resize=resize)


def class_names(path: Path, interface: Interface, names: Sequence[str] | None) -> tuple[str, ...]:
    """Check class names against a file; without names, return the classes' numbers.

    Args:
        path: The file, for messages.
        interface: Interface of the file.
        names: Class names in the order of the outputs, or None.

    Raises:
        InputError: A name occurs twice; the number of names differs from the file's classes, or
            too few for its top-K.
        ArtifactError: Neither the file nor the names state the number of classes.
    """
    count = interface.classes
    if names is None:
        if count is None and interface.topk is not None:
            raise InputError(
                f"{path}: outputs the {interface.topk} most probable classes, and does not state "
                "how many classes exist",
                fix="list the class names in the order of their numbers: --classes FILE",
            )
        if count is None:
            raise _open_classes(path)
        return tuple(map(str, range(count)))
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        first, second = [n for n, name in enumerate(names, 1) if name == repeated[0]][:2]
        raise InputError(
            f"--classes: name {repeated[0]!r} is used twice, for classes {first} and {second}",
            fix="use a different name for each class",
        )
    if interface.topk is not None and len(names) < interface.topk:
        raise InputError(
            f"--classes has {plural(len(names), 'name')}, but {path} outputs the "
            f"{interface.topk} most probable classes"
        )
    if interface.topk is None and count is None:
        raise _open_classes(path)
    if count is not None and len(names) != count:
        raise wrong_number(names, path, count)
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
    """Return the sidecar of an ONNX file of unknown architecture; hash the file.

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
