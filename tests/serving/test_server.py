"""`rtresnet serve` as a process, with real clients and raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtresnet
from rtresnet.cli.main import main
from rtresnet.core.errors import InputError
from rtresnet.serving.protocol import InferRequest, InferTensor, Parameters, requested
from tests.browser import wait_for
from tests.serving.conftest import Server

INFER = "/v2/models/resnet8/infer"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def logits(models: Path, images: np.ndarray) -> np.ndarray:
    with rtresnet.load(models / "resnet8.onnx") as session:
        return session.logits(images)


def ask(
    server: Server,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Send one request on its own connection; return status, headers (lower case), body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return response.status, fields, response.read()
    finally:
        connection.close()


@pytest.fixture
def no_error_is_logged(server: Server) -> Iterator[None]:
    """Nothing that a client sends is an error of the server."""
    yield
    log = server.log.read_text()
    assert '"level": "error"' not in log, log[log.index('"level": "error"') - 50 :][:2000]


def request_of(images: np.ndarray, **more: Any) -> bytes:
    entry = {"name": "images", "datatype": "FP32", "shape": list(images.shape),
             "data": images.ravel().tolist()}  # fmt: skip
    return json.dumps({"inputs": [entry | more.pop("entry", {})]} | more).encode()


def binary(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Return a request with a binary tensor, and its header."""
    entry = {"name": "images", "datatype": "FP32", "shape": list(images.shape),
             "parameters": {"binary_data_size": images.nbytes}}  # fmt: skip
    head = json.dumps({"inputs": [entry]}).encode()
    return head + images.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_tritonclient_http_gets_the_sessions_logits(
    raw: bool, named: bool, server: Server, images: np.ndarray, logits: np.ndarray
) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("resnet8")
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=raw)
    outputs = [triton.InferRequestedOutput("logits", binary_data=raw)] if named else None
    result = client.infer("resnet8", [tensor], outputs=outputs, request_id="seven")
    np.testing.assert_allclose(result.as_numpy("logits"), logits, atol=1e-5)
    assert result.get_response()["id"] == "seven"


def test_tritonclient_http_reads_metadata_configuration_and_classes(
    server: Server, images: np.ndarray, logits: np.ndarray
) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.get_model_metadata("resnet8", "1")["inputs"][0]["shape"] == [-1, 3, 32, 32]
    assert client.get_model_config("resnet8")["input"][0]["format"] == "FORMAT_NCHW"
    assert {m["name"] for m in client.get_model_repository_index()} == {"resnet8", "resnet8-int8"}
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    outputs = [triton.InferRequestedOutput("logits", class_count=2)]
    rows = client.infer("resnet8", [tensor], outputs=outputs).as_numpy("logits")
    assert [int(row[0].split(b":")[1]) for row in rows] == logits.argmax(1).tolist()
    before = client.get_inference_statistics("resnet8")["model_stats"][0]["inference_count"]
    client.infer("resnet8", [tensor])
    after = client.get_inference_statistics("resnet8")["model_stats"][0]["inference_count"]
    assert after == before + 3


def test_tritonclient_grpc_gets_the_sessions_logits(
    server: Server, images: np.ndarray, logits: np.ndarray
) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    client = triton.InferenceServerClient(server.grpc)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("resnet8")
    assert client.get_model_metadata("resnet8").inputs[0].shape == [-1, 3, 32, 32]
    assert client.get_model_config("resnet8").config.max_batch_size == 32
    assert client.get_server_metadata().name == "rtresnet"
    assert len(client.get_model_repository_index().models) == 2
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    result = client.infer("resnet8", [tensor], client_timeout=20)
    np.testing.assert_allclose(result.as_numpy("logits"), logits, atol=1e-5)
    streamed: list[Any] = []
    client.start_stream(lambda result, error: streamed.append((result, error)))
    for model in ("resnet8", "none", "resnet8"):
        client.async_stream_infer(model, [tensor])
    client.stop_stream()
    assert [error is None for _, error in streamed] == [True, False, True]
    for model, shape in (("none", images.shape), ("resnet8", (3, 32, 32))):
        wrong = triton.InferInput("images", list(shape), "FP32")
        wrong.set_data_from_numpy(images if model == "none" else images[0])
        with pytest.raises(Exception, match=r"NOT_FOUND|INVALID_ARGUMENT"):
            client.infer(model, [wrong])


