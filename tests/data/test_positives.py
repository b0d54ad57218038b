import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from stores import picture, write_store

from sslmed.config import DataError, UsageError
from sslmed.data.loading import Batch, ViewDataset, stream_loader
from sslmed.data.modality import MODALITIES
from sslmed.data.positives import Positives
from sslmed.data.sampling import StreamSampler
from sslmed.data.shards.format import MetaColumn
from sslmed.data.store import Store
from sslmed.data.views import Augment
from sslmed.keyed_rng import rng

XRAY = MODALITIES["xray"]
SIZE = 32
NAN = np.nan
# A row an image: patient, study, series, position in mm.
IMAGES = [
    (0, 1, 1, 0.0),
    (0, 1, 1, 5.0),
    (0, 2, 1, 10.3),
    (0, NAN, 1, 15.3),
    (1, 1, 1, 0.0),
    (1, 1, 1, 0.0002),
    (1, 1, 2, 3.0),
    (2, 1, 1, 2.0),
    (3, 2, NAN, 1.0),
    (3, 2, 1, NAN),
    (3, 1, 1, 4.0),
    (1, 1, 1, 2.5),
]
ALL = np.arange(len(IMAGES))
# The partners of each row, by hand.
PARTNERS: dict[str, list[set[int]]] = {
    "patient": [
        *({1, 2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1, 2}),
        *({5, 6, 11}, {4, 6, 11}, {4, 5, 11}),
        *(set(), {9, 10}, {8, 10}, {8, 9}, {4, 5, 6}),
    ],
    "study": [
        *({1}, {0}, set(), set()),
        *({5, 6, 11}, {4, 6, 11}, {4, 5, 11}),
        *(set(), {9}, {8}, set(), {4, 5, 6}),
    ],
    "neighbour": [{1}, {0}, {3}, {2}, {11}, {11}, set(), set(), set(), set(), set(), {4, 5}],
}


def write(folder: Path, columns: dict[str, np.ndarray], patients: list[int]) -> Store:
    scans = [
        picture(np.full((24, 20), 100 + number, np.uint8), f"{number:064x}", 0, 200 + number)
        for number in range(len(patients))
    ]
    meta = [
        (MetaColumn(name, "number") if values.dtype.kind == "f" else MetaColumn(name, "category", ("a", "b")), values)
        for name, values in columns.items()
    ]
    return write_store(folder, scans, [f"{7 - patient:032x}" for patient in patients], meta=meta)


def columns(*names: str) -> dict[str, np.ndarray]:
    table = np.array(IMAGES).T
    return {name: table[1 + ("study", "series", "position").index(name)] for name in names}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("positives") / "store"
    return write(folder, columns("study", "series", "position"), [image[0] for image in IMAGES])


def drawn(positives: Positives, row: int, times: int = 300) -> Counter[int]:
    return Counter(positives.partner(row, rng(0, epoch, row, "partner")) for epoch in range(times))


@pytest.mark.parametrize("kind", PARTNERS)
def test_partners_are_those_of_a_table_made_by_hand_each_as_likely(kind: Any, store: Store) -> None:
    positives = Positives(kind, store, ALL, 5.0)
    for row, expected in enumerate(PARTNERS[kind]):
        found = drawn(positives, row)
        assert set(found) == (expected or {row}), row
        assert min(found.values()) > 0.6 * 300 / len(found)
    having = sum(map(bool, PARTNERS[kind]))
    what = "a neighbour within 5 mm in their series" if kind == "neighbour" else f"another image of the same {kind}"
    assert positives.note() == f"positives: {having} of 12 images have {what}"


@pytest.mark.parametrize("reach", [0.01, 2.0, 2.5, 4.999, 5.0, 5.3, 10.0, 1000.0])
def test_neighbours_lie_within_reach_but_not_at_the_same_place(reach: float, store: Store) -> None:
    expected = [
        {
            other
            for other, (patient, _, series, position) in enumerate(IMAGES)
            if (patient, series) == (IMAGES[row][0], IMAGES[row][2])
            and 0 < round(abs(position - IMAGES[row][3]), 3) <= reach
        }
        for row in range(len(IMAGES))
    ]
    if not any(expected):
        with pytest.raises(DataError, match=r"none of the 12 training images has a neighbour within"):
            Positives("neighbour", store, ALL, reach)
        return
    positives = Positives("neighbour", store, ALL, reach)
    assert [set(drawn(positives, row, 60)) for row in range(len(IMAGES))] == [
        others or {row} for row, others in enumerate(expected)
    ]
    assert positives.note().startswith(f"positives: {sum(map(bool, expected))} of 12 images")


def test_partners_come_from_the_training_rows_alone(store: Store) -> None:
    positives = Positives("patient", store, np.array([0, 2, 5, 7, 9]), 5.0)
    assert positives.note() == "positives: 2 of 5 images have another image of the same patient"
    assert [set(drawn(positives, row, 20)) for row in (0, 2, 5, 7, 9, 3)] == [{2}, {0}, {5}, {7}, {9}, {3}]


def test_one_patient_alone_is_told_that_nothing_repels(store: Store) -> None:
    assert "none repels another" in Positives("patient", store, np.arange(4), 5.0).note()
    assert "none repels another" not in Positives("patient", store, np.arange(5), 5.0).note()


def test_groups_are_the_patients_whatever_the_positives(store: Store) -> None:
    patients = np.array([image[0] for image in IMAGES])
    for kind in PARTNERS:
        groups = Positives(kind, store, ALL, 5.0).groups  # type: ignore[arg-type]
        np.testing.assert_array_equal(groups[:, None] == groups, patients[:, None] == patients)


