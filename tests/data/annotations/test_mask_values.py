import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.annotations.mask_values import Legend, legend

NONE = np.zeros(256, bool)


def of(*values: int) -> np.ndarray:
    present = np.zeros(256, bool)
    present[list(values)] = True
    return present


@pytest.mark.parametrize(
    ("values", "classes", "numbers"),
    [
        ((0, 1, 2), ("0", "1", "2"), (0, 1, 2)),
        ((0, 255), ("0", "1"), (0, 255)),
        ((255,), ("0", "1"), (0, 255)),
        ((0, 1, 255), ("0", "1"), (0, 1)),  # 255 is to be ignored
        ((0, 7), ("0", "7"), (0, 7)),
        ((3, 7, 255), ("0", "3", "7"), (0, 3, 7)),
        ((0,), ("0",), (0,)),
    ],
)
def test_what_values_mean(values: tuple[int, ...], classes: tuple[str, ...], numbers: tuple[int, ...]) -> None:
    assert legend(of(*values), NONE, None) == Legend(classes, numbers, False)


def test_names() -> None:
    assert legend(of(0, 2), NONE, None, ("bg", "nerve", "vessel")) == Legend(("bg", "nerve", "vessel"), (0, 1, 2), True)
    assert legend(of(0, 255), NONE, None, ("bg", "nerve")) == Legend(("bg", "nerve"), (0, 255), True)
    assert legend(of(0, 9), NONE, None, ("bg", "nerve")) == Legend(("bg", "nerve"), (0, 9), True)
    with pytest.raises(DataError, match=r"2 names .*\(bg, nerve\).* hold the values 0, 1, 2"):
        legend(of(0, 1, 2), NONE, None, ("bg", "nerve"))
    with pytest.raises(DataError, match="3 names"):
        legend(of(0, 255), NONE, None, ("a", "b", "c"))


def test_later_masks_keep_the_names_unless_they_are_replaced() -> None:
    earlier = Legend(("bg", "nerve", "vessel"), (0, 1, 2), True)
    assert legend(of(0, 1), of(0, 2), earlier) == earlier
    with pytest.raises(DataError, match="have the classes bg, nerve, vessel, not x, y, z"):
        legend(of(0, 1), of(0, 2), earlier, ("x", "y", "z"))
    assert legend(of(0, 1), of(0, 2), earlier, ("x", "y", "z"), replace=True).classes == ("x", "y", "z")
    assert legend(of(0, 3), of(0, 1), Legend(("0", "1"), (0, 1), False)).classes == ("0", "1", "3")


@pytest.mark.parametrize(
    ("came", "kept"),
    [((0, 1, 2), (0, 255)), ((0, 255), (0, 1)), ((0, 255), (0, 1, 2)), ((1,), (255,))],
)
def test_255_must_not_change_its_meaning(came: tuple[int, ...], kept: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="is 255 the foreground, or to be ignored"):
        legend(of(*came), of(*kept), Legend(("0", "1"), (0, 255), False))


@pytest.mark.parametrize(
    ("came", "kept"), [((0, 255), (0, 255)), ((0, 1, 255), (0, 1)), ((0, 255), (0, 1, 255)), ((0, 1), (0, 1, 255))]
)
def test_255_that_keeps_its_meaning(came: tuple[int, ...], kept: tuple[int, ...]) -> None:
    legend(of(*came), of(*kept), Legend(("0", "1"), (0, 1), False))
