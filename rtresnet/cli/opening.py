"""Opening any artifact: a checkpoint in torch, an ONNX file or a plan in the runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common
from rtresnet.core import labels
from rtresnet.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.core.labels import LabelMap
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.models.reference import TorchBackend
    from rtresnet.runtime.backend import TopK
    from rtresnet.runtime.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """Any artifact, ready to run.

    Attributes:
        forward: What `preprocess.prepare` returns to float32 logits [N, classes], or of a top-K
            file to indices and probabilities.
        classes: Their names; their numbers where the file has no names. Empty of a top-K file
            that does not say how many there are.
        topk: How many classes an image the file gives; None where it gives logits.
        where: Device, provider, threads and versions.
        close: Gives memory back.
        weights: sha256 of the checkpoint that the weights came from, where it is known.
        assumed: What the file does not state and was assumed; see `sidecar.Sidecar`.
        order: Where `classes` are in another order than the file's own: the mapping to them.
    """

    path: Path
    forward: Callable[[np.ndarray], np.ndarray | TopK]
    preprocess: Preprocess
    classes: tuple[str, ...]
    precision: str
    where: dict[str, Any]
    close: Callable[[], None]
    topk: int | None = None
    weights: str | None = None
    order: LabelMap | None = None
    assumed: tuple[str, ...] = ()

    def matched(
        self, reference: Opened, names: Sequence[str] | None = None
    ) -> tuple[Opened, LabelMap]:
        """The same artifact with its outputs in the order of another one's classes.

        Args:
            reference: The other one.
            names: From --classes, of the one that has no names.

        Returns:
            The artifact, and how its classes were matched with the reference's.

        Raises:
            InputError: They have other classes.
        """
        for entry in (reference, self):
            entry.require_classes()
        same = self.weights is not None and self.weights == reference.weights
        unnamed = labels.numbered(self.classes)
        mapping = labels.match(
            reference.classes,
            self.classes,
            data_named=same or not unnamed,
            names=names if unnamed or labels.numbered(reference.classes) else None,
            model_name=str(reference.path),
            data_name=str(self.path),
        )
        if not mapping.is_permutation:
            raise InputError(
                f"{self.path} has {len(self.classes)} classes and {reference.path} "
                f"{len(reference.classes)}",
                fix="use artifacts of the same classes",
            )
        order = None if mapping.in_order else mapping
        return dataclasses.replace(self, order=order, classes=reference.classes), mapping

    def require_classes(self) -> None:
        """Raises InputError of a top-K file that does not say how many classes there are."""
        if not self.classes:
            raise InputError(
                f"{self.path}: gives the most probable classes, and no sidecar says how many "
                "there are",
                fix="use the file it was made from",
            )

    def answer(self, images: np.ndarray) -> np.ndarray | TopK:
        """As `forward`, with the classes in the order of `classes`."""
        found = self.forward(images)
        if self.order is None:
            return found
        if isinstance(found, tuple):
            return self.order.apply(found[0]), found[1]
        return self.order.reorder(found)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """As `answer`; of a top-K file what its answer says of all classes (`metrics`).

        Raises:
            InputError: A top-K file that does not say how many classes there are.
        """
        from rtresnet.core import metrics
        from rtresnet.runtime.backend import logits

        found = self.answer(images)
        if isinstance(found, tuple) and self.classes:
            return metrics.from_best(*found, len(self.classes))
        return logits(found, self.path)


PLAN_OPTIONS = ("contexts", "graphs")


def states_input(path: str) -> bool:
    """Whether an artifact's sidecar says what it takes, so that no option has to."""
    from rtresnet.core import artifacts

    sidecar = artifacts.read_sidecar(path)
    return sidecar is not None and sidecar.input_known


