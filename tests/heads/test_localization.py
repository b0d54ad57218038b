"""Which place teaches what, the loss by value and gradient, and the boxes that come out, against slow references."""

import math
from typing import Any

import detection
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sslmed.heads import localization
from sslmed.heads.localization import assigned, focal_loss, hit
from sslmed.models.detectors import Places

SOME = settings(max_examples=60, deadline=None)
SIDE, STRIDES = 64, (4, 8, 16, 32)
Row = list[float]


def grid(side: int = SIDE, strides: tuple[int, ...] = STRIDES) -> tuple[torch.Tensor, torch.Tensor]:
    """Middles of all cells of all levels, row by row, and their strides."""
    centres = [
        ((column + 0.5) * stride, (row + 0.5) * stride, stride)
        for stride in strides
        for row in range(side // stride)
        for column in range(side // stride)
    ]
    all_of_them = torch.tensor(centres, dtype=torch.float64)
    return all_of_them[:, :2], all_of_them[:, 2]


@st.composite
def rows(draw: st.DrawFn, most: int = 5) -> list[Row]:
    """Boxes inside the input, on a grid of halves, so that equal boxes and middles on the edge of a cell come up."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        width, height = (draw(st.integers(1, 2 * SIDE)) / 2 for _ in range(2))
        left, top = (draw(st.integers(0, int(2 * (SIDE - each)))) / 2 for each in (width, height))
        found.append([left, top, left + width, top + height, float(draw(st.integers(-1, 1)))])
        if draw(st.booleans()):
            found.append(draw(st.sampled_from(found)))
    return [row if row[4] >= 0 else detection.NONE for row in found]


def slow_assigned(centres: Any, strides: Any, target: list[Row]) -> tuple[list[int], list[float]]:
    """Place by place and box by box, from the words of ``assigned``."""
    numbers, central = [], []
    for (across, down), stride in zip(centres.tolist(), strides.tolist(), strict=True):
        best, smallest = -1, math.inf
        for number, (left, top, right, bottom, kind) in enumerate(target):
            if kind < 0:
                continue
            level = min((each for each in STRIDES if max(right - left, bottom - top) / 2 <= 8 * each), default=32)
            reaches = (min(max(side / 2, stride / 2), 1.5 * stride) for side in (right - left, bottom - top))
            offs = (abs(across - (left + right) / 2), abs(down - (top + bottom) / 2))
            near = all(off <= reach for off, reach in zip(offs, reaches, strict=True))
            area = (right - left) * (bottom - top)
            if level == stride and near and area < smallest:
                best, smallest = number, area
        numbers.append(best)
        central.append(0.0 if best < 0 else centrality(across, down, stride, target[best]))
    return numbers, central


def centrality(across: float, down: float, stride: float, box: Row) -> float:
    """FCOS's equation 3, with sides of at least two strides."""
    left, top, right, bottom = box[:4]
    wide, high = max(right - left, 2 * stride), max(bottom - top, 2 * stride)
    l = across - (left + right - wide) / 2  # noqa: E741  # as in the paper
    t = down - (top + bottom - high) / 2
    r, b = wide - l, high - t
    if min(l, r, t, b) < 0:
        return 0.0
    return math.sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))


@SOME
@given(rows())
def test_places_are_assigned_as_by_a_slow_reference(target: list[Row]) -> None:
    centres, strides = grid()
    box, central = assigned(centres, strides, torch.tensor(target))
    numbers, expected = slow_assigned(centres, strides, target)
    assert box.tolist() == numbers
    torch.testing.assert_close(central, torch.tensor(expected, dtype=torch.float64))


@SOME
@given(rows(most=1))
def test_every_box_alone_has_a_place_that_is_central(target: list[Row]) -> None:
    box, central = assigned(*grid(), torch.tensor(target[:1]))
    if target[0][4] >= 0:
        assert (box == 0).any()
        assert central.max() >= 1 / 3 - 1e-6
    else:
        assert (box == -1).all()
        assert not central.any()


