"""List the nets with their cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A net.

    Attributes:
        shortcut: "A", "B" or "C"; None for a plain net.
        size: Side of the input, in pixels.
        multiply_adds: Multiply-adds for one image.
    """

    model: str
    depth: int
    block: str
    shortcut: str | None
    size: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, kw_only=True)
class ModelsResult:
    """All nets, and VGG-19's multiply-adds, with which the paper compares them."""

    models: tuple[ModelInfo, ...]
    vgg19_multiply_adds: int


def list_models() -> ModelsResult:
    """Count the parameters and multiply-adds of every net.

    Returns:
        Parameters and multiply-adds of each net.

    Raises:
        UnavailableError: torch is missing, and a net is not in the table of costs.
    """
    from rtresnet.models import zoo

    models = []
    for name in zoo.names():
        spec = zoo.spec(name)
        cost = zoo.cost(spec)
        models.append(
            ModelInfo(
                model=name, depth=spec.depth, block=spec.block, shortcut=spec.shortcut,
                size=spec.size, parameters=cost.parameters, multiply_adds=cost.multiply_adds,
            )
        )  # fmt: skip
    vgg19 = zoo.cost(zoo.spec("vgg19")).multiply_adds
    return ModelsResult(models=tuple(models), vgg19_multiply_adds=vgg19)
