"""A detector's plan on a fake GPU, computed by ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import Bench, FakeContext, FakeCuda, FakeEngine

import rtresnet
from rtresnet.core import artifacts, detector_preprocess
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection, Plan, Profile, Sidecar, Weights
from rtresnet.detection import export
from rtresnet.detection import net as nets
from rtresnet.models import checkpoint, zoo
from rtresnet.runtime.trt_detector import TrtDetector

ort = pytest.importorskip("onnxruntime")
SPEC = Detection(
    canvas=(64, 96), anchors=(16.0, 32.0), pool=7, width=0.125, candidates=60, regions=12,
    detections=8, shorter=64, longer=96, least_score=0.01,
)  # fmt: skip
CLASSES = ("a", "b", "c")


class DetectorContext(FakeContext):
    def execute_async_v3(self, stream_handle: int) -> bool:
        engine: Any = self.engine
        if not engine.answer("execute_async_v3", True):
            return False
        assert self.scratch and set(self.addresses) == set(engine.shapes)
        addresses, device = dict(self.addresses), engine.device

        def work() -> None:
            feed = {}
            for name in engine.given:
                shape = engine.shapes[name]
                raw = device.at(addresses[name], 4 * int(np.prod(shape)))
                feed[name] = raw.view(np.float32).reshape(shape).copy()
            for name, values in zip(
                engine.outputs, engine.session.run(engine.outputs, feed), strict=True
            ):
                device.at(addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)

        device.enqueue("execute", stream_handle, work)
        return True


class DetectorEngine(FakeEngine):
    """A detector's ONNX file: two inputs and four outputs of fixed shapes."""

    context = DetectorContext
    given = ("images", "extent")

    def __init__(self, device: Any, session: Any) -> None:
        super().__init__(device)
        self.session = session
        tensors = (*session.get_inputs(), *session.get_outputs())
        self.shapes = {tensor.name: tuple(tensor.shape) for tensor in tensors}
        self.outputs = [tensor.name for tensor in session.get_outputs()]
        self.profiles = [(1, 1, 1)]

    @property
    def num_io_tensors(self) -> int:
        return len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return [*self.outputs, *self.given][index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.given else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return "int64" if name == "labels" else "float32"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


@pytest.fixture(scope="module")
def session() -> Any:
    torch.manual_seed(0)
    net = nets.build(zoo.spec("resnet18"), SPEC, len(CLASSES)).eval()
    with torch.no_grad():
        net.score.bias[1:] += 1.0
    model = export.to_onnx(net, name="x").SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, session: Any) -> Iterator[Bench]:
    made = Bench(monkeypatch, tmp_path, DetectorEngine(FakeCuda(), session))
    data = made.path.read_bytes()
    artifacts.publish(
        made.path,
        lambda path: path.write_bytes(data),
        Sidecar(
            kind="plan", file=made.path.name, input=Preprocess.for_size(64), precision="fp32",
            model=checkpoint.model_of(zoo.spec("resnet18"), CLASSES), detection=SPEC,
            weights=Weights(origin="untrained"),
            plan=Plan(builder="tensorrt_rtx", version="1.7.1.116", targets=("sm_89",),
                      profiles=(Profile(min=1, opt=1, max=1),), seconds=1.0),
        ),
    )  # fmt: skip
    yield made
    assert made.cuda.live == [], "not everything was given back"


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed).standard_normal((1, 3, 64, 96)).astype(np.float32)
    return values, np.array([[60, 90]], np.float32)


def test_load_plan_of_a_detector_detects(bench: Bench, session: Any) -> None:
    with rtresnet.load(bench.path) as loaded:
        assert isinstance(loaded.backend, TrtDetector)
        result = loaded.detect(image())
        assert len(result) > 0 and (result.boxes <= [70, 50, 70, 50]).all()
        assert loaded.classes == CLASSES and loaded.batch == 1
        for seed in range(3):  # nothing of one call is left in the next
            feed = inputs(seed)
            outputs = loaded.backend.detect(*feed)
            expected = session.run(None, dict(zip(("images", "extent"), feed, strict=True)))
            for name, values in zip(detector_preprocess.OUTPUTS, expected, strict=True):
                assert np.array_equal(outputs[name], values) and outputs[name].dtype == values.dtype
        with pytest.raises(InputError, match="logits"):
            loaded(feed[0])
    with pytest.raises(InputError, match="closed"):
        loaded.backend.detect(*feed)


