from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _brief(brief_measurements: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command here is run for its figures: tests/bench and tests/quantize look at those."""
    monkeypatch.setattr("rtresnet.quantization.calibrate.SMALL_HELD_OUT", 16)
