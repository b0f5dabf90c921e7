"""Prometheus metrics of a server."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RECENT = 2048  # requests that the page's histogram shows
RATE_SECONDS = 5  # over which the page's rate is a mean
OUTCOMES = ("success", "failure")


class Metrics:
    """Counts requests and batches; `text` is for a scraper."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self.total = 0
        self._each_second: deque[list[int]] = deque(maxlen=RATE_SECONDS + 1)  # [second, requests]
        self._requests = Counter("rtresnet_requests", "Requests by status", ["model", "status"],
                                 registry=registry)  # fmt: skip

        def histogram(name: str, text: str, *labels: str, buckets: Any = SECONDS) -> Histogram:
            return Histogram(
                f"rtresnet_{name}", text, ["model", *labels], registry=registry, buckets=buckets
            )

        self._latency = histogram("request_seconds", "Request latency")
        self._runs = histogram("inference_seconds", "Time of an inference", "version", "outcome")
        self._queue = histogram("queue_seconds", "Time in the queue", "version")
        self._compute = histogram("compute_seconds", "Time of a batch's call", "version")
        self._batch = histogram("batch_size", "Images in a batch", "version", buckets=BATCHES)
        with contextlib.suppress(Exception):  # no GPU, no driver, no nvidia-ml-py
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            gauge = Gauge("rtresnet_gpu_utilization", "Share of time that the GPU was busy",
                          registry=registry)  # fmt: skip
            gauge.set_function(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    def request(self, model: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.total += 1
        self._requests.labels(model, str(status)).inc()
        self._latency.labels(model).observe(seconds)

    def run(self, model: str, version: str, seconds: float, queue: float | None) -> None:
        """Count an inference: its seconds, and those in the queue (None: it failed)."""
        self._runs.labels(model, version, OUTCOMES[queue is None]).observe(seconds)
        if queue is not None:
            self._queue.labels(model, version).observe(queue)
            now = time.monotonic()
            self.recent.append((now, seconds))
            if not self._each_second or self._each_second[-1][0] != int(now):
                self._each_second.append([int(now), 0])
            self._each_second[-1][1] += 1

    def per_second(self) -> float:
        """Return the mean number of successful requests in each of the last whole seconds."""
        now = int(time.monotonic())
        requests = [n for second, n in self._each_second if now - RATE_SECONDS <= second < now]
        return sum(requests) / RATE_SECONDS

    def batch(self, model: str, version: str, size: int, seconds: float) -> None:
        """Count a batch."""
        self._batch.labels(model, version).observe(size)
        self._compute.labels(model, version).observe(seconds)

    def statistics(self, model: str, version: str) -> dict[str, object]:
        """Return a model's counts and times in Triton's format."""

        def sample(name: str, **labels: str) -> float:
            labels |= {"model": model, "version": version}
            return self._registry.get_sample_value(f"rtresnet_{name}", labels) or 0

        def part(name: str, **labels: str) -> dict[str, int]:
            count, seconds = (sample(f"{name}_{kind}", **labels) for kind in ("count", "sum"))
            return {"count": int(count), "ns": int(seconds * 1e9)}

        return {
            "name": model,
            "version": version,
            "inference_count": int(sample("batch_size_sum")),
            "execution_count": int(sample("batch_size_count")),
            "inference_stats": {
                "success": part("inference_seconds", outcome="success"),
                "fail": part("inference_seconds", outcome="failure"),
                "queue": part("queue_seconds"),
                "compute_infer": part("compute_seconds"),
            },
        }

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
