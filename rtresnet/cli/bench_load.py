"""What `rtresnet bench` asks of sessions: which load, which requests, through which batcher."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core.errors import InputError

if TYPE_CHECKING:
    from rtresnet.bench.load import Candidate, Measurement
    from rtresnet.runtime.session import Session

SCENARIOS = ("single-stream", "multi-stream", "offline", "server", "closed")
MULTI_STREAM = 8
POOL_BYTES, POOL = 64 << 20, 8
"""Different requests are made beforehand, up to so many bytes and so many requests."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One load, checked.

    Attributes:
        batches: Images a request, one measurement each.
        max_batch: Above 1, requests go through a batcher.
        images: (name, bytes) of encoded images; empty where requests are made of random numbers.
    """

    scenario: str = "single-stream"
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 3.0
    queries: int | None = None
    seed: int = 0
    qps: float | None = None
    concurrency: int | None = None
    max_batch: int = 1
    max_wait_ms: float = 2.0
    images: tuple[tuple[str, bytes], ...] = ()

    def facts(self, session: Session) -> dict[str, Any]:
        """What of it belongs to a result of `session` before anything was measured."""
        found = {"qps": self.qps, "concurrency": self.concurrency}
        if self.scenario in ("server", "closed"):
            found["max_batch"] = self.max_batch
        if self.pipeline_of(session) is not None:
            found["in_flight"] = getattr(session.backend, "in_flight", None)
        return {name: value for name, value in found.items() if value is not None}

    def pipeline_of(self, session: Session) -> Callable[[], Any] | None:
        """What keeps batches of a session in flight; None where one follows the other."""
        if self.scenario != "offline" or self.images:
            return None
        return getattr(session.backend, "pipeline", None)


def choose(
    *,
    scenario: str | None,
    batch: str | None,
    qps: float | None,
    concurrency: int | None,
    max_batch: int,
    with_preprocess: str | None,
    **rest: Any,
) -> Load:
    """A load from options; `--qps` alone means server, `--concurrency` alone closed.

    Raises:
        InputError: Options that do not go together.
    """
    if scenario is None:
        scenario = "server" if qps is not None else "closed" if concurrency else "single-stream"
    for name, value, owner in (("qps", qps, "server"), ("concurrency", concurrency, "closed")):
        if value is not None and scenario != owner:
            raise InputError(f"--{name} belongs to --scenario {owner}, not to {scenario}")
        if value is None and scenario == owner:
            raise InputError(f"--scenario {owner} needs --{name}", fix=f"as in --{name} 50")
    if max_batch > 1 and scenario not in ("server", "closed"):
        raise InputError(f"--max-batch forms batches under server and closed, not {scenario}")
    if max_batch > 1 and with_preprocess:
        raise InputError(
            "--with-preprocess measures without a batcher", fix="leave --max-batch out"
        )
    if batch is not None and scenario in ("multi-stream", "server"):
        raise InputError(f"--batch: {scenario} has its own number of images a request")
    fixed = {"multi-stream": (MULTI_STREAM,), "server": (1,), "closed": (1,), "offline": (8,)}
    batches = fixed.get(scenario, (1, 8)) if batch is None else tuple(parse_batches(batch))
    if max_batch > 1 and batches != (1,):
        raise InputError("--max-batch takes requests of one image", fix="leave --batch out")
    images = read_images(with_preprocess) if with_preprocess else ()
    return Load(
        scenario=scenario, batches=batches, qps=qps, concurrency=concurrency,
        max_batch=max_batch, images=images, **rest,
    )  # fmt: skip


def for_fixed_batch(
    load: Load, sessions: Sequence[Session], *, asked: bool
) -> tuple[Load, str | None]:
    """Leaves out of a load what files with a fixed batch do not compute as one batch.

    Args:
        load: From `choose`.
        sessions: What is to be measured.
        asked: Whether its batches were given with --batch; defaults give way to the file's batch.

    Returns:
        The load, and a sentence on what is left out.

    Raises:
        InputError: Nothing is left to measure.
    """
    fixed = {session.batch: session for session in sessions if session.batch is not None}
    if not fixed:
        return load, None
    if len(fixed) > 1:
        each = ", ".join(f"{entry.path} takes batches of {size}" for size, entry in fixed.items())
        raise InputError(f"{each}: no batch suits them all", fix="measure them one by one")
    ((size, session),) = fixed.items()
    calls = (load.max_batch,) if load.max_batch > 1 else load.batches
    takes = f"{session.path}: takes batches of {size}"
    if size in calls:
        left_out = ", ".join(str(count) for count in calls if count != size)
        note = f"{takes}; batch {left_out} is not measured" if left_out else None
        return load if load.max_batch > 1 else dataclasses.replace(load, batches=(size,)), note
    if load.scenario in ("single-stream", "offline") and not asked:
        return dataclasses.replace(load, batches=(size,)), f"{takes}; no other is measured"
    if load.scenario in ("server", "closed") and load.batches == (1,):
        fix = f"--max-batch {size}" if size > 1 else "leave --max-batch out"
    else:
        fix = f"--batch {size}" if load.scenario != "multi-stream" else "--scenario single-stream"
    raise InputError(f"{takes}, not of {', '.join(map(str, calls))}", fix=fix)


def parse_batches(given: str) -> list[int]:
    """`1,8` to [1, 8].

    Raises:
        InputError: Not whole numbers from 1.
    """
    try:
        batches = [int(part) for part in given.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise InputError(
            f"--batch {given}: whole numbers from 1 are needed", fix="as in --batch 1,8"
        )
    return batches


def milliseconds(given: str, option: str) -> float:
    """`10ms`, `0.5s` or `10` (ms) to milliseconds.

    Raises:
        InputError: Something else, or nothing.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s|)", given.strip())
    value = float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "": 1.0}[match[2]] if match else 0
    if value <= 0:
        raise InputError(f"--{option} {given}: a time above 0 is needed", fix=f"--{option} 10ms")
    return value


