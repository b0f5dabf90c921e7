"""Sidecars: JSON files that record the provenance of each artifact. Together they form a chain.

Every artifact `X` (checkpoint, ONNX file, plan) has a sidecar `X.json` next to it. It names the
artifact's sha256 and its parent's, so the chain from plan back to checkpoint can be walked and
checked by reading JSON files only. `rtresnet inspect X` prints it. `sidecar.py` declares the
fields.

This module does not read the contents of artifacts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io, locks, provenance, serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.serialization import to_json
from rtresnet.core.sidecar import (
    SCHEMA,
    AccuracyRecord,
    Link,
    Measurements,
    Sidecar,
    accuracies,
    parse_sidecar,
    same_data,
)

UPDATE_WAIT = 10.0  # seconds; longer than another measurement takes to be recorded
KINDS = ("checkpoint", "onnx", "plan")
SUFFIXES = {".onnx": "onnx", ".plan": "plan"}
SUFFIXES |= dict.fromkeys((".pt", ".pth", ".th", ".safetensors"), "checkpoint")


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a sidecar: `engines/resnet50.plan.json` for `engines/resnet50.plan`."""
    return Path(f"{os.fspath(path)}.json")


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return the kind of artifact by the suffix of a file name.

    Raises:
        InputError: The suffix is not one of SUFFIXES.
    """
    try:
        return SUFFIXES[Path(path).suffix.lower()]
    except KeyError:
        raise InputError(
            f"{path}: not a checkpoint (.pt, .pth, .th, .safetensors), an ONNX file (.onnx) or a "
            "plan (.plan)"
        ) from None


def require_onnx(path: str | os.PathLike[str], verb: str) -> Path:
    """Return the path if it is a readable file that may be ONNX.

    Args:
        path: The file that the user named.
        verb: Command that accepts only ONNX files, such as "quantize"; for the message.

    Raises:
        InputError: There is no such file, or it is a checkpoint or a plan; `fix` names the command
            to use.
    """
    path = atomic_io.require_file(path, fix="create one with: rtresnet export")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind == "checkpoint":
        raise InputError(
            f"{path}: is a checkpoint, but {verb} needs an ONNX file",
            fix=f"create one with: {shlex.join(['rtresnet', 'export', '--weights', str(path)])}",
        )
    if kind == "plan" and verb == "build":
        raise InputError(f"{path}: is already a plan", fix=f"see: rtresnet inspect {path}")
    if kind == "plan":
        sidecar = read_sidecar(path)
        parent = parent_path(path, sidecar) if sidecar else None
        raise InputError(
            f"{path}: is a plan, but {verb} needs an ONNX file",
            fix=f"use the one it was built from{f': rtresnet {verb} {parent}' if parent else ''}",
        )
    return path


def publish(
    path: str | os.PathLike[str], write: Callable[[Path], object], sidecar: Sidecar
) -> Sidecar:
    """Write an artifact and its sidecar.

    Args:
        path: Path of the artifact.
        write: Called with a temporary path; must leave the artifact's bytes there.
        sidecar: Everything but file name, hash, size and versions, which are filled in here.

    Returns:
        The sidecar as written.

    Raises:
        InputError: The suffix belongs to another kind of artifact.
    """
    require_name(path, sidecar.kind)
    path = Path(path)
    with atomic_io.atomic_path(path) as temporary:
        write(temporary)
        size, digest = temporary.stat().st_size, atomic_io.sha256(temporary)
    return _write_sidecar(path, sidecar, size, digest)


def require_name(path: str | os.PathLike[str], kind: str) -> None:
    """Reject a file name whose suffix belongs to another kind of artifact than `kind`.

    Raises:
        InputError: The suffix belongs to another kind, or to none.
    """
    if kind_of(path) != kind:
        suffixes = [suffix for suffix, its in SUFFIXES.items() if its == kind]
        raise InputError(
            f"{path}: the suffix is that of kind {kind_of(path)}, but the file is of kind {kind}",
            fix=f"choose a name that ends in {' or '.join(suffixes)}",
        )


def publish_bytes(
    path: str | os.PathLike[str], data: memoryview, describe: Callable[[], Sidecar]
) -> Sidecar:
    """Write an artifact from memory, and the sidecar that `describe` returns.

    Does not wait for the disk. After a power failure the sidecar's hash shows a truncated file.

    Args:
        path: Path of the artifact.
        data: Its bytes.
        describe: Returns the sidecar. If it raises, nothing is written.
    """
    path = Path(path)
    with atomic_io.atomic_path(path, durable=False) as temporary, ThreadPoolExecutor(2) as pool:
        written = pool.submit(temporary.write_bytes, data)
        hashed = pool.submit(hashlib.sha256, data)
        sidecar = describe()
        require_name(path, sidecar.kind)
        size, digest = written.result(), hashed.result().hexdigest()
    return _write_sidecar(path, sidecar, size, digest)


def _write_sidecar(path: Path, sidecar: Sidecar, size: int, digest: str) -> Sidecar:
    sidecar = dataclasses.replace(
        sidecar,
        file=path.name,
        sha256=digest,
        bytes=size,
        made_by=provenance.made_by() | sidecar.made_by,
    )
    sidecar = dataclasses.replace(sidecar, measured=_still_valid(path, sidecar) | sidecar.measured)
    # If the process is killed between the two writes, the old sidecar's hash does not match.
    atomic_io.write_text(sidecar_path(path), to_json(sidecar))
    return sidecar


def _still_valid(path: Path, new: Sidecar) -> Measurements:
    """Return the accuracies and the parity of the sidecar that `new` replaces.

    They hold only for the same bytes with the same input contract, and parity for the same parent.
    """
    try:
        old = read_sidecar(path)
    except (ArtifactError, OSError):
        return {}
    if old is None or (old.sha256, old.input, old.model) != (new.sha256, new.input, new.model):
        return {}
    kept = Measurements()
    if "accuracy" in old.measured:
        kept["accuracy"] = old.measured["accuracy"]
    same_parent = old.parent and new.parent and old.parent.sha256 == new.parent.sha256
    if same_parent and "parity" in old.measured:
        kept["parity"] = old.measured["parity"]
    return kept


def record(path: str | os.PathLike[str], sidecar: Sidecar) -> Sidecar:
    """Write the sidecar of a file that exists.

    Args:
        path: The artifact.
        sidecar: Everything but file name, size and versions; its `sha256` is that of the file.

    Returns:
        The sidecar as written.

    Raises:
        InputError: The sidecar cannot be written.
    """
    path = Path(path)
    atomic_io.require_place(sidecar_path(path))
    return _write_sidecar(path, sidecar, path.stat().st_size, sidecar.sha256)


def update_measured(
    path: str | os.PathLike[str], measured: Measurements, *, sha256: str | None = None
) -> None:
    """Add measurements (accuracy, parity, with their n) to an artifact's sidecar, if it has one.

    Args:
        path: The artifact.
        measured: Entries to add or to replace.
        sha256: Hash of the file that was measured; None if it cannot have changed.

    Raises:
        ArtifactError: The file is not the one that was measured, or does not match its sidecar.
        InputError: The sidecar cannot be written.
        LockedError: Another process is writing the artifact.
    """
    _change_measured(path, lambda old: old | measured, sha256)


def record_accuracy(
    path: str | os.PathLike[str], record: AccuracyRecord, *, sha256: str | None = None
) -> None:
    """Add an accuracy to an artifact's sidecar; replaces one on the same images.

    Args and errors: see `update_measured`.
    """

    def change(old: Measurements) -> Measurements:
        others = [other for other in accuracies(old) if not same_data(other, record)]
        return old | {"accuracy": [*others, record]}

    _change_measured(path, change, sha256)


def _change_measured(
    path: str | os.PathLike[str], change: Callable[[Measurements], Measurements], sha256: str | None
) -> None:
    """Replace `measured` in a sidecar while no other process writes the artifact or its sidecar."""
    if not sidecar_path(path).exists():
        return
    with locks.hold_file(path, warn=lambda line: None, wait=UPDATE_WAIT):
        sidecar = verify(path)
        if sidecar is None:
            return
        if sha256 is not None and sidecar.sha256 != sha256:
            raise ArtifactError(f"{path}: was replaced after it was measured", fix="measure again")
        changed = dataclasses.replace(sidecar, measured=change(sidecar.measured))
        atomic_io.write_text(sidecar_path(path), to_json(changed))


def link_to(
    parent: str | os.PathLike[str], child: str | os.PathLike[str], digest: str | None = None
) -> Link:
    """Return the parent as `child`'s sidecar should name it; `digest` where its sha256 is known."""
    relative = os.path.relpath(Path(parent).resolve(), Path(child).resolve().parent)
    return Link(file=relative, sha256=digest or atomic_io.sha256(parent))


