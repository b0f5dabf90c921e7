"""Run a command as on a CPU without AVX-512, VNNI and AMX, on x86-64 Linux.

    python tests/runtime/hide_vnni.py python benchmarks/engines.py resnet50

The command sees ONNX Runtime's AVX2 kernels. no_vnni.c answers its CPUID instructions. Where the
processor cannot trap them (AMD, many virtual machines), the command imports a copy of ONNX Runtime
in which every CPUID instruction is replaced by UD2, an instruction of the same length that always
traps. Only instructions that objdump lists are replaced, never equal bytes inside another one.

Needs gcc, and objdump where the processor cannot trap CPUID. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("no_vnni.c")
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
CANNOT_TRAP = 77  # exit status of no_vnni.c


class CannotHideError(Exception):
    """The platform, the compiler or the disassembler does not allow it; the message says why."""


def environment(folder: Path) -> dict[str, str]:
    """Prepare environment variables for processes that see no AVX-512, VNNI and AMX.

    Args:
        folder: Existing folder for the compiled library and the copy of ONNX Runtime, which the
            processes need.

    Raises:
        CannotHideError: Not Linux on x86-64, or gcc or objdump is missing.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotHideError("needs Linux on x86-64")
    library = folder / "no_vnni.so"
    _run("gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE))
    variables = {"LD_PRELOAD": str(library), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    tried = subprocess.run(
        [sys.executable, "-c", ""], env=os.environ | variables, capture_output=True, check=False
    )
    if tried.returncode == CANNOT_TRAP:
        variables["NO_VNNI_PATCHED"] = "1"
        search_path = [str(_patched_onnxruntime(folder)), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    return variables


def _patched_onnxruntime(folder: Path) -> Path:
    """Create a folder to import a patched onnxruntime from: links, and copies of its libraries."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise CannotHideError("onnxruntime is not installed")
    installed, root = Path(spec.origin).parent, folder / "patched"
    copy = root / "onnxruntime"
    (copy / "capi").mkdir(parents=True)
    for entry in (*installed.iterdir(), *(installed / "capi").iterdir()):
        target = copy / entry.relative_to(installed)
        if entry.name.startswith(("onnxruntime_pybind11_state", "libonnxruntime.so")):
            shutil.copyfile(entry, target)
            _patch(target)
        elif entry.name not in ("capi", "__pycache__"):
            target.symlink_to(entry)
    return root


def _patch(library: Path) -> None:
    """Replace the CPUID instructions in the code of a shared library by UD2."""
    with library.open("r+b") as file:
        for offset in _cpuid_offsets(library):
            file.seek(offset)
            if file.read(2) != CPUID:
                raise CannotHideError(f"{library.name}: no CPUID at {offset:#x}")
            file.seek(offset)
            file.write(UD2)


def _cpuid_offsets(library: Path) -> list[int]:
    """Return positions of the CPUID instructions of .text in the file."""
    header = re.search(
        r"\.text +[0-9a-f]+ +([0-9a-f]+) +[0-9a-f]+ +([0-9a-f]+)",
        _run("objdump", "-h", "-j", ".text", str(library)),
    )
    if header is None:
        raise CannotHideError(f"{library.name}: no section .text")
    address, offset = (int(number, 16) for number in header.groups())
    code = _run("objdump", "-d", "--no-show-raw-insn", "-j", ".text", str(library))
    lines = re.finditer(r"^ *([0-9a-f]+):\tcpuid", code, re.MULTILINE)
    return [int(line[1], 16) - address + offset for line in lines]


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotHideError(f"{command[0]}: {getattr(error, 'stderr', '') or error}") from error


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="no-vnni-") as folder:
        try:
            variables = environment(Path(folder))
        except CannotHideError as error:
            print(f"hide_vnni: {error}", file=sys.stderr)
            return 3
        return subprocess.run(sys.argv[1:], env=os.environ | variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
