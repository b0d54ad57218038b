import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import f1_score, jaccard_score

from sslmed.config import DataError
from sslmed.data.annotations.mask_values import VOID
from sslmed.evaluation import protocol, surfaces
from sslmed.evaluation.overlap import NAME, Overlaps, counts, dice, iou, judge, measures, read

CLASSES = ("background", "liver", "spleen")
RANDOM = np.random.default_rng(0)


@st.composite
def pairs(draw: Any, classes: int = 4) -> tuple[Any, Any]:
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6))
    known = st.integers(0, classes - 1)
    truth = draw(arrays.arrays(np.uint8, shape, elements=st.one_of(known, st.just(VOID))))
    return truth, draw(arrays.arrays(np.uint8, shape, elements=known))


def sets(labels: Any, label: int, void: set[Any]) -> set[Any]:
    return {place for place in np.ndindex(labels.shape) if labels[place] == label} - void


@given(pairs())
@settings(deadline=None)
def test_counts_dice_and_iou_are_those_of_sets(pair: tuple[Any, Any]) -> None:
    truth, predicted = pair
    found = counts(truth, predicted, 4)
    assert (found.shape, found.dtype) == ((3, 4), np.int64)
    void = sets(truth, VOID, set())
    for label in range(4):
        one, other = sets(truth, label, void), sets(predicted, label, void)
        assert found[:, label].tolist() == [len(one & other), len(one), len(other)]
        if one | other:
            assert dice(found)[label] == pytest.approx(2 * len(one & other) / (len(one) + len(other)), abs=1e-12)
            assert iou(found)[label] == pytest.approx(len(one & other) / len(one | other), abs=1e-12)
        else:
            assert math.isnan(dice(found)[label])
            assert math.isnan(iou(found)[label])


@given(pairs())
@settings(deadline=None)
def test_mask_mathematics(pair: tuple[Any, Any]) -> None:
    truth, predicted = pair
    found = counts(truth, predicted, 4)
    values, shares = dice(found), iou(found)
    defined = ~np.isnan(values)
    assert (np.isnan(shares) == ~defined).all()
    assert ((shares[defined] >= 0) & (shares[defined] <= values[defined]) & (values[defined] <= 1)).all()
    np.testing.assert_allclose(values, 2 * shares / (1 + shares), rtol=1e-12)
    np.testing.assert_array_equal(counts(np.flip(truth), np.flip(predicted), 4), found)
    known = np.where(truth == VOID, 0, truth).astype(np.uint8)
    swapped = counts(predicted, known, 4)
    np.testing.assert_array_equal(swapped, counts(known, predicted, 4)[[0, 2, 1]])
    if truth.ndim == 3:
        apart = [counts(one, other, 4) for one, other in zip(truth, predicted, strict=True)]
        np.testing.assert_array_equal(sum(apart), found)
        np.testing.assert_array_equal(dice(np.stack(apart)), [dice(each) for each in apart])


def test_scikit_learn_agrees() -> None:
    truth, predicted = RANDOM.integers(0, 5, (2, 40, 30), dtype=np.uint8)
    found = counts(truth, predicted, 5)
    flat = truth.ravel(), predicted.ravel()
    np.testing.assert_allclose(dice(found), f1_score(*flat, average=None), rtol=1e-12)
    np.testing.assert_allclose(iou(found), jaccard_score(*flat, average=None), rtol=1e-12)


def test_what_is_predicted_on_void_is_no_false_positive() -> None:
    truth = np.array([[1, 1, VOID, VOID, 0]], np.uint8)
    predicted = np.array([[1, 1, 1, 2, 0]], np.uint8)
    np.testing.assert_array_equal(dice(counts(truth, predicted, 3)), [1, 1, np.nan])


