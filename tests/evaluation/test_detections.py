import contextlib
import io
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.config import DataError
from sslmed.data.annotations.boxes import Boxes
from sslmed.evaluation import protocol
from sslmed.evaluation.detections import KINDS, NAME, Detected, Found, hits, measures, read

CLASSES = ("nodule", "mass", "cyst")
Box = tuple[float, float, float, float]
Scene = list[tuple[list[tuple[Box, int]], list[tuple[Box, float, int]]]]  # of each image (box, class), (box, score, ..)


def detected(scene: Scene, classes: Sequence[str] = CLASSES) -> Detected:
    truth, found = [], []
    for true, said in scene:
        truth.append(Boxes(np.array([b for b, _ in true], np.float32).reshape(-1, 4), np.int16([c for _, c in true])))
        said = sorted(said, key=lambda each: -each[1])
        corners = np.array([b for b, _, _ in said], np.float32).reshape(-1, 4)
        found.append(Found(corners, np.float64([s for _, s, _ in said]), np.int16([c for _, _, c in said])))
    patients = np.array([f"{at // 2:032x}".encode() for at in range(len(scene))], "S32")
    return Detected(np.arange(len(scene)) + 7, patients, tuple(truth), tuple(found), tuple(classes))


def library(scene: Scene, classes: Sequence[str] = CLASSES) -> dict[str, float]:
    """AP as faster-coco-eval has it; it says -1 for undefined, and refuses to judge nothing."""
    whole = detected(scene, classes)
    truth, found = [], []
    for at, (true, said) in enumerate(zip(whole.truth, whole.found, strict=True)):
        for one, boxes in ((truth, true), (found, said)):
            for number in range(len(boxes)):
                left, top, right, bottom = boxes.xyxy[number].astype(float).tolist()
                one.append({"image_id": at, "category_id": int(boxes.classes[number])})
                one[-1]["bbox"] = [left, top, right - left, bottom - top]
                one[-1] |= {"score": float(boxes.scores[number])} if isinstance(boxes, Found) else {}
                one[-1] |= {"id": len(one), "area": (right - left) * (bottom - top), "iscrowd": 0}
    if not truth or not found:
        there = {box["category_id"] for box in truth}
        each = {name: 0.0 if at in there else math.nan for at, name in enumerate(classes)}
        means = dict.fromkeys(("map50", "map"), 0.0 if truth else math.nan)
        return means | {f"{kind}:{name}": each[name] for kind in ("map50", "map") for name in classes}
    images = [{"id": at} for at in range(len(scene))]
    categories = [{"id": at, "name": name} for at, name in enumerate(classes)]
    expected = COCO({"images": images, "annotations": truth, "categories": categories})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval_faster(expected, expected.loadRes(found), "bbox")
        evaluation.run()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
    values = {"map": float(evaluation.stats[0]), "map50": float(evaluation.stats[1])}
    for at, name in enumerate(classes):
        values |= {f"map50:{name}": precision[0, :, at].mean(), f"map:{name}": precision[:, :, at].mean()}
    return {name: math.nan if value < 0 else value for name, value in values.items()}


def random_scene(random: np.random.Generator, images: int, most: int, tied: bool = True, classes: int = 3) -> Scene:
    """A third of the images negative, some without detections; near hits, doubles, and scores that tie."""
    scene: Scene = []
    for _ in range(images):
        true, said = [], []
        for _ in range(random.integers(0, 5) * (random.random() > 0.3)):
            left, top = random.integers(0, 60, 2)
            wide, high = random.integers(2, 30, 2)
            true.append(((left, top, left + wide, top + high), int(random.integers(classes))))
        for _ in range(random.integers(0, most + 1)):
            left, top = random.integers(0, 60, 2)
            box, label = (left, top, left + random.integers(1, 30), top + random.integers(1, 30)), 0
            if true and random.random() < 0.6:
                near, label = true[random.integers(len(true))]
                left, top, right, bottom = np.array(near) + random.normal(0, 1.5, 4)
                box = (left, top, max(right, left + 0.5), max(bottom, top + 0.5))
            label = int(random.integers(classes)) if random.random() < 0.3 else label
            said.append((box, float(random.integers(0, 11)) / 10 if tied else random.random(), label))
        scene.append((true, said))
    return scene


corner = st.integers(0, 6)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, st.integers(1, 4), st.integers(1, 4))
labels = st.integers(0, 2)
scores = st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
truths = st.lists(st.tuples(boxes, labels), max_size=4)
scenes = st.lists(st.tuples(truths, st.lists(st.tuples(boxes, scores, labels), max_size=6)), min_size=1, max_size=5)


