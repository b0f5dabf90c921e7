"""The session on Ray Serve: `python ray_app.py MODEL PORT MAX_BATCH MAX_WAIT_MS`.

As Ray Serve's documentation recommends for throughput: `serve.batch`, a limit of ongoing requests
above the batch, and RAY_SERVE_THROUGHPUT_OPTIMIZED=1, which `benchmarks/serving.py` sets. Runs in
an environment of its own, made by that script.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

import rtresnet

model, port, max_batch, max_wait_ms = sys.argv[1:]


@serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1})
class Net:
    def __init__(self, model: str) -> None:
        self.session = rtresnet.load(model, provider="cpu", threads=1)

    @serve.batch(max_batch_size=int(max_batch), batch_wait_timeout_s=float(max_wait_ms) / 1000)
    async def infer(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.session(np.stack(images)))

    async def __call__(self, request: Request) -> Response:
        data = np.frombuffer(await request.body(), np.float32)
        logits: Any = await self.infer(data.reshape(self.session.image_shape))  # type: ignore
        return Response(logits.tobytes(), media_type="application/octet-stream")


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(Net.bind(model), route_prefix="/predict")  # type: ignore[attr-defined]
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
