"""The workload of a benchmark: requests and their rate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core.config import Config, option, parse_wait
from rtresnet.core.errors import InputError

if TYPE_CHECKING:
    from rtresnet.bench.scenarios import EarlyStop
    from rtresnet.bench.workload import Candidate, LoadFacts, Measurement
    from rtresnet.runtime.session import Session

Scenario = Literal["single-stream", "multi-stream", "offline", "server", "closed"]
BATCHES: dict[Scenario, tuple[int, ...]] = {
    "single-stream": (1, 8), "multi-stream": (8,), "offline": (8,), "server": (1,), "closed": (1,)
}  # fmt: skip
"""Images per request, one measurement each, by default."""
MAX_WAIT_MS = 2.0
POOL_BYTES, POOL = 64 << 20, 8
"""Different requests are prepared up to this size and this number."""


def parse_batches(text: str) -> tuple[int, ...]:
    """Read `1,8`.

    Raises:
        InputError: Not whole numbers from 1.
    """
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        batches = (0,)
    if min(batches) < 1:
        raise InputError("not whole numbers of at least 1", fix="as in --batch 1,8")
    return batches


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig(Config):
    """Options that `benchmark` and the searches share.

    Attributes:
        seconds: Duration of each measurement, after warm-up.
        queries: Number of requests, instead of `seconds`.
        seed: Random seed of inputs, order and arrivals.
        max_batch: Above 1, a batcher forms batches of single images. For `find_batch` the largest
            batch to try.
        max_wait_ms: How long an image waits for others to share its batch.
        with_preprocess: Encoded image, or folder of images, to include decoding.
    """

    seconds: float = option(3.0, "Duration of each measurement in seconds, after warm-up.")
    queries: int | None = option(
        None, "Run N requests instead of a fixed time.", metavar="N", minimum=1
    )
    seed: int = option(0, "Random seed of inputs, order and arrivals.")
    max_batch: int | None = option(
        None,
        "With server and closed, form batches of up to N images. With --find-batch, the largest "
        "batch to try.",
        metavar="N",
        minimum=1,
        default_text="1; 1024 for --find-batch",
    )
    max_wait_ms: float | None = option(
        None,
        "Longest time that an image waits for its batch to fill.",
        names=("--max-wait",),
        metavar="TIME",
        parse=parse_wait,
        minimum=0,
        default_text="2ms",
    )
    with_preprocess: Path | None = option(
        None,
        "Measure from encoded bytes: decode, crop and normalize an image, or the images of a "
        "folder.",
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"--seconds {self.seconds:g}: must be above 0")
        if self.max_wait_ms is not None and self.batched == 1:
            raise InputError("--max-wait needs --max-batch", fix="add --max-batch N")

    @property
    def batched(self) -> int:
        """Largest batch that is formed; 1 for none."""
        return self.max_batch or 1

    @property
    def wait_ms(self) -> float:
        """`max_wait_ms` or its default, in milliseconds."""
        return MAX_WAIT_MS if self.max_wait_ms is None else self.max_wait_ms


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One workload, checked.

    Attributes:
        batches: Images per request, one measurement each.
        max_batch: Above 1, requests go through a batcher.
        images: (name, bytes) of encoded images; empty if requests are random numbers.
    """

    scenario: Scenario
    batches: tuple[int, ...] = (1,)
    seconds: float
    queries: int | None = None
    seed: int = 0
    qps: float | None = None
    concurrency: int | None = None
    max_batch: int = 1
    max_wait_ms: float = MAX_WAIT_MS
    images: tuple[tuple[str, bytes], ...] = ()

    def facts(self, session: Session) -> LoadFacts:
        """Return the properties of the load that are known before measuring."""
        from rtresnet.bench.workload import LoadFacts

        pipelined = self.pipeline_of(session) is not None
        return LoadFacts(
            qps=self.qps,
            concurrency=self.concurrency,
            max_batch=self.max_batch if self.scenario in ("server", "closed") else None,
            max_wait_ms=self.max_wait_ms if self.max_batch > 1 else None,
            in_flight=getattr(session.backend, "in_flight", None) if pipelined else None,
        )

    def pipeline_of(self, session: Session) -> Callable[[], Any] | None:
        """Return the session's pipeline of batches in flight; None if batches are sequential."""
        if self.scenario != "offline" or self.images:
            return None
        return getattr(session.backend, "pipeline", None)