@given(scenes)
@settings(deadline=None, max_examples=50)
def test_ap_is_the_librarys(scene: Scene) -> None:
    whole = detected(scene)
    found = {name: measure(whole) for name, measure in measures(CLASSES).items()}
    for name, value in library(scene).items():
        assert found[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_many_boxes_is_the_librarys(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed), 25, 40)
    whole = detected(scene)
    expected = library(scene)
    for name, value in expected.items():
        assert measures(CLASSES)[name](whole) == pytest.approx(value, abs=1e-9), name
    assert 0.02 < expected["map"] < expected["map50"] < 0.98


@pytest.mark.parametrize("right", [99, 100, 105])
def test_only_a_hundred_of_an_image_and_class_count(right: int) -> None:
    false: list[Any] = [((50, 50, 60, 60), 0.9 - at / 1000, 0) for at in range(right)]
    others: list[Any] = [((50, 50, 60, 60), 0.95, 1)] * 5
    scene: Scene = [([((0, 0, 9, 9), 0)], [*false, *others, ((0, 0, 9, 9), 0.1, 0)])]
    value = measures(CLASSES)["map50:nodule"](detected(scene))
    assert value == pytest.approx(0.01 if right == 99 else 0, abs=1e-12)
    assert value == pytest.approx(library(scene)["map50:nodule"], abs=1e-9)
    assert hits(detected(scene))[0].sum() == (right == 99)
    # What comes after the hundred is no false positive either, which a later hit would feel.
    scene.append(([((0, 0, 9, 9), 0)], [((0, 0, 9, 9), 0.05, 0)]))
    value = measures(CLASSES)["map50:nodule"](detected(scene))
    assert value == pytest.approx(library(scene)["map50:nodule"], abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(deadline=None, max_examples=30)
def test_a_weight_counts_an_image_so_often(seed: int, weights: list[int]) -> None:
    random = np.random.default_rng(seed)
    scene: Scene = []
    for true, said in random_scene(random, 6, 8):
        levels = random.permutation(11)[: len(said)] / 10  # in an image each once, over images they tie
        scene.append((true, [(box, float(score), label) for (box, _, label), score in zip(said, levels, strict=True)]))
    repeated = [image for image, weight in zip(scene, weights, strict=True) for _ in range(weight)]
    whole = detected(scene)
    for name, value in library(repeated).items():
        assert measures(CLASSES)[name](whole, np.array(weights)) == pytest.approx(value, abs=1e-9, nan_ok=True), name


def overlap(one: Any, other: Any) -> float:
    wide, high = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    both = max(0.0, wide) * max(0.0, high)
    return both / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - both)


@pytest.mark.parametrize("level", [0, 4])
def test_hits_are_those_of_a_plain_loop(level: int) -> None:
    whole = detected(random_scene(np.random.default_rng(5), 20, 20))
    assert sum(map(np.sum, hits(whole, level))) > 10
    for truth, found, hit in zip(whole.truth, whole.found, hits(whole, level), strict=True):
        free = set(range(len(truth)))
        for at in range(len(found)):
            own = [each for each in sorted(free) if truth.classes[each] == found.classes[at]]
            ious = {
                each: overlap(truth.xyxy[each].astype(float), found.xyxy[at].astype(float)) for each in reversed(own)
            }
            best = max(ious, key=lambda each: ious[each], default=None)
            taken = best is not None and ious[best] >= 0.5 + 0.05 * level
            assert hit[at] == taken
            free -= {best} if taken else set()


def test_replicates_are_the_values_of_their_weights() -> None:
    whole = detected(random_scene(np.random.default_rng(1), 12, 20))
    weights = np.vstack([protocol.bootstrap_weights(whole.patient, 30, seed=0), np.zeros(12), np.eye(12)])
    found = measures(CLASSES)
    assert list(found) == [*KINDS, *(f"{kind}:{name}" for kind in KINDS for name in CLASSES)]
    assert KINDS == ("map50", "map", "froc", "sensitivity_at_1")
    for kind in KINDS:
        for name in (kind, f"{kind}:mass"):
            replicates = found[name](whole, weights)
            singles = [found[name](whole, own) for own in weights]
            assert all(isinstance(value, float) for value in singles)
            np.testing.assert_allclose(replicates, singles, atol=1e-12)
            assert math.isnan(replicates[30])  # nobody was drawn
        each = np.array([found[f"{kind}:{name}"](whole, weights) for name in CLASSES])
        there = ~np.isnan(each)
        means = np.where(there, each, 0).sum(axis=0)[there.any(axis=0)] / there.sum(axis=0)[there.any(axis=0)]
        np.testing.assert_allclose(found[kind](whole, weights)[there.any(axis=0)], means, atol=1e-12)
        assert not there.all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = detected(random_scene(np.random.default_rng(2), 12, 20))
    weights = protocol.bootstrap_weights(whole.patient, 20, seed=0)
    at_once = [measure(whole, weights) for measure in measures(CLASSES).values()]
    monkeypatch.setattr("sslmed.evaluation.detected_boxes._BLOCK_CELLS", 700)
    np.testing.assert_array_equal([measure(whole, weights) for measure in measures(CLASSES).values()], at_once)


