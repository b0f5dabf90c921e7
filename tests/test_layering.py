"""Who may import whom. The table of the design, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rtresnet.cli.main import VERBS

ROOT = Path(__file__).parent.parent / "rtresnet"
BASE = {
    "errors",
    "batches",
    "blocks",
    "artifacts",
    "sidecar",
    "storage",
    "locks",
    "isolated",
    "preprocess",
    "metrics",
    "machine",
    "gpu_targets",
    "trt_loading",
    "records",
    "typed_json",
    "onnx_file",
    "onnx_interface",
    "adoption",
    "terminal",
    "norms",
    "branches",
    "learned",
    "labels",
    "",
}
HEAVY = {
    "torch", "onnx", "onnxruntime", "onnxruntime_ep_openvino", "tensorrt", "tensorrt_rtx", "cuda",
    "pycuda", "PIL", "simplejpeg", "sklearn", "matplotlib", "rich", "click", "numpy",
    "pyarrow", "ray",
}  # fmt: skip

# room: (rooms it may import beside the base, packages it may import beside the standard library)
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "": (set(), {"numpy"}),
    "models": ({"models"}, {"numpy", "torch"}),
    "data": ({"data"}, {"numpy", "torch", "PIL", "simplejpeg", "sklearn"}),
    "train": ({"train", "models", "data"}, {"numpy", "torch"}),
    "study": ({"study", "models", "data", "train"}, {"numpy", "torch"}),
    "export": ({"export", "models"}, {"numpy", "torch", "onnx"}),
    "quantize": ({"quantize"}, {"numpy", "onnx", "onnxruntime"}),
    "build": ({"build"}, {"numpy"}),
    "runtime": ({"runtime"}, {"numpy"}),
    "bench": ({"bench", "runtime"}, {"numpy"}),
    "serve": ({"serve"}, set()),
    "report": ({"report", "bench"}, {"numpy", "rich", "matplotlib"}),
    "cli": (set(), HEAVY),
}
# The one file of a room that may import modules of a room that it may not: those that know
# neither ONNX nor ONNX Runtime.
DOORS = {
    "train/qat.py": {
        "quantize.places",
        "quantize.histogram",
        "quantize.limits",
        "quantize.exact",
    },
}
# The one file of a room that may import packages that the room may not.
SEAMS = {
    "runtime/ort.py": {"onnxruntime", "onnxruntime_ep_openvino"},
    "onnx_file.py": {"onnx"},
    "onnx_interface.py": {"onnx"},
    "runtime/cpu_rewrite.py": {"onnx"},
    "runtime/cuda.py": {"cuda", "pycuda"},
    "runtime/gpu_check.py": {"cuda"},  # to tell the binding's defects from those of cuda.py
    # Shapes, and so multiply-adds and bytes, stand in the ONNX file alone.
    "bench/kernels.py": {"onnx"},
    "bench/roofline.py": {"onnx"},  # makes the products it times
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every imported module, dotted, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "rtresnet" or module.count(".") == 0:
                found |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0] if len(relative.parts) > 1 else ""
    if str(relative) in ("__init__.py", "__main__.py"):
        return
    rooms, packages = ALLOWED[room]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "rtresnet":
            used, module = rest.split(".")[0], ".".join(rest.split(".")[:2])
            allowed = used in rooms | BASE or module in DOORS.get(relative.as_posix(), set())
            assert room == "cli" or allowed, f"{relative} imports {name}"
        elif top in HEAVY:
            seam = SEAMS.get(relative.as_posix(), set())
            assert top in packages | seam, f"{relative} imports {name}"


def test_the_table_covers_every_room() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert rooms == set(ALLOWED) - {""}


BLOCKED = sorted(HEAVY - {"numpy", "click", "rich"})
BARE = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
"""


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where none of the heavy packages can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BARE + code], capture_output=True, text=True, check=False
    )


def test_every_help_works_with_no_heavy_package() -> None:
    code = """
from rtresnet.cli.main import VERBS, main
assert main(["--help"]) == 0
for verb in VERBS:
    assert main([verb, "--help"]) == 0, verb
print("all", len(VERBS))
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr
    assert f"all {len(VERBS)}" in done.stdout


def test_serving_imports_no_heavy_package() -> None:
    code = """
import importlib
import rtresnet
assert "numpy" not in sys.modules
for name in rtresnet.__all__:
    assert getattr(rtresnet, name) is not None and name in dir(rtresnet)
for room in ("runtime", "bench", "build", "report", "train.evaluate", "data.loader"):
    importlib.import_module(f"rtresnet.{room}")
for name in ("runtime.session", "runtime.ort", "runtime.trt", "runtime.cuda", "bench.load",
             "build.engine", "report.page", "report.plots", "models.zoo"):
    importlib.import_module(f"rtresnet.{name}")
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr


def test_training_needs_no_onnx() -> None:
    code = """
import sys
for name in ("onnx", "onnxruntime"):
    sys.modules[name] = None
import rtresnet.train.loop, rtresnet.train.qat
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_imports() -> None:
    names = [
        ".".join(("rtresnet", *path.relative_to(ROOT).with_suffix("").parts)) for path in FILES
    ]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_one_line_and_exit_code_3() -> None:
    code = "from rtresnet.cli.main import main\nsys.exit(main(['train']))"
    done = bare(code)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "pip install torch" in done.stderr
