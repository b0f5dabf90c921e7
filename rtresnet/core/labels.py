"""Match the labels of a data set with the classes of a model.

Labels are matched by name. If one side has no names, they are matched by position, and every
result states this assumption.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtresnet.core.errors import DataError, InputError, nearest
from rtresnet.core.reporter import plural

SHOWN = 3  # unknown names that an error lists


@dataclass(frozen=True, kw_only=True)
class LabelMatch:
    """Record of how the data's labels were matched with a model's classes.

    Attributes:
        matched_by: "name", "file" (names from --classes) or "position".
        in_order: Whether the labels equal the model's class numbers.
        data_classes: Number of classes of the data.
        model_classes: Number of classes of the model.
        remarks: Remarks for the reader of the result.
    """

    matched_by: str
    in_order: bool
    data_classes: int
    model_classes: int
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """The model's class for each label of a data set.

    Attributes:
        indices: Index of the model's class for each class of the data.
        model_classes: Number of classes of the model.
        by: "name", "file" (names from --classes) or "position".
        why: With "position", the side that has no names.
    """

    indices: tuple[int, ...]
    model_classes: int
    by: str
    why: str = ""

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Map the data's labels, int64 [N], to the model's; -1 (no label) stays."""
        return np.where(labels < 0, -1, np.array([*self.indices, -1])[labels])

    def reorder(self, scores: np.ndarray) -> np.ndarray:
        """Reorder [N, classes, ...] from the data's order to the model's; permutations only."""
        return scores[:, np.argsort(self.indices)]

    @property
    def in_order(self) -> bool:
        """Whether the data's labels equal the model's class numbers."""
        return self.indices == tuple(range(len(self.indices)))

    @property
    def is_permutation(self) -> bool:
        """Whether both have the same classes."""
        return len(self.indices) == self.model_classes

    def summary(self) -> LabelMatch:
        """Return the mapping as results show it."""
        return LabelMatch(
            matched_by=self.by,
            in_order=self.in_order,
            data_classes=len(self.indices),
            model_classes=self.model_classes,
            remarks=tuple(self.remarks()),
        )

    def assumptions(self) -> list[str]:
        """Return the assumptions that a result must state."""
        return [f"class names matched by position: {self.why}"] if self.by == "position" else []

    def remarks(self) -> list[str]:
        """Return other facts that a reader of the result must know."""
        lines = []
        if not self.is_permutation:
            lines.append(
                f"the data has {len(self.indices)} of the model's {self.model_classes} classes; "
                f"predictions are over all {self.model_classes}"
            )
        if self.by != "position" and not self.in_order:
            lines.append("the data's classes are in a different order; matched by name")
        return lines


def numbered(classes: Sequence[str]) -> bool:
    """Return whether names are only the classes' numbers, as of a model that has no names."""
    return tuple(classes) == tuple(str(index) for index in range(len(classes)))


def match(
    model: Sequence[str],
    data: Sequence[str],
    *,
    data_named: bool = True,
    names: Sequence[str] | None = None,
    model_name: str = "the model",
    data_name: str = "the data",
) -> LabelMap:
    """Find the model's class for each label of a data set.

    Args:
        model: The model's class names, in the order of its outputs; their numbers if it has
            none.
        data: The data's class names, in the order of its labels.
        data_named: Whether `data` are names; False if they are numbers.
        names: From --classes: names of the model's outputs if it has none, else of the data's
            labels. If neither has names, names of both.
        model_name: For messages.
        data_name: For messages.

    Raises:
        DataError: A class that the model does not have, or, if a side has no names, a different
            number of classes.
    """
    if names is not None:
        if numbered(model):
            if len(names) != len(model):
                raise wrong_number(names, model_name, len(model))
            model = names
            if not data_named:  # then they name both sides, and numbers stay what they are
                count = len(_first(names, len(data), data_name))
                return LabelMap(indices=tuple(range(count)), model_classes=len(model), by="file")
        elif data_named and len(names) != len(data):
            raise wrong_number(names, data_name, len(data))
        else:
            data = _first(names, len(data), data_name)
        indices = _by_name(model, data, model_name, data_name)
        return LabelMap(indices=indices, model_classes=len(model), by="file")
    # A model of numbers may have been trained on class folders with such names.
    numbers = bool(set(data) & set(model)) or all(name.isdecimal() for name in data)
    if data_named and (numbers or not numbered(model)):
        indices = _by_name(model, data, model_name, data_name)
        return LabelMap(indices=indices, model_classes=len(model), by="name")
    without = [data_name] if not data_named else []
    without += [model_name] if numbered(model) else []
    why = f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no class names"
    if len(model) != len(data):
        raise DataError(
            f"{data_name} has {plural(len(data), 'class')}, but {model_name} has {len(model)}; "
            f"{why}",
            fix="list the class names in the order of their numbers: --classes FILE",
        )
    return LabelMap(
        indices=tuple(range(len(data))), model_classes=len(model), by="position", why=why
    )


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names: one per line, or a JSON list in a file *.json.

    Raises:
        InputError: No such file, not UTF-8, not a list of names, an empty name, or none.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix.lower() == ".json" else text.rstrip().split("\n")
    except OSError as error:
        raise InputError(f"--classes {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise InputError(f"--classes {path}: cannot be read ({error})") from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InputError(f"--classes {path}: not a list of names", fix='as in ["cat", "dog"]')
    names = [name.strip() for name in names]
    if not all(names):
        raise InputError(
            f"--classes {path}: name {names.index('') + 1} is empty", fix="write one name per line"
        )
    return tuple(names)


def wrong_number(names: Sequence[str], side: object, count: int) -> InputError:
    """Return the error for --classes with the wrong number of names."""
    return InputError(
        f"--classes has {plural(len(names), 'name')}, but {side} has {plural(count, 'class')}",
        fix="list every class once, in the order of its number",
    )


def _first(names: Sequence[str], count: int, data_name: str) -> Sequence[str]:
    if len(names) < count:
        raise wrong_number(names, data_name, count)
    return names[:count]


def _with_nearest(name: str, names: Sequence[str]) -> str:
    near = nearest(name, names)
    return f"{name!r} (nearest: {near!r})" if near else repr(name)


def _by_name(
    model: Sequence[str], data: Sequence[str], model_name: str, data_name: str
) -> tuple[int, ...]:
    if tuple(model) == tuple(data):
        return tuple(range(len(data)))
    counts = Counter(model)
    unknown = [name for name in data if name not in counts]
    if unknown:
        shown = ", ".join(_with_nearest(name, model) for name in unknown[:SHOWN])
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise DataError(
            f"{data_name}: {model_name} has no class {shown}{more}",
            fix="rename the classes, or list their names in order: --classes FILE",
        )
    for name in data:
        if counts[name] > 1:
            raise DataError(f"{model_name}: has {plural(counts[name], 'class')} named {name!r}")
    if len(set(data)) != len(data):
        twice = Counter(data).most_common(1)[0][0]
        raise DataError(f"{data_name}: has two classes named {twice!r}")
    place = {name: index for index, name in enumerate(model)}
    return tuple(place[name] for name in data)
