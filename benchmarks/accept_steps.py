"""The steps of accept_gpu.py. Each runs in a process of its own; see `STEPS` at the end.

A step imports what it needs when it runs, so that a machine without some package still runs the
other steps. What a step needs of another one is a file: a step can be repeated alone with --only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core import hardware
from rtresnet.core.errors import RtresnetError
from rtresnet.core.isolated import StepFailed, StepSkipped

ROOT = Path(__file__).resolve().parent.parent
BUILDERS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # as --builder takes it: module
PRECISIONS = ("fp32", "fp16", "int8")
INPUT = "images"  # as `export` names it
BATCHES = (1, 8, 33, 70)
ALTERNATING = (1, 8, 1, 33, 8, 1, 70, 1)
# Norm of the difference to the CPU's logits over their norm: the same arithmetic, in another order.
BOUNDS = {"fp32": 1e-2, "fp16": 1e-2, "int8": 0.1}
SAME = 1e-3  # between two runs of the same plan
LEAK = 1 << 20  # bytes in all calls
LIBRARIES = re.compile(r"(libcuda|libcudart|libcublas|libcudnn|libnv|libtensorrt|libonnxruntime)")
PACKAGES = (
    "rtresnet", "numpy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-python", "cuda-bindings", "pycuda",
    "nvidia-ml-py", "nvidia-cudnn-cu13", "nvidia-cublas",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the steps of one run share.

    Attributes:
        out: Absolute path of the run's folder.
        model: The net that is exported and built.
        calls: Calls that the memory check makes.
        keep_logs: Whether TensorRT's verbose log is written to `out`/logs.
    """

    out: Path
    model: str
    calls: int
    keep_logs: bool

    def onnx(self, precision: str) -> Path:
        """Return the path that `export` writes."""
        suffix = "" if precision == "fp32" else f"-{precision}"
        return self.out / "engines" / f"{self.model}{suffix}.onnx"

    def plan(self, builder: str, precision: str) -> Path:
        """Return the path that `build` writes."""
        return self.out / "engines" / f"{self.model}-{precision}-{builder}.plan"

    def existing(self, path: Path) -> Path:
        """Return the path, or StepSkipped."""
        if not path.exists():
            raise StepSkipped(f"{path.name} is missing: an earlier step writes it")
        return path


# ---- the machine


