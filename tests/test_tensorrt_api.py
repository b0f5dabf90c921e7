"""The builder and the runtime, checked against the API of each real TensorRT module.

`Restricted` wraps a module and its objects. It has only the names that the real module has, and
checks every call against the real signatures. What runs inside is TensorRT-RTX (builder) or the
fake GPU (runtime), so that nothing here needs a GPU.

The API of `tensorrt_rtx` is read from the installed module. `tensorrt` cannot be installed without
NVIDIA's package index; its bindings alone are a small wheel (tensorrt-cu13-bindings) that can be
imported over stub libraries of a few lines of C. `make test` puts two versions into
.venv/tensorrt-bindings; RTRESNET_TENSORRT_BINDINGS names other folders, as in PATH. Tests without
their module are skipped.
"""

from __future__ import annotations

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
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.builder import engine, inspector, nodes
from rtresnet.core import hardware, trt_loading
from rtresnet.core.errors import ArtifactError
from rtresnet.core.hardware import Gpu

ROOT = Path(__file__).parent.parent
BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
RTX = "tensorrt_rtx"

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
    """Return the folders with bindings of `tensorrt`."""
    named = os.environ.get("RTRESNET_TENSORRT_BINDINGS", "")
    places = [Path(name) for name in named.split(os.pathsep) if name] or sorted(BINDINGS.glob("*"))
    spec = importlib.util.find_spec("tensorrt_bindings")
    if not places and spec is not None and spec.origin is not None:
        places = [Path(spec.origin).parent.parent]
    return [place for place in places if (place / "tensorrt_bindings").is_dir()]


def version_in(folder: Path) -> str:
    text = (folder / "tensorrt_bindings" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)', text, re.MULTILINE)
    assert match is not None
    return match[1]


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
    """Return for each signature of a method its arguments: name, and whether optional."""
    name = path.rpartition(".")[2]
    results = []
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
            results.append([(p.partition(":")[0].strip(), " = " in p) for p in parts if p.strip()])
    return [[a for a in signature if a[0] != "self"] for signature in results]


def fits(signature: list[tuple[str, bool]], count: int, names: tuple[str, ...]) -> bool:
    rest = signature[count:]
    keywords = {name for name, _ in rest}
    needed = {name for name, default in rest if not default}
    return count <= len(signature) and needed <= set(names) <= keywords


# Classes that the code derives from; SUBCLASS_PROBE checks them. Buffers are passed on as they are.
UNWRAPPED = ("ILogger", "IProgressMonitor", "IProfiler", "IHostMemory")
FAKES = {
    "FakeEngine": "ICudaEngine", "FakeContext": "IExecutionContext", "FakeConfig": "IRuntimeConfig",
    "FakeCache": "IRuntimeCache", "FakeInspector": "EngineInspector",
}  # fmt: skip