def test_a_thousand_replicates_take_seconds() -> None:
    whole = detected(random_scene(np.random.default_rng(3), 60, 100))
    weights = protocol.bootstrap_weights(whole.patient, 1000, seed=0)
    started = time.process_time()
    protocol.summarise({"model": [whole]}, measures(CLASSES), weights)
    assert time.process_time() - started < 15  # about 1 on one core


def test_matching_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = detected(random_scene(np.random.default_rng(2), 6, 10))
    before = measures(CLASSES)["map"](whole)
    monkeypatch.setattr("sslmed.evaluation.detections._matched", None)
    assert measures(CLASSES)["map"](whole) == before


@pytest.mark.parametrize("scene", [[], [([], [])], [([], [((0, 0, 1, 1), 0.5, 0)])]])
def test_without_truth_nothing_can_be_said(scene: Scene) -> None:
    assert all(math.isnan(measure(detected(scene))) for measure in measures(CLASSES).values())


def test_without_detections_nothing_is_found() -> None:
    scene: Scene = [([((0, 0, 1, 1), 1)], []), ([], [])]
    found = {name: measure(detected(scene)) for name, measure in measures(CLASSES).items()}
    assert [found[name] for name in KINDS] == [0, 0, 0, 0]
    assert math.isnan(found["map:nodule"])


@pytest.mark.parametrize("weights", [np.ones(3), np.ones((2, 3)), np.ones((1, 2, 4)), np.ones(()), -np.ones(4)])
def test_weights_of_something_else_are_refused(weights: Any) -> None:
    whole = detected([([], [])] * 4)
    for kind in KINDS:
        with pytest.raises(ValueError, match="weights"):
            measures(CLASSES)[kind](whole, weights)


XYXY, SCORES, NUMBERS = np.zeros((2, 4), np.float32), np.array([0.5, 0.5]), np.zeros(2, np.int16)


