"""Run a step in a separate process, so that a crash or a hang of a native library is a result.

`run_step` starts the process and waits; `report_step` is called in it. The result is passed in a
file, so that the output of a library cannot damage it. Importing it and `run_step` need only the
standard library.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtresnet.core.errors import RtresnetError

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
RESULT, TIMEOUT = "RTRESNET_STEP_RESULT", "RTRESNET_STEP_TIMEOUT"  # environment of the process
TAIL = 4000  # characters of stderr that are kept


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a step.

    Attributes:
        name: Name of the step.
        status: "ok", "failed" or "skipped".
        reason: Reason of a failure or skip; None if the step is ok.
        seconds: Wall time of its process.
        data: Measurements of the step, ready for JSON.
        stderr: The end of its stderr, with the Python stack of a crash or a hang.
    """

    name: str
    status: str
    reason: str | None = None
    seconds: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)
    stderr: str = ""


class StepSkipped(Exception):
    """Raised in a step that cannot run here; the message is the reason."""


class StepFailed(Exception):
    """Raised in a failed step that has measurements.

    Args:
        reason: The failure.
        data: The measurements, a mapping or a dataclass.
    """

    def __init__(self, reason: str, data: object) -> None:
        super().__init__(reason)
        self.data = data


def run_step(
    name: str,
    command: Sequence[str],
    *,
    timeout: float,
    logs: Path,
    environment: Mapping[str, str] | None = None,
) -> StepResult:
    """Run a command that calls `report_step`, and wait for it.

    Args:
        name: Name of the step; its output goes to NAME.stdout.txt and NAME.stderr.txt in `logs`.
        command: The program and its arguments.
        timeout: Seconds after which it is killed, its children included.
        logs: An existing folder.
        environment: Variables in addition to this process's own.

    Returns:
        The result, also if the process crashed or was killed.

    Raises:
        KeyboardInterrupt: Ctrl-C; the process is killed first.
    """
    result = (logs / f"{name}.result.json").absolute()
    result.unlink(missing_ok=True)
    variables = {**os.environ, **(environment or {}), RESULT: str(result), TIMEOUT: f"{timeout}"}
    begin = time.perf_counter()
    errors = logs / f"{name}.stderr.txt"
    with (logs / f"{name}.stdout.txt").open("wb") as out, errors.open("wb") as error:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=error,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status, reason, data = _outcome(code, result, timeout)
    result.unlink(missing_ok=True)
    return StepResult(
        name=name, status=status, reason=reason, seconds=time.perf_counter() - begin, data=data,
        stderr=_tail(errors),
    )  # fmt: skip


def _outcome(
    code: int | None, result: Path, timeout: float
) -> tuple[str, str | None, dict[str, Any]]:
    """Return status, reason and data of a process that has ended."""
    written: Any = None
    with contextlib.suppress(OSError, ValueError):
        written = json.loads(result.read_text())
    valid = isinstance(written, dict) and written.get("status") in (OK, FAILED, SKIPPED)
    data = written["data"] if valid else {}
    if code == 0 and valid:
        return written["status"], written["reason"], data
    if code is None:
        how = f"did not end within {timeout:g} s and was killed"
    elif code < 0:
        how = f"ended by {_signal(-code)}"
    else:
        how = f"ended with exit code {code}"
    if not valid:
        how += ", without a valid result" if code is not None else ""
    elif written["status"] == FAILED:
        how = f"{written['reason']}; then {how}"
    else:
        how += ", after the step itself had finished"
    return FAILED, how, data


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * TAIL))
        return file.read().decode(errors="replace").strip()[-TAIL:]


def report_step(step: Callable[[], object]) -> None:
    """Run a step in the process that `run_step` started, and write its result.

    A crash leaves the Python stack on stderr, and so does a step that takes too long.

    Args:
        step: Returns its measurements as a mapping or a dataclass, or None.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * float(os.environ[TIMEOUT]))
    status, reason, data = OK, None, None
    try:
        data = step()
    except StepSkipped as skipped:
        status, reason = SKIPPED, str(skipped)
    except StepFailed as failed:
        status, reason, data = FAILED, str(failed), failed.data
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        kind = "" if isinstance(error, RtresnetError) else f"{type(error).__name__}: "
        status, reason = FAILED, f"{kind}{error}"
    faulthandler.cancel_dump_traceback_later()
    from rtresnet.core.serialization import to_builtins

    record = {"status": status, "reason": reason, "data": to_builtins(data or {})}
    target = Path(os.environ[RESULT])
    part = target.with_suffix(".part")
    part.write_text(json.dumps(record, default=str))
    part.replace(target)
    sys.stdout.flush()