def read_images(path: str) -> tuple[tuple[str, bytes], ...]:
    """An image file, or up to 64 MB of those in a folder, still encoded.

    Raises:
        InputError: There are none.
    """
    from rtresnet.data import sources

    place = Path(path)
    names = sources.images_under(place) if place.is_dir() else [place]
    found: list[tuple[str, bytes]] = []
    for name in names:
        if not name.is_file():
            raise InputError(f"{name}: no such file or folder")
        found.append((str(name), name.read_bytes()))
        if sum(len(data) for _, data in found) > POOL_BYTES:
            break
    if not found:
        raise InputError(f"{path}: no images in this folder")
    return tuple(found)


def candidate(session: Session, load: Load, batch: int) -> Candidate:
    """A session with requests of `batch` images each, made now."""
    from rtresnet.bench.load import Candidate

    if load.images:
        count = -(-len(load.images) // batch)
        encoded = [
            [load.images[(number * batch + place) % len(load.images)] for place in range(batch)]
            for number in range(count)
        ]
        serve = _from_bytes(session)
        serve(encoded[0])  # a broken image or a missing contract is told before the clock
        return Candidate(serve=serve, requests=encoded, timings=session.backend.timings)
    first = session.example(batch, seed=load.seed)
    count = max(1, min(POOL, POOL_BYTES // first.nbytes))
    requests = [first] + [session.example(batch, seed=load.seed + n) for n in range(1, count)]
    return Candidate(
        serve=session, requests=requests, timings=session.backend.timings,
        pipeline=load.pipeline_of(session),
    )  # fmt: skip


def _from_bytes(session: Session) -> Callable[[Sequence[tuple[str, bytes]]], object]:
    import numpy as np

    from rtresnet.data.decode import decode

    contract = session.preprocess

    def serve(encoded: Sequence[tuple[str, bytes]]) -> object:
        images = [decode(name, data, at_least=contract.resize) for name, data in encoded]
        return session(session.prepare(np.stack([contract.crop(image) for image in images])))

    return serve


def measure(
    sessions: Sequence[Session],
    load: Load,
    batch: int,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> list[Measurement]:
    """Every session under the load, in turn or, where requests come by themselves, one by one."""
    from rtresnet.bench import load as loads

    candidates = [candidate(session, load, batch) for session in sessions]
    if load.scenario not in ("server", "closed"):
        return loads.measure(
            candidates, batch=batch, seconds=load.seconds, queries=load.queries, seed=load.seed,
            on_progress=on_progress,
        )  # fmt: skip
    found: dict[int, Measurement] = {}
    for index in order(len(sessions), load.seed):
        found[index] = arriving(sessions[index], candidates[index], load, batch)
        on_progress(load.seconds * len(found))
    return _compared([found[index] for index in range(len(sessions))], load.scenario)


def order(count: int, seed: int) -> list[int]:
    """0 to `count` - 1 in an order drawn by a seed."""
    import numpy as np

    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


def arriving(
    session: Session,
    asked: Candidate,
    load: Load,
    batch: int = 1,
    **bounds: Any,
) -> Measurement:
    """One session under server or closed, through a batcher where the load says so.

    Clients without a batcher each have a thread and call the session themselves: how many of their
    calls run at the same time is the session's to decide.

    Args:
        session: What serves.
        asked: Its requests, in batches.
        load: Scenario, rate or clients, and the batcher's sizes.
        batch: Images a request, of closed.
        bounds: `give_up`, `fewest`, as the scenario takes them.
    """
    from rtresnet.bench import scenarios
    from rtresnet.runtime.batcher import Batcher

    submit: Callable[[Any], Any] | None = None
    with contextlib.ExitStack() as stack:
        if load.max_batch > 1:
            limit = max(1024, 2 * (load.concurrency or 0))
            batcher = stack.enter_context(Batcher(session, load.max_batch, load.max_wait_ms, limit))
            submit = ask = batcher.submit
            asked = dataclasses.replace(
                asked,
                serve=lambda image: ask(image).result(),
                requests=[request[0] for request in asked.requests],
                timings=dict,
            )
            for _ in range(3):  # full batches are warmed up too
                for future in [ask(asked.requests[0]) for _ in range(load.max_batch)]:
                    future.result()
        elif load.scenario == "closed" and (load.concurrency or 1) > 1:
            pool = stack.enter_context(ThreadPoolExecutor(load.concurrency))
            submit = functools.partial(pool.submit, asked.serve)  # type: ignore[call-arg]
            asked = dataclasses.replace(asked, timings=dict)  # whose, of several under way?
        common: dict[str, Any] = {"seconds": load.seconds, "queries": load.queries}
        if load.scenario == "server":
            assert load.qps is not None
            return scenarios.server(
                asked, qps=load.qps, seed=load.seed, submit=submit, **common, **bounds
            )
        assert load.concurrency is not None
        return scenarios.closed(
            asked, concurrency=load.concurrency, batch=batch, submit=submit, **common, **bounds
        )


def _compared(measured: list[Measurement], scenario: str) -> list[Measurement]:
    from rtresnet.bench import baseline, compare

    first, *others = measured
    result = [first]
    for other in others:
        found = compare.compare_unpaired(
            first.samples, other.samples, figure=baseline.FIGURES[scenario],
            comparisons=len(others),
        )  # fmt: skip
        speed = found.speed if found else first.latency.median / other.latency.median
        result.append(dataclasses.replace(other, speed=speed, comparison=found))
    return result
