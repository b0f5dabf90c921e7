from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _brief(brief_measurements: None) -> None:
    """No command here is run for its figures."""
