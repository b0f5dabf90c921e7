"""`rtresnet models`: the zoo as a table."""

from __future__ import annotations

from typing import Any

import click

from rtresnet.cli import common


@click.command("models")
@common.json_option
def command(json_file: str | None) -> None:
    """List the nets: depth, block, parameters, multiply-adds."""
    from rtresnet.models import zoo
    from rtresnet.reporting import tables

    rows, records = [], []
    for name in zoo.names():
        spec = zoo.spec(name)
        cost = zoo.cost(spec)
        record: dict[str, Any] = {
            "model": name,
            "depth": spec.depth,
            "block": spec.block,
            "shortcut": spec.shortcut,
            "size": spec.size,
            "parameters": cost.parameters,
            "multiply_adds": cost.multiply_adds,
        }
        records.append(record)
        rows.append(
            (
                name,
                spec.depth,
                spec.block,
                spec.shortcut,
                f"{spec.size}x{spec.size}",
                f"{record['parameters']:,}",
                f"{record['multiply_adds'] / 1e9:.3f} G",
            )
        )
    vgg = zoo.VGG19_MULTIPLY_ADDS
    rows.append(("VGG-19", 19, "-", None, "224x224", "-", f"{vgg / 1e9:.1f} G"))
    headings = ("model", "depth", "block", "shortcut", "input", "parameters", "mult-adds")
    tables.show(common.out_console(), headings, rows)
    common.note("Any depth of 6n+2 works as a CIFAR net too, resnet8 or plain26 for instance.")
    common.write_json(json_file, "models", {"models": records, "vgg19_multiply_adds": vgg})