def read_sidecar(path: str | os.PathLike[str]) -> Sidecar | None:
    """Read the sidecar of an artifact without checking the hash.

    Args:
        path: The artifact, which may not exist.

    Returns:
        The sidecar, or None if there is none.

    Raises:
        ArtifactError: The sidecar is not valid JSON, of another schema, or incomplete.
    """
    place = sidecar_path(path)
    try:
        data = serialization.load(place, fix=f"create {path} again", error=ArtifactError)
    except FileNotFoundError:
        return None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise ArtifactError(
            f"{place}: sidecar schema {schema}, but this version of rtresnet reads {SCHEMA}",
            fix=f"create {path} again with: {_command(data)}",
        )
    try:
        return parse_sidecar(data)
    except (KeyError, TypeError, InputError) as error:
        raise ArtifactError(
            f"{place}: broken sidecar ({error})", fix=f"create {path} again with: {_command(data)}"
        ) from None


def verify(path: str | os.PathLike[str]) -> Sidecar | None:
    """Read the sidecar and check that it matches the file.

    Raises:
        ArtifactError: The hash differs: truncated, replaced, or of another build.
    """
    atomic_io.require_file(path)
    sidecar = read_sidecar(path)
    if sidecar is not None and sidecar.sha256 != atomic_io.sha256(path):
        raise mismatch(path, sidecar)
    return sidecar