def test_a_box_is_taught_at_the_level_of_its_longer_side() -> None:
    centres, strides = grid(1024)
    for longer, stride in ((1, 4), (64, 4), (65, 8), (128, 8), (129, 16), (256, 16), (257, 32), (1000, 32)):
        box, _ = assigned(centres, strides, torch.tensor([[8.0, 8.0, 16.0, 8.0 + longer, 0.0]]))
        assert set(strides[box == 0].tolist()) == {stride}, longer


@SOME
@given(st.lists(st.tuples(st.floats(-8, 8), st.integers(0, 1)), min_size=1, max_size=6))
def test_the_focal_loss_by_value_and_gradient(pairs: list[tuple[float, int]]) -> None:
    logits = torch.tensor([each for each, _ in pairs], dtype=torch.float64, requires_grad=True)
    goal = torch.tensor([float(each) for _, each in pairs], dtype=torch.float64)
    value = focal_loss(logits, goal)
    (slope,) = torch.autograd.grad(value, logits)
    total = 0.0
    for number, (logit, there) in enumerate(pairs):  # the paper's equation 5, and its appendix B for the derivative
        p, alpha, sign = 1 / (1 + math.exp(-logit if there else logit)), (0.25 if there else 0.75), 2 * there - 1
        total -= alpha * (1 - p) ** 2 * math.log(p)
        by_hand = sign * alpha * (1 - p) ** 2 * (2 * p * math.log(p) + p - 1)
        assert slope[number].item() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    assert value.item() == pytest.approx(total, rel=1e-9)


def slow_loss(places: Places, target: torch.Tensor) -> torch.Tensor:
    """Place by place, in scalars."""
    focal = entropy = apart = places.classes.new_zeros(())
    count = weight = 0.0
    for image, own in enumerate(target.tolist()):
        numbers, central = slow_assigned(places.centres, places.strides, own)
        for place, (number, share) in enumerate(zip(numbers, central, strict=True)):
            for kind, logit in enumerate(places.classes[image, place]):
                there = number >= 0 and own[number][4] == kind
                p = torch.sigmoid(logit if there else -logit)
                focal = focal - (0.25 if there else 0.75) * (1 - p) ** 2 * p.log()
            if number < 0:
                continue
            count, weight = count + 1, weight + share
            p = torch.sigmoid(places.central[image, place])
            entropy = entropy - share * p.log() - (1 - share) * (1 - p).log()
            apart = apart + share * (1 - slow_giou(places.boxes[image, place], own[number]))
    return (focal + entropy) / max(count, 1) + (apart / weight if weight else 0)


