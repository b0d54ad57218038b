import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import picture, write_store

from sslmed.config import DataError, UsageError
from sslmed.data.annotations.writer import annotate
from sslmed.data.shards.format import LabelColumn
from sslmed.data.store import Store
from sslmed.data.targets import labels, masks, one_label

ROWS = 6
KIND = (LabelColumn("kind", "class", ("adenoma", "cyst", "nerve")), [0, 2, -1, 1, 2, -1])
EDEMA = (LabelColumn("edema", "binary", ("0", "1")), [1, 0, -1, -1, 1, 0])
MASS = (LabelColumn("mass", "binary", ("0", "1")), [0, 0, -1, 1, 1, -1])
ONE = (LabelColumn("site", "class", ("here",)), [0] * ROWS)
SEEN = {0: 0, 2: 2, 3: 1}  # the row of each mask, and the class that it shows in a corner


def mask(row: int) -> np.ndarray:
    made = np.zeros((8, 6), np.uint8)
    made[:2, :2], made[-1, -1] = SEEN[row], 255
    return made


def made(path: Path, columns: list[Any], mask_classes: tuple[str, ...] | None = None) -> Store:
    scans = [picture(np.full((8, 6), row, np.uint8), f"{row:064x}") for row in range(ROWS)]
    store = write_store(path / "store", scans, [f"{row:032x}" for row in range(ROWS)])
    drawn = [(row, mask(row) if mask_classes else np.zeros((8, 6), np.uint8)) for row in SEEN]
    values = [(column, np.array(numbers, np.int16)) for column, numbers in columns]
    annotate(store.path, labels=values, masks=None if mask_classes is None else drawn, mask_classes=mask_classes or ())
    return Store(store.path)


def test_one_label_is_a_class(tmp_path: Path) -> None:
    store = made(tmp_path, [EDEMA, KIND])
    target = labels(store, "kind")
    assert (target.name, target.kind, target.classes) == ("kind", "class", ("adenoma", "cyst", "nerve"))
    assert target.known.tolist() == [True, True, False, True, True, False]
    assert target.values is not None
    assert (target.values.tolist(), target.values.dtype) == ([0, 2, -1, 1, 2, -1], np.int64)
    expected = [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_array_equal(target.presence(), np.array(expected, bool))
    assert [int(target.of(row, store)) for row in range(ROWS)] == [0, 2, -1, 1, 2, -1]
    assert target.of(1, store).shape == ()
    assert labels(store, ["kind"]).kind == "class"


def test_several_labels_are_findings(tmp_path: Path) -> None:
    store = made(tmp_path, [EDEMA, KIND, MASS])
    target = labels(store, ("mass", "edema"))  # in the order in which they were asked for
    assert (target.name, target.kind, target.classes) == ("mass, edema", "findings", ("mass", "edema"))
    assert target.known.tolist() == [True, True, False, True, True, True]  # one of them is enough
    assert target.values is not None
    assert target.values.dtype == np.int8
    assert target.values.tolist() == [[0, 1], [0, 0], [-1, -1], [1, -1], [1, 1], [-1, 0]]
    np.testing.assert_array_equal(target.presence(), target.values == 1)
    assert target.of(3, store).tolist() == [1, -1]


@pytest.mark.parametrize(
    ("columns", "name", "kind"),
    [
        ([KIND, EDEMA, MASS], "kind", "class"),
        ([EDEMA, KIND], "edema", "class"),
        ([EDEMA, KIND, MASS], "edema, mass", "findings"),
    ],
)
def test_by_default_it_is_the_first_label_or_all_findings(
    columns: list[Any], name: str, kind: str, tmp_path: Path
) -> None:
    target = labels(made(tmp_path, columns), None)
    assert (target.name, target.kind) == (name, kind)


@pytest.mark.parametrize(
    ("columns", "wanted", "error", "words"),
    [
        ([], None, DataError, r"store has no labels; add some: sslmed label STORE --labels CSV"),
        ([], "kind", DataError, "has no labels"),
        ([KIND], "size", UsageError, "no label 'size'; it has kind"),
        ([KIND, EDEMA], ("edema", "size"), UsageError, "no label 'size'"),
        ([KIND, EDEMA], ("edema", "kind"), UsageError, r"\[edema, kind\], but 'kind' has the classes adenoma, cyst"),
        ([KIND, EDEMA], ("edema", "edema"), UsageError, r"\[edema, edema\]; allowed: each once of kind, edema"),
        ([KIND, EDEMA], (), UsageError, r"data\.target is \[\]; allowed: each once of kind, edema"),
        ([ONE], None, DataError, "label 'site' of .* has one class, here,"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    columns: list[Any], wanted: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        labels(made(tmp_path, columns), wanted)


def test_masks(tmp_path: Path) -> None:
    store = made(tmp_path, [], ("background", "nerve", "vessel"))
    target = masks(store)
    assert (target.name, target.kind, target.classes) == ("masks", "mask", ("background", "nerve", "vessel"))
    assert target.known.tolist() == [row in SEEN for row in range(ROWS)]
    assert target.values is None
    presence = target.presence()
    assert presence.shape == (ROWS, 3)
    for row in range(ROWS):
        found = target.of(row, store)
        assert (found.shape, found.dtype) == ((8, 6), np.uint8)
        if row in SEEN:
            np.testing.assert_array_equal(found, mask(row))
            assert presence[row].tolist() == [True, SEEN[row] == 1, SEEN[row] == 2]
        else:
            assert (found == 255).all()  # nothing is known of any pixel
            assert not presence[row].any()


def test_masks_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no masks; add some: sslmed label STORE --masks DIR"):
        masks(made(tmp_path / "none", [KIND]))
    with pytest.raises(DataError, match=r"have one class, 0,.*sslmed label STORE --masks DIR"):
        masks(made(tmp_path / "one", [], ()))


def test_a_target_is_light_to_send(tmp_path: Path) -> None:
    store = made(tmp_path, [EDEMA, MASS], ("background", "nerve", "vessel"))
    for target in (labels(store, None), labels(store, "edema"), masks(store)):
        sent = pickle.dumps(target)
        assert len(sent) < 2000
        again = pickle.loads(sent)  # noqa: S301
        np.testing.assert_array_equal(again.of(3, store), target.of(3, store))
        np.testing.assert_array_equal(again.presence(), target.presence())


def test_a_reader_of_one_label_refuses_several(tmp_path: Path) -> None:
    store = made(tmp_path / "two", [MASS, EDEMA])
    assert one_label(store, None, "it") == "mass"
    assert one_label(store, "edema", "it") == one_label(store, ("edema",), "it") == "edema"
    assert one_label(made(tmp_path / "none", []), None, "it") is None
    with pytest.raises(UsageError, match=r"is \[edema, mass\], but a probe reads one label; give data\.target=edema"):
        one_label(store, ("edema", "mass"), "a probe")
    with pytest.raises(UsageError, match=r"is \[\], but a probe reads one label; give data\.target=mass"):
        one_label(store, (), "a probe")
