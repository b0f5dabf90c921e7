"""Import rules between packages: the table of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtresnet.cli.commands import SUMMARIES

ROOT = Path(__file__).parent.parent / "rtresnet"
HEAVY = {
    "torch", "onnx", "onnxruntime", "onnxruntime_ep_openvino", "tensorrt", "tensorrt_rtx", "cuda",
    "pycuda", "PIL", "simplejpeg", "sklearn", "matplotlib", "rich", "click", "numpy",
    "jinja2", "pyarrow", "ray", "safetensors", "huggingface_hub", "starlette",
    "uvicorn", "uvloop", "grpc", "google", "prometheus_client",
}  # fmt: skip

# package: (packages of ours it may import, packages of others it may import). Everything may import
# `core` and the standard library.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), {"numpy"}),
    "onnxlib": ({"onnxlib"}, {"numpy", "onnx"}),
    "models": ({"models"}, {"numpy", "torch", "safetensors"}),
    "data": ({"data"}, {"numpy", "torch", "PIL", "simplejpeg", "sklearn"}),
    "training": ({"training", "models", "data"}, {"numpy", "torch"}),
    "study": ({"study", "models", "data", "training"}, {"numpy", "torch"}),
    "detection": (
        {"detection", "models", "data", "training", "exporter", "onnxlib"},
        {"numpy", "torch", "onnx", "safetensors", "PIL"},
    ),
    "exporter": ({"exporter", "models", "onnxlib"}, {"numpy", "torch", "onnx"}),
    "quantization": ({"quantization", "onnxlib"}, {"numpy", "onnx", "onnxruntime"}),
    "builder": ({"builder"}, {"numpy"}),
    "runtime": ({"runtime"}, {"numpy"}),
    "bench": ({"bench", "runtime", "onnxlib"}, {"numpy"}),
    "serving": (
        {"serving", "runtime"},
        {"numpy", "starlette", "uvicorn", "uvloop", "grpc", "google", "prometheus_client"},
    ),
    # `workflows`: the results that pages show.
    "reporting": ({"reporting", "bench", "workflows"}, {"numpy", "rich", "matplotlib", "jinja2"}),
    "workflows": (
        {
            "workflows", "onnxlib", "models", "data", "training", "study", "exporter",
            "quantization", "builder", "runtime", "bench", "serving", "detection",
        },
        {"numpy", "torch", "onnx", "onnxruntime", "pyarrow", "ray"},
    ),
    "cli": (set(), HEAVY),
}  # fmt: skip
# Modules that one file may import although its package may not.
DOORS = {
    "training/qat.py": {
        "quantization.placement",
        "quantization.calibrators",
        "quantization.number_formats",
    },
    # Pure Python: what export writes into metadata_props is known to these three.
    "models/checkpoint.py": {"onnxlib", "onnxlib.metadata"},
    "training/checkpointing.py": {"onnxlib", "onnxlib.metadata"},
    "reporting/report.py": {"builder", "builder.layers"},
    "reporting/engine_layers.py": {"builder.layers"},
    "reporting/checks.py": {"quantization.lint_rules"},
    "reporting/predictions.py": {"detection.average_precision"},
    "reporting/study.py": {"study", "study.ablations"},
    "runtime/loading.py": {"onnxlib", "onnxlib.metadata"},
    "runtime/cpu_rewrite.py": {"onnxlib", "onnxlib.graph", "onnxlib.io", "onnxlib.metadata"},
    "builder/nodes.py": {"onnxlib.graph"},  # the block namer, pure Python
    "builder/layers.py": {"onnxlib.graph"},
}
# Packages of others that one file may import although its package may not.
SEAMS = {
    "models/download.py": {"huggingface_hub"},
    "workflows/explain.py": {"PIL"},  # writes pictures
    "core/preprocess.py": {"PIL"},
    "reporting/gallery.py": {"PIL"},  # encodes thumbnails
    "runtime/providers.py": {"onnxruntime", "onnxruntime_ep_openvino"},
    "runtime/cpu_rewrite.py": {"onnx"},
    "runtime/cuda.py": {"cuda", "pycuda"},
    # Shapes, and so multiply-adds and bytes, stand in the ONNX file alone.
    "bench/kernels.py": {"onnx"},
    "bench/roofline.py": {"onnx"},  # makes the products it times
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return every imported module, dotted, wherever in the file the import stands."""
    result: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "rtresnet" or module.count(".") == 0:
                result |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                result.add(module)
    return result


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0]
    if len(relative.parts) == 1:  # __init__.py, __main__.py
        return
    rooms, packages = ALLOWED[room]
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "rtresnet" and room != "cli":
            used, module = rest.split(".")[0], ".".join(rest.split(".")[:2])
            allowed = used in rooms | {"core", "__version__", ""} or module in DOORS.get(
                relative.as_posix(), ()
            )
            assert allowed, f"{relative} imports {name}"
        elif top in HEAVY:
            seam = SEAMS.get(relative.as_posix(), set())
            assert top in packages | seam, f"{relative} imports {name}"