def test_a_meta_column_of_names_will_do(tmp_path: Path) -> None:
    store = write(tmp_path / "store", {"study": np.array([0, 0, 1, -1, -1, 0], np.int32)}, [0, 0, 0, 0, 0, 1])
    positives = Positives("study", store, np.arange(6), 5.0)
    assert [set(drawn(positives, row, 20)) for row in range(6)] == [{1}, {0}, {2}, {3}, {4}, {5}]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (
            "study",
            (),
            r"positives=study needs the meta column 'study', but .*store has no meta column; add meta:",
        ),
        ("neighbour", ("study",), r"the meta column 'series', but .* has study; add meta:series.* labels CSV"),
        ("neighbour", ("study", "series"), r"'position', but .* has study, series; add meta:position.* mm"),
    ],
)
def test_a_missing_meta_column_is_named(kind: Any, given: tuple[str, ...], words: str, tmp_path: Path) -> None:
    store = write(tmp_path / "store", columns(*given), [image[0] for image in IMAGES])
    with pytest.raises(UsageError, match=words):
        Positives(kind, store, ALL, 5.0)


def test_positions_in_words_are_refused(tmp_path: Path) -> None:
    text = {"series": np.zeros(2), "position": np.array([0, 1], np.int32)}
    store = write(tmp_path / "store", text, [0, 0])
    with pytest.raises(UsageError, match=r"'position', but .* has text there; give .* mm"):
        Positives("neighbour", store, np.arange(2), 5.0)


@pytest.mark.parametrize("kind", PARTNERS)
def test_without_a_partner_for_anybody_it_would_do_nothing(kind: Any, tmp_path: Path) -> None:
    blank = {name: np.full(3, NAN) for name in ("study", "series", "position")}
    store = write(tmp_path / "store", blank, [0, 1, 2])
    with pytest.raises(DataError, match=f"none of the 3 .*positives={kind} would do nothing; use data.positives=image"):
        Positives(kind, store, np.arange(3), 5.0)


class Million:
    """What is read of a store, of 10^6 images of 250,000 patients."""

    path = "store"
    meta_columns = ("study", "series", "position")

    def __init__(self) -> None:
        stream = np.random.default_rng(0)
        self.patient = np.char.zfill(stream.integers(0, 250_000, len(self)).astype("S32"), 32)
        self.columns = {name: stream.integers(0, 50, len(self)).astype(float) for name in self.meta_columns}
        self.index = self

    def __len__(self) -> int:
        return 1_000_000

    def meta(self, name: str) -> np.ndarray:
        return self.columns[name]


def test_a_million_images_take_seconds_and_a_few_bytes_each() -> None:
    store: Any = Million()
    started = time.perf_counter()
    positives = Positives("neighbour", store, np.arange(len(store)), 5.0)
    assert time.perf_counter() - started < 20  # about 2
    assert len(pickle.dumps(positives)) < 32 * len(store)
    started = time.perf_counter()
    for row in range(1000):
        positives.partner(row, rng(0, 0, row, "partner"))
    assert time.perf_counter() - started < 1  # about 0.05


# What a training sees of it.


def dataset(store: Store, positives: Positives | None) -> ViewDataset:
    return ViewDataset(store, XRAY, (XRAY.view, XRAY.view), SIZE, 1, seed=0, target=None, positives=positives)


def test_the_first_view_is_the_images_and_the_others_are_the_partners(phantom_store: Store) -> None:
    rows = phantom_store.rows("train", "unlabelled")
    positives = Positives("patient", phantom_store, rows, 5.0)
    with_partners, alone = dataset(phantom_store, positives), dataset(phantom_store, None)
    augment = Augment((XRAY.view, XRAY.view), SIZE, XRAY.normalise, seed=0)
    others = 0
    for row in map(int, rows[:12]):
        sample, own = with_partners[3, row], alone[3, row]
        assert torch.equal(sample.views[0], own.views[0])
        partner = positives.partner(row, rng(0, 3, row, "partner"))
        made = augment(phantom_store.pixels(partner), phantom_store.intensity(partner), epoch=3, sample=row)
        assert np.array_equal(sample.views[1][0], made[1])  # with the partner's own range
        assert torch.equal(sample.views[1], own.views[1]) == (partner == row)
        assert (sample.row, own.row, own.group) == (row, row, row)
        assert sample.group == positives.groups[row]
        others += partner != row
    assert others > 4


def batches(store: Store, positives: Positives | None, workers: int) -> list[Batch]:
    sampler = StreamSampler(store.rows("train")[:8], 8, steps=3, seed=0)
    return list(stream_loader(dataset(store, positives), sampler, workers))


def test_workers_draw_the_same_partners(phantom_store: Store) -> None:
    ranks.context()  # workers come from one forkserver that has the heavy imports done
    positives = Positives("patient", phantom_store, phantom_store.rows("train"), 5.0)
    alone, helped = batches(phantom_store, positives, 0), batches(phantom_store, positives, 2)
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one.views[1], two.views[1])
        assert torch.equal(one.groups, two.groups)
        assert one.groups.tolist() == positives.groups[one.ids.numpy()].tolist()
        assert one.groups.dtype == torch.int64
    assert not torch.equal(alone[0].views[1], batches(phantom_store, None, 0)[0].views[1])
    assert torch.equal(batches(phantom_store, None, 0)[0].groups, alone[0].ids)


def test_an_unreadable_partner_is_an_error_of_the_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def pixels(self: Store, row: int, slices: int = 1) -> np.ndarray:
        if row == 1:
            raise DataError("sample 1 cannot be read")
        return np.zeros((24, 20), np.uint8)

    monkeypatch.setattr(Store, "pixels", pixels)
    found = dataset(store, Positives("study", store, ALL, 5.0))[0, 0]
    assert isinstance(found, DataError)
