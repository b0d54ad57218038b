import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.data.annotations.boxes import Boxes
from sslmed.evaluation import protocol
from sslmed.evaluation.detections import Detected, Found, measures
from sslmed.evaluation.froc import RATES, bands, curve

CLASSES = ("nodule", "mass")
Scene = list[tuple[list[Any], list[Any]]]  # of each image (box, class), and (box, score, class)

FAR = (90, 90, 92, 92)


def detected(scene: Scene) -> Detected:
    truth, found = [], []
    for true, said in scene:
        truth.append(Boxes(np.array([b for b, _ in true], np.float32).reshape(-1, 4), np.int16([c for _, c in true])))
        said = sorted(said, key=lambda each: -each[1])
        corners = np.array([b for b, _, _ in said], np.float32).reshape(-1, 4)
        found.append(Found(corners, np.float64([s for _, s, _ in said]), np.int16([c for _, _, c in said])))
    patients = np.array([f"{at // 2:032x}".encode() for at in range(len(scene))], "S32")
    return Detected(np.arange(len(scene)), patients, tuple(truth), tuple(found), CLASSES)


def around(x: float, y: float) -> tuple[float, float, float, float]:
    """A box with this centre; how large it is counts for nothing."""
    return (x - 30, y - 1, x + 30, y + 1)


def at_one(scene: Scene) -> float:
    return float(measures(CLASSES)["sensitivity_at_1:nodule"](detected(scene)))


def slow(scene: Scene, label: int, rate: float) -> float:
    """The rules, image by image and cut by cut."""
    outcomes, truths = [], 0
    for true, said in scene:
        own = [box for box, number in true if number == label]
        truths += len(own)
        free = set(range(len(own)))
        for box, score, number in sorted(said, key=lambda each: -each[1]):
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            if number == label:
                inside = [at for at, (a, b, c, d) in enumerate(own) if a <= x <= c and b <= y <= d]
                near = {
                    at: math.dist((x, y), ((own[at][0] + own[at][2]) / 2, (own[at][1] + own[at][3]) / 2)) ** 2
                    for at in inside
                    if at in free
                }
                if near:
                    free.remove(min(near, key=lambda at: near[at]))
                if near or not inside:
                    outcomes.append((score, bool(near)))
    if not truths:
        return math.nan
    best = 0
    for cut in {score for score, _ in outcomes}:
        kept = [hit for score, hit in outcomes if score >= cut]
        if kept.count(False) <= rate * len(scene):
            best = max(best, kept.count(True))
    return best / truths


corner = st.integers(0, 6)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, st.integers(1, 6), st.integers(1, 6))
labels = st.integers(0, 1)
scores = st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
truths = st.lists(st.tuples(boxes, labels), max_size=4)
images = st.tuples(truths, st.lists(st.tuples(boxes, scores, labels), max_size=12))