def test_the_table_covers_every_room() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert rooms == set(ALLOWED)


BLOCKED = sorted(HEAVY - {"numpy", "click", "rich"})
BARE = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
"""


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where none of the heavy packages can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BARE + code], capture_output=True, text=True, check=False
    )


def test_every_help_works_with_no_heavy_package() -> None:
    code = """
from rtresnet.cli.commands import SUMMARIES
from rtresnet.cli.main import main
assert main(["--help"]) == 0
for verb in SUMMARIES:
    assert main([verb, "--help"]) == 0, verb
print("all", len(SUMMARIES))
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr
    assert f"all {len(SUMMARIES)}" in done.stdout


def test_help_imports_no_command_and_neither_numpy_nor_rich() -> None:
    code = """
import sys
from rtresnet.cli.main import main
assert main(["--help"]) == 0
ours = {name for name in sys.modules if name.startswith(("rtresnet.cli.", "rtresnet.workflows"))}
assert ours == {"rtresnet.cli.main", "rtresnet.cli.commands"}, ours
assert not {"numpy", "rich", "msgspec"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_serving_imports_no_heavy_package() -> None:
    code = """
import importlib
import rtresnet
assert "numpy" not in sys.modules
for name in rtresnet.__all__:
    assert getattr(rtresnet, name) is not None and name in dir(rtresnet)
for room in ("runtime", "bench", "builder", "reporting", "training.evaluate", "data.loader",
             "workflows.views"):
    importlib.import_module(f"rtresnet.{room}")
for name in ("runtime.loading", "runtime.ort", "runtime.trt", "runtime.cuda", "bench.workload",
             "builder.engine", "reporting.pages", "reporting.plots", "models.zoo"):
    importlib.import_module(f"rtresnet.{name}")
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr


def test_training_needs_no_onnx() -> None:
    code = """
import sys
for name in ("onnx", "onnxruntime"):
    sys.modules[name] = None
import rtresnet.training.loop, rtresnet.training.qat
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
    assert "pip install 'rtresnet[train]'" in done.stderr


def public_annotations(node: ast.AST) -> Iterator[ast.expr]:
    """Return annotations of public functions, methods and fields, and of constants."""
    for item in getattr(node, "body", []):
        if isinstance(item, ast.AnnAssign):
            name = getattr(item.target, "id", "_")
            annotations = [item.annotation]
        elif isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            name, every = item.name, ast.walk(item.args)
            annotations = [a.annotation for a in every if isinstance(a, ast.arg) and a.annotation]
            annotations += [item.returns] if item.returns else []
        elif isinstance(item, ast.ClassDef):
            name, annotations = item.name, list(public_annotations(item))
        else:
            continue
        if not name.startswith("_") or name in ("__init__", "__call__"):
            yield from annotations


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_public_signature_has_a_dict_of_anything(path: Path) -> None:
    annotations = map(ast.unparse, public_annotations(ast.parse(path.read_text())))
    untyped = [text for text in annotations if "dict[str, Any]" in text]
    assert not untyped
