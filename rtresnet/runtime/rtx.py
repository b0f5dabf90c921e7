"""What only TensorRT-RTX has: a header that can be asked, and kernels compiled on the spot.

Knows TensorRT only as the module it is handed.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io, hardware
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.runtime.compatibility import rebuild_here

REBUILD = "build it on this machine: rtresnet build"


def check_header(trt: Any, runtime: Any, data: bytes, path: Path) -> None:
    """Asks whether a plan will run here, which TensorRT-RTX tells from the first bytes.

    Raises:
        UnavailableError: It will not; the message says why.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, bits = runtime.get_engine_validity(data[: runtime.engine_header_size])
    why = [
        name.lower().replace("_", " ")
        for name, reason in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(bits) & int(reason)
    ]
    told = ", ".join(why) or "no reason given"
    if validity == trt.EngineValidity.INVALID:
        # Without a reason CUDA itself did not start, which a driver that is too old explains.
        fix = rebuild_here(hardware.gpus()[0])
        raise UnavailableError(
            f"{path}: TensorRT-RTX {trt.__version__} does not accept this plan on "
            f"{hardware.gpus()[0].name}: {told}",
            fix=(None if why else hardware.driver_fix()) or fix,
        )
    if validity == trt.EngineValidity.SUBOPTIMAL:
        warnings.warn(
            f"{path}: will run here slower than it could ({told}); {REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )


class KernelCache:
    """Kernels that TensorRT-RTX compiled for this GPU, kept beside the plan.

    Args:
        config: An IRuntimeConfig, for contexts that are to use it.
        path: The plan.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self.path = cache_path(path)
        self.cache = config.create_runtime_cache()
        self._kept = b""
        blob = self.path.read_bytes() if self.path.is_file() else b""
        # False: of another version, GPU or driver. Then it is made anew, and replaced.
        if self.cache is not None and blob and self.cache.deserialize(blob):
            self._kept = blob

    def save(self) -> None:
        """Writes it, if it is not what the file already has. A failure is a warning."""
        memory = self.cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if not blob or blob == self._kept:
            return
        try:
            with atomic_io.atomic_path(self.path) as temporary:
                temporary.write_bytes(blob)
        except (OSError, InputError) as error:  # it saves time next time, no more
            warnings.warn(
                f"{self.path}: the compiled kernels are not kept ({error})",
                RuntimeWarning,
                stacklevel=3,
            )


def cache_path(path: str | os.PathLike[str]) -> Path:
    """Where a plan's compiled kernels are kept: `engines/resnet50.plan.cache`."""
    return Path(f"{os.fspath(path)}.cache")
