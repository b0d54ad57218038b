import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.identity import SiteKey
from sslmed.data.splits import SPLITS, TEST, TRAIN, UNLABELLED, VAL, assign, check, digest

KEY = SiteKey(bytes(32))


def make(per_class: list[int], images: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patients, contents, classes of a set with so many patients in each class; the last count has no label."""
    patients, classes = [], []
    for label, count in enumerate(per_class):
        label = -1 if label == len(per_class) - 1 else label
        for number in range(count):
            patients += [KEY.patient(f"{label} {number}")] * images
            classes += [label] * images
    contents = [f"{number:064x}" for number in range(len(patients))]
    return np.array(patients, "S32"), np.array(contents, "S64"), np.array(classes)


def per_patient(patients: np.ndarray, splits: np.ndarray) -> dict[bytes, int]:
    assert len(set(zip(patients.tolist(), splits.tolist(), strict=True))) == len(set(patients.tolist()))
    return dict(zip(patients.tolist(), splits.tolist(), strict=True))


def test_shares_hold_in_every_class_by_patient() -> None:
    patients, contents, classes = make([100, 40, 0])
    splits = assign(patients, contents, classes)
    for label, count in ((0, 100), (1, 40)):
        found = per_patient(patients[classes == label], splits[classes == label])
        assert np.bincount(list(found.values()), minlength=4).tolist() == [0.7 * count, 0.1 * count, 0.2 * count, 0]


@pytest.mark.parametrize("count", range(3, 12))
def test_three_patients_of_a_class_are_enough_for_all_sides(count: int) -> None:
    patients, contents, classes = make([count, 30, 0])
    splits = assign(patients, contents, classes)
    assert set(splits[classes == 0].tolist()) == {TRAIN, VAL, TEST}


@pytest.mark.parametrize(("count", "sides"), [(1, {TRAIN}), (2, {TRAIN, TEST})])
def test_tiny_classes(count: int, sides: set[int]) -> None:
    patients, contents, classes = make([count, 30, 0])
    assert set(assign(patients, contents, classes)[classes == 0].tolist()) == sides


def test_neither_order_nor_seedless_chance_matters_but_the_seed_does() -> None:
    patients, contents, classes = make([50, 30, 20])
    splits = assign(patients, contents, classes)
    order = np.random.default_rng(1).permutation(len(patients))
    np.testing.assert_array_equal(assign(patients[order], contents[order], classes[order]), splits[order])
    assert (assign(patients, contents, classes, seed=1) != splits).any()


def test_one_more_patient_moves_few_others() -> None:
    patients, contents, classes = make([100, 0])
    before = per_patient(patients, assign(patients, contents, classes))
    patients, contents, classes = make([101, 0])
    after = per_patient(patients, assign(patients, contents, classes))
    assert sum(after[patient] != split for patient, split in before.items()) <= 3


def test_patients_without_a_label_are_unlabelled_and_patients_with_one_label_are_not() -> None:
    patients, contents, classes = make([20, 20, 10])
    classes[1] = -1  # the second image of a labelled patient
    splits = assign(patients, contents, classes)
    assert (splits == UNLABELLED).sum() == 20
    assert (patients[splits == UNLABELLED] == patients[classes == -1][1:]).all()
    assert splits[0] == splits[1]


@pytest.mark.parametrize("labels", [None, "blank"])
def test_a_set_without_labels_is_split_as_well(labels: str | None) -> None:
    patients, contents, classes = make([0, 50])
    splits = assign(patients, contents, classes if labels else None)
    assert np.bincount(splits, minlength=4).tolist() == [70, 10, 20, 0]


def test_a_patient_counts_for_the_rarest_class_of_its_images() -> None:
    patients, contents, classes = make([40, 3, 0])
    classes[::2][:40] = 0
    rare = np.flatnonzero(classes == 1)
    classes[rare[::2]] = 0  # each rare patient has one image of the frequent class
    splits = assign(patients, contents, classes)
    assert set(splits[classes == 1].tolist()) == {TRAIN, VAL, TEST}


def test_patients_that_share_an_image_stay_together() -> None:
    patients, contents, classes = make([60, 40, 0])
    generator = np.random.default_rng(0)
    for _ in range(40):  # chains too: a with b, b with c
        one, other = generator.integers(len(patients), size=2)
        contents[one] = contents[other]
    splits = assign(patients, contents, classes)
    check(patients, contents, splits)
    assert {TRAIN, VAL, TEST} <= set(splits.tolist())


def test_check_names_three_pairs_of_images() -> None:
    patients, contents, classes = make([10, 0])
    splits = assign(patients, contents, classes)
    check(patients, contents, splits)
    bad = splits.copy()
    bad[1::2] = np.where(splits[1::2] == TEST, TRAIN, TEST)
    with pytest.raises(DataError, match="10 patients on two sides") as caught:
        check(patients, contents, bad, [f"image{row}.png" for row in range(20)])
    message = str(caught.value)
    assert message.count(".png") == 6
    assert message.count("\n") < 6
    assert f"image0.png ({SPLITS[bad[0]]}) and image1.png ({SPLITS[bad[1]]})" in message


def test_check_finds_an_identical_image_under_two_patients() -> None:
    patients, contents, _ = make([2, 0], images=1)
    contents[1] = contents[0]
    with pytest.raises(DataError, match="identical image"):
        check(patients, contents, np.array([TRAIN, TEST], np.uint8))
    check(patients, contents, np.array([TRAIN, UNLABELLED], np.uint8))
    with pytest.raises(DataError, match="row 0"):
        check(patients, contents, np.array([UNLABELLED, VAL], np.uint8))


def test_digest_says_who_is_where_in_any_order() -> None:
    patients, contents, classes = make([20, 0])
    splits = assign(patients, contents, classes)
    made = digest(patients, splits)
    assert len(made) == 64
    order = np.random.default_rng(0).permutation(len(patients))
    assert digest(patients[order], splits[order]) == made
    assert digest(patients[::2], splits[::2]) == made
    moved = splits.copy()
    moved[:2] = (moved[:2] + 1) % 3
    assert digest(patients, moved) != made


def test_an_empty_set() -> None:
    assert assign(np.array([], "S32"), np.array([], "S64")).shape == (0,)
