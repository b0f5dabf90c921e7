from __future__ import annotations

import pytest

from rtresnet.core import errors
from rtresnet.core.errors import (
    ArtifactError,
    CheckFailedError,
    DataError,
    InputError,
    QueueFullError,
    RtresnetError,
    UnavailableError,
    UnknownNameError,
    missing_package,
)

TREE = {
    RtresnetError: (Exception, 2),
    InputError: (RtresnetError, 2),
    UnknownNameError: (InputError, 2),
    DataError: (InputError, 2),
    ArtifactError: (InputError, 2),
    UnavailableError: (RtresnetError, 3),
    QueueFullError: (UnavailableError, 3),
    CheckFailedError: (RtresnetError, 1),
}


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_a_class_has_its_place_in_the_tree_and_its_exit_code(cls: type[RtresnetError]) -> None:
    parent, code = TREE[cls]
    assert cls.__bases__[0] is parent
    assert cls.exit_code == code


def test_the_tree_drawn_in_the_docstring_is_complete() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, RtresnetError)
    }
    assert defined == set(TREE)
    assert errors.__doc__ is not None
    drawn = errors.__doc__.partition("\n\n")[2].partition("\n\n")[0]
    for cls in defined:
        assert cls.__name__ in drawn


def test_what_is_wrong_with_an_input_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"net\.pt: truncated"):
        raise ArtifactError("net.pt: truncated")
    assert not issubclass(UnavailableError, ValueError)
    assert not issubclass(CheckFailedError, ValueError)


def test_message_and_fix_are_one_line() -> None:
    error = ArtifactError("net.pt: truncated", fix="copy it again")
    assert str(error) == "net.pt: truncated; copy it again"
    assert (error.message, error.fix) == ("net.pt: truncated", "copy it again")


def test_without_a_fix_the_message_stands_alone() -> None:
    error = DataError("no images")
    assert str(error) == "no images"
    assert error.fix is None


@pytest.mark.parametrize(
    ("text", "nearest"), [("resnet5", "resnet50"), ("ResNet18", "resnet18"), ("resent34", "34")]
)
def test_an_unknown_name_comes_with_the_nearest_one(text: str, nearest: str) -> None:
    error = UnknownNameError("model", text, ["resnet18", "resnet34", "resnet50"])
    assert f"unknown model {text!r}" in str(error)
    assert error.fix is not None
    assert nearest in error.fix
    assert "known: resnet18, resnet34, resnet50" in error.fix


def test_unknown_name_of_a_long_table_comes_with_the_nearest_only() -> None:
    error = UnknownNameError("model", "resnet5", [f"resnet{depth}" for depth in range(10, 60)])
    assert error.fix is not None and "did you mean" in error.fix and "known:" not in error.fix


def test_a_name_like_none_of_them_comes_with_all_of_them() -> None:
    error = UnknownNameError(
        "method", "zzz", (name for name in ("minmax", "entropy", "percentile"))
    )
    assert str(error) == "unknown method 'zzz'; known: minmax, entropy, percentile"


@pytest.mark.parametrize(("package", "fix"), [
    ("scikit-learn", "pip install 'rtresnet[demo]'"),
    ("torch", "pip install 'rtresnet[train]'"),
    ("cuda-python", "pip install cuda-python"),
])  # fmt: skip
def test_missing_package_names_the_purpose_and_the_extra(package: str, fix: str) -> None:
    error = missing_package(package, "the data set 'digits'")
    assert error.exit_code == 3
    assert "the data set 'digits'" in str(error) and package in str(error)
    assert error.fix == fix
    assert "\n" not in str(error)
