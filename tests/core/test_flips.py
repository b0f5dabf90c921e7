from __future__ import annotations

import numpy as np

from rtresnet.core.flips import MOST, Answers, flips


def answers(classes: list[int], probabilities: list[float]) -> Answers:
    indices = 10 * np.arange(len(classes))  # broken images are left out
    return Answers(
        indices=indices, classes=np.array(classes), probabilities=np.array(probabilities)
    )


def test_flips_are_the_images_whose_class_changes_the_most_certain_first() -> None:
    one = answers([0, 1, 2, 0], [0.9, 0.5, 0.9, 0.8])
    other = answers([0, 0, 1, 2], [0.9, 0.6, 0.7, 0.95])
    labels = {10: "b", 20: "b", 30: None}
    changed, listed = flips(one, other, "abc", label=labels.get, locate=lambda i: f"{i}.jpg")
    assert changed == 3
    assert [(flip.index, flip.place) for flip in listed] == [
        (30, "30.jpg"), (20, "20.jpg"), (10, "10.jpg"),
    ]  # fmt: skip
    assert [(flip.reference, flip.candidate) for flip in listed] == [
        ("a", "c"), ("c", "b"), ("b", "a"),
    ]  # fmt: skip
    assert [flip.outcome for flip in listed[1:]] == ["won", "lost"]


def test_flips_of_equal_answers_are_none_and_of_many_a_part() -> None:
    one = answers([0] * 300, [0.5] * 300)
    assert flips(one, one, "ab") == (0, ())
    changed, listed = flips(one, answers([1] * 300, [0.5] * 300), "ab")
    assert changed == 300 and len(listed) == MOST


def test_flips_to_an_output_that_is_not_a_number_are_listed() -> None:
    changed, (flip,) = flips(answers([0], [0.5]), answers([-1], [float("nan")]), "ab")
    assert changed == 1 and flip.candidate == "not a number"