def for_fixed_batch(
    workload: Workload, sessions: Sequence[Session], *, explicit: bool
) -> tuple[Workload, str | None]:
    """Remove the batches that files with a fixed batch do not compute as one batch.

    Args:
        workload: The workload.
        sessions: What is measured.
        explicit: Whether the user chose the batches; the file's batch replaces defaults.

    Returns:
        The workload, and a sentence on batches that are not measured.

    Raises:
        InputError: Nothing remains to be measured.
    """
    fixed = {session.batch: session for session in sessions if session.batch is not None}
    if not fixed:
        return workload, None
    if len(fixed) > 1:
        each = ", ".join(
            f"the batch of {entry.path} is fixed at {size}" for size, entry in fixed.items()
        )
        raise InputError(f"{each}: the fixed batches differ", fix="measure them one by one")
    ((size, session),) = fixed.items()
    calls = (workload.max_batch,) if workload.max_batch > 1 else workload.batches
    detector = session.detection is not None
    its = "is a detector, whose" if detector else "its"
    takes = f"{session.path}: {its} batch is fixed at {size}"
    if size in calls:
        others = ", ".join(str(count) for count in calls if count != size)
        noted = others and (explicit or not detector)  # no one expects a detector at batch 8
        note = f"{takes}; batch {others} is not measured" if noted else None
        if workload.max_batch > 1:
            return workload, note
        return dataclasses.replace(workload, batches=(size,)), note
    if workload.scenario in ("single-stream", "offline") and not explicit:
        return (
            dataclasses.replace(workload, batches=(size,)),
            f"{takes}; no other batch is measured",
        )
    if workload.scenario in ("server", "closed") and workload.batches == (1,):
        fix = f"--max-batch {size}" if size > 1 else "leave --max-batch out"
    elif workload.scenario == "multi-stream":
        fix = "--scenario single-stream"
    else:
        fix = f"--batch {size}"
    raise InputError(f"{takes}, not at {', '.join(map(str, calls))}", fix=fix)


def read_images(path: Path | None) -> tuple[tuple[str, bytes], ...]:
    """Read an image file, or up to 64 MB of the images in a folder, without decoding them.

    Raises:
        InputError: There are none.
    """
    if path is None:
        return ()
    from rtresnet.data import sources

    names = sources.images_under(path) if path.is_dir() else [path]
    images: list[tuple[str, bytes]] = []
    for name in names:
        if not name.is_file():
            raise InputError(f"{name}: no such file or folder")
        images.append((str(name), name.read_bytes()))
        if sum(len(data) for _, data in images) > POOL_BYTES:
            break
    if not images:
        raise InputError(f"{path}: no images in this folder")
    return tuple(images)