def mismatch(path: str | os.PathLike[str], sidecar: Sidecar) -> ArtifactError:
    """Return the error for a file that does not match its sidecar."""
    size, place = Path(path).stat().st_size, sidecar_path(path).name
    problem = f"does not match its sidecar {place}"
    if size != sidecar.bytes:
        problem += f" ({size} bytes instead of {sidecar.bytes})"
    cause = "replaced" if size >= sidecar.bytes else "truncated"
    return ArtifactError(
        f"{path}: {problem}: {cause}, or the sidecar belongs to another file",
        fix=f"delete {place} if it belongs to another file, or create the file again with: "
        + sidecar.made_by.get("command", "unknown"),
    )


def parent_path(path: str | os.PathLike[str], sidecar: Sidecar) -> Path | None:
    """Return the path of the parent, which may not exist; None at the start of a chain."""
    if sidecar.parent is None:
        return None
    return Path(os.path.normpath(Path(path).parent / sidecar.parent.file))


def chain(
    path: str | os.PathLike[str], digest: str | None = None
) -> Iterator[tuple[Path, Sidecar | None, str]]:
    """Walk from an artifact to its origin.

    Args:
        path: The artifact.
        digest: Its sha256, if that was just computed.

    Yields:
        (path, sidecar or None, state), where state is ok, missing, changed or no sidecar. The
        walk ends at the first link that is not ok.
    """
    current: Path | None = Path(path)
    expected: str | None = None
    visited: set[Path] = set()
    while current is not None:
        sidecar = read_sidecar(current)
        if not current.exists():
            yield current, sidecar, "missing"
            return
        actual, digest = digest or atomic_io.sha256(current), None
        if (expected and actual != expected) or (sidecar and sidecar.sha256 != actual):
            yield current, sidecar, "changed"
            return
        if sidecar is None:
            yield current, None, "no sidecar"
            return
        yield current, sidecar, "ok"
        visited.add(current)
        expected = sidecar.parent.sha256 if sidecar.parent else None
        current = parent_path(current, sidecar)
        if current in visited:  # the step replaced its own input by equal bytes
            return


def under(
    folder: str | os.PathLike[str],
) -> Iterator[tuple[Path, Sidecar | None, str]]:
    """Find every artifact in a folder and the folders in it, by suffix, and check its hash.

    Yields:
        (path, sidecar or None, state), in the order of their names. The state is ok, changed,
        no sidecar or broken sidecar. For an artifact whose own state is ok, it can also name the
        problem of its first invalid ancestor, as in "resnet8.onnx missing".
    """
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        try:
            (_, sidecar, state), *ancestors = chain(path)
        except ArtifactError:
            yield path, None, "broken sidecar"
            continue
        wrong = [
            f"{link.name} {its}" for link, _, its in ancestors if its in ("missing", "changed")
        ]
        yield path, sidecar, wrong[0] if wrong else state


def _command(data: Any) -> str:
    made_by = data.get("made_by") if isinstance(data, dict) else None
    return made_by.get("command", "unknown") if isinstance(made_by, dict) else "unknown"