def describe_machine(context: Context) -> dict[str, Any]:
    """Return driver, GPUs, packages and environment."""
    from rtresnet.workflows import doctor_gpu

    names = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "RTRESNET_CUDA")
    return doctor_gpu.check_driver() | {
        "cpu": hardware.cpu(),
        "versions": hardware.versions(PACKAGES),
        "commit": hardware.commit(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def import_library(context: Context, module: str) -> dict[str, Any]:
    """Return version and loaded shared libraries."""
    loaded = importlib.import_module(module)
    data: dict[str, Any] = {"version": getattr(loaded, "__version__", None)}
    if module == "onnxruntime":
        if hasattr(loaded, "preload_dlls"):
            loaded.preload_dlls()
        data["providers"] = loaded.get_available_providers()
    if module == "torch":
        data["cuda"] = loaded.version.cuda
        data["available"] = loaded.cuda.is_available()
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if "/" in line}
    data["libraries"] = sorted(path for path in paths if LIBRARIES.match(Path(path).name))
    return data


def check_cuda(context: Context) -> dict[str, Any]:
    """Test every CUDA operation."""
    from rtresnet.workflows import doctor_gpu

    return doctor_gpu.check_cuda()


# ---- training and ONNX Runtime


def train_on_gpu(context: Context, compiled: bool) -> dict[str, Any]:
    """Measure the training speed of ResNet-50 at 224 pixels in bf16."""
    import torch
    from train_gpu import throughput

    if not torch.cuda.is_available():
        raise StepSkipped(f"torch {torch.__version__} sees no GPU")
    rates = {batch: throughput("cuda", batch, 20, 224, compiled=compiled) for batch in (64, 256)}
    return {"model": "resnet50", "size": 224, "precision": "bf16", "images_per_second": rates}


def run_cli(*arguments: str) -> None:
    """Run a command of rtresnet in this process."""
    from rtresnet.cli.main import main

    code = main(list(arguments))
    if code:
        raise StepFailed(f"rtresnet {arguments[0]} ended with exit code {code}; see stderr", {})


def export(context: Context) -> dict[str, Any]:
    """Export ONNX files in three precisions."""
    os.chdir(context.out)  # engines/ and calib/ are relative
    run_cli("export", "--model", context.model, "--weights", "untrained", "--fp32", "--fp16",
            "--int8", "--calib", "synthetic:64", "--no-plan")  # fmt: skip
    return {precision: context.onnx(precision).stat().st_size for precision in PRECISIONS}


def run_onnx_on_gpu(context: Context, precision: str) -> dict[str, Any]:
    """Compare ONNX Runtime's CUDA provider with its CPU provider."""
    import onnxruntime

    from rtresnet import load

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise StepSkipped(f"onnxruntime {onnxruntime.__version__} has no CUDA provider")
    source = context.existing(context.onnx(precision))
    with load(source, provider="cuda") as session:
        return compare_with_cpu(session, source, precision)


# ---- plans


def target_of(builder: str) -> str | None:
    """Return the value for --target; StepSkipped if TensorRT-RTX does not support this GPU."""
    from rtresnet.builder.targets import RTX_TARGETS

    if builder != "rtx":
        return None
    here = hardware.gpus()[0].target
    if here not in RTX_TARGETS:
        raise StepSkipped(f"TensorRT-RTX has no target {here}; it has {', '.join(RTX_TARGETS)}")
    return here


def build_plan(context: Context, builder: str, precision: str) -> dict[str, Any]:
    """Build one plan; return its attestation and what TensorRT reads from its header."""
    source, plan = context.existing(context.onnx(precision)), context.plan(builder, precision)
    target, record = target_of(builder), context.out / "build.json"
    arguments = ["build", str(source), "--builder", builder, "--batch", "1:8:32", "--out",
                 str(plan), "--json", str(record)]  # fmt: skip
    module = importlib.import_module(BUILDERS[builder])
    with recorded_log(module, context, plan.stem + "-build") as complaints:
        run_cli(*arguments, *(["--target", target] if target else []))
    result = json.loads(record.read_text())["result"]
    record.unlink()
    fields = ("bytes", "version", "targets", "seconds", "attested")
    data = {name: result.get(name) for name in fields} | {"complaints": complaints}
    if hasattr(module.Runtime, "get_engine_validity"):
        runtime = module.Runtime(module.Logger(module.Logger.WARNING))
        validity, bits = runtime.get_engine_validity(
            plan.read_bytes()[: runtime.engine_header_size]
        )
        data["validity"], data["diagnostics"] = validity.name, int(bits)
    layers = plan.with_name(plan.name + ".layers.json")
    if layers.exists():
        shutil.copy(layers, fixtures(context) / layers.name)
    return data


@contextlib.contextmanager
def recorded_log(module: Any, context: Context, name: str) -> Iterator[list[str]]:
    """Collect warnings and errors of every logger derived from the module's ILogger.

    The verbose log goes to logs/NAME.tensorrt.txt where it is kept.
    """
    complaints: list[str] = []
    base = module.ILogger
    worst = ("INTERNAL_ERROR", "ERROR", "WARNING")
    folder = context.out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(folder / f"{name}.tensorrt.txt", "w")) if (
            context.keep_logs
        ) else None  # fmt: skip

        def note(severity: Any, message: str) -> None:
            if severity.name in worst and len(complaints) < 20:
                complaints.append(f"{severity.name}: {message.strip()[:300]}")
            if stream:
                stream.write(f"[{severity.name}] {message}\n")
                stream.flush()  # what it wrote last before a crash counts

        class Recorded(base):  # type: ignore[misc]
            def __init_subclass__(cls, **options: Any) -> None:
                super().__init_subclass__(**options)
                original = cls.log

                def log(self: Any, severity: Any, message: str) -> None:
                    note(severity, message)
                    original(self, severity, message)

                cls.log = log

        module.ILogger = Recorded
        try:
            yield complaints
        finally:
            module.ILogger = base


