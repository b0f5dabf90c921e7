"""Accept a machine with an NVIDIA GPU: every part of rtresnet that needs one, in one command.

    python benchmarks/accept_gpu.py [--out accept-gpu] [--keep-logs] [--only 'build-*'] [--dry-run]

Each step runs in a process of its own, with a timeout: one that fails, hangs or crashes does not
stop the others. stdout gets one JSON block to paste into an issue; OUT gets it as report.json,
replaced after each step, with the steps' output in logs/ and, in fixtures/, what tests on a CPU can
use later: inspector JSON, IProfiler names, layer files. Starts with Python's standard library
alone; a step whose packages are missing is reported as skipped.

Exit code: 0 all steps ok or skipped; 1 some failed; 2 usage; 3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # a checkout need not be installed

from accept_steps import STEPS, Context, Step  # noqa: E402

from rtresnet.core import hardware  # noqa: E402
from rtresnet.core.isolated import FAILED, OK, SKIPPED, StepResult, report_step, run_step  # noqa: E402

SCHEMA = 1
LONGEST = 60_000  # characters of the report: an issue on GitHub takes 65,536
TAILS = (2000, 1000, 500, 200)  # of a failed step's stderr, until the report is short enough
BRIEF = 300  # of any other step's


def missing(step: Step) -> str | None:
    """Return why a step cannot run if packages are missing."""
    absent = [module for module in step.needs if not hardware.installed(module)]
    if not absent:
        return None
    names = " ".join(hardware.DISTRIBUTIONS.get(module, module) for module in absent)
    return f"not installed: {', '.join(absent)} (pip install {names})"


def report(results: Sequence[StepResult], arguments: Sequence[str]) -> str:
    """Return the report's JSON block."""
    counts = {status: sum(r.status == status for r in results) for status in (OK, FAILED, SKIPPED)}
    head = {
        "accept_gpu": SCHEMA,
        "commit": hardware.commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arguments": list(arguments),
        "counts": counts,
    }
    text = ""
    for tail in TAILS:
        steps: list[dict[str, Any]] = []
        for result in results:
            length = tail if result.status == FAILED else min(tail, BRIEF)
            steps.append(
                dataclasses.asdict(result)
                | {"seconds": round(result.seconds, 2), "stderr": result.stderr[-length:]}
            )
        text = json.dumps(head | {"steps": steps}, indent=1)
        if len(text) <= LONGEST:
            break
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("accept-gpu"), help="[accept-gpu]")
    parser.add_argument("--model", default="resnet18", help="the net to build [resnet18]")
    parser.add_argument(
        "--calls", type=int, default=10_000, help="calls of the memory check [default: 10000]"
    )
    parser.add_argument("--keep-logs", action="store_true", help="keep TensorRT's verbose log")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="steps by name, as build-*"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run none")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # in the process of a step
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    steps: Sequence[Step] = STEPS,
    script: str = __file__,
) -> int:
    """Run the command line.

    Args:
        arguments: Those of the process by default.
        steps: What can be run; one is called "machine".
        script: Calls this function with the same steps; run again for each of them.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    context = Context(
        out=options.out.absolute(), model=options.model, calls=options.calls,
        keep_logs=options.keep_logs,
    )  # fmt: skip
    if options.step:
        (step,) = (step for step in steps if step.name == options.step)
        report_step(lambda: step.run(context))
        return 0
    patterns = options.only or ["*"]
    chosen = [s for s in steps if any(fnmatch.fnmatch(s.name, p) for p in patterns)]
    if not chosen:
        print(f"error: --only {' '.join(patterns)} names no step; see --dry-run", file=sys.stderr)
        return 2
    if options.dry_run:
        for step in chosen:
            print(f"{step.name:28} {step.timeout:5.0f} s  {missing(step) or 'can start'}")
        return 0
    # Without a GPU nothing below can run; asked in a process of its own like everything else.
    first = next(step for step in steps if step.name == "machine")
    chosen = [first, *(step for step in chosen if step is not first)]
    return run_all(chosen, [script, *words], context)


def run_all(steps: Sequence[Step], command: Sequence[str], context: Context) -> int:
    """Run the steps one after another and print the report; returns the exit code."""
    results: list[StepResult] = []
    code = 0
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        for step in steps:
            reason = missing(step)
            if reason:
                results.append(StepResult(name=step.name, status=SKIPPED, reason=reason))
            else:
                results.append(_run(step, command, context, {"PYTHONPATH": path}))
            result = results[-1]
            if step.name == "machine" and result.status == OK and not result.data["devices"]:
                print(f"error: no NVIDIA GPU here: {result.data['reason']}", file=sys.stderr)
                return 3
            line = f"{result.status:8}{result.seconds:7.1f} s  {step.name}"
            print(line + (f": {result.reason}" if result.reason else ""), file=sys.stderr)
            context.out.mkdir(parents=True, exist_ok=True)
            (context.out / "report.json").write_text(report(results, command[1:]) + "\n")
            code = code or int(result.status == FAILED)
    except KeyboardInterrupt:
        code = 130
        for step in steps[len(results) :]:
            results.append(StepResult(name=step.name, status=SKIPPED, reason="interrupted"))
    print(report(results, command[1:]))
    return code


def _run(
    step: Step, script: Sequence[str], context: Context, environment: dict[str, str]
) -> StepResult:
    command = [sys.executable, *script, "--step", step.name]
    with contextlib.ExitStack() as stack:
        logs = context.out / "logs"
        if step.name == "machine":  # without a GPU nothing is left behind
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        return run_step(
            step.name, command, timeout=step.timeout, logs=logs, environment=environment
        )


if __name__ == "__main__":
    sys.exit(main())
