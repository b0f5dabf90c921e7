"""Which block of a residual net a node belongs to, by its name or by the additions.

Pure Python over names and operators, so that rooms that may not import each other agree on what
a block is. A block is what lies between two residual additions, with its shortcut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMED = re.compile(r"((?:layer\d+|features)[./]\d+)(?:[./]|$)")
STEM, HEAD = "stem", "head"
ENDS = ("GlobalAveragePool", "ReduceMean", "Gemm", "MatMul")


def assign(nodes: Sequence[tuple[str, str]]) -> list[str]:
    """The block of each node: "stem", "layer1.0" and so on ("block1" without names), "head".

    Args:
        nodes: (name, operator) in the graph's order.
    """
    convolutions = [name for name, op in nodes if op.endswith("Conv")]
    named = sum(NAMED.match(name) is not None for name in convolutions)
    return _by_name(nodes) if named >= max(1, len(convolutions) - 1) else _by_additions(nodes)


def _by_name(nodes: Sequence[tuple[str, str]]) -> list[str]:
    matches = [NAMED.match(name) for name, _ in nodes]
    last = max(index for index, match in enumerate(matches) if match)
    found = []
    for index, ((_, op), match) in enumerate(zip(nodes, matches, strict=True)):
        other = HEAD if index > last or op in ENDS else STEM
        found.append(match[1].replace("/", ".") if match else other)
    return found


def _by_additions(nodes: Sequence[tuple[str, str]]) -> list[str]:
    """An Add ends a block: the next one begins with the next convolution."""
    found: list[str] = []
    number, current, ended = 0, "", True
    for _, op in nodes:
        if op in ENDS:
            current = HEAD
        elif op.endswith("Conv") and ended and current != HEAD:
            current = f"block{number}" if number else STEM
            number += 1
            ended = number == 1  # the stem is one convolution
        ended |= op == "Add"
        found.append(current or STEM)
    return found