def fixtures(context: Context) -> Path:
    """Return the folder of files that later tests on a CPU read."""
    folder = context.out / "fixtures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def relative_error(got: Any, expected: Any) -> float:
    """Return norm of the difference over the norm of the reference."""
    import numpy as np

    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def compare_with_cpu(session: Any, source: Path, precision: str) -> dict[str, Any]:
    """Compare logits of batches with ONNX Runtime's CPU provider; StepFailed if they differ.

    Args:
        session: What is checked.
        source: The ONNX file it was made from.
        precision: Sets the bound.
    """
    import numpy as np

    from rtresnet import load

    with load(source, provider="cpu") as reference:
        images = reference.example(max(BATCHES))
        expected = reference.logits(images)
    errors, problems = {}, []
    for count in BATCHES:
        got = session.logits(images[:count])
        errors[count] = relative_error(got, expected[:count])
        if not errors[count] <= BOUNDS[precision]:
            problems.append(f"batch {count} differs from the CPU by {errors[count]:.2g}")
    for count in ALTERNATING:
        first = max(BATCHES) - count  # other images than before
        error = relative_error(session.logits(images[first:]), expected[first:])
        if not error <= BOUNDS[precision]:
            problems.append(f"alternating batches: batch {count} differs by {error:.2g}")
    if not np.array_equal(session.logits(images[:8]), session.logits(images[:8])):
        problems.append("the same images twice give different logits")
    data = {"errors": errors, "described": session.describe()}
    if problems:
        raise StepFailed("; ".join(problems), data)
    return data


def run_plan(context: Context, builder: str, precision: str) -> dict[str, Any]:
    """Compare a plan with the CPU, with and without graphs."""
    from rtresnet import load

    plan = context.existing(context.plan(builder, precision))
    module = importlib.import_module(BUILDERS[builder])
    data: dict[str, Any] = {}
    problems = []
    with recorded_log(module, context, plan.stem + "-run") as complaints:
        for name, graphs in (("no graphs", False), ("graphs", None)):
            captured = None
            try:
                with load(plan, graphs=graphs) as session:
                    captured = getattr(session.backend, "graphs", None)
                    data[name] = compare_with_cpu(session, context.onnx(precision), precision)
            except (RtresnetError, StepFailed) as error:
                data[name] = getattr(error, "data", {})
                problems.append(f"{name}: {error}")
            data[name]["captured"] = captured
    data["complaints"] = complaints
    if problems:
        raise StepFailed("; ".join(problems), data)
    return data


