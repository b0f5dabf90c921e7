"""Import TensorRT or TensorRT-RTX and create its objects; report failures as errors.

Both libraries report a failure to start in different ways: an ImportError about a shared
library, or a TypeError about a factory function, with the cause in the log. Here each becomes one
UnavailableError. This module uses no other part of their API.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rtresnet.core import hardware
from rtresnet.core.errors import InputError, UnavailableError

MODULES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
"""Module to the product's name."""


def load_tensorrt(module: str) -> Any:
    """Import a TensorRT module.

    Args:
        module: A key of MODULES. Nothing else is imported: the name may come from a sidecar.

    Raises:
        InputError: Not a key of MODULES.
        UnavailableError: It is not installed, or one of its shared libraries does not load.
    """
    if module not in MODULES:
        raise InputError(f"{module!r} is not a TensorRT module; known: {', '.join(MODULES)}")
    package = hardware.DISTRIBUTIONS[module]
    if not hardware.installed(module):
        raise UnavailableError(f"{module} is not installed", fix=f"pip install {package}")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise  # Ctrl-C during the import of an extension module
        raise UnavailableError(
            f"{module} is installed but cannot be imported: {str(error).splitlines()[0]}",
            fix=f"pip install --force-reinstall {package}",
        ) from error


def create(module: Any, kind: str, logger: Any, reason: Callable[[], str]) -> Any:
    """Create a Builder or a Runtime.

    Args:
        module: Module returned by `load_tensorrt`.
        kind: "Builder" or "Runtime".
        logger: An ILogger of this module.
        reason: Returns the logger's errors.

    Raises:
        UnavailableError: TensorRT does not start here; the message has its own reason.
    """
    try:
        return getattr(module, kind)(logger)
    except TypeError as error:  # pybind11: "factory function returned nullptr"
        if "nullptr" not in str(error):
            raise
        why = reason()
    # Outside of the handler: its traceback would keep TensorRT's objects alive.
    raise UnavailableError(
        f"{MODULES.get(module.__name__, module.__name__)} {module.__version__} cannot create a "
        f"{kind}: {why}",
        fix=hardware.driver_fix(why) or "see: rtresnet doctor",
    )
