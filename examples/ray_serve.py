"""Serve a model on Ray Serve, in several replicas that may share a GPU.

    python examples/ray_serve.py engines/resnet20-int8.onnx --replicas 2
    python examples/ray_serve.py engines/resnet50-int8.plan --replicas 4 --gpus 0.5 --wait

Each replica loads the model and forms batches as `rtresnet serve` does. `--gpus 0.5` puts two
replicas on each GPU: Ray counts the fractions, and does not limit memory. The script starts a
local Ray, or uses the cluster that RAY_ADDRESS names; every node needs rtresnet and the model.
"""

import argparse
import asyncio
import io
import signal
import urllib.request
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import rtresnet as rt


class Classifier:
    """A replica: POST an encoded image, get its most probable classes."""

    def __init__(self, model: str, device: str) -> None:
        self.session = rt.load(model, device=device)
        self.batcher = rt.Batcher(self.session, max_batch=32, max_wait_ms=2)
        self.batcher.submit(self.session.example(1)[0]).result()  # warm before it is ready

    def _prepare(self, data: bytes) -> np.ndarray:
        return self.session.prepare([np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))])[0]

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer a request."""
        try:
            image = await asyncio.to_thread(self._prepare, await request.body())
        except (OSError, ValueError, Image.DecompressionBombError):
            return JSONResponse({"error": "not a valid image"}, 400)
        try:
            logits = await asyncio.wrap_future(self.batcher.submit(image))
        except rt.QueueFullError:
            return JSONResponse({"error": "busy"}, 503, headers={"retry-after": "1"})
        best = np.argsort(-logits)[:5]
        return JSONResponse({"classes": [self.session.classes[i] for i in best.tolist()]})


def main() -> None:
    """Deploy the model and send one request; with --wait, serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="engines/resnet20-int8.onnx")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0.0, help="share of a GPU for each replica")
    parser.add_argument("--device", default="auto", help="cuda runs an ONNX file on the GPU")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--wait", action="store_true", help="serve until Ctrl-C")
    options = parser.parse_args()
    ray.init(log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    deployment = serve.deployment(
        Classifier,
        num_replicas=options.replicas,
        max_ongoing_requests=64,  # twice the batch: one is computed while the next one forms
        ray_actor_options={"num_cpus": 1, "num_gpus": options.gpus},
    )
    model = str(Path(options.model).resolve())  # replicas have another working folder
    serve.run(deployment.bind(model, options.device), route_prefix="/classify")
    url = f"http://127.0.0.1:{options.port}/classify"
    print(f"{options.replicas} replicas: {url}")
    photograph = io.BytesIO()
    Image.new("RGB", (64, 48)).save(photograph, "PNG")
    with urllib.request.urlopen(url, photograph.getvalue()) as response:
        print(response.read().decode())
    if options.wait:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
