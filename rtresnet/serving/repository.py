"""The models of a server: loading, names and versions, reloading.

A source of models is an ONNX file or a plan with its sidecar, or the folder of a Triton repository
with NAME/VERSION/model.onnx or model.plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.runtime.session import Session
from rtresnet.serving import protocol
from rtresnet.serving.config import ServeConfig
from rtresnet.serving.model import ServedModel, stamp
from rtresnet.serving.prometheus import Metrics
from rtresnet.serving.protocol import RequestError

log = logging.getLogger("rtresnet.serve")

SUFFIXES = (".onnx", ".plan")
POLL_SECONDS = 1.0


class Repository:
    """Loads models, finds them by name and version, and reloads files that changed.

    Args:
        sources: ONNX files, plans, or folders of a Triton repository.
        load: Opens an artifact and verifies its sidecar.
        config: The options of the server.

    Attributes:
        ready: Whether the server accepts requests.
        operations: The protocol's reading operations by their names in gRPC: functions of a model's
            name and version that return the fields of gRPC's response.
    """

    def __init__(
        self, sources: Sequence[Path], load: Callable[[Path], Session], config: ServeConfig
    ) -> None:
        self.config, self.metrics, self.ready = config, Metrics(), False
        self._sources, self._load = sources, load
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._last_stamps: dict[Path, Any] = {}
        self._rejected_stamps: dict[Path, Any] = {}
        self.operations: dict[str, Callable[..., dict[str, Any]]] = {
            "ServerLive": lambda *_: {"live": self.healthy},
            "ServerReady": lambda *_: {"ready": self.ready and self.healthy},
            "ServerMetadata": lambda *_: protocol.server(),
            "ModelReady": lambda *model: {"ready": self.ready and self.get(*model).healthy},
            "ModelMetadata": self._metadata,
            "ModelConfig": lambda *model: {"config": self.get(*model).config()},
            "ModelStatistics": lambda *model: {
                "model_stats": [
                    entry.statistics() for entry in ([self.get(*model)] if model[0] else self.all())
                ]
            },
            "RepositoryIndex": lambda *_: {
                "models": [
                    {"name": model.name, "version": model.version,
                     "state": "READY" if model.healthy else "UNAVAILABLE", "reason": ""}
                    for model in self.all()
                ]
            },
        }  # fmt: skip

    def load_all(self) -> None:
        """Load and warm up all models; if one fails, the others are closed.

        Raises:
            InputError: Nothing to serve, or two models of one name and version.
        """
        try:
            for source in self._sources:
                for name, version, path in model_files(source):
                    if version in self._models.get(name, {}):
                        raise InputError(f"{path}: duplicate model {name}, version {version}")
                    self._models.setdefault(name, {})[version] = self._open(name, version, path)
        except BaseException:
            self.close()
            raise
        if not self._models:
            sources = ", ".join(map(str, self._sources))
            raise InputError(
                f"{sources}: no ONNX file or plan to serve", fix="create one: rtresnet export"
            )

    def _open(self, name: str, version: str, path: Path) -> ServedModel:
        return ServedModel(name, version, path, self._load, self.config, self.metrics)

    def get(self, name: str | None, version: str = "") -> ServedModel:
        """Return a model; without a name the only one, without a version the newest.

        Raises:
            RequestError: The model or the version does not exist.
        """
        models = self._models
        if name is None and len(models) == 1:
            name = next(iter(models))
        if name is None or name not in models:
            problem = "name a model" if name is None else f"unknown model {name[:80]!r}"
            raise RequestError(404, problem, fix=f"known: {', '.join(sorted(models))}")
        versions = models[name]
        chosen = version or max(versions, key=int)
        if chosen not in versions:
            raise RequestError(
                404,
                f"{name}: unknown version {version[:20]!r}",
                fix=f"known: {', '.join(versions)}",
            )
        return versions[chosen]

    def _metadata(self, name: str | None, version: str) -> dict[str, object]:
        model = self.get(name, version)
        return model.metadata(sorted(self._models[model.name], key=int))

    def all(self) -> list[ServedModel]:
        """Return every version of every model."""
        return [
            versions[v] for _, versions in sorted(self._models.items())
            for v in sorted(versions, key=int)
        ]  # fmt: skip

    @property
    def healthy(self) -> bool:
        """Whether no device is lost."""
        return all(model.healthy for model in self.all())

    async def watch(self) -> None:
        """Reload files whose content changed, until it is cancelled.

        A file is reloaded when it did not change between two checks, its sidecar is valid and the
        self-check passes. The old version serves until then, and finishes its requests.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for model in self.all():
                try:
                    await self._reload_if_changed(model)
                except Exception:  # other files must still be watched
                    log.exception("reloading %s failed", model.name)

    async def _reload_if_changed(self, model: ServedModel) -> None:
        path, now = model.session.path, stamp(model.session.path)
        settled = self._last_stamps.get(path) == now
        self._last_stamps[path] = now
        if now in (model.stamp, self._rejected_stamps.get(path)) or not settled:
            return
        # A replacement that has begun is completed even if the watch is cancelled, and the end of
        # the event loop waits for its thread, so that `close` finds every version.
        replacing = asyncio.get_running_loop().run_in_executor(None, self._replace, model, now)
        await asyncio.shield(replacing)

    def _replace(self, model: ServedModel, now: list[Any]) -> None:
        path = model.session.path
        try:
            new = self._open(model.name, model.version, path)
        except Exception as error:  # the old version keeps serving after any error
            self._rejected_stamps[path] = now
            log.error("not reloaded: %s", error)
            return
        self._models[model.name][model.version] = new
        log.info("reloaded %s version %s", model.name, model.version)
        model.close()

    def close(self) -> None:
        """Finish queued requests and free the memory of every model, also if one fails to close."""
        with contextlib.ExitStack() as stack:
            for model in self.all():
                stack.callback(model.close)


def model_files(source: Path) -> list[tuple[str, str, Path]]:
    """Return (name, version, file) of the models in a file or a Triton repository's folder."""
    if not source.is_dir():
        return [(source.stem, "1", source)]
    paths = sorted(source.glob("*/*/model.*")) or sorted(source.glob("*/model.*"))
    return [
        (path.parent.parent.name, path.parent.name, path)
        for path in paths
        if path.suffix in SUFFIXES and path.parent.name.isdecimal()
    ]


def chain(path: Path) -> list[dict[str, str]]:
    """Return the artifacts that a file was made from: file, kind, sha256 and state."""
    try:
        return [
            {"file": file.name, "kind": artifacts.kind_of(file), "state": state,
             "precision": sidecar.precision if sidecar else "unknown",
             "sha256": sidecar.sha256 if sidecar else ""}
            for file, sidecar, state in artifacts.chain(path)
        ]  # fmt: skip
    except ArtifactError:
        return []
