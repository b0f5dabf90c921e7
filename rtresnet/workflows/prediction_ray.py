"""Predict on Ray Data, with many `Predictor`s in separate processes.

The cluster is the one that RAY_ADDRESS names, or a local one for the time of the run. Every machine
needs rtresnet, the artifact and the images under the same names. Batches come back in order and
have the same predictions as without Ray.
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

from rtresnet.core import artifacts, atomic_io, serialization
from rtresnet.core.errors import InputError, RtresnetError, UnavailableError, missing_package
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.predictor import PredictConfig, Prediction, Predictor, PredictorInfo

BLOCKS = 512  # Ray's units of work; results come back a block at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """Settings from which every process makes the same predictor."""

    folder: str
    artifact: str
    sha256: str
    config: PredictConfig
    runtime: RuntimeConfig | None
    stated: InputConfig | None

    def predictor(self) -> Predictor:
        """Load the artifact in this process, after checking that it is the same file."""
        with contextlib.suppress(OSError):  # names are relative to the folder of the caller
            os.chdir(self.folder)
        if atomic_io.sha256(atomic_io.require_file(self.artifact)) != self.sha256:
            raise InputError(
                f"{self.artifact}: differs from the file on the machine where predict was started"
            )
        return Predictor(self.artifact, self.config, runtime=self.runtime, stated=self.stated)


class Actor:
    """A process: a `Predictor` that predicts one batch in each call."""

    def __init__(self, task: _Task) -> None:
        self.predictor = task.predictor()

    def __call__(self, item: dict[str, str]) -> dict[str, str]:
        """Predict names; both sides are JSON, because Arrow cannot store every file name."""
        (batch,) = self.predictor.batches(json.loads(item["names"]))
        return {"predictions": json.dumps([dataclasses.asdict(entry) for entry in batch])}


class RayPredictor:
    """Many `Predictor`s, used like one.

    Args:
        artifact: Checkpoint, ONNX file or plan; the same file on every machine.
        config: As for `Predictor`.
        actors: Number of processes; by default one for each GPU if the artifact runs there, else
            one for each machine.
        runtime: As for `Predictor`.
        stated: As for `Predictor`.

    Raises:
        UnavailableError: No Ray Data, no cluster at RAY_ADDRESS, or no GPU in it for a plan.
        RtresnetError: As for `Predictor`.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        config: PredictConfig | None = None,
        *,
        actors: int | None = None,
        runtime: RuntimeConfig | None = None,
        stated: InputConfig | None = None,
    ) -> None:
        self._ray = _ray()
        task = _Task(
            folder=str(Path.cwd()),
            artifact=str(artifact),
            sha256=atomic_io.sha256(atomic_io.require_file(artifact)),
            config=config or PredictConfig(),
            runtime=runtime,
            stated=stated,
        )
        self._owned = not self._ray.is_initialized()
        if self._owned:
            self._start()
        try:
            gpu = artifacts.kind_of(artifact) == "plan"
            gpu = gpu or (runtime is not None and runtime.device == "cuda")
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            if gpu and not gpus:
                raise UnavailableError(
                    "no machine of Ray's cluster has a GPU", fix="see: ray status"
                )
            machines = sum(node["Alive"] for node in self._ray.nodes())
            self.actors = actors or (gpus if gpu else machines)
            self._resources = {"num_cpus": 1, "num_gpus": int(gpu)}
            # Asked of a worker: this machine may have no GPU.
            ask = self._ray.remote(**self._resources)(_info).remote
            with _original_errors():
                self.info: PredictorInfo = self._ray.get(ask(task))
            # Defaults are fixed now, so that every process makes the same batches.
            fixed = dataclasses.replace(task.config, top=self.info.top, batch=self.info.batch)
            self._task = dataclasses.replace(task, config=fixed)
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

    def batches(self, names: Sequence[str]) -> Iterator[list[Prediction]]:
        """See `Predictor.batches`."""
        data, step = self._ray.data, self.info.batch
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [
            {"names": json.dumps(names[start : start + step])}
            for start in range(0, len(names), step)
        ]
        results = data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).map(
            Actor,
            fn_constructor_args=(self._task,),
            compute=data.ActorPoolStrategy(size=self.actors),
            **self._resources,
        )
        with _original_errors():
            for item in results.iter_rows():
                entries = json.loads(item["predictions"])
                yield [serialization.from_json(Prediction, entry) for entry in entries]

    def close(self) -> None:
        """End the local cluster, if it was started here."""
        if self._owned:
            self._ray.shutdown()


def _info(task: _Task) -> PredictorInfo:
    with task.predictor() as predictor:
        return predictor.info


@contextlib.contextmanager
def _original_errors() -> Iterator[None]:
    """Raise a RtresnetError of one of Ray's processes as if it had been raised here."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, RtresnetError) and type(cause).__module__.startswith("rtresnet."):
                raise cause from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise missing_package("ray[data]", "--ray") from None
    return ray