def test_classify_raw_and_multipart_give_the_classes_that_predict_gives(
    server: Server, models: Path, photo: bytes, tmp_path: Path
) -> None:
    from rtresnet.data.decode import decode

    with rtresnet.load(models / "resnet8.onnx") as session:
        best = session.logits(session.prepare([decode("photo", photo)])).argmax()
        name = session.classes[best]
    status, _, body = ask(server, "/v1/classify?model=resnet8&top=2", photo)
    answer = json.loads(body)
    assert status == 200 and answer["results"][0][0]["class"] == name
    assert len(answer["results"][0]) == 2 and answer["ms"]["preprocess"] > 0
    file = tmp_path / "photo.png"
    file.write_bytes(photo)
    curl = ["curl", "-s", f"http://127.0.0.1:{server.port}/v1/classify?model=resnet8"]
    if shutil.which("curl"):
        shown = subprocess.run(
            [*curl, "--data-binary", f"@{file}"], capture_output=True, check=True
        )
        assert json.loads(shown.stdout)["results"][0][0]["class"] == name
        shown = subprocess.run(
            [*curl, "-F", f"a=@{file}", "-F", f"b=@{file}"], capture_output=True, check=True
        )
        assert [row[0]["class"] for row in json.loads(shown.stdout)["results"]] == [name, name]


def bad_requests(images: np.ndarray) -> dict[str, tuple[str, bytes, dict[str, str], int]]:
    good, header = binary(images)
    size = header["Inference-Header-Content-Length"]
    return {
        "not JSON": (INFER, b"{", {}, 400),
        "not an object": (INFER, b"[]", {}, 400),
        "deep": (INFER, b"[" * 100_000, {}, 400),
        "no inputs": (INFER, b'{"inputs": []}', {}, 400),
        "unknown input": (INFER, request_of(images, entry={"name": "x"}), {}, 400),
        "wrong type": (INFER, request_of(images, entry={"datatype": "INT8"}), {}, 400),
        "wrong shape": (INFER, request_of(images, entry={"shape": [1, 3, 8, 8]}), {}, 400),
        "no image": (INFER, request_of(images, entry={"shape": [0, 3, 32, 32]}), {}, 400),
        "many images": (INFER, request_of(images, entry={"shape": [9999, 3, 32, 32]}), {}, 400),
        "negative": (INFER, request_of(images, entry={"shape": [-1, 3, 32, 32]}), {}, 400),
        "text": (INFER, request_of(images, entry={"data": ["a"] * images.size}), {}, 400),
        "ragged": (INFER, request_of(images, entry={"data": [[1], [1, 2]]}), {}, 400),
        "few numbers": (INFER, request_of(images, entry={"data": [1.0]}), {}, 400),
        "unknown output": (INFER, request_of(images, outputs=[{"name": "x"}]), {}, 400),
        "classification": (
            INFER,
            request_of(images, outputs=[{"name": "logits", "parameters": {"classification": "a"}}]),
            {}, 400,
        ),
        "timeout": (INFER, request_of(images, parameters={"timeout": "soon"}), {}, 400),
        "huge timeout": (INFER, request_of(images, parameters={"timeout": 10**400}), {}, 400),
        "many outputs": (INFER, request_of(images, outputs=[{"name": "logits"}] * 9), {}, 400),
        "unknown model": ("/v2/models/none/infer", request_of(images), {}, 404),
        "unknown version": ("/v2/models/resnet8/versions/9/infer", request_of(images), {}, 404),
        "path": ("/v2/models/..%2f..%2fetc/infer", request_of(images), {}, 404),
        "truncated tensor": (INFER, good[:-7], header, 400),
        "more bytes": (INFER, good + b"x", header, 400),
        "header beyond": (INFER, good, {"Inference-Header-Content-Length": "99999999"}, 400),
        "header negative": (INFER, good, {"Inference-Header-Content-Length": "-1"}, 400),
        "header cut": (INFER, good, {"Inference-Header-Content-Length": str(int(size) - 3)}, 400),
        "too large": (INFER, b"x" * (2 * 1024 * 1024 + 1), {}, 413),
        "compressed": (INFER, good, header | {"Content-Encoding": "gzip"}, 400),
        "not an image": ("/v1/classify?model=resnet8", b"hello", {}, 400),
        "empty image": ("/v1/classify?model=resnet8", b"", {}, 400),
        "which model": ("/v1/classify", b"hello", {}, 404),
        "top": ("/v1/classify?model=resnet8&top=-1", b"hello", {}, 400),
        "multipart": (
            "/v1/classify?model=resnet8", b"hello", {"Content-Type": "multipart/form-data"}, 400
        ),
        "boundary": (
            "/v1/classify?model=resnet8", b"--a\r\nx",
            {"Content-Type": "multipart/form-data; boundary=b"}, 400,
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("top=abc", "top is 'abc', expected a whole number from 1 to 1000"),
        ("top=0", "top is '0', expected a whole number from 1 to 1000"),
        ("least_score=2", "least_score is '2', expected a number from 0 to 1"),
    ],
)
def test_query_bad_value_is_stated_in_words(query: str, message: str, server: Server) -> None:
    status, _, answer = ask(server, f"/v1/classify?model=resnet8&{query}", b"x")
    assert status == 400 and json.loads(answer)["error"] == message