@given(st.lists(st.tuples(images, st.integers(0, 3)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_measures_and_weights_are_those_of_a_plain_loop(weighed: list[Any]) -> None:
    scene, weights = [image for image, _ in weighed], np.array([weight for _, weight in weighed])
    whole, found = detected(scene), measures(CLASSES)
    for counts in (np.ones(len(scene), int), weights):
        repeated = [image for image, count in zip(scene, counts, strict=True) for _ in range(count)]
        each = [[slow(repeated, label, rate) for rate in RATES] for label in range(2)]
        for name, column in (("froc", slice(None)), ("sensitivity_at_1", slice(3, 4))):
            values = [float(np.mean(one[column])) for one in each]
            there = [value for value in values if not math.isnan(value)]
            mean = sum(there) / len(there) if there else math.nan
            got = [found[key](whole, counts) for key in (f"{name}:nodule", f"{name}:mass", name)]
            assert got == pytest.approx([*values, mean], abs=1e-12, nan_ok=True)


def test_the_rates_are_those_of_the_competition() -> None:
    assert RATES == (0.125, 0.25, 0.5, 1, 2, 4, 8)
    # One image: 8 true boxes, and before the hit number k come k - 1 false positives.
    true = [((10 * at, 0, 10 * at + 4, 4), 0) for at in range(8)]
    said = [(around(10 * at + 2, 2), 0.9 - at / 10, 0) for at in range(8)]
    said += [(FAR, 0.9 - at / 10 + 0.05, 0) for at in range(1, 8)]
    found = measures(CLASSES)
    # At less than one false positive an image 1 of 8; at 1, 2, 4 and 8 of them 2, 3, 5 and 8.
    assert found["froc:nodule"](detected([(true, said)])) == pytest.approx((3 * 1 + 2 + 3 + 5 + 8) / 8 / 7)
    assert found["sensitivity_at_1:nodule"](detected([(true, said)])) == pytest.approx(2 / 8)


@pytest.mark.parametrize(("centre", "hit"), [((4, 2), 1), ((0, 0), 1), ((4.01, 2), 0), ((2, -0.01), 0)])
def test_a_centre_on_the_edge_is_inside(centre: tuple[float, float], hit: int) -> None:
    assert at_one([([((0, 0, 4, 4), 0)], [(around(*centre), 0.5, 0)])]) == hit


def test_a_box_that_is_taken_makes_further_ones_nothing() -> None:
    true = [((0, 0, 4, 4), 0), ((20, 0, 24, 4), 0)]
    doubles = [(around(2, 2), 0.9 - at / 100, 0) for at in range(20)]
    assert at_one([(true, [*doubles, (around(22, 2), 0.1, 0)])]) == 1  # no false positive stands before the last
    false = [(FAR, 0.5, 0)] * 2
    assert at_one([(true, [*doubles, *false, (around(22, 2), 0.1, 0)])]) == 0.5


def test_another_class_takes_nothing() -> None:
    assert at_one([([((0, 0, 4, 4), 0)], [(around(2, 2), 0.9, 1)])]) == 0
    assert at_one([([((0, 0, 4, 4), 0)], [(FAR, 0.95, 1), (FAR, 0.95, 1), (around(2, 2), 0.9, 0)])]) == 1


def test_of_several_boxes_the_nearest_free_one_is_taken() -> None:
    wide, narrow = ((0, 0, 20, 4), 0), ((8, 0, 16, 4), 0)  # centres at 10 and 12
    second = (around(2, 2), 0.8, 0)  # inside the wide one alone
    for true in ([wide, narrow], [narrow, wide]):
        assert at_one([(true, [(around(11.5, 2), 0.9, 0), second])]) == 1  # nearer to the narrow: the wide one is left
        assert at_one([(true, [(around(10.5, 2), 0.9, 0), second])]) == 0.5  # takes the wide one, and second is nothing
        assert at_one([(true, [(around(10.5, 2), 0.9, 0), (around(10.5, 2), 0.85, 0)])]) == 1


def test_equal_scores_enter_together() -> None:
    true = [((0, 0, 4, 4), 0)]
    assert at_one([(true, [(around(2, 2), 0.5, 0), (FAR, 0.5, 0)])]) == 1
    assert at_one([(true, [(around(2, 2), 0.5, 0), (FAR, 0.5, 0), (FAR, 0.5, 0)])]) == 0
    assert at_one([(true, [(around(2, 2), 0.5, 0), (FAR, 0.5, 0), (FAR, 0.5, 0)]), ([], [])]) == 1  # on two images


def test_the_curve_is_what_the_measures_read() -> None:
    true = [((0, 0, 4, 4), 0), ((20, 0, 24, 4), 0)]
    said = [(FAR, 0.9, 0), (around(2, 2), 0.8, 0), (FAR, 0.7, 0), (around(22, 2), 0.6, 0), (FAR, 0.5, 0)]
    scene: Scene = [(true, said), ([((0, 0, 4, 4), 1)], [(around(2, 2), 0.3, 1)])]
    rates, sensitivities = curve(detected(scene), 0)
    assert rates.tolist() == [0, 0.5, 1, 1.5]
    assert sensitivities.tolist() == [0, 0.5, 1, 1]
    assert [each.tolist() for each in curve(detected(scene), 1)] == [[0], [1]]
    rates, sensitivities = curve(detected(scene), None)
    assert rates.tolist() == [0, 0.5, 1, 1.5]
    assert sensitivities.tolist() == [0.5, 0.75, 1, 1]


@pytest.mark.parametrize("images", [3, 49, 98])
def test_a_rate_of_the_curve_reaches_its_own_cut(images: int) -> None:
    """Although a rate times the images is not always the count it was made of."""
    true = [((2, 10 * at, 6, 10 * at + 4), 0) for at in range(20)]
    said = [(around(4, 10 * at + 2), 0.9 - at / 50, 0) for at in range(20)]
    said += [(FAR, 0.9 - at / 50 + 0.01, 0) for at in range(20)]
    rates, sensitivities = curve(detected([(true, said), *[([], [])] * (images - 1)]), 0)
    np.testing.assert_allclose(rates, np.arange(21) / images)
    np.testing.assert_allclose(sensitivities, np.arange(21) / 20)


def random_scene(seed: int) -> Scene:
    random = np.random.default_rng(seed)
    scene: Scene = []
    for _ in range(16):
        true = [((10 * at, 0, 10 * at + 4, 4), at % 2) for at in range(random.integers(0, 4))]
        places = [(10 * random.integers(0, 6) + random.integers(0, 8), 2) for _ in range(random.integers(0, 9))]
        scene.append((true, [(around(*place), random.random(), int(random.integers(2))) for place in places]))
    return scene


def test_bands_are_those_of_the_measure() -> None:
    whole = detected(random_scene(0))
    weights = protocol.bootstrap_weights(whole.patient, 200, seed=0)
    low, high = bands(whole, weights, (0.25, 1.0, 2.0))
    assert low.shape == high.shape == (3,)
    expected = protocol.interval(measures(CLASSES)["sensitivity_at_1"](whole, weights))
    assert (low[1], high[1]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    rates, sensitivities = curve(whole, None)
    low, high = bands(whole, weights, rates)
    assert (low <= sensitivities).all()
    assert (sensitivities <= high).all()
    assert (low < high).any()
    assert (np.diff(low) >= 0).all()


@pytest.mark.parametrize("scene", [[], [([], [])], [([], [(FAR, 0.5, 0)])]])
def test_without_truth_there_is_no_curve(scene: Scene) -> None:
    whole = detected(scene)
    for label in (0, 1, None):
        rates, sensitivities = curve(whole, label)
        assert rates.tolist() == [0]
        assert np.isnan(sensitivities).all()
    weights = np.ones((5, len(scene)))
    assert np.isnan(bands(whole, weights, (0.5, 1.0))).all()
