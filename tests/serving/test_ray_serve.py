"""examples/ray_serve.py on a local Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import rtresnet

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'rtresnet[ray]'")


@pytest.mark.slow
def test_example_serves_the_sessions_classes_on_replicas_that_share_a_gpu(
    models: Path, photo: bytes
) -> None:
    from rtresnet.data.decode import decode

    path = models / "resnet8.onnx"
    with rtresnet.load(path) as session:
        logits = session.logits(session.prepare([decode("photo", photo)]))
        expected = [session.classes[index] for index in (-logits[0]).argsort()[:5]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 4, "GPU": 1}),  # Ray only counts them
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "ray_serve.py", path, "--replicas", "2", "--gpus",
         "0.5", "--port", str(port), "--wait"],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("2 replicas"), line
        url = line.split()[-1]
        assert len(json.loads(process.stdout.readline())["classes"]) == len(expected)
        for _ in range(8):  # both replicas
            with urllib.request.urlopen(url, photo) as response:
                assert json.load(response)["classes"] == expected
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url, b"hello")
        assert error.value.code == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