BAD = tuple(bad_requests(np.zeros((1, 3, 32, 32), np.float32)))


@pytest.mark.usefixtures("no_error_is_logged")
@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_with_one_message(
    case: str, server: Server, images: np.ndarray
) -> None:
    path, body, headers, expected = bad_requests(images)[case]
    status, _, answer = ask(server, path, body, headers)
    assert status == expected, answer
    message = json.loads(answer)["error"]
    assert message and len(message) < 500 and "Traceback" not in message


def test_requested_classes_of_a_model_without_logits_are_rejected() -> None:
    tensors = [InferTensor("indices"), InferTensor("probabilities")]
    classes = InferTensor("indices", parameters=Parameters(classification=2))
    with pytest.raises(InputError, match="logits"):
        requested(InferRequest(inputs=[], outputs=[classes]), tensors)


@pytest.mark.usefixtures("no_error_is_logged")
def test_decompression_bomb_is_refused(server: Server) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    status, _, answer = ask(server, "/v1/classify?model=resnet8", bomb)
    assert status == 400 and b"error" in answer


def raw(server: Server, data: bytes, seconds: float = 10) -> bytes:
    """Return what the server answers to bytes on a socket, until it closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
                if b"\r\n\r\n" in part and b"connection: close" not in part.lower():
                    connection.settimeout(1)
        except TimeoutError:
            pass
        return b"".join(parts)


@pytest.mark.usefixtures("no_error_is_logged")
@pytest.mark.parametrize(
    "head",
    [
        b"POST /v2/health/live HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nabcdef",
        b"GET /v2 HTTP/9.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
    ],
    ids=["both lengths", "two lengths", "negative", "version", "TLS", "path", "header", "headers"],
)
def test_malformed_http_is_refused_and_its_connection_closed(head: bytes, server: Server) -> None:
    answer = raw(server, head)
    assert answer == b"" or b" 4" in answer.split(b"\r\n")[0], answer[:200]
    assert answer.count(b"HTTP/1.1 2") == 0
    assert ask(server, "/v2/health/ready")[0] == 200


def mutated(data: bytes, rng: random.Random, within: int) -> bytes:
    """Return bytes with up to four changes, deletions, repetitions or a truncation."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(min(len(body), within) or 1), rng.randint(1, 40)
        kind = rng.randrange(5)
        if kind < 2:
            body[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            del body[place : place + length]
        elif kind == 3:
            body[place:place] = body[place : place + length]
        elif rng.random() < 0.1:
            del body[place:]
    return bytes(body)


@pytest.mark.usefixtures("no_error_is_logged")
@pytest.mark.parametrize(("path", "count"), [(INFER, 2000), ("/v1/classify?model=resnet8", 400)])
def test_mutated_bodies_are_answered_and_never_with_a_server_error(
    path: str, count: int, server: Server, images: np.ndarray, photo: bytes
) -> None:
    rng = random.Random(0)
    good, header = binary(images[:1]) if path == INFER else (photo, {})
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    parts = b"--b\r\nContent-Disposition: form-data; name=a; filename=a\r\n\r\n" + photo
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    statuses = set()
    for _ in range(count):
        body, fields = mutated(good, rng, 200), dict(header) if rng.random() < 0.8 else {}
        if path != INFER and rng.random() < 0.5:
            body, fields = mutated(parts + b"\r\n--b--\r\n", rng, 200), form
        connection.request("POST", path, body, fields)
        response = connection.getresponse()
        response.read()
        statuses.add(response.status)
    assert 400 in statuses and statuses <= {200, 400, 413}


@pytest.mark.usefixtures("no_error_is_logged")
def test_mutated_heads_are_refused_or_answered(server: Server, images: np.ndarray) -> None:
    rng = random.Random(1)
    body, header = binary(images[:1])
    fields = "".join(f"{name}: {value}\r\n" for name, value in header.items())
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {len(body)}\r\n\r\n"
    chunked = (
        "POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"
    )
    requests = []
    for number in range(600):
        start = mutated((head, chunked)[number % 2].encode(), rng, len(head))
        requests.append(start + (body if number % 2 == 0 else b""))

    async def sent(data: bytes) -> bytes:
        """Return the response within a second; the server waits for the rest of some requests."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        answer = b""
        with contextlib.suppress(OSError, TimeoutError, asyncio.TimeoutError):
            writer.write(data)
            while part := await asyncio.wait_for(reader.read(65536), 1):
                answer += part
        writer.transport.abort()
        return answer

    async def all_sent() -> list[bytes]:
        return await asyncio.gather(*map(sent, requests))

    statuses = []
    for request, answer in zip(requests, asyncio.run(all_sent()), strict=True):
        matches = re.findall(rb"HTTP/1\.1 (\d)\d\d", answer)
        assert b"5" not in matches, (request[:300], answer[:200])
        statuses += matches
    assert statuses.count(b"2") > 20 and statuses.count(b"4") > 100
    assert ask(server, INFER, body, header)[0] == 200


@pytest.mark.usefixtures("no_error_is_logged")
def test_mutated_grpc_messages_are_refused_or_answered(server: Server, images: np.ndarray) -> None:
    import grpc

    from rtresnet.serving.grpc_service import MESSAGES

    rng = random.Random(2)
    request = MESSAGES["ModelInferRequest"](
        model_name="resnet8", raw_input_contents=[images[0].tobytes()]
    )
    request.inputs.add(name="images", datatype="FP32", shape=[1, 3, 32, 32])
    good = request.SerializeToString()
    refused = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    # grpcio answers INTERNAL or UNKNOWN where the message cannot be parsed
    unparsed = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(500):
            data = mutated(good, rng, 60)
            try:
                infer(data, timeout=30)
            except grpc.RpcError as error:
                assert error.code() in refused | unparsed, error  # type: ignore[attr-defined]
        assert infer(good, timeout=30)


def test_client_that_leaves_within_its_body_is_no_error(
    models: Path, images: np.ndarray, start: Callable[..., Server]
) -> None:
    server = start(models / "resnet8.onnx")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 5000)
    wait_for(lambda: '"status": 499' in server.log.read_text())
    assert '"level": "error"' not in server.log.read_text()


def test_metrics_and_status_count_what_was_asked(server: Server, images: np.ndarray) -> None:
    body, header = binary(images)
    assert ask(server, INFER, body, header)[0] == 200
    text = ask(server, "/metrics")[2].decode()
    assert 'rtresnet_requests_total{model="resnet8",status="200"}' in text
    assert "rtresnet_batch_size_bucket" in text and "rtresnet_queue_seconds_sum" in text
    status = json.loads(ask(server, "/v1/status")[2])
    model = next(m for m in status["models"] if m["name"] == "resnet8")
    assert model["chain"][0]["kind"] == "onnx"
    assert model["statistics"]["inference_count"] > 0


def test_client_that_disconnects_is_dropped_from_the_batch(
    models: Path, images: np.ndarray, start: Callable[..., Server]
) -> None:
    server = start(models / "resnet8.onnx", "--max-wait", "1000s", "--max-batch", 2)
    body, header = binary(images[:1])
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        fields = "".join(f"{name}: {value}\r\n" for name, value in header.items())
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
    wait_for(lambda: '"status": 499' in server.log.read_text())
    # With the dropped image, the first of these two would fill a batch, and the second would wait.
    assert ask(server, INFER, *binary(images[:2]))[0] == 200
    stats = json.loads(ask(server, "/v2/models/resnet8/stats")[2])["model_stats"][0]
    assert stats["inference_count"] == 2 and stats["execution_count"] == 1


def test_token_is_needed_where_one_is_set(
    models: Path, tmp_path: Path, start: Callable[..., Server]
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    server = start(models / "resnet8.onnx", "--token-file", token)
    assert ask(server, "/v2/health/ready")[0] == 200
    assert ask(server, "/v2")[0] == 401
    assert ask(server, "/v2", headers={"Authorization": "Bearer wrong"})[0] == 401
    assert ask(server, "/v2", headers={"Authorization": "Bearer 0123456789abcdef"})[0] == 200


def test_changed_file_is_reloaded_and_a_broken_one_is_not(
    models: Path, images: np.ndarray, tmp_path: Path, start: Callable[..., Server]
) -> None:
    path = tmp_path / "net.onnx"

    def put(name: str) -> None:
        for suffix in ("", ".json"):
            shutil.copy(f"{models / name}{suffix}", f"{path}{suffix}.new")
        for suffix in ("", ".json"):
            Path(f"{path}{suffix}.new").replace(f"{path}{suffix}")

    def answer() -> list[float]:
        status, _, body = ask(server, "/v2/models/net/infer", request_of(images))
        assert status == 200
        return json.loads(body)["outputs"][0]["data"]  # type: ignore[no-any-return]

    put("resnet8.onnx")
    server = start(path)
    first = answer()
    path.write_bytes(path.read_bytes()[:-100])  # no longer what its sidecar describes
    wait_for(lambda: any("not reloaded" in event for event in server.events()))
    assert answer() == first
    put("resnet8-int8.onnx")
    wait_for(lambda: any(event.startswith("reloaded") for event in server.events()))
    assert answer() != first


def test_repository_folder_serves_its_newest_version(
    models: Path, images: np.ndarray, tmp_path: Path, start: Callable[..., Server]
) -> None:
    for version, name in (("1", "resnet8-int8.onnx"), ("2", "resnet8.onnx")):
        folder = tmp_path / "repository" / "net" / version
        folder.mkdir(parents=True)
        for suffix in ("", ".json"):
            shutil.copy(f"{models / name}{suffix}", f"{folder / 'model.onnx'}{suffix}")
    server = start(tmp_path / "repository")
    newest = ask(server, "/v2/models/net/infer", request_of(images))[2]
    second = ask(server, "/v2/models/net/versions/2/infer", request_of(images))[2]
    first = ask(server, "/v2/models/net/versions/1/infer", request_of(images))[2]
    data = [json.loads(body)["outputs"][0]["data"] for body in (newest, second, first)]
    assert data[0] == data[1] != data[2]


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request(
    models: Path, images: np.ndarray, start: Callable[..., Server]
) -> None:
    server = start(models / "resnet8.onnx")
    body, header = binary(images[:1])
    lost: list[object] = []
    answered = [0]
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return  # the server takes no more connections
            try:
                connection.request("POST", INFER, body, header)
                status = connection.getresponse().status
                if status != 200:
                    lost.append(status)
                answered[0] += 1
            except (OSError, http.client.HTTPException) as error:
                lost.append(error)
            finally:
                connection.close()

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: answered[0] > 100)
    assert server.stop() == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert not lost, lost[:3]


@pytest.mark.slow
def test_slow_client_is_cut_off(models: Path, start: Callable[..., Server]) -> None:
    server = start(models / "resnet8.onnx")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        begin = time.monotonic()
        connection.settimeout(0.5)
        closed = False
        while time.monotonic() - begin < 20 and not closed:
            try:
                connection.sendall(b"G")
                closed = connection.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
        assert closed and time.monotonic() - begin < 15


@pytest.mark.slow
def test_body_that_does_not_come_is_status_408(models: Path, start: Callable[..., Server]) -> None:
    server = start(models / "resnet8.onnx")
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx".encode()
    assert raw(server, head, 40).startswith(b"HTTP/1.1 408 ")
    assert ask(server, "/v2/health/ready")[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/v2/nothing", "GET", 404), (INFER, "GET", 405), ("/v2", "POST", 405), ("/v2", "TRACE", 405)],
)
def test_unknown_path_or_method_is_refused(
    path: str, method: str, status: int, server: Server
) -> None:
    answered, _, body = ask(server, path, method=method)
    assert answered == status and json.loads(body)["error"]


def test_head_is_answered_without_a_body(server: Server) -> None:
    status, fields, body = ask(server, "/v2", method="HEAD")
    assert status == 200 and int(fields["content-length"]) > 0 and not body


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_port_in_use_is_exit_code_2(
    option: str, models: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = {"--port": "0", "--grpc-port": "0"}
    ports[option] = str(server.port) if option == "--port" else server.grpc.rpartition(":")[2]
    arguments = [text for pair in ports.items() for text in pair]
    assert main(["serve", str(models / "resnet8.onnx"), *arguments]) == 2
    assert option in capsys.readouterr().err


def test_page_needs_no_network(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/") as response:
        page = response.read().decode()
        assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
