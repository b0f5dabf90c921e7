"""`rtresnet eval`: accuracy of a checkpoint, an ONNX file or a plan on labelled images."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common, opening

if TYPE_CHECKING:
    from rtresnet.core import metrics
    from rtresnet.training.protocols import Member


@click.command("eval", short_help="Measure top-1 and top-5 accuracy.")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--data", required=True, help=common.DATA_HELP)
@click.option(
    "--split",
    type=click.Choice(("train", "test", "all")),
    default="test",
    show_default=True,
    help="A set that came undivided is evaluated whole.",
)
@click.option(
    "--protocol",
    type=click.Choice(("center", "10-crop", "dense")),
    default="center",
    show_default=True,
    help="dense: whole images at five scales, checkpoints only.",
)
@click.option(
    "--resize",
    type=click.IntRange(min=1),
    help="Shorter side before the crop [the artifact's]; with dense, its one scale.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.")
@click.option("--model", help="The net of a foreign checkpoint [recognized].")
@click.option(
    "--record/--no-record",
    default=None,
    help="Write the accuracy into the artifact's sidecar [where that can be written].",
)
@common.classes_option
@common.input_options
@common.device_options
@common.json_option
def command(
    artifacts: tuple[str, ...],
    data: str,
    split: str,
    protocol: str,
    resize: int | None,
    batch: int | None,
    record: bool | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Measure top-1 (and top-5 above five classes).

    Several artifacts are an ensemble: their probabilities are averaged, image by image.
    """
    result = run(
        *artifacts, data=data, split=split, protocol=protocol, resize=resize, batch=batch, **options
    )
    for entry in result["members"]:
        _show(
            entry["artifact"], entry, f"{entry['precision']}, {entry['provider']}; {entry['shown']}"
        )
    common.show_run_notes(*result["members"])
    if len(artifacts) > 1:
        _show(result["artifact"], result, f"mean of probabilities; {protocol}")
    common.footer(line for entry in result["members"] for line in footnotes(entry))
    common.write_json(json_file, "eval", result)
    if record is not False:
        write_records(result, required=bool(record))