def test_detect_wrong_inputs_are_refused(bench: Bench) -> None:
    images, extent = inputs()
    with rtresnet.load(bench.path) as loaded:
        backend: Any = loaded.backend
        for wrong in (
            (images[..., :32], extent), (images.astype(np.float64), extent), (images, extent[0]),
        ):  # fmt: skip
            with pytest.raises(InputError, match="the plan takes"):
                backend.detect(*wrong)
        assert backend.detect(images, extent)["boxes"].shape == (1, 8, 4)


@pytest.mark.parametrize(
    "call",
    ["create_execution_context", "set_optimization_profile_async", "set_tensor_address",
     "create_runtime_cache"],
)  # fmt: skip
def test_load_failing_call_is_named_and_leaves_nothing(bench: Bench, call: str) -> None:
    bench.fail(call)
    with pytest.raises(UnavailableError, match=call):
        rtresnet.load(bench.path)


def test_detect_failing_execution_is_named_and_the_next_call_works(bench: Bench) -> None:
    with rtresnet.load(bench.path) as loaded:
        backend: Any = loaded.backend
        bench.fail("execute_async_v3")
        with pytest.raises(UnavailableError, match="execute_async_v3"):
            backend.detect(*inputs())
        assert backend.detect(*inputs())["boxes"].shape == (1, 8, 4)


def test_load_little_memory_is_an_error_in_megabytes(bench: Bench) -> None:
    bench.cuda.room = 1000
    with pytest.raises(UnavailableError, match="MB"):
        rtresnet.load(bench.path)


def test_load_engine_that_is_no_detector_is_refused(bench: Bench) -> None:
    engine: Any = bench.engine
    engine.shapes = engine.shapes | {"images": (-1, 3, 64, 96)}
    with pytest.raises(ArtifactError, match="fixed shapes"):
        rtresnet.load(bench.path)


def test_load_graphs_are_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match="CUDA graphs"):
        rtresnet.load(bench.path, graphs=True)


def test_load_with_several_contexts_is_refused(bench: Bench) -> None:
    with pytest.raises(InputError) as caught:
        rtresnet.load(bench.path, contexts=2)
    assert caught.value.fix and "--contexts" in caught.value.fix


def test_detect_from_several_threads_and_close_twice(bench: Bench) -> None:
    with rtresnet.load(bench.path) as loaded:
        backend: Any = loaded.backend
        alone = [backend.detect(*inputs(seed)) for seed in range(4)]
        results: dict[int, dict[str, np.ndarray]] = {}

        def call(seed: int) -> None:
            for _ in range(3):
                results[seed] = backend.detect(*inputs(seed))

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for seed, outputs in enumerate(alone):
            for name, values in outputs.items():
                assert np.array_equal(results[seed][name], values)
        loaded.close()


def test_kernels_are_kept_after_a_call(bench: Bench) -> None:
    cache = Path(f"{bench.path}.cache")
    with rtresnet.load(bench.path):
        pass
    assert not cache.exists()
    with rtresnet.load(bench.path) as loaded:
        loaded.detect(image())
    assert cache.read_bytes().startswith(b"kernels")


def test_batcher_of_a_detectors_session_fails_its_calls_only(bench: Bench) -> None:
    with rtresnet.load(bench.path) as loaded:
        with rtresnet.Batcher(loaded, max_batch=1) as batcher:
            error = batcher.submit(inputs()[0][0]).exception(30)
        assert isinstance(error, InputError) and "detector" in str(error)
        assert loaded.backend.timings() == {}
        for name in ("pinned", "pipeline", "timeline", "watch"):
            assert not hasattr(loaded.backend, name)
