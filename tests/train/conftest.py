from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from rtresnet.train.step import Stepper


@pytest.fixture
def interrupt_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """interrupt_in(3): Ctrl-C comes while the third step from now is computed; it comes once."""

    def arrange(step: int) -> None:
        original, done = Stepper.step, 0

        def stepping(self: Stepper, *arguments: object) -> object:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Stepper, "step", stepping)

    return arrange