class Recorder:
    """What `Restricted` objects of one module have seen.

    Attributes:
        used: Paths of names, as in "ICudaEngine.get_tensor_name".
        wrong: Calls that fit no signature.
    """

    def __init__(self, api: Api) -> None:
        self.api = api
        self.used: set[str] = set()
        self.wrong: list[str] = []

    def check_name(self, path: str) -> None:
        if path not in self.api.names:
            raise AttributeError(f"{self.api.module} {self.api.version} has no {path}")
        self.used.add(path)

    def check_call(self, path: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        signatures = overloads(self.api, path)  # none of a class, or of a function in Python
        if signatures and not any(fits(each, len(arguments), tuple(named)) for each in signatures):
            self.wrong.append(f"{path}({len(arguments)}, {list(named)}): {signatures}")

    def wrap(self, value: Any) -> Any:
        """Wrap an object of TensorRT or of the fake one; leave others and enums alone."""
        kind = type(value).__name__
        real = type(value).__module__.startswith("tensorrt_rtx")
        if kind in UNWRAPPED or kind == "Dims" or hasattr(type(value), "__members__"):
            return value
        if real or kind in FAKES or kind == "Runtime":
            return Restricted(self, value, FAKES.get(kind, kind))
        return value


class Restricted:
    """An object with those of its names that the real module has.

    Args:
        recorder: Checks names and calls.
        target: The object.
        kind: Name of its class in the real module; empty for the module itself.
    """

    def __init__(self, recorder: Recorder, target: Any, kind: str = "") -> None:
        for name, value in (("_recorder", recorder), ("_target", target), ("_kind", kind)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        recorder, target, kind = self._recorder, self._target, self._kind
        if name.startswith("__") and name != "__members__":
            return recorder.api.module if name == "__name__" else getattr(target, name)
        path = f"{kind}.{name}" if kind else name
        recorder.check_name(path)
        value = getattr(target, name)
        if not kind and isinstance(value, type | SimpleNamespace):
            return value if name in UNWRAPPED else Restricted(recorder, value, name)
        if callable(value) and not isinstance(value, type):
            return functools.partial(self._call, path, value)
        return recorder.wrap(value)

    def __setattr__(self, name: str, value: Any) -> None:
        value = unwrapped(value)
        if name == "__class__":
            object.__setattr__(self, "_kind", value.__name__)
        else:
            self._recorder.check_name(f"{self._kind}.{name}")
        setattr(self._target, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call(self._kind, self._target, *arguments, **named)

    def _call(self, path: str, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self._recorder.check_call(path, arguments, named)
        plain = {name: unwrapped(value) for name, value in named.items()}
        return self._recorder.wrap(function(*map(unwrapped, arguments), **plain))


def unwrapped(value: Any) -> Any:
    return value._target if isinstance(value, Restricted) else value


def test_restricted_finds_missing_names_and_calls_that_fit_no_signature() -> None:
    names = {
        "Runtime": "",
        "Runtime.load": "load(self: Runtime, data: bytes, size: int = 0) -> int",
    }
    recorder = Recorder(Api(module="tensorrt", version="0", names=names, environment={}))

    class Runtime:
        def load(self, *arguments: int, **named: int) -> int:
            return 1

        def save(self) -> None:
            raise AssertionError("the real module has no such name")

    runtime = recorder.wrap(Runtime())
    assert runtime.load(1) == runtime.load(1, size=2) == 1 and not recorder.wrong
    assert not hasattr(runtime, "save")
    with pytest.raises(AttributeError, match="tensorrt 0 has no"):
        runtime.name = "x"
    for arguments, named in (((), {}), ((1, 2, 3), {}), ((1,), {"length": 2})):
        runtime.load(*arguments, **named)
    assert len(recorder.wrong) == 3 and recorder.used == {"Runtime.load"}


@pytest.fixture
def recorder(api: Api, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Records uses of this API, on a machine with a GPU."""
    gpu = Gpu(name="Test GPU", capability=(8, 9), memory=1 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    monkeypatch.setattr(hardware, "installed", lambda name: True)
    return Recorder(api)


def residual_net(path: Path, extra: str = "Relu") -> Path:
    """Write an ONNX file with a convolution, an addition and a classifier, and `extra`."""
    value = helper.make_tensor_value_info
    weights = {"w": np.zeros((3, 3, 3, 3), np.float32), "fc": np.zeros((3, 5), np.float32)}
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "images"], ["a"], name="add"),
        helper.make_node(extra, ["a"], ["r"], name="extra"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("MatMul", ["f", "fc"], ["logits"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes, "net", [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("api", MODULES, indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_builder_uses_only_names_and_signatures_of_the_module(
    api: Api, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = pytest.importorskip(RTX)
    monkeypatch.setattr(trt_loading, "load_tensorrt", lambda name: Restricted(recorder, rtx))
    builder = "rtx" if api.module == RTX else "tensorrt"
    source, out = residual_net(tmp_path / "net.onnx"), tmp_path / "net.plan"
    target = ("sm_89",) if api.module == RTX else ()
    cache = None if api.module == RTX else tmp_path / "kernels.cache"
    engine.build(source, out, target=target, builder=builder, tf32=False, timing_cache=cache)
    assert out.stat().st_size > 0
    with pytest.raises(ArtifactError, match="NoSuchOperator"):
        engine.check(residual_net(tmp_path / "bad.onnx", "NoSuchOperator"), builder=builder)
    assert not recorder.wrong
    assert recorder.used >= {
        "Builder.build_serialized_network", "Builder.create_builder_config",
        "Builder.create_network", "Builder.create_optimization_profile", "BuilderFlag.TF32",
        "ElementWiseOperation.SUM", "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.clear_flag", "IBuilderConfig.profiling_verbosity",
        "IBuilderConfig.progress_monitor", "IConvolutionLayer.kernel_size_nd",
        "IElementWiseLayer.op", "ILayer.metadata", "ILayer.type", "INetworkDefinition.get_layer",
        "INetworkDefinition.name", "IOptimizationProfile.set_shape", "ITensor.dtype",
        "OnnxParser.parse", "OnnxParser.get_error", "OnnxParser.supports_model_v2",
        "OnnxParser.get_subgraph_nodes", "ParserError.code", "ParserError.node_operator",
        "ProfilingVerbosity.DETAILED", "float32",
    }  # fmt: skip
    only_rtx = {"ComputeCapability.SM89", "IBuilderConfig.set_compute_capability"}
    only_tensorrt = {"IBuilderConfig.set_timing_cache", "ITimingCache.serialize",
                     "Runtime.deserialize_cuda_engine"}  # fmt: skip
    assert recorder.used >= (only_rtx if api.module == RTX else only_tensorrt)
    assert not recorder.used & (only_tensorrt if api.module == RTX else only_rtx)


class FakeInspector:
    execution_context: Any = None

    def get_engine_information(self, format_: str) -> str:
        assert self.execution_context is not None and format_ == "json"
        return "{}"


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_inspector_uses_only_names_and_signatures_of_the_module(
    api: Api, recorder: Recorder, fake_gpu: Any
) -> None:
    class FakeEngine(fake_gpu.FakeEngine):  # type: ignore[misc]
        def create_engine_inspector(self) -> FakeInspector:
            return FakeInspector()

        def create_execution_context(self) -> Any:
            return fake_gpu.FakeContext(self)

    opened = FakeEngine(fake_gpu.FakeCuda())

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            return opened

    module = SimpleNamespace(
        __version__=api.version, Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="in"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )  # fmt: skip
    texts = inspector.inspect_engine(Restricted(recorder, module), None, str, b"", 1)
    assert texts == ("{}",) and not recorder.wrong
    assert recorder.used >= {
        "EngineInspector.execution_context", "EngineInspector.get_engine_information",
        "ICudaEngine.create_engine_inspector", "ICudaEngine.create_execution_context",
        "IExecutionContext.set_optimization_profile_async", "LayerInformationFormat.JSON",
    }  # fmt: skip


@pytest.fixture(scope="module")
def fake_gpu() -> Any:
    """The module tests/runtime/fake_gpu.py."""
    if "fake_gpu" not in sys.modules:
        path = Path(__file__).parent / "runtime" / "fake_gpu.py"
        spec = importlib.util.spec_from_file_location("fake_gpu", path)
        assert spec is not None and spec.loader is not None
        sys.modules["fake_gpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fake_gpu"])
    return sys.modules["fake_gpu"]


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_runtime_uses_only_names_and_signatures_of_the_module(
    api: Api, recorder: Recorder, fake_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = fake_gpu.Bench(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, RTX, Restricted(recorder, bench.trt))
    for kernels in ("eager", "lazy"):
        backend = bench.load(kernels=kernels)
        for count in (1, 3, 3, 20):
            batch = fake_gpu.images(count)
            np.testing.assert_allclose(backend.infer(batch), fake_gpu.expected(batch), atol=1e-5)
        assert backend.graphs == ("built in" if api.module == RTX else "by hand")
        backend.close()
    if api.module == RTX:  # the kernels that the first load has kept, and a slow plan
        bench.validity = (fake_gpu.Validity.SUBOPTIMAL, 1)
        with pytest.warns(RuntimeWarning, match="slower"):
            bench.load().close()
        bench.validity = (fake_gpu.Validity.VALID, 0)
    plain = bench.load(graphs=False, timings=True)
    plain.watch(None)
    plain.infer(fake_gpu.images(8))
    plain.close()
    assert not recorder.wrong
    assert recorder.used >= {
        "ExecutionContextAllocationStrategy.USER_MANAGED", "ICudaEngine.create_execution_context",
        "ICudaEngine.create_runtime_config", "ICudaEngine.device_memory_size_v2",
        "ICudaEngine.get_tensor_dtype", "ICudaEngine.get_tensor_mode",
        "ICudaEngine.get_tensor_name", "ICudaEngine.get_tensor_profile_shape",
        "ICudaEngine.get_tensor_shape", "ICudaEngine.num_io_tensors",
        "ICudaEngine.num_optimization_profiles", "IExecutionContext.execute_async_v3",
        "IExecutionContext.profiler", "IExecutionContext.set_device_memory",
        "IExecutionContext.set_input_shape", "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.set_tensor_address",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "Runtime.deserialize_cuda_engine", "TensorIOMode.INPUT", "TensorIOMode.OUTPUT", "nptype",
    }  # fmt: skip
    only_rtx = {
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "DynamicShapesKernelSpecializationStrategy.LAZY",
        "EngineInvalidityDiagnostics.__members__", "EngineValidity.INVALID",
        "EngineValidity.SUBOPTIMAL", "IRuntimeCache.deserialize", "IRuntimeCache.serialize",
        "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache", "Runtime.engine_header_size",
        "Runtime.get_engine_validity",
    }  # fmt: skip
    assert recorder.used & only_rtx == (only_rtx if api.module == RTX else set())


@pytest.mark.parametrize("api", MODULES, indirect=True)
def test_every_enum_by_name_has_its_members(api: Api) -> None:
    """Names that are looked up by a text from a file."""
    for kind in (*nodes.WORDS, "CONSTANT", "ELEMENTWISE"):
        assert f"LayerType.{kind}" in api.names
    for dtype in ("FLOAT", "HALF", "INT8", "UINT8", "INT64"):
        assert f"DataType.{dtype}" in api.names
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in api.names or api.module == RTX


SUBCLASS_PROBE = """
import importlib, inspect, json, sys
from rtresnet.builder import engine
from rtresnet.runtime import profilers
from rtresnet.runtime.trt_plan import ErrorLog, logger
trt = importlib.import_module(sys.argv[1])
made = {
    "ILogger": [logger(trt, ErrorLog()), engine.make_log(trt)],
    "IProgressMonitor": [engine.make_monitor(trt, print)],
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
from rtresnet.runtime.trt_plan import ErrorLog, logger
trt = trt_loading.load_tensorrt(sys.argv[1])
errors = ErrorLog()
log = engine.make_log(trt)
for kind, logged, reason in (
    ("Builder", log, log.reason), ("Runtime", logger(trt, errors), errors.take)
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
