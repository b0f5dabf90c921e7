"""Read the file formats of public data sets into arrays: idx, CIFAR-10's Python batches, npz.

A damaged file is a DataError that names it. `sources.py` checks that the arrays are images with
labels.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.core.errors import DataError, missing_package
from rtresnet.core.preprocess import resize

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle-boot",
]  # fmt: skip

Raw = tuple[np.ndarray, np.ndarray, Sequence[str]]
"""Images, labels, class names."""


def read_digits(split: str) -> Raw:
    """Read the 8x8 scans of digits that scikit-learn ships, resized to 32x32.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing_package("scikit-learn", "the data set 'digits'") from None
    data = load_digits()
    small = (data.images * (255 / 16)).astype(np.uint8)
    images = np.stack([resize(np.repeat(image[..., None], 3, 2), 32, 32) for image in small])
    # scikit-learn's set has no splits: a fifth, with a fixed seed, is the test split.
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(images) // 5
    chosen = {"train": order[cut:], "test": order[:cut], "all": np.arange(len(images))}[split]
    return images[chosen], data.target[chosen], [str(digit) for digit in range(10)]


def read_fashion_mnist(folder: Path, split: str) -> Raw:
    """Read idx files, plain or .gz; padded by 2 pixels to the 32 of a CIFAR net."""
    prefixes = {"train": ["train"], "test": ["t10k"], "all": ["train", "t10k"]}[split]
    images = np.concatenate([_idx(folder, f"{prefix}-images-idx3-ubyte") for prefix in prefixes])
    labels = np.concatenate([_idx(folder, f"{prefix}-labels-idx1-ubyte") for prefix in prefixes])
    if images.ndim != 3:
        raise DataError(f"{folder}: images are {list(images.shape)}, not [N, 28, 28]")
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels, FASHION


def _idx(folder: Path, name: str) -> np.ndarray:
    for path in (folder / name, folder / f"{name}.gz"):
        if not path.exists():
            continue
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        rank = raw[3] if len(raw) > 3 else 0
        start = 4 + 4 * rank
        shape = struct.unpack(f">{rank}I", raw[4:start]) if len(raw) >= start else ()
        if raw[:3] != b"\0\0\x08" or not shape or len(raw) != start + math.prod(shape):
            raise DataError(f"{path}: not an idx file of bytes, or truncated")
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    raise DataError(f"{folder / name}: not found, with or without .gz")


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only NumPy arrays, because the Python batches are pickles."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "_frombuffer")

    def find_class(self, module: str, name: str) -> Any:
        """Reject everything that is not part of an array."""
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an image batch")


def read_cifar10(folder: Path, split: str) -> Raw:
    """Read the Python batches, in `folder` or in the subfolder of their archive."""
    nested = folder / "cifar-10-batches-py"
    folder = nested if nested.is_dir() else folder
    train = [f"data_batch_{index}" for index in range(1, 6)]
    names = {"train": train, "test": ["test_batch"], "all": [*train, "test_batch"]}[split]
    images, labels = [], []
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                batch = _ArraysOnly(file, encoding="bytes").load()
            images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[b"labels"]).reshape(len(images[-1])))
        except FileNotFoundError:
            raise DataError(f"{folder / name}: no such file") from None
        except Exception as error:  # a damaged pickle raises almost anything
            raise DataError(f"{folder / name}: not a CIFAR-10 batch ({error})") from None
    pixels = np.ascontiguousarray(np.concatenate(images).transpose(0, 2, 3, 1))
    return pixels, np.concatenate(labels), CIFAR10


def read_npz(path: Path) -> Raw:
    """Read `images`, `labels` and `classes`; the class names are empty if the file has none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
            named = [str(name) for name in file["classes"]] if "classes" in file else []
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except KeyError as error:
        raise DataError(
            f"{path}: {error.args[0]}",
            fix="save the arrays `images` and `labels` with numpy.savez",
        ) from None
    except Exception as error:  # a damaged file raises almost anything: zip, tokenizer, type
        raise DataError(
            f"{path}: not an npz file of plain arrays, or truncated ({error})"
        ) from None
    return images, labels, named