def slow_giou(found: torch.Tensor, true: Row) -> torch.Tensor:
    zero = found.new_zeros(())
    left, top, right, bottom = (found.new_tensor(each) for each in true[:4])
    wide = torch.maximum(zero, torch.minimum(found[2], right) - torch.maximum(found[0], left))
    high = torch.maximum(zero, torch.minimum(found[3], bottom) - torch.maximum(found[1], top))
    union = (found[2] - found[0]) * (found[3] - found[1]) + (right - left) * (bottom - top) - wide * high
    hull_wide = torch.maximum(found[2], right) - torch.minimum(found[0], left)
    hull_high = torch.maximum(found[3], bottom) - torch.minimum(found[1], top)
    hull = hull_wide * hull_high
    return wide * high / union - (hull - union) / hull


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [2], [0, 0]], ids=str)
@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_the_loss_by_value_and_gradient(counts: list[int], network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = detection.detector(network).double()
    images, target = detection.scene(counts, seed=1)
    features = head.features(images.double())
    said = head._places(features)
    raw = {name: getattr(said, name).detach().requires_grad_() for name in ("classes", "boxes", "central")}
    places = said._replace(**raw)
    monkeypatch.setattr(head, "_places", lambda _: places)
    value, expected = head.loss(features, target), slow_loss(places, target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    found = torch.autograd.grad(value, [*raw.values()])
    by_hand = torch.autograd.grad(expected, [*raw.values()], allow_unused=True)
    for (name, leaf), one, other in zip(raw.items(), found, by_hand, strict=True):
        other = torch.zeros_like(leaf) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert any(counts) == bool(one.any()) or name == "classes"


@pytest.mark.parametrize("reducer", [False, True])
@pytest.mark.parametrize("network", ["test_resnet", "test_vit", "test_convnext"])
def test_images_without_boxes_have_a_finite_loss_and_a_gradient(network: str, reducer: bool) -> None:
    head = detection.detector(network, reducer=reducer)
    images, target = detection.scene([0, 0])
    loss = head.loss(head.features(images), target)
    loss.backward()
    assert torch.isfinite(loss)
    gradients = {name: each.grad for name, each in head.head.named_parameters()}
    assert all(each is not None and torch.isfinite(each).all() for each in gradients.values())
    assert gradients["detector.classes.weight"].any()
    assert not gradients["detector.distances.weight"].any()


def test_the_order_of_boxes_and_their_padding_change_nothing() -> None:
    head = detection.detector().eval()
    images, target = detection.scene([3, 1, 2])
    features = head.features(images)
    longer = torch.cat([torch.tensor([[detection.NONE] * 2] * 3), target.flip(1)], dim=1)
    torch.testing.assert_close(head.loss(features, target), head.loss(features, longer))


@pytest.mark.parametrize("reducer", [False, True])
def test_weights_that_are_not_numbers_give_a_loss_that_is_none(reducer: bool) -> None:
    """The guard of training skips such a step; an error would end the run. In use they are an error."""
    images, target = detection.scene([1, 2])
    for name in ("detector.scales", "detector.distances.bias", "detector.classes.bias", "detector.tower.0.weight"):
        head = detection.detector(reducer=reducer)
        with torch.no_grad():
            head.head.get_parameter(name).fill_(math.nan)
        loss = head.loss(head.features(images), target)
        assert torch.isnan(loss), name
        loss.backward()
        assert all(each.grad is not None for each in head.head.parameters()), "processes wait for each gradient"
    with pytest.raises(ValueError, match="not numbers"):
        head(images)


@pytest.mark.ddp
@pytest.mark.parametrize("reducer", [False, True])
@pytest.mark.parametrize(
    ("counts", "rows"),
    [([2, 1, 3, 1, 1, 2, 2, 4], (4, 4)), ([5, 4, 3, 6, 0, 0, 0, 0], (4, 4)), ([0, 0], (1, 1))],
    ids=["spread", "on one rank", "none"],
)
def test_two_processes_have_the_gradient_of_one(counts: list[int], rows: tuple[int, int], reducer: bool) -> None:
    images, target = detection.scene(counts, seed=2)
    whole = detection.gradients(images, target, reducer)
    for found in ranks.on_two_ranks(detection.gradients, images, target, reducer, rows):
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


def test_hit_says_the_class_of_the_true_box_that_is_covered_best() -> None:
    true = torch.tensor([[0.0, 0, 10, 10, 2], [20, 20, 30, 30, 0], [0, 0, 10, 8, 1], detection.NONE])
    found = torch.tensor(
        [
            [0.0, 0, 10, 10],  # the first, though the third has an IoU of 0.8
            [0, 0, 10, 8.5],  # the third, though the first has one of 0.85
            [20, 20, 30, 25],  # half of the second
            [20, 20, 30, 24.9],  # less
            [40, 40, 50, 50],
            [0, 0, 0, 0],  # padding
            [60, 5, 60, 9],  # of no width
        ]
    )
    assert hit(found, true).tolist() == [3, 2, 1, 0, 0, -1, -1]
    assert hit(found, true[3:]).tolist() == [0, 0, 0, 0, 0, -1, -1]


def symmetric(head: Any) -> None:
    """Make the weights of a detector on a ViT the same from left to right."""
    with torch.no_grad():
        for layer in head.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                layer.weight.copy_((layer.weight + layer.weight.flip(-1)) / 2)
        network, side = head.backbone.network, head.backbone.network.patch_embed.grid_size
        network.pos_embed.normal_(0, 0.5)
        prefix, patches = network.pos_embed.split([network.num_prefix_tokens, side[0] * side[1]], dim=1)
        rows = patches.unflatten(1, side)
        network.pos_embed.copy_(torch.cat([prefix, ((rows + rows.flip(2)) / 2).flatten(1, 2)], dim=1))
        distances = head.head.detector.distances
        distances.weight.normal_(0, 0.1)
        distances.weight[[1, 3]] += distances.weight[[1, 3]].flip(-1)
        distances.weight[2] = distances.weight[0].flip(-1)
        distances.bias[2] = distances.bias[0]


@pytest.mark.parametrize("reducer", [False, True])
def test_a_flipped_image_gives_flipped_boxes(reducer: bool) -> None:
    head = detection.detector("test_vit", 96, reducer=reducer).eval().double()
    symmetric(head)
    if reducer:
        with torch.no_grad():  # linear over 7 x 7 points, across
            weight = head.head.reducer.hidden.weight.unflatten(1, (-1, 7, 7))
            weight.copy_((weight + weight.flip(-1)) / 2)
    images = detection.scene([3, 2], 96, seed=3)[0].double()
    with torch.no_grad():
        found, flipped = head(images), head(images.flip(3))
    back = flipped.clone()
    back[..., 0], back[..., 2] = 96 - flipped[..., 2], 96 - flipped[..., 0]
    back[flipped[..., 5] < 0] = flipped[flipped[..., 5] < 0]
    assert (found[..., 5] >= 0).sum() > 20
    assert len(found[0, :, :4].round().unique(dim=0)) > 10, "they differ"
    assert not torch.allclose(found[..., :4], flipped[..., :4], atol=1)
    torch.testing.assert_close(back, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("side", [50, 65, 77])
def test_nothing_is_found_beyond_an_input_that_strides_do_not_divide(side: int, small: bool) -> None:
    head = detection.detector(side=side, detections=300).eval()
    if small:  # so that places beyond the input have boxes of which nothing is inside
        with torch.no_grad():
            head.head.detector.distances.weight.zero_()
            head.head.detector.distances.bias.fill_(-2.0)
    images, target = detection.scene([2, 1], side, seed=4)
    with torch.no_grad():
        places = head._places(head.features(images))
        assert (places.centres > side).any(), "the maps reach beyond it"
        found = head(images)
    there = found[..., 5] >= 0
    assert there.sum() > 20
    assert ((found[..., :4] >= 0) & (found[..., :4] <= side)).all()
    assert (found[..., 2:4] > found[..., :2])[there].all()
    assert torch.isfinite(head.loss(head.features(images), target))


def test_the_score_is_the_mean_of_class_and_centre_and_suppression_is_by_class() -> None:
    head = detection.detector(detections=300, overlap=0.4).eval()
    images, _ = detection.scene([2], seed=5)
    with torch.no_grad():
        places, found = head._places(head.features(images)), head(images)[0]
    scores = (places.classes[0].sigmoid() * places.central[0].sigmoid()[:, None]).sqrt()
    assert found[0, 4].item() == pytest.approx(scores.max().item(), rel=1e-5)
    there = found[found[:, 5] >= 0]
    for kind in (0.0, 1.0):
        own = there[there[:, 5] == kind][:, :4]
        assert len(own) > 1
        assert localization.iou(own, own).fill_diagonal_(0).max() <= 0.4
    assert len(there) < scores.numel()


def test_only_as_many_detections_as_asked_for_the_best() -> None:
    few, many = (detection.detector(detections=count).eval() for count in (3, 50))
    images, _ = detection.scene([2], seed=5)
    with torch.no_grad():
        found, all_of_them = few(images), many(images)
    assert found.shape == (1, 3, 6)
    torch.testing.assert_close(found, all_of_them[:, :3])


def test_the_reducer_lowers_what_it_calls_nothing() -> None:
    head = detection.detector(reducer=True).eval()
    images, _ = detection.scene([2, 1], seed=6)
    classifier = head.head.reducer.classifier
    with torch.no_grad():
        head.reducing = False
        alone = head(images)
        head.reducing = True
        classifier.weight.zero_()
        classifier.bias.copy_(torch.tensor([2.0, 0.0, 1.0]))  # nothing, and the two classes
        both = head(images)
        head.reducing = False
        torch.testing.assert_close(head(images), alone)
    chance = F.softmax(torch.tensor([2.0, 0.0, 1.0]), dim=0)
    for one, other in zip(alone, both, strict=True):
        one = one[one[:, 5] >= 0]
        expected = (one[:, 4] * chance[one[:, 5].long() + 1]).sqrt()
        order = expected.argsort(descending=True, stable=True)
        torch.testing.assert_close(other[: len(one), 4], expected[order])
        torch.testing.assert_close(other[: len(one), :4], one[order, :4])
    assert (both[..., 4][:, 1:] <= both[..., 4][:, :-1]).all()


def test_the_reducer_learns_from_the_true_boxes_and_the_likeliest() -> None:
    head = detection.detector("test_vit", reducer=True).double()
    images, target = detection.scene([2, 0], seed=7)
    features = head.features(images.double())
    places = head._places(features)
    with torch.no_grad():
        found = head._detected(places, images.shape[-2:]).boxes[:, :64]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number in range(2):
        boxes = torch.cat([found[number], target[number, :, :4].double()])
        logits = head.head.reducer(places.finest[number : number + 1], boxes[None], 4.0)[0]
        kinds = hit(boxes, target[number])
        assert kinds[-2:].tolist() == ([-1, -1] if number else (target[0, :, 4] + 1).tolist())
        for kind, each in zip(kinds.tolist(), logits, strict=True):
            if kind >= 0:
                total, count = total - each.log_softmax(dim=0)[kind], count + 1
    assert 2 < count < 132
    assert head._second(features, places, target).item() == pytest.approx((total / count).item(), rel=1e-9)


@pytest.mark.parametrize("reducer", [False, True])
@pytest.mark.parametrize("network", ["test_resnet", "test_vit", "test_convnext"])
def test_half_precision_gives_full_losses_and_boxes(network: str, reducer: bool) -> None:
    head = detection.detector(network, reducer=reducer)
    images, target = detection.scene([2, 1])
    full = head.loss(head.features(images), target)
    with torch.autocast("cpu", torch.bfloat16):
        features = head.features(images)
        loss, found = head.loss(features, target), head.predict(features)
    assert loss.dtype == found.dtype == torch.float32
    assert loss.item() == pytest.approx(full.item(), rel=0.05)


@pytest.mark.parametrize("reducer", [False, True])
def test_an_exported_detector_says_the_same(reducer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localization, "CANDIDATES", 40)  # suppression is as many steps of the graph
    head = detection.detector(reducer=reducer, detections=20).eval()
    images, _ = detection.scene([2, 1, 3], seed=8)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.export.export(head, (images[:2],), dynamic_shapes=(batch,))
    with torch.no_grad():
        for given in (images, images[:1]):
            expected = head(given)
            assert (expected[..., 5] >= 0).sum() > 5 * len(given)
            torch.testing.assert_close(program.module()(given), expected, rtol=1e-4, atol=1e-4)


def test_equal_scores_stay_in_order_whatever_the_place_in_the_tensor() -> None:
    """A sigmoid of the same number differs by a rounding between the bulk of a tensor and its end."""
    head = detection.detector(side=128, width=8, depth=1).eval()
    for bias in torch.linspace(-5, 1, 60).tolist():
        with torch.no_grad():
            head.head.detector.classes.bias.fill_(bias)
            scores = head(torch.zeros(1, 1, 128, 128))[0, :, 4]
        assert (scores[:-1] >= scores[1:]).all()