def test_counting_a_volume_takes_no_more_than_its_slices() -> None:
    truth = np.zeros((60, 100, 100), np.uint8)
    tracemalloc.start()
    try:
        counts(truth, truth, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * truth.size  # 8 bytes a pixel, if all slices were counted at once


@pytest.mark.parametrize(
    ("truth", "predicted", "classes", "message"),
    [
        (np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 2, "two label maps"),
        (np.zeros(2, np.uint8), np.zeros(2, np.uint8), 2, "two label maps"),
        (np.zeros((2, 2), np.int64), np.zeros((2, 2), np.uint8), 2, "must be uint8"),
        (np.full((2, 2), 2, np.uint8), np.zeros((2, 2), np.uint8), 2, "must hold 0 to 1"),
        (np.zeros((2, 2), np.uint8), np.full((2, 2), 2, np.uint8), 2, "must hold 0 to 1"),
        (np.full((2, 2), VOID, np.uint8), np.full((2, 2), VOID, np.uint8), 2, "in the truth alone"),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), 256, "classes is 256"),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), 0, "classes is 0"),
    ],
)
def test_what_is_no_pair_of_label_maps_is_refused(truth: Any, predicted: Any, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counts(truth, predicted, classes)


def test_a_unit_is_judged_class_by_class() -> None:
    spacing = (4.0, 0.5, 0.8)
    truth, predicted = RANDOM.integers(0, 3, (2, 3, 8, 9), dtype=np.uint8)
    truth[RANDOM.random(truth.shape) < 0.2] = VOID
    unit = judge(7, b"p", truth, predicted, 4, spacing)
    known = np.where(truth == VOID, 0, predicted)
    for label in (1, 2):
        expected = surfaces.distances(truth == label, known == label, spacing)
        assert (unit.hd95[label], unit.asd[label]) == (expected.hd95, expected.asd)
    assert math.isnan(unit.hd95[0])  # the background has no surface of its own
    assert unit.dice[0] > 0
    assert [math.isnan(getattr(unit, kind)[3]) for kind in ("dice", "iou", "hd95", "asd")] == [True] * 4


def test_empty_masks_follow_the_one_rule() -> None:
    empty, some = np.zeros((3, 4), np.uint8), np.zeros((3, 4), np.uint8)
    some[0, 0] = 1
    void = np.full((3, 4), VOID, np.uint8)
    for truth, predicted in ((empty, some), (some, empty)):  # found where nothing is, missed where something is
        unit = judge(0, b"p", truth, predicted, 2, (2.0, 3.0))
        assert (unit.dice[1], unit.iou[1]) == (0, 0)
        assert unit.hd95[1] == unit.asd[1] == pytest.approx(math.hypot(3 * 2, 4 * 3))
    units = [judge(row, b"p", truth, each, 2) for row, (truth, each) in enumerate([(empty, empty), (void, some)])]
    units.append(judge(2, b"p", some, some, 2))
    whole = Overlaps.of(units, "px", ("background", "nodule"))
    assert whole.left_out.tolist() == [1, 2]
    assert [measure(whole) for measure in measures(whole.classes).values()] == [1, 1, 0, 0] * 2


def made(units: int = 12, seed: int = 0, **changes: Any) -> Overlaps:
    """Two units a patient, a quarter of the values undefined."""
    random = np.random.default_rng(seed)
    values = random.random((4, units, 3))
    values[:, random.random((units, 3)) < 0.25] = np.nan
    values[2:, :, 0] = np.nan
    values[2:] *= 30
    patients = np.repeat([f"{number:032x}".encode() for number in range((units + 1) // 2)], 2)[:units]
    return replace(Overlaps(patients.astype("S32"), np.arange(units) + 5, *values, "mm", CLASSES), **changes)


def slow_mean(values: Any, weights: Any) -> float:
    """Of one class: over the units that have it, as often as each was drawn."""
    drawn = [v for v, weight in zip(values, weights, strict=True) for _ in range(int(weight)) if not math.isnan(v)]
    return sum(drawn) / len(drawn) if drawn else math.nan


def test_means_are_those_of_what_was_drawn() -> None:
    whole = made()
    weights = np.vstack([protocol.bootstrap_weights(whole.patient, 40, seed=0), np.zeros(12), np.eye(12)[:3]])
    found = {name: measure(whole, weights) for name, measure in measures(CLASSES).items()}
    assert list(found) == ["dice", "iou", "hd95", "asd"] + [
        f"{kind}:{name}" for kind in ("dice", "iou", "hd95", "asd") for name in ("liver", "spleen")
    ]
    for kind in ("dice", "iou", "hd95", "asd"):
        for replicate, own in enumerate(weights):
            each = [slow_mean(getattr(whole, kind)[:, label], own) for label in (1, 2)]
            some = [value for value in each if not math.isnan(value)]
            got = [found[name][replicate] for name in (kind, f"{kind}:liver", f"{kind}:spleen")]
            mean = sum(some) / len(some) if some else math.nan
            assert got == pytest.approx([mean, *each], abs=1e-12, nan_ok=True)
    assert np.isnan(found["dice"]).any()  # one replicate drew nobody
    one = measures(CLASSES)["asd"]
    assert one(whole) == one(whole, None) == one(whole, np.ones(12))
    assert isinstance(one(whole), float)


def test_a_class_without_a_unit_is_skipped_and_none_left_is_nan() -> None:
    whole = made()
    whole.dice[:, 2] = np.nan
    found = measures(CLASSES)
    assert found["dice"](whole) == pytest.approx(found["dice:liver"](whole), rel=1e-12)
    assert math.isnan(found["dice:spleen"](whole))
    whole.dice[:, 1] = np.nan
    assert math.isnan(found["dice"](whole))  # whatever the background has
    nothing = Overlaps.of([], "mm", CLASSES)
    assert math.isnan(found["dice"](nothing))


def test_many_units_are_weighed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(101)
    weights = protocol.bootstrap_weights(whole.patient, 20, seed=0)
    at_once = measures(CLASSES)["iou"](whole, weights)
    monkeypatch.setattr("sslmed.evaluation.overlap._BLOCK_CELLS", 60)
    np.testing.assert_allclose(measures(CLASSES)["iou"](whole, weights), at_once, rtol=1e-12)


def test_the_protocol_compares_arms_unit_by_unit() -> None:
    base = made()
    better = replace(base, dice=base.dice + 0.1, asd=base.asd - 1)
    weights = protocol.bootstrap_weights(base.patient, 200, seed=0)
    arms = {"pretrained": [better, better], "random": [base, base]}
    found = {
        (each.arm, each.metric): each
        for each in protocol.summarise(arms, measures(CLASSES), weights, reference="random")
    }
    for name, gap in (("dice", 0.1), ("dice:spleen", 0.1), ("asd", -1), ("iou", 0)):
        one = found["pretrained", name]
        assert one.value.mean == pytest.approx(measures(CLASSES)[name](better))
        assert one.difference is not None
        assert (one.difference.mean, one.difference.low, one.difference.high) == pytest.approx((gap, gap, gap))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 12), ()])
def test_weights_of_something_else_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weights of shape"):
        measures(CLASSES)["dice"](made(), np.ones(shape))


@pytest.mark.parametrize("changes", [{"unit": "cm"}, {"classes": CLASSES[:2]}, {"dice": np.zeros((12, 2))}])
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needed|must have the shape"):
        made(**changes)


@pytest.mark.parametrize("unit", ["mm", "px"])
def test_what_is_written_is_read(unit: str, tmp_path: Path) -> None:
    whole = made(classes=("no, never", 'a "nodule"', "é"), unit=unit)
    whole.write(tmp_path)
    again = read(tmp_path)
    assert again.same_test(whole)
    assert (again.unit, again.classes) == (whole.unit, whole.classes)
    for kind in ("dice", "iou", "hd95", "asd"):
        np.testing.assert_allclose(getattr(again, kind), getattr(whole, kind), rtol=1e-8)
    assert list(tmp_path.iterdir()) == [tmp_path / NAME]


def test_the_file_is_for_people_too(tmp_path: Path) -> None:
    values = [np.array([[1, 0.5]]), np.array([[1, 1 / 3]]), *np.array([[[np.nan, 12.5]], [[np.nan, 2]]])]
    Overlaps(np.array([b"ab"], "S32"), np.array([9]), *values, "mm", ("background", "liver")).write(tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines()
    assert lines == [
        "unit,patient,class,dice,iou,hd95:mm,asd:mm",
        "9,ab,background,1,1,,",
        "9,ab,liver,0.5,0.333333333,12.5,2",
    ]


HEADER = "unit,patient,class,dice,iou,hd95:mm,asd:mm\n"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "row,patient\n1,2\n",
        HEADER,
        HEADER.replace("asd:mm", "asd:px") + "1,p,a,1,1,,\n1,p,b,1,1,,\n",
        HEADER.replace("mm", "cm") + "1,p,a,1,1,,\n1,p,b,1,1,,\n",
        HEADER + "1,p,a,1,1,,\n1,p,b,1,1,,\n2,p,a,1,1,,\n",
        HEADER + "1,p,a,1,1,,\n1,p,b,1,1,,\n2,p,b,1,1,,\n2,p,a,1,1,,\n",
        HEADER + "1,p,a,1,1,,\n1,q,b,1,1,,\n",
        HEADER + "x,p,a,1,1,,\nx,p,b,1,1,,\n",
        HEADER + "1,p,a,1,1,,\n1,p,b,one,1,,\n",
        HEADER + "1,p,a,1,1,,\n1,p,b,nan,1,,\n",
        HEADER + "1,p,a,1,1,,\n1,p,b,1,1,\n",
        HEADER + "1,p,a,1,1,,\n\n1,p,b,1,1,,\n",
        HEADER + f"1,p,a,1,1,,\n1,p,{'b' * 200_000},1,1,,\n",
    ],
)
def test_what_holds_no_measures_is_a_data_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / NAME).write_text(content)
    with pytest.raises(DataError, match=NAME):
        read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"row": np.arange(12)},
        {"patient": np.array([b"somebody else"] * 12, "S32")},
        {"unit": "px"},
        {"classes": ("background", "liver", "kidney")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_test_is_another(changes: dict[str, Any]) -> None:
    assert made().same_test(made(seed=1))  # the measures may differ: they are what is compared
    assert not made().same_test(made(**changes))