def run(
    *artifacts: str,
    data: str,
    split: str = "test",
    protocol: str = "center",
    resize: int | None = None,
    batch: int | None = None,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates artifacts on labelled images; returns what `--json` writes."""
    from rtresnet.data import loader, sources
    from rtresnet.training import protocols

    if protocol == "dense":
        for path in artifacts:
            _require_checkpoint(path)
    with contextlib.ExitStack() as stack:
        opened = []
        for path in artifacts:
            opened.append(opening.open_artifact(path, **options))
            stack.callback(opened[-1].close)
        _require_all_probabilities(opened, protocol)
        opened, assumed = _in_one_order(opened, classes)
        members = [_member(entry, protocol, resize) for entry in opened]
        source = sources.for_model(
            sources.open_source(data, split), opened[0].classes, names=classes,
            model_name=artifacts[0],
        )  # fmt: skip
        tally = loader.DecodeErrors(len(source), common.note)
        with common.progress(f"evaluating {', '.join(artifacts)}", total=len(source)) as update:
            result = protocols.measure(members, source, batch=batch, tally=tally, on_images=update)
    skipped = {"skipped": list(tally.skipped.values())}
    labels = source.mapping
    about = {
        "data": data,
        "split": split if source.splits else "all",
        "data_sha256": source.fingerprint(),
        "labels": labels.record() | {"remarks": labels.remarks()},
    }
    assumed += labels.assumptions()
    entries = []
    for path, artifact, member, found in zip(
        artifacts, opened, members, result.members, strict=True
    ):
        entries.append(
            {"artifact": path, "precision": artifact.precision}
            | {"assumed": [*artifact.assumed, *assumed]}
            | {"input": dataclasses.asdict(member.preprocess)}
            | _measured(found, artifact.topk) | about | skipped | _shown(member) | artifact.where
        )  # fmt: skip
    if len(entries) == 1:
        return entries[0] | {"members": entries}
    return (
        {"artifact": f"ensemble of {len(entries)}", "protocol": protocol, "assumed": assumed}
        | _measured(result.ensemble) | about | skipped | {"members": entries}
    )  # fmt: skip


RECORDED = (
    "n", "top1", "top5", "top1_percent", "top5_percent", "data", "split", "data_sha256",
    "protocol", "labels", "assumed",
)  # fmt: skip


def write_records(result: dict[str, Any], *, required: bool = False) -> None:
    """Writes each artifact's accuracy into its sidecar.

    Only what was measured as the sidecar says is the artifact's accuracy: one centre crop, with
    its own preprocessing.

    Args:
        result: From `run`.
        required: Whether what cannot be recorded is an error rather than a note.

    Raises:
        InputError: `required`, and there is no sidecar, it cannot be written, or the accuracy is
            not the artifact's own.
    """
    from rtresnet.core import artifacts
    from rtresnet.core.errors import InputError

    for entry in result["members"]:
        path = entry["artifact"]
        sidecar = artifacts.read_sidecar(path)
        if sidecar is None:
            reason = f"{path}: no sidecar to record the accuracy in (see: rtresnet adopt)"
        elif entry["protocol"] != "center" or entry["input"] != dataclasses.asdict(sidecar.input):
            reason = (
                f"{path}: not recorded, as it was measured in another way than its sidecar says"
            )
        else:
            try:
                artifacts.record_accuracy(path, {name: entry[name] for name in RECORDED})
                continue
            except (InputError, OSError) as error:
                reason = f"accuracy not recorded: {error}"
                if not required:
                    common.note(reason)
        if required:
            raise InputError(reason, fix="leave out --record")


def _measured(accuracy: metrics.Accuracy, topk: int | None = None) -> dict[str, Any]:
    if topk is not None and topk < 5:
        accuracy = dataclasses.replace(accuracy, top5=None)
    return dataclasses.asdict(accuracy) | {
        "top1_percent": accuracy.top1_percent,
        "top5_percent": accuracy.top5_percent,
    }


def _shown(member: Member) -> dict[str, Any]:
    """How the images were shown, for the JSON and (`shown`) in words."""
    size, resize, views = member.preprocess.size, member.preprocess.resize, member.views_an_image
    scales = ", ".join(map(str, member.scales))
    pixels = f"shorter side {scales}" if scales else f"{size} of {resize}"
    return {
        "protocol": member.protocol,
        "size": size,
        "resize": None if scales else resize,
        "scales": list(member.scales) or None,
        "views": views,
        "shown": f"{member.protocol}, {pixels} px, {views} view{'s' if views > 1 else ''}",
    }


def _show(name: str, entry: dict[str, Any], how: str) -> None:
    top5 = "" if entry["top5"] is None else f", top-5 {entry['top5_percent']:.2f} %"
    skipped = f", {len(entry['skipped'])} skipped" if entry["skipped"] else ""
    common.out_console().print(
        f"{name}: top-1 {entry['top1_percent']:.2f} % ({entry['top1']} of {entry['n']})"
        f"{top5}{skipped}  [{how}]",
        soft_wrap=True,
        markup=False,
    )


def _require_checkpoint(path: str) -> None:
    """Raises InputError where an artifact takes images of one size only."""
    from rtresnet.core import artifacts, atomic_io
    from rtresnet.core.errors import InputError

    atomic_io.require_file(path)
    if artifacts.kind_of(path) == "checkpoint":
        return
    origin = list(artifacts.chain(path))[-1]
    known = origin[2] == "ok" and artifacts.kind_of(origin[0]) == "checkpoint"
    raise InputError(
        f"{path}: takes images of one size, and --protocol dense shows them whole",
        fix="evaluate the checkpoint it was made from" + (f", {origin[0]}" if known else ""),
    )


def _member(opened: opening.Opened, protocol: str, resize: int | None) -> Member:
    from rtresnet.core.errors import InputError
    from rtresnet.training.protocols import Member, dense_scales

    preprocess, size = opened.preprocess, opened.preprocess.size
    if resize is not None and resize < size:
        raise InputError(
            f"--resize {resize}: {opened.path} takes {size} x {size} pixels, which must fit",
            fix=f"--resize {size} or more",
        )
    if protocol != "dense":
        side = resize or preprocess.resize
        preprocess = dataclasses.replace(preprocess, resize=side)
        return Member(forward=opened.logits, preprocess=preprocess, protocol=protocol)
    from rtresnet.models.reference import DenseBackend, TorchBackend
    from rtresnet.models.resnet import ResNet

    assert isinstance(opened.forward, TorchBackend) and isinstance(opened.forward.net, ResNet)
    dense = DenseBackend(opened.forward.net)
    order = opened.order
    return Member(
        forward=dense if order is None else lambda images: order.reorder(dense(images)),
        preprocess=preprocess,
        protocol=protocol,
        scales=(resize,) if resize else dense_scales(size),
    )


def _require_all_probabilities(opened: Sequence[opening.Opened], protocol: str) -> None:
    """Raises InputError where a mean needs probabilities that a top-K file keeps to itself."""
    from rtresnet.core import artifacts
    from rtresnet.core.errors import InputError

    for entry in opened:
        if entry.topk is not None and (len(opened) > 1 or protocol != "center"):
            sidecar = artifacts.read_sidecar(entry.path)
            parent = artifacts.parent_path(entry.path, sidecar) if sidecar else None
            raise InputError(
                f"{entry.path}: gives the {entry.topk} most probable classes; an ensemble or "
                "several crops are a mean over all of them",
                fix=f"use {parent or 'the file it was made from'}",
            )


def _in_one_order(
    opened: Sequence[opening.Opened], names: Sequence[str] | None
) -> tuple[list[opening.Opened], list[str]]:
    """The nets of an ensemble with their outputs in the order of the first one's classes.

    Args:
        opened: The nets.
        names: From --classes, of nets without names.

    Returns:
        The nets, and what had to be assumed of their classes.

    Raises:
        InputError: They have other classes, or one gives no scores of all classes.
    """
    first, *others = opened
    first.require_classes()
    matched = [other.matched(first, names) for other in others]
    assumed = [line for _, mapping in matched for line in mapping.assumptions()]
    return [first, *(entry for entry, _ in matched)], assumed


def footnotes(entry: dict[str, Any]) -> list[str]:
    """What one artifact's accuracy assumes, and what its reader must know, a line each."""
    return [*(f"Assumed: {line}." for line in entry["assumed"]),
            *(f"Note: {line}." for line in entry["labels"]["remarks"])]  # fmt: skip
