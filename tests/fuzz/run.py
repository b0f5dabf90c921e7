"""Fuzz everything that reads files: damaged input must be rejected without crash or hang.

    python -m tests.fuzz.run --minutes 30            # all targets, in one process each
    python -m tests.fuzz.run --minutes 5 --target onnx --seed 7

A case copies a folder of small valid files, damages one of them and reads it in this process. It
fails where an exception other than the tool's own escapes, where the exit code is not one that the
target allows, where reading takes longer than LIMIT seconds, where control characters of the file
reach the terminal, or where a file is accepted although its recorded hash differs. The last table
counts these; reproducers go to --out, each as a folder of files with a `case.txt`.

Mutators draw from `random.Random`, so that Hypothesis can drive and shrink them (`test_fuzz.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core.errors import RtresnetError
from tests.fuzz import corpus as corpora
from tests.fuzz.targets import TARGETS, Target

LIMIT = 10  # seconds a case may take
KINDS = ("traceback", "wrong exit code", "hang", "raw control characters", "accepted corruption",
         "crash")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failed case: its kind (KINDS), what was seen, and where, for counting it once."""

    kind: str
    detail: str
    place: str


class _Hang(BaseException):
    """Raised by the alarm; not an Exception, which readers may catch."""


def attempt(target: Target, data: bytes, corpus: Path, work: Path) -> Fault | None:
    """Read `data` in place of the target's file, in a fresh copy of its folder under `work`."""
    source = corpus / target.file
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source.parent, work)
    path = work / source.name
    path.write_bytes(data)
    same, printed, begun = data == source.read_bytes(), io.StringIO(), time.monotonic()

    def ring(*_: object) -> None:
        raise _Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = target.read(path) or 0
    except RtresnetError as error:
        code = error.exit_code
    except OSError:  # the command line prints its file and reason, with exit code 2
        code = 2
    except _Hang:
        code = -1
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "rtresnet/" in f.filename]
        place = f"{frames[-1].filename.rsplit('rtresnet/', 1)[-1]}:{frames[-1].lineno}"
        return Fault(
            kind="traceback", detail=traceback.format_exc(), place=f"{type(error).__name__} {place}"
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    text = printed.getvalue()
    seconds = time.monotonic() - begun
    if code == -1 or seconds > LIMIT:
        return Fault(kind="hang", detail=f"{seconds:.1f} s", place=target.name)
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
        return Fault(kind="raw control characters", detail=text, place=target.name)
    if target.hashed and not same and code == 0:
        return Fault(kind="accepted corruption", detail=text, place=target.name)
    if code not in ((target.intact,) if same else target.codes):
        return Fault(
            kind="wrong exit code", detail=f"{code}\n{text}", place=f"{target.name} {code}"
        )
    return None


def _fuzz(target: Target, corpus: Path, out: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run cases of one target until the time is up; save one reproducer for each place."""
    counts: Counter[str] = Counter()
    places: Counter[str] = Counter()
    until, n = time.monotonic() + seconds, 0
    original = (corpus / target.file).read_bytes()
    current = out / f"{target.name}-current"
    while time.monotonic() < until:
        data = target.mutate(original, random.Random(f"{seed}:{n}")) if n else original
        fault = attempt(target, data, corpus, current)
        if fault is not None:
            counts[fault.kind] += 1
            if places[fault.place] == 0:
                saved = out / f"{target.name}-{seed}-{n}"
                shutil.copytree(current, saved, dirs_exist_ok=True)
                about = f"{target.name}: {fault.kind}, {fault.place}, case {seed}:{n}\n"
                (saved / "case.txt").write_text(about + fault.detail, errors="replace")
            places[fault.place] += 1
        n += 1
    shutil.rmtree(current)
    return {"cases": n, "faults": counts, "places": places}


def _processes(
    target: Target, folder: str, options: argparse.Namespace, every: int
) -> tuple[Counter[str], Counter[str]]:
    """Fuzz one target in a process, and in a new one with the next seed after a crash."""
    counts: Counter[str] = Counter(cases=0)
    places: Counter[str] = Counter()
    seed, until = options.seed, time.monotonic() + options.minutes * 60 / every
    while (left := until - time.monotonic()) > 0:
        command = [sys.executable, "-m", "tests.fuzz.run", "--child", folder, "--seed", str(seed)]
        command += ["--minutes", str(left / 60), "--target", target.name, "--out", str(options.out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
            counts.update({"cases": result["cases"]} | result["faults"])
            places.update(result["places"])
            break
        counts["crash"] += 1
        places[f"process ended with {done.returncode}"] += 1
        current = options.out / f"{target.name}-current"
        if current.exists():
            current.replace(options.out / f"{target.name}-{seed}-crash")
        seed += 1
    return counts, places


def main() -> int:
    """Run every target in a process of its own and print the table; 1 if anything failed."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--minutes", type=float, default=1)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--target", action="append", choices=[t.name for t in TARGETS])
    options.add_argument("--out", type=Path, default=Path("fuzz-reproducers"))
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    chosen = [t for t in TARGETS if not arguments.target or t.name in arguments.target]
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        result = _fuzz(
            chosen[0], arguments.child, arguments.out, arguments.minutes * 60, arguments.seed
        )
        print(json.dumps(result))
        return 0
    print(f"{'target':<22} {'cases':>7}  " + "  ".join(KINDS))
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpora.make(Path(folder))
        for target in chosen:
            counts, places = _processes(target, folder, arguments, len(chosen))
            total.update(counts)
            _row(target.name, counts)
            for place, count in places.items():
                print(f"    {count:>5} x {place}")
    _row("total", total)
    return int(any(total[kind] for kind in KINDS))


def _row(name: str, counts: Any) -> None:
    cells = "  ".join(f"{counts.get(kind, 0):>{len(kind)}}" for kind in KINDS)
    print(f"{name:<22} {counts['cases']:>7}  {cells}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
