"""`rtresnet predict --ray`: the rows of `predict_rows.py`, made by processes of Ray Data.

The cluster is the one that RAY_ADDRESS names, or a local one for the time of the run. Every machine
needs rtresnet, the artifact and the images under the same names. Batches come back in order, and
are the same as without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rtresnet.cli.predict_rows import About, Predictor, Row
from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import InputError, RtresnetError, UnavailableError, missing_package

BLOCKS = 512  # Ray's units of work; results come back a block at a time


class Actor:
    """One process: a `Predictor` that makes one batch a call."""

    def __init__(self, folder: str, artifact: str, digest: str, options: dict[str, Any]) -> None:
        _stand_in(folder)
        if atomic_io.sha256(atomic_io.require_file(artifact)) != digest:
            raise InputError(f"{artifact}: not the file that it is where predict was started")
        self.predictor = Predictor(artifact, **options)

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        """Names to rows, both as JSON: Arrow's strings cannot hold every name of a file."""
        (rows,) = self.predictor.batches(json.loads(item["names"]))
        return {"rows": json.dumps([dataclasses.asdict(row) for row in rows])}


class OnRay:
    """Many `Predictor`s behind the calls of one.

    Args:
        artifact: Checkpoint, ONNX file or plan; the same file on every machine.
        actors: How many; by default one a GPU for what runs there, else one a machine.
        options: As `Predictor` takes them.

    Raises:
        UnavailableError: No Ray Data, no cluster at RAY_ADDRESS, or no GPU in it for a plan.
        RtresnetError: What a `Predictor` raises.
    """

    def __init__(self, artifact: str, *, actors: int | None = None, **options: Any) -> None:
        self._ray = _ray()
        self._artifact, self._folder = artifact, str(Path.cwd())
        self._digest = atomic_io.sha256(atomic_io.require_file(artifact))
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._start()
        try:
            gpu = options.get("device") == "cuda" or artifacts.kind_of(artifact) == "plan"
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            if gpu and not gpus:
                raise UnavailableError(
                    "no machine of Ray's cluster has a GPU", fix="see: ray status"
                )
            machines = sum(node["Alive"] for node in self._ray.nodes())
            self.actors = actors or (gpus if gpu else machines)
            self._needs = {"num_cpus": 1, "num_gpus": int(gpu)}
            ask = self._ray.remote(**self._needs)(_about).remote
            with _plainly():
                self.about: About = self._ray.get(ask(self._folder, artifact, options))
            # What was left open is decided now: every process makes the same batches.
            self._options = options | {"top": self.about.top, "batch": self.about.batch}
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            self._ray.init(logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UnavailableError(
                f"Ray does not start ({str(error).splitlines()[0]})",
                fix="see: ray status; without RAY_ADDRESS it starts on this machine",
            ) from error

    def batches(self, names: Sequence[str]) -> Iterator[list[Row]]:
        """See `Predictor.batches`."""
        data, step = self._ray.data, self.about.batch
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [
            {"names": json.dumps(names[start : start + step])}
            for start in range(0, len(names), step)
        ]
        made = data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).map(
            Actor,
            fn_constructor_args=(self._folder, self._artifact, self._digest, self._options),
            compute=data.ActorPoolStrategy(size=self.actors),
            **self._needs,
        )
        with _plainly():
            for item in made.iter_rows():
                yield [Row(**row) for row in json.loads(item["rows"])]

    def close(self) -> None:
        """Ends the local cluster, if it was started here."""
        if self._ours:
            self._ray.shutdown()


def _about(folder: str, artifact: str, options: dict[str, Any]) -> About:
    """What the processes will say of themselves: where this was started there may be no GPU."""
    _stand_in(folder)
    with contextlib.closing(Predictor(artifact, **options)) as predictor:
        return predictor.about


def _stand_in(folder: str) -> None:
    """Names relative to where the person stands are found, where there is such a folder."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """A mistake found by one of Ray's processes is told as if it had been found here."""
    try:
        yield
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, RtresnetError) and type(seen).__module__ == "rtresnet.core.errors":
                raise seen from None
            seen = getattr(seen, "cause", None) or seen.__cause__
        raise


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise missing_package("ray[data]", "--ray") from None
    return ray
