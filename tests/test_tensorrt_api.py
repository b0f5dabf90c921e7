"""Every use of TensorRT's Python API in `build` and `runtime`, compared with the real modules.

`tensorrt_rtx` is asked where it is installed. `tensorrt` cannot be installed without a GPU vendor's
package index; its bindings alone are a small wheel (tensorrt-cu13-bindings), and import over stub
libraries of a few lines of C. `make test` puts two versions into .venv/tensorrt-bindings; others
are named in RTRESNET_TENSORRT_BINDINGS, folders as in PATH. Without either these tests are skipped.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rtresnet.builder import nodes

ROOT = Path(__file__).parent.parent
BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
RTX = "tensorrt_rtx"

# What the names in each file stand for; "trt" is the module everywhere.
RUNTIME = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "self.context": "IExecutionContext",
    "bound.context": "IExecutionContext",
}
OWNERS = {
    "builder/engine.py": {
        "maker": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition",
        "entry": "IOptimizationProfile", "tensor": "ITensor", "images": "ITensor",
        "logits": "ITensor", "cache": "ITimingCache",
    },
    "builder/preflight.py": {
        "maker": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
        "error": "ParserError",
    },
    "builder/nodes.py": {
        "network": "INetworkDefinition", "layer": "ILayer", "out": "ITensor", "tensor": "ITensor",
        "inputs[0]": "ITensor",
    },
    "builder/monitor.py": {"maker": "Builder", "config": "IBuilderConfig"},
    "builder/targets.py": {"config": "IBuilderConfig"},
    "builder/inspector.py": RUNTIME | {"inspector": "EngineInspector"},
    "runtime/trt.py": RUNTIME,
    "runtime/execution.py": RUNTIME,
    "runtime/io_spec.py": RUNTIME,
    "runtime/context_config.py": RUNTIME | {
        "config": "IRuntimeConfig", "owned": "IRuntimeConfig",
        "when": "DynamicShapesKernelSpecializationStrategy",
    },
    "runtime/rtx.py": RUNTIME | {"config": "IRuntimeConfig", "self.cache": "IRuntimeCache"},
    "runtime/error_log.py": {},
    "runtime/trt_profile.py": {},
}  # fmt: skip
OF_PYTHON = ("__class__", "__init__", "__name__", "__version__")
# A layer's own class is told by its type; the API hands out the base class.
SUBCLASSES = {"kernel_size_nd": "IConvolutionLayer", "op": "IElementWiseLayer"}
RTX_ONLY = {
    "ComputeCapability", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "DynamicShapesKernelSpecializationStrategy.LAZY", "EngineInvalidityDiagnostics.__members__",
    "EngineValidity.INVALID", "EngineValidity.SUBOPTIMAL",
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "IRuntimeCache.deserialize", "IRuntimeCache.serialize", "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache", "Runtime.engine_header_size",
    "Runtime.get_engine_validity",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Use:
    """One place where a file reads or calls something of TensorRT's.

    Attributes:
        path: As in "ICudaEngine.get_tensor_name".
        where: File and line.
        arguments: Number of positional ones and names of the others; None where it is no call.
    """

    path: str
    where: str
    arguments: tuple[int, tuple[str, ...]] | None


@functools.cache
def uses() -> tuple[Use, ...]:
    found = []
    for file, owners in OWNERS.items():
        tree = ast.parse((ROOT / "rtresnet" / file).read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or id(node) in inner:
                continue
            owner, name = ast.unparse(node.value), node.attr
            if owner == "trt" or owner.startswith("trt."):
                path = f"{owner}.{name}".removeprefix("trt.")
            elif owner in owners:
                path = f"{SUBCLASSES.get(name, owners[owner])}.{name}"
            else:
                continue
            parts = path.split(".")
            if parts[-1] in OF_PYTHON:
                continue
            call = calls.get(id(node)) if len(parts) <= 2 else None
            starred = call is not None and any(isinstance(a, ast.Starred) for a in call.args)
            arguments = None
            if call is not None and not starred:
                names = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
                arguments = (len(call.args), names)
            found.append(
                Use(path=".".join(parts[:2]), where=f"{file}:{node.lineno}", arguments=arguments)
            )
    return tuple(found)


PROBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
found = {}
def describe(owner, prefix, depth):
    for name in dir(owner):
        if name.startswith("__") and name not in ("__members__", "__version__"):
            continue
        value = getattr(owner, name)
        found[prefix + name] = (getattr(value, "__doc__", None) or "") if callable(value) else ""
        if isinstance(value, type) and depth < 1:
            describe(value, prefix + name + ".", depth + 1)
describe(trt, "", 0)
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True, kw_only=True)
class Api:
    """A real module, in a process of its own.

    Attributes:
        names: Every attribute, two levels deep, to its documentation.
    """

    module: str
    version: str
    names: dict[str, str]
    environment: dict[str, str]

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, self.module, *arguments],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip


STUB = """
#include <stddef.h>
/* LOG: the entry log(severity, message) in an ILogger's table of virtual functions. */
typedef void (*Log)(void*, int, const char*);
static void* refuse(void* logger) {
    if (logger) (*(Log**)logger)[LOG](logger, 1, "CUDA initialization failure with error: 35");
    return NULL;
}
void* createInferBuilder_INTERNAL(void* logger, int version) { return refuse(logger); }
void* createInferRuntime_INTERNAL(void* logger, int version) { return refuse(logger); }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { return NULL; }
void* getBuilderPluginRegistry(int capability) { return NULL; }
void* getPluginRegistry(void) { return NULL; }
int initLibNvInferPlugins(void* logger, const char* name) { return 1; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return NULL; }
void* createNvOnnxParserRefitter_INTERNAL(void* r, void* logger, int v) { return NULL; }
int getNvOnnxParserVersion(void) { return 0; }
"""
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


def folders() -> list[Path]:
    """Where bindings of `tensorrt` lie."""
    named = os.environ.get("RTRESNET_TENSORRT_BINDINGS", "")
    places = [Path(name) for name in named.split(os.pathsep) if name] or sorted(BINDINGS.glob("*"))
    spec = importlib.util.find_spec("tensorrt_bindings")
    if not places and spec is not None and spec.origin is not None:
        places = [Path(spec.origin).parent.parent]
    return [place for place in places if (place / "tensorrt_bindings").is_dir()]


def version_in(folder: Path) -> str:
    text = (folder / "tensorrt_bindings" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)', text, re.MULTILINE)
    assert found is not None
    return found[1]


FOLDERS = {version_in(folder): folder for folder in folders()}
MODULES = [RTX, *FOLDERS]
only_tensorrt = pytest.mark.parametrize(
    "api",
    list(FOLDERS) or [pytest.param("none", marks=pytest.mark.skip(reason="no bindings"))],
    indirect=True,
)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT's libraries with nothing in them: no builder and no runtime can be created."""
    compiler = shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and Linux")
    folder = tmp_path_factory.mktemp("tensorrt-stubs")
    (folder / "stub.c").write_text(STUB)
    for version in sorted({name.split(".")[0] for name in FOLDERS}):
        for library in LIBRARIES:
            name = f"{library}.so.{version}"
            log = 0 if version == "10" else 4  # since 11 behind those of IVersionedInterface
            flags = [
                f"-DLOG={log}",
                "-shared",
                "-fPIC",
                "-w",
                f"-Wl,-soname,{name}",
                "-o",
                str(folder / name),
            ]
            subprocess.run([compiler, *flags, str(folder / "stub.c")], check=True)
    # NVIDIA's package of this name, which cannot be had, has these two lines.
    (folder / "python" / "tensorrt").mkdir(parents=True)
    (folder / "python" / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    return folder


@functools.cache
def load(version: str, stub_folder: Path | None) -> Api:
    path = [str(ROOT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    module = RTX
    if stub_folder is not None:
        module = "tensorrt"
        path += [str(stub_folder / "python"), str(FOLDERS[version])]
        environment["LD_LIBRARY_PATH"] = str(stub_folder)
    environment["PYTHONPATH"] = os.pathsep.join(path)
    api = Api(module=module, version=version, names={}, environment=environment)
    done = api.run(PROBE)
    assert done.returncode == 0, done.stderr
    return Api(
        module=module, version=version, names=json.loads(done.stdout), environment=environment
    )


@pytest.fixture
def api(request: pytest.FixtureRequest) -> Api:
    if request.param == RTX:
        if importlib.util.find_spec(RTX) is None:
            pytest.skip("no TensorRT-RTX here")
        return load(RTX, None)
    return load(request.param, request.getfixturevalue("stubs"))


def overloads(api: Api, path: str) -> list[list[tuple[str, bool]]]:
    """For each signature of a method its arguments: name, and whether it has a default."""
    name = path.rpartition(".")[2]
    found = []
    for line in api.names[path].splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\((.*)\) -> ", line)
        if match and not match[1].startswith("*args"):
            parts, depth = [""], 0
            for character in match[1]:
                depth += (character in "([{") - (character in ")]}")
                if character == "," and depth == 0:
                    parts.append("")
                else:
                    parts[-1] += character
            found.append([(p.partition(":")[0].strip(), " = " in p) for p in parts if p.strip()])
    return [[a for a in signature if a[0] != "self"] for signature in found]


def fits(signature: list[tuple[str, bool]], count: int, names: tuple[str, ...]) -> bool:
    rest = signature[count:]
    known = {name for name, _ in rest}
    needed = {name for name, default in rest if not default}
    return count <= len(signature) and needed <= set(names) <= known


def test_uses_are_found_in_every_file() -> None:
    assert {use.where.partition(":")[0] for use in uses()} == set(OWNERS)
    paths = {use.path for use in uses()}
    assert paths >= RTX_ONLY | {
        "Builder.build_serialized_network", "IBuilderConfig.clear_flag", "BuilderFlag.TF32",
        "OnnxParser.parse", "ParserError.node_name", "ILayer.metadata",
        "IConvolutionLayer.kernel_size_nd",
        "IExecutionContext.execute_async_v3", "ICudaEngine.device_memory_size_v2",
        "EngineInspector.get_engine_information", "LayerInformationFormat.JSON",
        "IRuntimeConfig.set_execution_context_allocation_strategy", "ILogger.ERROR",
        "TensorIOMode.INPUT", "nptype", "IProfiler", "IProgressMonitor",
    }  # fmt: skip


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_every_name_is_in_the_real_module(api: Api) -> None:
    missing = {
        f"{use.path} ({use.where})"
        for use in uses()
        if use.path not in api.names and not (api.module != RTX and use.path in RTX_ONLY)
    }
    assert not missing, f"{api.module} {api.version}"


@only_tensorrt
def test_what_tells_tensorrt_rtx_apart_is_not_in_tensorrt(api: Api) -> None:
    assert not {"ComputeCapability", "IRuntimeCache"} & set(api.names)
    assert not RTX_ONLY & set(api.names), "no longer RTX's alone"


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_every_call_fits_a_signature(api: Api) -> None:
    wrong, checked = [], set()
    for use in uses():
        if use.arguments is None or use.path not in api.names:
            continue
        known = overloads(api, use.path)
        if not known:  # a class, or a function in Python
            continue
        checked.add(use.path)
        if not any(fits(signature, *use.arguments) for signature in known):
            wrong.append((use, known))
    assert not wrong, f"{api.module} {api.version}"
    assert {
        "OnnxParser.parse", "ICudaEngine.get_tensor_profile_shape", "IBuilderConfig.clear_flag",
        "IExecutionContext.set_input_shape", "Builder.build_serialized_network",
        "Runtime.deserialize_cuda_engine", "IExecutionContext.set_optimization_profile_async",
    } <= checked  # fmt: skip


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_every_enum_by_name_has_its_members(api: Api) -> None:
    """Those that are looked up by a text, which no reading of the source finds."""
    for kind in (*nodes.WORDS, "CONSTANT", "ELEMENTWISE"):
        assert f"LayerType.{kind}" in api.names
    for dtype in ("FLOAT", "HALF", "INT8", "UINT8", "INT64"):
        assert f"DataType.{dtype}" in api.names
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in api.names or api.module == RTX


SUBCLASS_PROBE = """
import importlib, inspect, json, sys
from rtresnet.builder import engine, monitor
from rtresnet.runtime import profilers
from rtresnet.runtime.error_log import ErrorLog, logger
trt = importlib.import_module(sys.argv[1])
made = {
    "ILogger": [logger(trt, ErrorLog()), engine._log(trt)],
    "IProgressMonitor": [monitor._monitor(trt, print)],
    "IProfiler": [profilers.profiler(trt)],
}
found = {}
for base, instances in made.items():
    for instance in instances:
        assert isinstance(instance, getattr(trt, base))
        own = [n for n in vars(type(instance)) if n[0] != "_" and hasattr(getattr(trt, base), n)]
        for name in own:
            parameters = list(inspect.signature(getattr(instance, name)).parameters)
            found.setdefault(base + "." + name, []).append(parameters)
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_subclasses_override_what_tensorrt_calls(api: Api) -> None:
    done = api.run(SUBCLASS_PROBE)
    assert done.returncode == 0, done.stderr
    overridden: dict[str, list[list[str]]] = json.loads(done.stdout)
    assert set(overridden) == {
        "ILogger.log", "IProfiler.report_layer_time", "IProgressMonitor.phase_start",
        "IProgressMonitor.phase_finish", "IProgressMonitor.step_complete",
    }  # fmt: skip
    for path, ours in overridden.items():
        theirs = [[name for name, _ in signature] for signature in overloads(api, path)]
        for parameters in ours:
            assert not theirs or len(parameters) in {len(names) for names in theirs}, path


START_PROBE = """
import importlib, sys
from rtresnet.core import trt_loading
from rtresnet.builder import engine
from rtresnet.core.errors import UnavailableError
from rtresnet.runtime.error_log import ErrorLog, logger
trt = trt_loading.load_tensorrt(sys.argv[1])
errors = ErrorLog()
log = engine._log(trt)
for kind, logged, reason in (
    ("Builder", log, log.complaints), ("Runtime", logger(trt, errors), errors.take)
):
    try:
        trt_loading.create(trt, kind, logged, reason)
    except UnavailableError as error:
        print(error.exit_code, error.message, "|", error.fix)
"""


@only_tensorrt
def test_library_that_creates_nothing_is_told_by_its_own_reason(api: Api) -> None:
    done = api.run(START_PROBE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for kind, line in zip(("Builder", "Runtime"), lines, strict=True):
        assert line.startswith(f"3 TensorRT {api.version}"), line
        assert f"cannot create a {kind}: CUDA initialization failure with error: 35" in line
        assert "r580" in line.partition("|")[2]


@only_tensorrt
def test_missing_library_is_one_line_with_exit_code_3(api: Api, tmp_path: Path) -> None:
    lacking = dict(api.environment) | {"LD_LIBRARY_PATH": str(tmp_path)}
    probe = """
import sys
from rtresnet.core import trt_loading
from rtresnet.core.errors import UnavailableError
try:
    trt_loading.load_tensorrt(sys.argv[1])
except UnavailableError as error:
    print(error.exit_code, error)
"""
    without: Any = Api(module=api.module, version=api.version, names={}, environment=lacking)
    done = without.run(probe)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"3 tensorrt is installed .*libnv\w+\.so\.\d+.*; pip install .*\n",
                        done.stdout)  # fmt: skip
