"""Loading, failing and reloading models."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtresnet
from rtresnet.core.errors import InputError
from rtresnet.runtime.session import Session
from rtresnet.serving import model as model_module
from rtresnet.serving import protocol
from rtresnet.serving import repository as module
from rtresnet.serving.model import ServedModel
from rtresnet.serving.protocol import InferRequest, InferTensor, RequestError
from rtresnet.serving.repository import Repository


class Opened:
    """Loads sessions and counts those that are open."""

    def __init__(self) -> None:
        self.open = 0
        self.load: Callable[[Path], Session] = self._load

    def _load(self, path: Path) -> Session:
        session = rtresnet.load(path, provider="cpu")
        backend, close = session.backend, session.backend.close
        self.open += 1

        def closed() -> None:
            self.open -= 1
            close()

        backend.close = closed  # type: ignore[method-assign]
        return session


@pytest.fixture
def opened() -> Opened:
    return Opened()


CONFIG = rtresnet.ServeConfig(max_batch=4)


def test_load_all_failure_closes_the_models_before_it(
    models: Path, tmp_path: Path, opened: Opened
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    repository = Repository([models / "resnet8.onnx", broken], opened.load, CONFIG)
    with pytest.raises(InputError):
        repository.load_all()
    assert opened.open == 0


def test_served_model_without_a_batcher_is_closed(
    models: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise rtresnet.UnavailableError("not enough pinned memory")

    monkeypatch.setattr(model_module, "Batcher", no_memory)
    with pytest.raises(rtresnet.UnavailableError, match="pinned"):
        Repository([models / "resnet8.onnx"], opened.load, CONFIG).load_all()
    assert opened.open == 0


def put(source: Path, path: Path) -> None:
    """Replace a model and its sidecar."""
    for suffix in ("", ".json"):
        shutil.copy(f"{source}{suffix}", f"{path}{suffix}.new")
    for suffix in ("", ".json"):
        Path(f"{path}{suffix}.new").replace(f"{path}{suffix}")


def test_watch_cancelled_during_a_reload_leaves_no_version_open(
    models: Path, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    path, loading, go_on = tmp_path / "net.onnx", threading.Event(), threading.Event()
    put(models / "resnet8.onnx", path)

    def load(file: Path) -> Session:
        loading.set()
        assert go_on.wait(30)
        return opened.load(file)

    go_on.set()
    repository = Repository([path], load, CONFIG)
    repository.load_all()
    loading.clear()
    go_on.clear()

    async def run() -> None:
        watching = asyncio.create_task(repository.watch())
        put(models / "resnet8-int8.onnx", path)
        assert await asyncio.to_thread(loading.wait, 30)
        watching.cancel()
        await asyncio.wait([watching])
        go_on.set()

    asyncio.run(run())
    repository.close()
    assert opened.open == 0


def test_watch_keeps_watching_after_a_model_failed_to_close(
    models: Path, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    path = tmp_path / "net.onnx"
    put(models / "resnet8.onnx", path)
    repository = Repository([path], opened.load, CONFIG)
    repository.load_all()
    first = repository.get("net")

    def failing() -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(first, "close", failing)

    async def replaced(name: str) -> None:
        before = repository.get("net")
        put(models / name, path)
        while repository.get("net") is before:
            await asyncio.sleep(0.01)

    async def run() -> None:
        watching = asyncio.create_task(repository.watch())
        await asyncio.wait_for(replaced("resnet8-int8.onnx"), 30)
        await asyncio.wait_for(replaced("resnet8.onnx"), 30)
        watching.cancel()

    asyncio.run(run())
    assert "the device is lost" in caplog.text
    monkeypatch.undo()
    repository.close()
    first.close()
    assert opened.open == 0


def test_close_closes_every_model_and_reports_the_failure(
    models: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [models / "resnet8.onnx", models / "resnet8-int8.onnx"]
    repository = Repository(sources, opened.load, CONFIG)
    repository.load_all()
    for model in repository.all():

        def failing(model: ServedModel = model) -> None:
            type(model.batcher).close(model.batcher)
            raise RuntimeError(model.name)

        monkeypatch.setattr(model.batcher, "close", failing)
    with pytest.raises(RuntimeError):
        repository.close()
    assert opened.open == 0


def test_serve_config_queue_below_the_batch_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        rtresnet.ServeConfig(queue=8)
    assert caught.value.fix is not None and "--queue 32" in caught.value.fix
    assert rtresnet.ServeConfig(queue=8, max_batch=8).queue_limit == 8
    assert rtresnet.ServeConfig().queue_limit == 1024
    assert rtresnet.ServeConfig(max_batch=4096).queue_limit == 4096


def request_of(count: int) -> InferRequest:
    images = np.ones((count, 3, 32, 32), np.float32)
    return InferRequest([InferTensor("images", "FP32", [count, 3, 32, 32], images)])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_infer_with_a_full_queue_is_503_and_an_expired_request_is_not_computed(
    models: Path,
) -> None:
    gate, sizes = threading.Event(), list[int]()

    def load(path: Path) -> Session:
        session = rtresnet.load(path, provider="cpu")
        infer = session.backend.infer

        def gated(images: np.ndarray) -> Any:
            sizes.append(len(images))
            assert gate.wait(30)
            return infer(images)

        session.backend.infer = gated  # type: ignore[method-assign]
        return session

    async def run(model: ServedModel) -> None:
        queue = model.batcher._queue
        computed = asyncio.create_task(model.infer(request_of(4), 30))
        await until(lambda: sizes == [4])
        gathered = asyncio.create_task(model.infer(request_of(4), 30))
        await asyncio.sleep(0)
        await until(lambda: not queue)
        expired = asyncio.create_task(model.infer(request_of(4), 0.05))
        await asyncio.sleep(0)
        assert len(queue) == 4
        with pytest.raises(RequestError) as full:
            await model.infer(request_of(1), 30)
        assert full.value.status == 503
        with pytest.raises(RequestError) as late:
            await expired
        assert late.value.status == 504
        last = asyncio.create_task(model.infer(request_of(3), 30))
        await asyncio.sleep(0)
        gate.set()
        answers = await asyncio.gather(computed, gathered, last)
        assert [len(answer["logits"]) for answer in answers] == [4, 4, 3]
        assert sizes == [4, 4, 3]

    config = rtresnet.ServeConfig(max_batch=4, queue=4)
    repository = Repository([models / "resnet8.onnx"], load, config)
    gate.set()  # for the self-check
    repository.load_all()
    gate.clear()
    sizes.clear()
    try:
        asyncio.run(asyncio.wait_for(run(repository.get("resnet8")), 60))
    finally:
        gate.set()
        repository.close()


@pytest.fixture
def division(tmp_path: Path) -> Path:
    """A net whose logits are x / x of the mean of each color: 1, or NaN for black images."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    net = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["images"], ["m"]),
         helper.make_node("Flatten", ["m"], ["f"]),
         helper.make_node("Div", ["f", "f"], ["logits"])],
        "net", [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", 3])],
    )  # fmt: skip
    path = tmp_path / "division.onnx"
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(net, opset_imports=[opset], ir_version=10), path)
    return path


@pytest.mark.parametrize(("value", "status"), [(0, 500), (np.nan, 400), (np.inf, 400), (1, 200)])
def test_infer_without_a_finite_answer_names_the_output_or_the_input(
    division: Path, value: float, status: int
) -> None:
    repository = Repository([division], lambda path: rtresnet.load(path), CONFIG)
    repository.load_all()
    data = np.full((2, 3, 8, 8), value, np.float32)
    data[1] = 1
    request = InferRequest([InferTensor("images", "FP32", [2, 3, 8, 8], data)])
    try:
        answer = asyncio.run(repository.get("division").infer(request, 30))
    except Exception as error:
        assert protocol.status_of(error) == status
        assert ("logits" if status == 500 else "images") in str(error)
    else:
        assert status == 200 and (answer["logits"] == 1).all()
    finally:
        repository.close()
