"""Counts and rates of the server's metrics."""

from __future__ import annotations

import pytest

from rtresnet.serving import prometheus


def test_status_rate_counts_more_requests_than_the_histogram_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.25]
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: now[0])
    metrics = prometheus.Metrics()
    for second in range(8):
        now[0] = 100.25 + second
        for _ in range(1000):
            metrics.run("net", "1", 0.01, 0.001)
        metrics.run("net", "1", 0.01, None)  # failed
    now[0] = 108.0
    assert metrics.per_second() == 1000 and len(metrics.recent) == prometheus.RECENT
    now[0] = 110.5
    assert metrics.per_second() == 600
    now[0] = 200.0
    assert metrics.per_second() == 0
