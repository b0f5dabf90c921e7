"""What is kept of a tensor's values while images stream past: the largest, and a histogram.

Memory is a few kB a tensor, whatever the number of images. The histogram is over magnitudes,
because activations are quantized symmetrically. Its range doubles, two bins becoming one, whenever
a larger value turns up, so one pass is enough.
"""

from __future__ import annotations

import numpy as np

from rtresnet.core.errors import DataError

BINS = 8192
SAMPLE = 1 << 16  # values a batch that go into the histogram, evenly spread; the largest sees all


class Histogram:
    """Magnitudes of one tensor.

    Attributes:
        largest: The largest magnitude seen, of every value.
        counts: float64 [BINS], over [0, limit].
        limit: Upper end of the histogram.
        channels: The largest magnitude a channel (axis 1), float32 [C].
        means: The mean a channel, float64 [C].
        n: Images seen.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.largest, self.limit = 0.0, 0.0
        self.counts = np.zeros(BINS)
        self.channels: np.ndarray = np.zeros(1, np.float32)
        self.means: np.ndarray = np.zeros(1)
        self.n = 0

    def add(self, values: np.ndarray) -> None:
        """Takes one batch's values in, [N, C, ...].

        Raises:
            DataError: One is not finite.
        """
        flat = values.ravel()
        around = tuple(axis for axis in range(values.ndim) if axis != 1)
        peaks = np.maximum(values.max(around), -values.min(around))
        peak = float(peaks.max())
        if not np.isfinite(peak):
            raise DataError(f"{self.name} is not finite on the calibration images")
        self.largest = max(self.largest, peak)
        self.channels = np.maximum(self.channels, peaks)
        share = len(values) / (self.n + len(values))
        self.means = self.means + share * (values.mean(around, dtype=np.float64) - self.means)
        self.n += len(values)
        if self.largest == 0:
            return
        if self.limit == 0:
            self.limit = self.largest
        while self.limit < self.largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.limit *= 2
        # An odd stride, so that it does not fall into step with rows or channels.
        some = flat[:: max(1, len(flat) // SAMPLE) | 1]
        index = np.abs(some) * np.float32(BINS / self.limit)
        index = np.minimum(index, BINS - 1).astype(np.int32)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def centres(self) -> np.ndarray:
        """Magnitude in the middle of each bin."""
        middle: np.ndarray = (np.arange(BINS) + 0.5) * (self.limit / BINS)
        return middle
