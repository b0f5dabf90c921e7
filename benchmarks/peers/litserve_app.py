"""The session on LitServe: `python litserve_app.py MODEL PORT MAX_BATCH MAX_WAIT_MS`.

As LitServe's documentation recommends for throughput: batching, and the fast queue (ZeroMQ) between
the processes of the API and the model. It reads JSON or forms, and files of a form cannot reach its
worker (it pickles them, which fails), so the image's bytes come in base64, as in its documentation.
Runs in an environment of its own, made by `benchmarks/serving.py`.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve as ls
import numpy as np
from fastapi import Response

import rtresnet


class Api(ls.LitAPI):
    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self.model = model

    def setup(self, device: str) -> None:
        self.session = rtresnet.load(self.model, provider="cpu", threads=1)

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        data = base64.b64decode(request["image"])
        return np.frombuffer(data, np.float32).reshape(self.session.image_shape)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> Any:
        return self.session(images)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    model, port, max_batch, max_wait_ms = sys.argv[1:]
    api = Api(model, max_batch_size=int(max_batch), batch_timeout=float(max_wait_ms) / 1000)
    server = ls.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning",
        access_log=False,
    )  # fmt: skip