def options_for(path: str, paths: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that apply to `path`, of several artifacts in one command.

    `--provider` and `--threads` apply to the ONNX files among them; where there are none, they stay
    and the plan refuses them. `--contexts` and `--graphs` apply to the plans.

    Raises:
        InputError: `--contexts` or `--graphs`, and no plan among the artifacts.
    """
    from rtresnet.core import artifacts

    kinds = [artifacts.kind_of(name) for name in paths]
    given = [name for name in PLAN_OPTIONS if options.get(name) is not None]
    if given and "plan" not in kinds:
        raise InputError(
            f"{path}: not a plan; --{given[0]} applies to plans only",
            fix="leave it out, or measure a plan: rtresnet build",
        )
    if artifacts.kind_of(path) != "plan" or not given:
        options = {name: value for name, value in options.items() if name not in PLAN_OPTIONS}
    if artifacts.kind_of(path) == "onnx" or "onnx" not in kinds:
        return dict(options)
    taken = {"provider"} if artifacts.kind_of(path) == "checkpoint" else {"provider", "threads"}
    return {name: value for name, value in options.items() if name not in taken}


def open_session(
    path: str,
    paths: Sequence[str],
    device: str,
    options: dict[str, Any],
    *,
    contexts: int = 1,
    timings: bool = True,
) -> Session:
    """Opens any artifact as a session of the runtime.

    Args:
        path: The artifact.
        paths: Every artifact of the command, this one included.
        device: As for `load`.
        options: The command's options that apply to some of the artifacts.
        contexts: Contexts of a plan where the options do not say.
        timings: Whether a plan records the times of copies and computation.
    """
    from rtresnet.core import artifacts, atomic_io
    from rtresnet.runtime.session import load

    mine = options_for(path, paths, options)
    atomic_io.require_file(path, fix="make one with: rtresnet export")
    if artifacts.kind_of(path) != "checkpoint":
        if mine.get("contexts") is None:
            mine["contexts"] = contexts
        return load(path, device=device, timings=timings, **mine)
    return _in_torch(path, device=device, **mine)[0]


def open_artifact(
    path: str,
    *,
    device: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
    model: str | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> Opened:
    """Opens a checkpoint (in torch), an ONNX file or a plan (in the runtime)."""
    from rtresnet.core import artifacts, atomic_io

    atomic_io.require_file(path)
    if artifacts.kind_of(path) == "checkpoint":
        return _open_checkpoint(
            path, size, mean, std, device=device, provider=provider, threads=threads, model=model
        )
    from rtresnet.runtime.session import load

    session = load(path, device=device, provider=provider, threads=threads)
    sidecar = session.sidecar
    preprocess, assumed = input_of(session, size, mean, std)
    return Opened(
        path=Path(path),
        forward=session,
        preprocess=preprocess,
        classes=sidecar.model.classes if sidecar else _numbers(session, preprocess),
        precision=sidecar.precision if sidecar else "unknown",
        where=session.describe(),
        close=session.close,
        topk=sidecar.topk if sidecar else None,
        weights=sidecar.weights.sha256 if sidecar else None,
        assumed=assumed,
    )


def input_of(
    session: Session, size: int | None, mean: str | None, std: str | None
) -> tuple[Preprocess, tuple[str, ...]]:
    """The input contract of an ONNX file or a plan, and what of it is assumed.

    Args:
        session: The loaded file.
        size: From the options, as `mean` and `std`; in place of what the sidecar says.
        mean: "R,G,B".
        std: "R,G,B".

    Raises:
        InputError: Neither a sidecar nor the options say what the file takes.
    """
    from rtresnet.core.sidecar import restated

    path, sidecar, backend = session.path, session.sidecar, session.backend
    pixels = backend.layout == "nhwc"
    if pixels and (mean or std):
        raise InputError(
            f"{path}: normalizes inside, so --mean and --std change nothing",
            fix="leave them out, or use the file it was made from",
        )
    if sidecar is not None and sidecar.input_known:
        preprocess = common.preprocess_from(sidecar.input, size, mean, std)
        return preprocess, restated(sidecar.assumed, sidecar.input, preprocess)
    preprocess = common.stated_input(path, size, mean, std, fixed=backend.size, pixels=pixels)
    return preprocess, restated(sidecar.assumed if sidecar else (), None, preprocess)


def _numbers(session: Session, preprocess: Preprocess) -> tuple[str, ...]:
    """The class numbers of a file without a sidecar; none of a top-K file.

    One image is run: the file may leave the number of classes open.
    """
    import numpy as np

    image = np.zeros((1, preprocess.size, preprocess.size, 3), np.uint8)
    found = session(preprocess.prepare(image))
    return () if isinstance(found, tuple) else tuple(map(str, range(found.shape[1])))


def _open_checkpoint(
    path: str,
    size: int | None,
    mean: str | None,
    std: str | None,
    **options: Any,
) -> Opened:
    from rtresnet.core.sidecar import restated

    session, backend, loaded = _in_torch(path, **options)
    preprocess = common.preprocess_from(loaded.input, size, mean, std)
    return Opened(
        path=Path(path),
        forward=backend,
        preprocess=preprocess,
        classes=loaded.model.classes,
        precision="fp32",
        where=session.describe(),
        close=session.close,
        weights=loaded.weights.sha256,
        assumed=restated(loaded.assumed, loaded.input, preprocess),
    )


def _in_torch(
    path: str,
    *,
    device: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
    model: str | None = None,
) -> tuple[Session, TorchBackend, Checkpoint]:
    """A checkpoint behind a session, what runs it, and what is in it."""
    if provider != "auto":
        raise InputError(f"{path}: a checkpoint runs in torch and takes no --provider")
    common.require_torch("reading a checkpoint")
    import torch

    from rtresnet.core import artifacts
    from rtresnet.models import checkpoint
    from rtresnet.models.reference import TorchBackend
    from rtresnet.runtime.session import Session

    place = common.torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = checkpoint.load(path, model=model)
    backend = TorchBackend(loaded.net().to(place), loaded.input.size)
    return Session(Path(path), artifacts.read_sidecar(path), backend), backend, loaded
