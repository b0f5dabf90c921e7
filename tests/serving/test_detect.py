"""A detector behind the server: encoded images, tensors over HTTP and gRPC, and the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

import rtresnet
from rtresnet.core import detector_preprocess
from rtresnet.detection import checkpoint
from rtresnet.detection.data import open_detection
from rtresnet.models import checkpoint as files
from rtresnet.serving.grpc_service import MESSAGES
from tests.browser import wait_for
from tests.serving.conftest import Server
from tests.serving.test_page import Browser, browser  # noqa: F401 - a fixture

NAME = "resnet18-detector"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector's file that is sure of the first class, whatever it sees."""
    folder = tmp_path_factory.mktemp("detector")
    config = rtresnet.TrainDetectorConfig(
        backbone="resnet18", data="shapes:4", epochs=1, batch=4, out=folder / "run",
        settings=("width=0.125", "shorter=64", "longer=64", "regions=12", "detections=8"),
    )  # fmt: skip
    best = rtresnet.train_detector(config).checkpoint
    loaded = checkpoint.load(best)
    loaded.state["score.bias"][1] += 5
    files.save(best, dataclasses.replace(loaded, measured={}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config_of = rtresnet.ExportConfig(precisions=("fp32",), canvas=(64, 96), plan=False)
        return Path(rtresnet.export(best, folder, config_of).path)


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"), path)
    yield running
    assert running.stop() == 0


def image(index: int, suffix: str = "PNG") -> tuple[np.ndarray, bytes]:
    pixels = open_detection("shapes:2", "test").read(index)[: 128 - 40 * index]
    out = BytesIO()
    Image.fromarray(pixels).save(out, suffix)
    return pixels, out.getvalue()


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(path: Path, pixels: np.ndarray, least: float) -> list[dict[str, Any]]:
    with rtresnet.load(path, provider="cpu") as session:
        result = session.detect(pixels)
        return [
            {"box": box.tolist(), "label": session.classes[label], "score": float(score)}
            for box, label, score in zip(result.boxes, result.labels, result.scores, strict=True)
            if score >= least
        ]


def test_detect_gives_boxes_in_pixels_of_the_image(server: Server, path: Path) -> None:
    pixels, data = image(1)
    status, answer = post(server, "/v1/detect", data)
    assert status == 200 and answer["model"] == NAME and answer["unsettled"] == [0]
    assert answer["sizes"] == [[88, 128]]
    (objects,) = answer["results"]
    required = expected(path, pixels, 0.5)
    assert len(objects) == len(required) > 0
    for one, other in zip(objects, required, strict=True):
        assert one["label"] == other["label"]
        assert one["box"] == pytest.approx(other["box"], abs=1e-2)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_detect_takes_several_images_and_a_least_score(server: Server, path: Path) -> None:
    pairs = [image(0), image(1)]
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{n}"; filename="{n}.png"\r\n\r\n'.encode()
        + data + b"\r\n"
        for n, (_, data) in enumerate(pairs)
    ]  # fmt: skip
    body, kind = b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"
    status, answer = post(server, "/v1/detect?least_score=0.05", body, **{"Content-Type": kind})
    assert status == 200 and answer["sizes"] == [[128, 128], [88, 128]]
    for objects, (pixels, _) in zip(answer["results"], pairs, strict=True):
        assert len(objects) == len(expected(path, pixels, 0.05))
    _, none = post(server, "/v1/detect?least_score=1", pairs[0][1])
    assert none["results"] == [[]]


@pytest.fixture(scope="module")
def tensors(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Two inputs on the canvas, their extents, and the outputs for each, stacked."""
    with rtresnet.load(path, provider="cpu") as session:
        assert session.detection is not None
        made = [
            detector_preprocess.to_canvas(image(n)[0], session.detection, session.preprocess)
            for n in (0, 1)
        ]
        backend: Any = session.backend
        answers = [backend.detect(*entry) for entry in made]
    names = ("boxes", "scores", "labels", "unsettled")
    stacked = {name: np.concatenate([answer[name] for answer in answers]) for name in names}
    images, extents = (np.concatenate(part) for part in zip(*made, strict=True))
    return images, extents, stacked


def request_of(images: np.ndarray, extent: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"name": "images", "datatype": "FP32", "shape": images.shape,
         "data": images.ravel().tolist()},
        {"name": "extent", "datatype": "FP32", "shape": extent.shape,
         "data": extent.ravel().tolist()},
    ]  # fmt: skip


def test_infer_takes_images_and_extents(server: Server, tensors: Any) -> None:
    images, extent, stacked = tensors
    inputs = request_of(images, extent)[::-1]  # by name, in any order
    status, answer = post(
        server, f"/v2/models/{NAME}/infer", json.dumps({"inputs": inputs}).encode()
    )
    assert status == 200, answer
    outputs = {entry["name"]: entry for entry in answer["outputs"]}
    assert list(outputs) == list(stacked)
    for name, values in stacked.items():
        assert outputs[name]["shape"] == list(values.shape)
        assert outputs[name]["data"] == pytest.approx(values.ravel().tolist(), abs=1e-3)


def test_infer_over_grpc_gives_the_same(server: Server, tensors: Any) -> None:
    images, extent, stacked = tensors
    message = MESSAGES["ModelInferRequest"](model_name=NAME)
    for name, values in (("images", images), ("extent", extent)):
        message.inputs.add(name=name, datatype="FP32", shape=values.shape)
        message.raw_input_contents.append(values.tobytes())
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        response = call(message)
    for entry, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        values = stacked[entry.name]
        result = np.frombuffer(raw, values.dtype).reshape(values.shape)
        assert np.allclose(result, values, atol=1e-3)


def test_metadata_names_both_inputs_and_the_task(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v2/models/{NAME}") as answer:
        record = json.load(answer)
    assert [entry["name"] for entry in record["inputs"]] == ["images", "extent"]
    assert record["inputs"][0]["shape"] == [-1, 3, 64, 96]
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/status") as answer:
        assert json.load(answer)["models"][0]["task"] == "detect"


def test_wrong_requests_are_refused_by_name(server: Server, tensors: Any) -> None:
    data = image(0)[1]
    for path, part in (
        ("/v1/classify", "/v1/detect"), ("/v1/detect?least_score=2", "least_score"),
        ("/v1/detect?least_score=nan", "least_score"),
    ):  # fmt: skip
        status, answer = post(server, path, data)
        assert status == 400 and part in answer["error"]
    assert post(server, "/v1/detect", b"no image")[0] == 400
    images, extent, _ = tensors
    right = request_of(images, extent)
    for inputs, part in (
        (right[:1], "images, extent"), ([right[0], right[0]], "extent"),
        ([right[0], right[1] | {"name": "size"}], "size"),
        (request_of(images, extent[:1]), "extent"), (request_of(images, extent * 0), "extent"),
        (request_of(images, extent + 1000), "extent"),
        (request_of(images, extent * np.nan), "JSON"),
        (request_of(images[..., :32], extent), "shape"),
    ):  # fmt: skip
        body = json.dumps({"inputs": inputs}).encode()
        status, answer = post(server, f"/v2/models/{NAME}/infer", body)
        assert status == 400 and part in answer["error"], (answer, part)
    body = json.dumps(
        {"inputs": right, "outputs": [{"name": "boxes", "parameters": {"classification": 2}}]}
    ).encode()
    status, answer = post(server, f"/v2/models/{NAME}/infer", body)
    assert status == 400 and "logits" in answer["error"]
    assert post(server, "/v1/detect", data)[0] == 200  # nothing of it hurt the server


@pytest.mark.slow
def test_page_draws_boxes(browser: Browser, server: Server, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "a.png").write_bytes(image(1)[1])
    browser.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    wait_for(lambda: NAME in (browser.evaluate("document.body.innerText") or ""))
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(tmp_path / "a.png")], nodeId=node)
    boxes = "document.querySelectorAll('#drop rect').length"
    wait_for(lambda: (browser.evaluate(boxes) or 0) > 0)
    assert "Objects" in browser.evaluate("document.querySelector('#answer').innerText")
    place = "JSON.stringify(document.querySelector('#drop {}').getBoundingClientRect())"
    picture, drawing = (json.loads(browser.evaluate(place.format(e))) for e in ("img", "svg"))
    for side in ("x", "y", "width", "height"):
        assert abs(picture[side] - drawing[side]) < 1
    shot = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    assert Image.open(BytesIO(shot)).size[0] > 300


def test_serve_checkpoint_of_a_detector_says_to_export_it(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rtresnet.cli.main import main

    best = path.parent / "run" / "best.pt"
    assert main(["serve", str(best), "--port", "0", "--grpc-port", "0"]) == 2
    assert "rtresnet export --weights" in capsys.readouterr().err
