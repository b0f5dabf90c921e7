"""Sessions for `bench`, which is the only user."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtresnet.runtime.session import Session


def open_session(
    path: str,
    paths: Sequence[str],
    device: Any,
    options: dict[str, Any],
    *,
    contexts: int = 1,
    timings: bool = True,
) -> Session:
    """Opens one of the artifacts of a command; see `workflows.loading.load_artifact`."""
    from rtresnet.workflows.loading import RuntimeConfig, load_artifact

    runtime = RuntimeConfig(device=device, **options).for_artifact(path, paths)
    runtime = dataclasses.replace(runtime, contexts=runtime.contexts or contexts)
    return load_artifact(path, runtime, input_needed=False, timings=timings)
