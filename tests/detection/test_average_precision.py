"""Average precision, compared with pycocotools and curves by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from rtresnet.core.detector_preprocess import Detections
from rtresnet.detection import average_precision
from rtresnet.detection.data import Targets

CLASSES = ("a", "b", "c", "never")


def targets(*rows: tuple[tuple[float, ...], int], ignored: bool = False) -> Targets:
    return Targets.of([(box, label, ignored, False, None) for box, label in rows])


def detections(*rows: tuple[tuple[float, ...], int, float]) -> Detections:
    return Detections(
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        labels=np.array([row[1] for row in rows], np.int64),
        scores=np.array([row[2] for row in rows], np.float32),
    )


def random_set(
    seed: int, *, ties: bool, images: int = 12
) -> tuple[list[Targets], list[Detections]]:
    """Return objects of all sizes with crowds, and detections near them and anywhere."""
    rng = np.random.default_rng(seed)
    objects, detected = [], []
    for _ in range(images):
        count = int(rng.integers(0, 9))
        corners = rng.uniform(0, 300, (count, 2))
        sides = np.exp(rng.uniform(np.log(6), np.log(250), (count, 2)))
        boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
        labels = rng.integers(0, 3, count)
        crowd = rng.random(count) < 0.15
        objects.append(
            Targets.of(
                [
                    (tuple(map(float, box)), int(label), bool(group), bool(group), None)
                    for box, label, group in zip(boxes, labels, crowd, strict=True)
                ]
            )
        )
        near = np.repeat(boxes, 3, 0) + rng.normal(0, 6, (3 * count, 4))
        far = rng.uniform(0, 200, (120, 2))
        anywhere = np.concatenate([far, far + rng.uniform(1, 200, (120, 2))], 1)
        everything = np.concatenate([near, anywhere]).astype(np.float32)
        everything[:, 2:] = np.maximum(everything[:, 2:], everything[:, :2] + 1)
        scores = rng.random(len(everything))
        guesses = np.concatenate([np.repeat(labels, 3), rng.integers(0, 4, 120)])
        detected.append(
            Detections(
                boxes=everything,
                labels=guesses.astype(np.int64),
                scores=(np.round(scores, 1) if ties else scores).astype(np.float32),
            )
        )
    return objects, detected


def coco_oracle(objects: list[Targets], detected: list[Detections]) -> list[float]:
    """Return the first six numbers of COCOeval's summary, in %."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")

    def xywh(box: np.ndarray) -> list[float]:
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    annotations = [
        {"image_id": i, "category_id": int(label), "bbox": xywh(box), "area": float(area),
         "iscrowd": int(crowd)}
        for i, entry in enumerate(objects)
        for box, label, crowd, area in zip(
            entry.boxes, entry.labels, entry.crowd, entry.areas, strict=True
        )
    ]  # fmt: skip
    results = [
        {"image_id": i, "category_id": int(label), "bbox": xywh(box), "score": float(score)}
        for i, entry in enumerate(detected)
        for box, label, score in zip(entry.boxes, entry.labels, entry.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = pycocotools.COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(objects))],
            "categories": [{"id": k} for k in range(len(CLASSES))],
            "annotations": [{**entry, "id": i + 1} for i, entry in enumerate(annotations)],
        }
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [100 * float(value) for value in run.stats[:6]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_coco_random_sets_equal_pycocotools(seed: int, ties: bool) -> None:
    objects, detected = random_set(seed, ties=ties)
    result = average_precision.evaluate(objects, detected, CLASSES)
    own = (result.ap, result.ap50, result.ap75, result.small, result.medium, result.large)
    expected = coco_oracle(objects, detected)
    assert [-100.0 if value is None else value for value in own] == pytest.approx(
        expected, abs=1e-6
    )
    assert result.classes["never"] is None


def test_evaluate_perfect_detections_is_100() -> None:
    objects = [targets(((0, 0, 40, 40), 0), ((50, 50, 90, 70), 1)), targets(((5, 5, 20, 20), 0))]
    detected = [
        detections(((0, 0, 40, 40), 0, 0.9), ((50, 50, 90, 70), 1, 0.8)),
        detections(((5, 5, 20, 20), 0, 0.7)),
    ]
    result = average_precision.evaluate(objects, detected, ("a", "b"))
    assert result.voc07 == pytest.approx(100) and result.voc == pytest.approx(100)
    assert result.ap == pytest.approx(100) and result.large is None
    assert (result.n, result.objects) == (2, 3)


def test_evaluate_without_detections_is_0_and_without_objects_none() -> None:
    none = detections()
    result = average_precision.evaluate([targets(((0, 0, 9, 9), 0))], [none], ("a", "b"))
    assert result.voc07 == result.voc == result.ap == 0
    result = average_precision.evaluate([targets()], [none], ("a", "b"))
    assert result.voc07 is None and result.ap is None and result.objects == 0


def test_voc_curve_second_detection_of_an_object_is_wrong() -> None:
    objects = [targets(((0, 0, 10, 10), 0), ((50, 50, 60, 60), 0))]
    detected = [
        detections(((0, 0, 10, 10), 0, 0.9), ((0, 0, 10, 9), 0, 0.8), ((50, 50, 60, 60), 0, 0.7))
    ]
    recall, precision, count = average_precision.voc_curve(objects, detected, 0)
    assert count == 2
    assert recall.tolist() == [0.5, 0.5, 1]
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    # 11 points: 6 recalls up to 0.5 at precision 1, 5 above at 2/3; the area: half and half.
    result = average_precision.evaluate(objects, detected, ("a",))
    assert result.voc07 == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert result.voc == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_voc_difficult_objects_neither_count_nor_punish() -> None:
    objects = [
        Targets.of(
            [((0, 0, 10, 10), 0, False, False, None), ((50, 50, 60, 60), 0, True, False, None)]
        )
    ]
    detected = [detections(((50, 50, 60, 60), 0, 0.9), ((0, 0, 10, 10), 0, 0.8))]
    result = average_precision.evaluate(objects, detected, ("a",))
    assert result.objects == 1
    assert result.voc07 == pytest.approx(100) and result.ap50 == pytest.approx(100)


def test_errors_names_missed_objects_and_wrong_detections() -> None:
    objects = targets(((0, 0, 10, 10), 0), ((50, 50, 60, 60), 1))
    detected = detections(
        ((0, 0, 10, 9), 0, 0.9), ((0, 0, 10, 10), 0, 0.8), ((50, 50, 60, 60), 0, 0.7),
        ((50, 50, 60, 60), 1, 0.2),
    )  # fmt: skip
    assert average_precision.errors(objects, detected) == ([1], [1, 2])
    assert average_precision.errors(objects, detected, least=0.1) == ([], [1, 2])