def run_threads(context: Context, builder: str) -> dict[str, Any]:
    """Test that threads on two contexts get their own logits."""
    from concurrent.futures import ThreadPoolExecutor

    from rtresnet import load

    with load(context.existing(context.plan(builder, "fp16")), contexts=2) as session:
        images = session.example(32)
        batches = [images[: 3 + index] for index in range(8)]
        expected = [session.logits(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(session.logits, batches * 20))
        error = max(relative_error(a, b) for a, b in zip(got, expected * 20, strict=True))
    if not error <= SAME:
        raise StepFailed(f"logits of threads differ by {error:.2g}", {"error": error})
    return {"calls": len(got), "error": error}


def run_torch_tensors(context: Context, builder: str) -> dict[str, Any]:
    """Test torch tensors in and out on the GPU."""
    import torch

    from rtresnet import load

    if not torch.cuda.is_available():
        raise StepSkipped(f"torch {torch.__version__} sees no GPU")
    errors = {}
    with load(context.existing(context.plan(builder, "fp16"))) as session:
        images = session.example(max(BATCHES))
        for count in BATCHES:
            expected = session.logits(images[:count])
            tensor = torch.zeros(expected.shape[:0] + images[:count].shape, device="cuda")
            tensor.copy_(torch.from_numpy(images[:count]))  # still under way in the call
            out = torch.zeros(expected.shape, device="cuda")
            returned = session.backend.infer(tensor)
            session.backend.infer(tensor, out=out)
            errors[count] = max(
                relative_error(returned, expected), relative_error(out.cpu().numpy(), expected)
            )
    if not max(errors.values()) <= SAME:
        raise StepFailed("logits of torch tensors differ from those of numpy", {"errors": errors})
    return {"errors": errors}


def free_memory() -> int:
    """Free bytes of the first GPU."""
    from rtresnet.runtime.cuda import open_cuda

    cuda = open_cuda()
    with cuda.active():
        return cuda.memory()[0]


def run_close(context: Context, builder: str) -> dict[str, Any]:
    """Test that closing twice works, a later call is an error, and memory is freed."""
    from rtresnet import InputError, load

    plan, free = context.existing(context.plan(builder, "fp16")), []
    for _ in range(5):
        session = load(plan)
        images = session.example(40)
        session(images)
        session.close()
        session.close()
        free.append(free_memory())
    data = {"free": free}
    with contextlib.suppress(InputError):
        session(images)
        raise StepFailed("a closed session computed something", data)
    if free[1] - free[-1] >= LEAK:
        raise StepFailed(f"{free[1] - free[-1]} bytes did not come back in 3 rounds", data)
    return data


def run_many_calls(context: Context, builder: str) -> dict[str, Any]:
    """Measure memory after thousands of calls of changing sizes."""
    from rtresnet import load

    with load(context.existing(context.plan(builder, "fp16"))) as session:
        images = session.example(32)
        for count in (1, 8, 32) * 3:
            session(images[:count])
        before = free_memory()
        for index in range(context.calls):
            session(images[: (1, 8, 32)[index % 3]])
        lost = before - free_memory()
    data = {"calls": context.calls, "lost_bytes": lost}
    if lost >= LEAK:
        raise StepFailed(f"{lost} bytes are gone after {context.calls} calls", data)
    return data


def record_layers(context: Context, builder: str, precision: str) -> dict[str, Any]:
    """Save what the inspector and IProfiler report, by TensorRT alone."""
    plan = context.existing(context.plan(builder, precision))
    trt = importlib.import_module(BUILDERS[builder])
    with recorded_log(trt, context, plan.stem + "-layers") as complaints:
        try:
            return _record_layers(trt, plan, fixtures(context)) | {"complaints": complaints}
        except StepFailed as failed:
            raise StepFailed(f"{failed}: {' '.join(complaints)}", {}) from None


def _record_layers(trt: Any, plan: Path, folder: Path) -> dict[str, Any]:
    from rtresnet.runtime.cuda import CudaPython

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Do nothing: `recorded_log` keeps the message."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.layers: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, float(ms)))

    cuda = CudaPython(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda.active())
        log = Log()
        runtime = made(trt.Runtime(log), "Runtime")
        engine = made(runtime.deserialize_cuda_engine(plan.read_bytes()), "engine")
        execution = made(engine.create_execution_context(), "context")
        inspector = engine.create_engine_inspector()
        without_shapes = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        stream = cuda.stream()
        stack.callback(cuda.destroy_stream, stream)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for name in names:
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                shape = (8, *tuple(engine.get_tensor_shape(name))[1:])
                made(execution.set_input_shape(name, shape), f"the shape of {name}")
        for name in names:
            count = math.prod(execution.get_tensor_shape(name))
            size = max(256, count * trt.nptype(engine.get_tensor_dtype(name))().itemsize)
            memory = cuda.allocate(size)
            stack.callback(cuda.free, memory)
            cuda.zero(memory, size, stream)
            made(execution.set_tensor_address(name, memory), f"the address of {name}")
        inspector.execution_context = execution
        layers = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        capturable = None
        if hasattr(execution, "is_stream_capturable"):
            capturable = bool(execution.is_stream_capturable(stream))
        profiler = Profiler()
        execution.profiler = profiler
        for _ in range(2):
            profiler.layers = []
            made(execution.execute_async_v3(stream), "execute_async_v3")
            cuda.synchronize(stream)
        del inspector, execution, engine, runtime  # in this order, while the device is current
    for kind, text in (
        ("inspector", layers),
        ("inspector-without-shapes", without_shapes),
        ("profiler", json.dumps([{"name": name, "ms": ms} for name, ms in profiler.layers])),
    ):
        (folder / f"{plan.stem}.{kind}.json").write_text(text)
    return {
        "version": trt.__version__,
        "profiled": len(profiler.layers),
        "ms": sum(ms for _, ms in profiler.layers),
        "inspector_bytes": len(layers),
        "is_stream_capturable": capturable,
    }


def made(returned: Any, what: str) -> Any:
    """Return the result of a TensorRT call; StepFailed for None and False."""
    if returned is None or returned is False:
        raise StepFailed(f"TensorRT returned {returned} for {what}", {})
    return returned


TRTEXEC = re.compile(r"(Latency|GPU Compute Time): .*?median = ([\d.]+) ms")


def compare_latency(context: Context, builder: str, precision: str) -> dict[str, Any]:
    """Compare our latency with trtexec's if that is installed."""
    plan, record = context.existing(context.plan(builder, precision)), context.out / "bench.json"
    run_cli("bench", str(plan), "--batch", "1,8,32", "--seconds", "2", "--json", str(record))
    result = json.loads(record.read_text())["result"]
    record.unlink()
    fields = ("n", "median", "p99", "images_per_second")
    ours = {
        entry["batch"]: {name: entry["latency"][name] for name in fields}
        | {name: part["median"] for name, part in entry["parts"].items()}
        for entry in result["results"]
    }
    data: dict[str, Any] = {"ours": ours, "remarks": result["environment"]["remarks"]}
    program = shutil.which("trtexec" if builder == "tensorrt" else "tensorrt_rtx")
    data["trtexec"] = program or "not in PATH"
    if program:
        data["theirs"] = {batch: run_trtexec(program, plan, batch) for batch in (1, 8, 32)}
    return data


def run_trtexec(program: str, plan: Path, batch: int) -> dict[str, float]:
    """Return median milliseconds, by name."""
    from rtresnet import load

    with load(plan) as session:
        shape = "x".join(map(str, (batch, *session.image_shape)))
    command = [program, f"--loadEngine={plan}", f"--shapes={INPUT}:{shape}", "--duration=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    if done.returncode:
        raise StepFailed(f"{Path(program).name} ended with exit code {done.returncode}", {})
    return {name: float(value) for name, value in TRTEXEC.findall(done.stdout)}


def run_tests(context: Context) -> dict[str, Any]:
    """Run `pytest -m gpu` with its output in logs/pytest.txt."""
    if not (ROOT / "tests").is_dir():
        raise StepSkipped("the tests are not here: run it from a checkout")
    log = context.out / "logs" / "pytest.txt"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "pytest", "-m", "gpu", "-rs",
             "-p", "no:cacheprovider", str(ROOT / "tests")],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    lines = log.read_text(errors="replace").splitlines()
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    data = {"summary": lines[-1] if lines else "", "failures": failures[:40]}
    if done.returncode:
        raise StepFailed(f"pytest ended with exit code {done.returncode}", data)
    return data


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        name: In the report and in --only.
        run: Does it.
        timeout: Seconds.
        needs: Modules without which it is skipped.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    timeout: float = 120.0
    needs: tuple[str, ...] = ()


CLI = ("click", "rich", "PIL")
RUN = ("numpy", "onnxruntime", "cuda.bindings")


def _steps() -> Iterator[Step]:
    part = functools.partial
    yield Step(name="machine", run=describe_machine)
    for module in ("cuda.bindings.driver", "torch", "onnxruntime", *BUILDERS.values()):
        needs = (module.removesuffix(".driver"),)
        yield Step(name=f"import-{module}", run=part(import_library, module=module), needs=needs)
    yield Step(name="cuda", run=check_cuda, needs=("numpy", "cuda.bindings"))
    for name, compiled in (("eager", False), ("compiled", True)):
        yield Step(
            name=f"train-{name}", run=part(train_on_gpu, compiled=compiled),
            needs=("numpy", "torch", "PIL"), timeout=400,
        )  # fmt: skip
    yield Step(name="export", run=export, needs=(*CLI, "torch", "onnx", "onnxruntime"), timeout=300)
    for precision in PRECISIONS:
        yield Step(
            name=f"onnxruntime-cuda-{precision}", run=part(run_onnx_on_gpu, precision=precision),
            needs=("numpy", "onnxruntime"),
        )  # fmt: skip
    for builder, module in BUILDERS.items():
        here = (*RUN, module)
        for precision in PRECISIONS:
            each = {"builder": builder, "precision": precision}
            names = f"{builder}-{precision}"
            yield Step(
                name=f"build-{names}", run=part(build_plan, **each),
                needs=(*CLI, "onnx", module), timeout=600,
            )  # fmt: skip
            yield Step(name=f"run-{names}", run=part(run_plan, **each), needs=here, timeout=300)
            yield Step(name=f"layers-{names}", run=part(record_layers, **each), needs=here[2:])
            yield Step(
                name=f"latency-{names}", run=part(compare_latency, **each), needs=(*CLI, *here)
            )
        runs: dict[str, Callable[..., dict[str, Any]]] = {
            "threads": run_threads, "torch": run_torch_tensors, "close": run_close,
            "calls": run_many_calls,
        }  # fmt: skip
        for name, function in runs.items():
            yield Step(
                name=f"{name}-{builder}", run=part(function, builder=builder), timeout=300,
                needs=(*here, "torch") if name == "torch" else here,
            )  # fmt: skip
    yield Step(name="pytest", run=run_tests, needs=("pytest",), timeout=1800)


STEPS = tuple(_steps())
