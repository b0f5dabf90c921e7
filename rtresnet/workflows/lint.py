"""Check a quantized ONNX file for problems in TensorRT, and repair what can be repaired."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io, hardware, reporter
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError, missing_package
from rtresnet.core.reporter import Reporter, plural

if TYPE_CHECKING:
    from rtresnet.core.sidecar import Sidecar
    from rtresnet.quantization.autofix import Repair
    from rtresnet.quantization.lint_rules import Finding


@dataclass(frozen=True, kw_only=True)
class LintResult:
    """Result of `lint`: the problems of a file.

    Attributes:
        file: The file.
        fixed: The repaired copy, if one was written.
        worse: Counts of errors and warnings, as in "3 errors, 1 warning"; of the repaired
            copy, if there is one.
        findings: Findings in the order of the nodes; after a repair, the remaining ones.
        repaired: What the repair did.
        before: The findings before the repair.
    """

    file: Path
    fixed: Path | None
    worse: str
    findings: tuple[Finding, ...]
    repaired: tuple[Repair, ...]
    before: tuple[Finding, ...] = dataclasses.field(default=(), metadata={"hidden": True})

    @property
    def passed(self) -> bool:
        """Whether there is nothing worse than a note."""
        return not self.worse

    def require_passed(self) -> None:
        """Raise CheckFailedError if there is an error or a warning."""
        if self.worse:
            fixable = self.fixed is None and any("--fix" in entry.fix for entry in self.findings)
            raise CheckFailedError(
                f"{self.fixed or self.file}: {self.worse}",
                fix=f"repair it with: rtresnet lint {self.file} --fix OUT.onnx"
                if fixable
                else None,
            )


def lint(
    path: str | os.PathLike[str],
    *,
    fix: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> LintResult:
    """Find nodes that TensorRT would reject, compute differently or run slowly.

    Needs neither a GPU nor TensorRT.

    Args:
        path: An ONNX file from any tool.
        fix: Where to write a copy with everything repaired that can be repaired without changing
            a bit of its outputs; needs ONNX Runtime.
        reporter: Receives progress.

    Returns:
        The problems, and the file with the fixes.

    Raises:
        InputError: Not an ONNX file, or `fix` belongs to another file.
        ArtifactError: The file is damaged, or does not match its sidecar.
        UnavailableError: The package onnx is missing.
    """
    path = artifacts.require_onnx(path, "lint")
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "reading an ONNX file")
    from rtresnet.onnxlib import io
    from rtresnet.quantization import lint as rules

    sidecar = artifacts.verify(path)
    model = io.load(path, fix=None)  # not checked: the lint rules explain rejected files
    try:
        findings = _without_intended(rules.lint(model), sidecar)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error.message}", fix=error.fix) from None
    before, repaired = findings, list["Repair"]()
    out = Path(fix) if fix is not None else None
    if out is not None:
        left, repaired = _repair(path, out, model, sidecar, reporter)
        findings = _without_intended(left, sidecar)
    return LintResult(
        file=path,
        fixed=out,
        worse=severities(findings),
        findings=tuple(findings),
        repaired=tuple(repaired),
        before=tuple(before),
    )


def _without_intended(findings: list[Finding], sidecar: Sidecar | None) -> list[Finding]:
    """Downgrade findings on blocks that `quantize --eval` left in float to notes."""
    excluded = sidecar.calibration.kept if sidecar and sidecar.calibration else ()
    return [
        dataclasses.replace(entry, severity="note")
        if entry.node in excluded and entry.rule.startswith("float-")
        else entry
        for entry in findings
    ]


def _repair(
    path: Path, out: Path, model: Any, sidecar: Sidecar | None, reporter: Reporter
) -> tuple[list[Finding], list[Repair]]:
    """Write the repaired file; return the remaining findings and the repairs."""
    from rtresnet.quantization.autofix import fix

    if sidecar is None and artifacts.sidecar_path(out).exists():
        raise InputError(f"{out}: has the sidecar of another file", fix="choose another --fix")
    with reporter.progress(f"repairing {path}, and comparing outputs"):
        fixed, repaired, left = fix(model)

    def write(target: Path) -> None:
        target.write_bytes(fixed.SerializeToString())

    if sidecar is None:
        with atomic_io.atomic_path(out) as temporary:
            write(temporary)
    else:
        in_place = out.exists() and out.samefile(path)
        parent = sidecar.parent if in_place else artifacts.link_to(path, out)
        artifacts.publish(out, write, dataclasses.replace(sidecar, parent=parent, made_by={}))
    return left, repaired


def severities(findings: Iterable[Finding]) -> str:
    """Format the counts, as in "3 errors, 1 warning"; empty if there are only notes."""
    count = Counter(entry.severity for entry in findings)
    return ", ".join(plural(count[s], s) for s in ("error", "warning") if count[s])
