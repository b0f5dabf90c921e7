"""Prometheus metrics of a server."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RECENT = 2048  # requests that the page's histogram shows


class Metrics:
    """Counts requests and batches; `text` is what a scraper reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ["model", "version"]
        self._requests = self._make(Counter, "requests", "Requests by status", ["model", "status"])
        self._latency = self._make(Histogram, "request_seconds", "Request latency", ["model"])
        self._queue = self._make(Histogram, "queue_seconds", "Time in the queue", ["model"])
        self._compute = self._make(Histogram, "compute_seconds", "Time of a batch's call", model)
        self._batch = self._make(Histogram, "batch_size", "Images in a batch", model, BATCHES)
        self._gpu = _GpuUtilization()
        if self._gpu.available:
            gauge = Gauge("rtresnet_gpu_utilization", "Share of time that the GPU was busy",
                          registry=self.registry)  # fmt: skip
            gauge.set_function(self._gpu)
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT)
        self.total = 0

    def _make(
        self, kind: Any, name: str, text: str, labels: list[str], buckets: Any = SECONDS
    ) -> Any:
        options = {"buckets": buckets} if kind is Histogram else {}
        return kind(f"rtresnet_{name}", text, labels, registry=self.registry, **options)

    def request(self, model: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self.total += 1
        self._requests.labels(model, str(status)).inc()
        self._latency.labels(model).observe(seconds)

    def split(self, model: str, now: float, seconds: float, queue: float) -> None:
        """Records where the time of a request went.

        Args:
            model: Its name.
            now: The time of the answer, in seconds of a monotonic clock.
            seconds: The whole request.
            queue: Waiting for its batch.
        """
        self._queue.labels(model).observe(queue)
        self.recent.append((now, seconds, queue))

    def batch(self, model: str, version: str, size: int, seconds: float) -> None:
        """Records a batch."""
        self._batch.labels(model, version).observe(size)
        self._compute.labels(model, version).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _GpuUtilization:
    """Asks NVML for the first visible GPU's utilization."""

    def __init__(self) -> None:
        self._handle: Any = None
        with contextlib.suppress(Exception):  # no GPU, no driver, no nvidia-ml-py
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    @property
    def available(self) -> bool:
        """Whether there is a GPU to ask."""
        return self._handle is not None

    def __call__(self) -> float:
        import pynvml

        return float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
