"""Predictions from Python: images, tables, and invalid outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.errors import DataError, InputError
from rtresnet.core.preprocess import UINT8, Preprocess
from rtresnet.core.serialization import to_builtins
from rtresnet.runtime.session import Session
from rtresnet.workflows import predictor
from rtresnet.workflows.predict import image_files, predict
from rtresnet.workflows.predictor import ClassProbability, PredictConfig, Predictor
from tests.conftest import tinted_noise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images of the four tints, and one that is broken."""
    root = tmp_path / "images"
    root.mkdir()
    for index, image in enumerate(tinted_noise(8, seed=5)[0]):
        Image.fromarray(image).save(root / f"{index}.png")
    (root / "broken.png").write_bytes(b"\x89PNG and then nothing")
    return root


@dataclasses.dataclass
class FakeBackend:
    """A backend that answers with a function of the images."""

    answer: Callable[[np.ndarray], Any]
    dtype: str = "float32"
    calls: list[np.ndarray] = dataclasses.field(default_factory=list)
    provider = device = "cpu"
    size, threads = 32, 1
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def input_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def layout(self) -> str:
        return "nhwc" if self.dtype == "uint8" else "nchw"

    def infer(self, images: np.ndarray) -> Any:
        self.calls.append(images.copy())
        return self.answer(images)

    def close(self) -> None:
        pass


def load_fake(backend: FakeBackend, **preprocess: Any) -> Callable[..., Session]:
    def load_artifact(path: str, *arguments: object, **options: object) -> Session:
        return Session(
            Path(path),
            None,
            backend,  # type: ignore[arg-type]
            input=Preprocess.for_size(32, **preprocess),
            classes=("cat", "dog", "owl"),
            precision="fp32",
        )

    return load_artifact


def test_predictor_uint8_top2_file_gives_its_two_classes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best_two(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.tile(np.array([[2, 0]], np.int64), (len(images), 1))
        return indices, np.tile(np.array([[0.7, 0.2]], np.float32), (len(images), 1))

    backend = FakeBackend(best_two, dtype="uint8")
    monkeypatch.setattr(predictor, "load_artifact", load_fake(backend, layout=UINT8))
    names = [str(folder / "0.png")]
    ((row,),) = Predictor("x.onnx", PredictConfig(top=2)).batches(names)
    assert row.top == (
        ClassProbability(name="owl", probability=0.7),
        ClassProbability(name="cat", probability=0.2),
    )
    (images,) = backend.calls
    assert images.dtype == np.uint8 and images.shape == (1, 32, 32, 3)
    with pytest.raises(InputError) as error:
        list(Predictor("x.onnx", PredictConfig(top=3)).batches(names))
    assert error.value.fix == "use --top 2 or less"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictor_logits_that_are_not_finite_are_an_error_of_their_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def one_bad(images: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(images), 3), np.float32)
        logits[0, 1] = value
        return logits

    monkeypatch.setattr(predictor, "load_artifact", load_fake(FakeBackend(one_bad)))
    names = [str(folder / f"{index}.png") for index in range(2)]
    ((bad, good),) = Predictor("x.onnx").batches(names)
    assert bad.error == "the net's output is not finite" and bad.top == ()
    assert good.error is None and len(good.top) == 3


def test_predict_folder_gives_the_classes_and_skips_the_broken_image(
    engines: Path, folder: Path
) -> None:
    result = predict(folder, engines / "resnet8.onnx", PredictConfig(top=1))
    assert [entry.top[0].name for entry in result.images] == [*"0123", *"0123"]
    assert len(result.skipped) == 1 and "broken.png" in result.skipped[0]
    record = to_builtins(result)
    assert record["images"][0]["top"][0]["class"] == "0" and record["provider"]
    with pytest.raises(DataError):
        predict(folder / "broken.png", engines / "resnet8.onnx")
    with pytest.raises(InputError) as error:
        predict(folder, engines / "resnet8.onnx", PredictConfig(top=5))
    assert error.value.fix == "use --top 4 or less"


def test_image_files_lists_files_and_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(image_files([folder / "0.png", folder])) == 10
    with pytest.raises(DataError):
        image_files(tmp_path / "empty")
    with pytest.raises(InputError):
        image_files(tmp_path / "gone.png")