@pytest.mark.parametrize(
    "parts",
    [
        (XYXY[:1], SCORES, NUMBERS),
        (XYXY.astype(np.float64), SCORES, NUMBERS),
        (XYXY, SCORES[:1], NUMBERS),
        (XYXY, SCORES.astype(np.float32), NUMBERS),
        (XYXY, SCORES, NUMBERS.astype(np.int64)),
        (XYXY, SCORES, NUMBERS[:, None]),
        (XYXY + np.float32(np.nan), SCORES, NUMBERS),
        (XYXY, np.array([0.4, 0.5]), NUMBERS),
        (XYXY, np.array([1.1, 0.5]), NUMBERS),
        (XYXY, np.array([0.5, np.nan]), NUMBERS),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match=r"xyxy|scores|classes"):
        Found(*parts)


def test_found_boxes_cannot_be_changed() -> None:
    one = Found(XYXY.copy(), SCORES.copy(), NUMBERS.copy())
    assert len(one) == 2
    for array in (one.xyxy, one.scores, one.classes):
        assert not array.flags.writeable


@pytest.mark.parametrize(
    "changes",
    [
        {"row": np.array([1, 1, 2])},
        {"row": np.arange(2)},
        {"patient": np.array([b"p"] * 2, "S32")},
        {"classes": ("nodule",)},
        {"classes": ("nodule", "mass", "mass")},
    ],
)
def test_images_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    whole = detected([([((0, 0, 1, 1), 2)], []), ([], []), ([], [((0, 0, 1, 1), 0.5, 1)])])
    with pytest.raises(ValueError, match=r"needed|once|class numbers"):
        replace(whole, **changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    names = ("no, never", 'a "nodule"\nof two lines', "é", "", "truth", "never shown")
    scene = random_scene(random, 12, 9, tied=False)
    scene[3], scene[11] = ([], []), ([], [])
    scene[5][1].append(((1e-7, 1 / 3, 2e5 / 3, 12345.678), 1 / 3, 3))
    whole = detected(scene, names)
    whole.write(tmp_path)
    again = read(tmp_path)
    assert again.same_test(whole)
    assert again.classes == names
    assert again.patient.dtype == whole.patient.dtype
    for one, other in zip(whole.found, again.found, strict=True):
        for name in ("xyxy", "scores", "classes"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert list(tmp_path.iterdir()) == [tmp_path / NAME]


def test_no_image_is_read_too(tmp_path: Path) -> None:
    detected([]).write(tmp_path)
    assert read(tmp_path).same_test(detected([]))


def test_the_file_is_for_people_too(tmp_path: Path) -> None:
    scene: Scene = [([((1, 2.5, 3, 4), 1)], [((0.1, 2, 3, 4), 0.25, 0)]), ([], [])]
    detected(scene, ("nodule", "mass")).write(tmp_path)
    assert (tmp_path / NAME).read_text().splitlines() == [
        "row,patient,what,class,left,top,right,bottom,score",
        ",,class,nodule,,,,,",
        ",,class,mass,,,,,",
        f"7,{0:032x},truth,mass,1,2.5,3,4,",
        f"7,{0:032x},found,nodule,0.100000001,2,3,4,0.25",
        f"8,{0:032x},,,,,,,",
    ]


HEADER = "row,patient,what,class,left,top,right,bottom,score\n,,class,a,,,,,\n"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "row,patient\n1,2\n",
        HEADER + "x,p,,,,,,,\n",
        HEADER + f"{2**70},p,,,,,,,\n",
        HEADER + "1,p,truth,b,1,1,2,2,\n",
        HEADER + "1,p,truth,a,1,1,2,2,0.5\n",
        HEADER + "1,p,truth,a,1,1,2,,\n",
        HEADER + "1,p,found,a,1,1,2,2,\n",
        HEADER + "1,p,found,a,1,1,2,2,1.5\n",
        HEADER + "1,p,found,a,1,1,2,2,nan\n",
        HEADER + "1,p,found,a,1,1,2,inf,0.5\n",
        HEADER + "1,p,found,a,1,1,2,1e300,0.5\n",
        HEADER + "1,p,found,a,1,1,2,two,0.5\n",
        HEADER + "1,p,found,a,1,1,2,2,0.5\n1,p,found,a,1,1,2,2,0.6\n",
        HEADER + "1,p,found,a,1,1,2,2,0.5\n1,q,found,a,1,1,2,2,0.5\n",
        HEADER + "1,p,found,a,1,1,2,2,0.5\n1,p,,,,,,,\n",
        HEADER + "1,p,,,,,,,\n2,p,,,,,,,\n1,p,,,,,,,\n",
        HEADER + "1,p,seen,a,1,1,2,2,0.5\n",
        HEADER + "1,p,found,a,1,1,2,2\n",
        HEADER + "1,p,,,,,,,\n,,class,b,,,,,\n",
        HEADER + ",,class,a,,,,,\n",
        HEADER + ",,class,b,1,,,,\n",
        HEADER + "\n1,p,,,,,,,\n",
        HEADER + f"1,{'p' * 200_000},,,,,,,\n",
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_holds_no_boxes_is_a_data_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / NAME).write_text(content)
    with pytest.raises(DataError, match=NAME):
        read(tmp_path)


def test_another_test_is_another() -> None:
    scene: Scene = [([((0, 0, 2, 2), 1)], [((0, 0, 1, 1), 0.5, 0)]), ([], [])]
    whole = detected(scene)
    assert whole.same_test(detected([(scene[0][0], []), ([], [((0, 0, 1, 1), 0.5, 0)])]))  # what is compared may differ
    assert not whole.same_test(detected([([((0, 0, 2, 3), 1)], []), ([], [])]))
    assert not whole.same_test(detected([([((0, 0, 2, 2), 2)], []), ([], [])]))
    assert not whole.same_test(detected([([], []), ([((0, 0, 2, 2), 1)], [])]))
    assert not whole.same_test(detected(scene[:1]))
    assert not whole.same_test(replace(whole, row=np.array([7, 9])))
    assert not whole.same_test(replace(whole, patient=np.array([b"p", b"q"], "S32")))
    assert not whole.same_test(replace(whole, classes=("nodule", "mass", "scar")))
