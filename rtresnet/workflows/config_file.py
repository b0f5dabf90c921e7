"""The configuration of a training run as a TOML file: read for `--config`, written into the run.

model = "resnet18"
data = "photos"

[recipe]
epochs = 30
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import atomic_io
from rtresnet.core.config import options_of
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.train_job import RECIPE_FIELDS, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from rtresnet.training.config import TrainJob

CONFIG_FILE = "config.toml"
NOT_IN_FILES = ("settings", "resume")
# Options that the resolved configuration has as fields of the recipe.
IN_RECIPE = (*RECIPE_FIELDS, "flip", "compile", "qat", "precision")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """The content of a file.

    Attributes:
        train: The options of `train`, the recipe's fields among `settings`.
        stated: The input that it states.
    """

    train: TrainConfig
    stated: InputConfig


def read_config(path: str | os.PathLike[str]) -> ConfigFile:
    """Read a configuration.

    Args:
        path: A TOML file; a run's config.toml is one.

    Returns:
        Config and input of `train`.

    Raises:
        InputError: Not readable, not TOML, or a value that is out of bounds.
        UnknownNameError: A key that is no option.
    """
    file = atomic_io.require_file(path, fix="every run writes one: RUN/config.toml")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a TOML file ({error})") from None
    recipe = values.pop("recipe", {})
    name = None
    if isinstance(recipe, str):
        recipe, name = {}, recipe
    name = recipe.pop("name", name)
    for key, value in recipe.items():
        if isinstance(value, dict):
            raise InputError(f"{file}: recipe.{key} is a table, not a value")
    settings = tuple(f"{key}={_setting(value)}" for key, value in recipe.items())
    train_keys = {field.name for field, _, _ in options_of(TrainConfig)} - set(NOT_IN_FILES)
    input_keys = {field.name for field, _, _ in options_of(InputConfig)}
    for key in values:
        if key not in train_keys | input_keys:
            raise UnknownNameError(f"key of {file}", key, sorted(train_keys | input_keys))
    train = {key: value for key, value in values.items() if key in train_keys}
    if name is not None:
        train["recipe"] = name
    return ConfigFile(
        train=TrainConfig(**train, settings=settings),
        stated=InputConfig(**{key: value for key, value in values.items() if key in input_keys}),
    )


def write_config(path: Path, config: TrainConfig, job: TrainJob) -> None:
    """Write the resolved configuration of a run.

    Args:
        path: The file.
        config: Config of the run.
        job: What it was resolved to.
    """
    resolved: dict[str, Any] = {
        "model": job.spec.name,
        "data": config.data or job.source.name,
        "weights": config.weights,
        "teacher": config.teacher,
        "size": job.preprocess.size,
        "mean": job.preprocess.mean,
        "std": job.preprocess.std,
        "interpolation": job.preprocess.interpolation,
        "max_broken": job.max_broken,
    }
    for field, _, _ in options_of(TrainConfig):
        value = getattr(config, field.name)
        skipped = field.name in (*NOT_IN_FILES, *IN_RECIPE, *resolved, "recipe", "out")
        if not skipped and value != field.default:
            resolved[field.name] = value
    lines = [f"{k} = {_toml(v)}" for k, v in resolved.items() if v is not None]
    recipe = dataclasses.asdict(job.recipe)
    lines += ["", "[recipe]", *(f"{key} = {_toml(value)}" for key, value in recipe.items())]
    atomic_io.write_text(path, "\n".join(lines) + "\n")


def changed_options(config: TrainConfig | InputConfig) -> Mapping[str, Any]:
    """Return the options of a config that differ from their defaults.

    Without `settings`, and without `preset`, whose values are those of mean and std.
    """
    return {
        field.name: getattr(config, field.name)
        for field, _, _ in options_of(type(config))
        if field.name not in ("settings", "preset") and getattr(config, field.name) != field.default
    }


def _setting(value: Any) -> str:
    """Return a value as `--set` takes it."""
    if isinstance(value, list):
        return ",".join(
            ":".join(map(_setting, entry)) if isinstance(entry, list) else _setting(entry)
            for entry in value
        )
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value))
