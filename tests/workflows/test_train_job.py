from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtresnet.core.errors import InputError
from rtresnet.workflows import train_job
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.train_job import TrainConfig, new_job
from tests.reporters import RecordingReporter

pytest.importorskip("torch")


def folder_of_images(root: Path, sides: list[tuple[int, int]], *, test: bool = False) -> str:
    """Write JPEGs of random pixels, as (width, height), alternately into two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test") if test else ("",):
        for number, (width, height) in enumerate(sides):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return str(root)


@pytest.mark.parametrize(
    ("sides", "size", "net", "pixels"),
    [
        ([(300, 200)] * 24, None, "resnet18", 224),
        ([(65, 65)] * 24, None, "resnet18", 224),
        ([(300, 64)] * 24, None, "resnet20", 32),
        ([(32, 32)] * 24, None, "resnet20", 32),
        ([(300, 200)] * 20 + [(30, 30)] * 4, None, "resnet18", 224),
        ([(300, 200)] * 24, 48, "resnet20", 48),
        ([(32, 32)] * 24, 96, "resnet18", 96),
    ],
)
def test_new_job_without_a_model_takes_the_net_for_the_size_of_the_images(
    sides: list[tuple[int, int]], size: int | None, net: str, pixels: int, tmp_path: Path
) -> None:
    reporter = RecordingReporter()
    config = TrainConfig(data=folder_of_images(tmp_path, sides))
    job = new_job(tmp_path, config, InputConfig(size=size), reporter)
    assert (job.spec.name, job.preprocess.size) == (net, pixels)
    (note,) = reporter.notes
    assert net in note and "--model" in note


def test_new_job_with_a_model_or_weights_does_not_choose_the_net(
    tmp_path: Path, trained: Path
) -> None:
    reporter = RecordingReporter()
    data = folder_of_images(tmp_path, [(100, 100)] * 24)
    named = new_job(tmp_path, TrainConfig(data=data, model="resnet34"), InputConfig(), reporter)
    started = TrainConfig(data=data, weights=str(trained / "best.pt"))
    loaded = new_job(tmp_path, started, InputConfig(), reporter)
    assert (named.spec.name, loaded.spec.name) == ("resnet34", "resnet8")
    assert not reporter.notes


def test_new_job_on_a_named_set_takes_resnet20_without_a_note(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    job = new_job(tmp_path, TrainConfig(data="synthetic:100"), InputConfig(), reporter)
    assert job.spec.name == "resnet20" and not reporter.notes


def test_new_job_does_not_choose_by_broken_images(tmp_path: Path) -> None:
    data = folder_of_images(tmp_path, [(100, 100)] * 24)
    for path in sorted(tmp_path.glob("*/*.jpg"))[:8]:
        path.write_bytes(b"no image")
    assert new_job(tmp_path, TrainConfig(data=data), InputConfig()).spec.name == "resnet18"


@pytest.mark.parametrize(
    ("settings", "test", "images"),
    [
        ((), True, 90), ((), False, 80),
        (("holdout=0.3",), False, 60), (("holdout=0", "split=random"), True, 100),
    ],
)  # fmt: skip
def test_new_job_counts_the_images_that_are_left_to_train_on(
    settings: tuple[str, ...], test: bool, images: int, tmp_path: Path
) -> None:
    data = folder_of_images(tmp_path, [(8, 8)] * 100, test=test)
    options: dict[str, Any] = {"data": data, "model": "resnet8", "settings": settings}
    new_job(tmp_path, TrainConfig(batch=images, **options), InputConfig())
    with pytest.raises(InputError, match=f"has {images} training images") as caught:
        new_job(tmp_path, TrainConfig(batch=images + 1, **options), InputConfig())
    assert caught.value.fix == f"use --batch {min(images, 64)}"


def test_data_form_of_fixed_sets_exists() -> None:
    from rtresnet.data import FORMS

    assert {form.partition(":")[0] for form in FORMS} >= set(train_job.FIXED_DATA)
