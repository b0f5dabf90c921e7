"""A simulated clock: it advances only if a server or a sleep advances it."""

from __future__ import annotations

from rtresnet.bench.workload import Candidate


class Simulated:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        self.time = max(self.time, moment)


def on_gpu(clock: Simulated, service: float, reading: float) -> Candidate:
    """Serve in `service` seconds; reading a request's timings back takes `reading` more."""

    def serve(request: object) -> None:
        clock.time += service

    def timings() -> dict[str, float]:
        clock.time += reading
        return {"compute": 1e3 * service}

    return Candidate(serve=serve, requests=["images"], timings=timings)
