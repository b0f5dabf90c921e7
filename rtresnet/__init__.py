"""Residual networks from images to measured TensorRT engines.

`rtresnet --help` lists the verbs. In Python, `rtresnet.load(path)` runs an ONNX file or a plan;
nothing heavier than NumPy is imported until it is called. `rtresnet.Batcher` makes batches of what
many threads ask for.
"""

from rtresnet.errors import EnvironmentLack, GateMissed, InputError, Overloaded, RtresnetError
from rtresnet.preprocess import Preprocess
from rtresnet.runtime.batcher import Batcher
from rtresnet.runtime.session import Session, load

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "EnvironmentLack",
    "GateMissed",
    "InputError",
    "Overloaded",
    "Preprocess",
    "RtresnetError",
    "Session",
    "__version__",
    "load",
]