def candidate(session: Session, workload: Workload, batch: int) -> Candidate:
    """Prepare requests of `batch` images each for a session."""
    from rtresnet.bench.workload import Candidate

    if workload.images:
        count = -(-len(workload.images) // batch)
        encoded = [
            [workload.images[(number * batch + i) % len(workload.images)] for i in range(batch)]
            for number in range(count)
        ]
        serve = _detects_bytes(session) if session.detection else _from_bytes(session)
        serve(encoded[0])  # reports a broken image or unknown preprocessing before the clock starts
        return Candidate(serve=serve, requests=encoded, timings=session.backend.timings)
    if session.detection is not None:
        return _detector(session, workload.seed)
    first = session.example(batch, seed=workload.seed)
    count = max(1, min(POOL, POOL_BYTES // first.nbytes))
    others = [session.example(batch, seed=workload.seed + n) for n in range(1, count)]
    return Candidate(
        serve=session, requests=[first, *others], timings=session.backend.timings,
        pipeline=workload.pipeline_of(session),
    )  # fmt: skip


def _detector(session: Session, seed: int) -> Candidate:
    """Prepare images of noise that fill a detector's canvas.

    Raises:
        InputError: Its backend runs no detectors.
    """
    import numpy as np

    from rtresnet.bench.workload import Candidate
    from rtresnet.workflows.detect_export import default_canvas

    spec, run = session.detection, getattr(session.backend, "detect", None)
    assert spec is not None
    if run is None:
        raise InputError(f"{session.path}: {session.backend.provider} does not run detectors")
    canvas = spec.canvas or default_canvas(spec)
    rng = np.random.default_rng(seed)
    requests = [
        (rng.standard_normal((1, 3, *canvas), dtype=np.float32), np.array([canvas], np.float32))
        for _ in range(4)
    ]
    return Candidate(
        serve=lambda request: run(*request), requests=requests, timings=session.backend.timings
    )


def _detects_bytes(session: Session) -> Callable[[Sequence[tuple[str, bytes]]], object]:
    from rtresnet.data.decode import decode

    return lambda encoded: [session.detect(decode(name, data)) for name, data in encoded]


def _from_bytes(session: Session) -> Callable[[Sequence[tuple[str, bytes]]], object]:
    from rtresnet.data.decode import decode

    preprocess = session.preprocess

    def serve(encoded: Sequence[tuple[str, bytes]]) -> object:
        images = [decode(name, data, at_least=preprocess.resize) for name, data in encoded]
        return session(session.prepare(images))

    return serve


def measure(
    sessions: Sequence[Session],
    workload: Workload,
    batch: int,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> list[Measurement]:
    """Measure all sessions: in alternating slices, or one by one under server and closed.

    Args:
        sessions: What to measure.
        workload: The workload.
        batch: Images per request, one of `workload.batches`.
        on_progress: Called with the seconds spent on measuring.
    """
    import numpy as np

    from rtresnet.bench import scenarios

    candidates = [candidate(session, workload, batch) for session in sessions]
    if workload.scenario not in ("server", "closed"):
        return scenarios.measure(
            candidates, batch=batch, seconds=workload.seconds, queries=workload.queries,
            seed=workload.seed, on_progress=on_progress,
        )  # fmt: skip
    measured: dict[int, Measurement] = {}
    for index in map(int, np.random.default_rng(workload.seed).permutation(len(sessions))):
        measured[index] = measure_queued(sessions[index], candidates[index], workload, batch)
        on_progress(workload.seconds * len(measured))
    return scenarios.compared(
        [measured[index] for index in range(len(sessions))], workload.scenario
    )


def measure_queued(
    session: Session,
    requests: Candidate,
    workload: Workload,
    batch: int = 1,
    *,
    fewest: int = 1,
    early_stop: EarlyStop = lambda latencies: False,
) -> Measurement:
    """Measure one session under server or closed, through a batcher if the workload has one.

    Without a batcher each client has a thread and calls the session itself: the session decides
    how many calls run at the same time.

    Args:
        session: What serves.
        requests: Its requests, as batches.
        workload: Scenario, rate or clients, and the batcher's limits.
        batch: Images per request of closed.
        fewest: Smallest number of requests of closed.
        early_stop: Ends a run whose outcome is certain.
    """
    from rtresnet.bench import scenarios
    from rtresnet.runtime.batcher import Batcher

    submit: Callable[[Any], Any] | None = None
    with contextlib.ExitStack() as stack:
        if workload.max_batch > 1:
            limit = max(1024, 2 * (workload.concurrency or 0))
            batcher = stack.enter_context(
                Batcher(session, workload.max_batch, workload.max_wait_ms, limit)
            )
            submit = put = batcher.submit
            requests = dataclasses.replace(
                requests,
                serve=lambda image: put(image).result(),
                requests=[request[0] for request in requests.requests],
                timings=dict,
            )
            for _ in range(3):  # warms full batches up, too
                for future in [put(requests.requests[0]) for _ in range(workload.max_batch)]:
                    future.result()
        elif workload.scenario == "closed" and (workload.concurrency or 1) > 1:
            pool = stack.enter_context(ThreadPoolExecutor(workload.concurrency))
            submit = functools.partial(pool.submit, requests.serve)  # type: ignore[call-arg]
            # With several requests in flight, timings cannot be assigned to one of them.
            requests = dataclasses.replace(requests, timings=dict)
        shared: dict[str, Any] = {
            "seconds": workload.seconds, "queries": workload.queries, "submit": submit,
            "early_stop": early_stop,
        }  # fmt: skip
        if workload.scenario == "server":
            assert workload.qps is not None
            return scenarios.server(requests, qps=workload.qps, seed=workload.seed, **shared)
        assert workload.concurrency is not None
        return scenarios.closed(
            requests, concurrency=workload.concurrency, batch=batch, fewest=fewest, **shared
        )
