"""One file that takes source intensities and gives what `predict` gives, for every head, modality and architecture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslmed.artifact import Card, DataCard, HeadCard
from sslmed.data.input import network_input
from sslmed.data.modality import MODALITIES, in_words, with_windows
from sslmed.evaluation.detected_boxes import Found
from sslmed.exporting import graphs, parity
from sslmed.exporting.deployed import Deployed, Features, deployed
from sslmed.exporting.parity import SIZES, TOLERANCE, compare, drawn
from sslmed.heads import HEADS
from sslmed.models.backbones import BackboneConfig, build
from sslmed.supervised.applying import Applied
from sslmed.supervised.model import Model

HEAD_OF = {
    "class": "classification",
    "findings": "classification",
    "mask": "segmentation",
    "boxes": "localization",
}
CUTS = {"class": None, "findings": (0.5, 0.3, 0.6), "mask": None, "boxes": (0.3, 0.4, 0.5)}


def card(config: BackboneConfig, width: int, modality: str, size: int, **changes: Any) -> Card:
    data = DataCard(fingerprint="", key_id="", split_digest="", images=1, patients=1)
    policy = with_windows(MODALITIES[modality], changes.get("windows", ()))
    coloured = modality in ("photo", "histology") and config.in_chans == 3
    return Card(
        backbone=config,
        **({"channels": 3 if coloured else 1} | changes),
        num_features=width,
        size=size,
        modality=modality,
        normalisation=in_words(policy),
        method={},
        recipe={},
        data=data,
        steps=0,
    )


def features(name: str, modality: str, in_chans: int = 1, size: int = 64, **changes: Any) -> Features:
    config = BackboneConfig(name=name, in_chans=in_chans)
    backbone = build(config, size, 0)
    policy = with_windows(MODALITIES[modality], changes.get("windows", ()))
    return Features(policy, card(config, backbone.num_features, modality, size, **changes), backbone.network)


def model(kind: Any, modality: str, name: str = "test_resnet", in_chans: int = 1, **settings: Any) -> Model:
    """A model whose head says something else of every image."""
    torch.manual_seed(0)
    config = BackboneConfig(name=name, in_chans=in_chans)
    backbone = build(config, 64, 0)
    with torch.no_grad():
        backbone.network(torch.randn(4, in_chans, 64, 64))  # statistics
    task = HEADS[HEAD_OF[kind]]
    head = task(task.Config(**settings), backbone, 3, kind)
    for parameter in head.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if kind in ("class", "findings") else 0.1)
    if kind == "mask":  # no class everywhere
        with torch.no_grad():
            logits = head.eval().logits(head.features(torch.randn(4, in_chans, 64, 64)))
            head.head.decoder.classifier.bias -= logits.mean((0, 2, 3))
    head.temperature = 1.7
    about = HeadCard(
        name=HEAD_OF[kind],
        target="something",
        kind=kind,
        classes=("a", "b", "c"),
        config=settings,
        temperature=1.7,
        thresholds=CUTS[kind],
        values=(0, 7, 255) if kind == "mask" else (),
    )
    about_all = card(config, backbone.num_features, modality, 64, head=about)
    policy = MODALITIES[modality]
    return Model(about_all, about, Applied(head.eval(), policy, 64, in_chans, head.config.tiles), None)


def applied(found: Model, module: Deployed, number: int) -> list[Any]:
    images = drawn(module, number)
    return [*found.applied((each, module.policy.intensity(each)) for each in images)]


# In torch alone, beside what predict does.


@pytest.mark.parametrize("modality", sorted(MODALITIES))
def test_preparation_is_that_of_predict(modality: str) -> None:
    module = features("test_resnet", modality)
    for number, batch in enumerate(parity.batches_of(module)):
        ready = module.prepare(*batch)
        for given, pixels in zip(ready, drawn(module, number), strict=True):
            wanted = network_input(pixels, module.policy.intensity(pixels), module.policy, 64, 1)
            # one grey level of a byte, where OpenCV's fixed point rounds a half the other way
            level = 1e-5 if pixels.dtype != np.uint8 else 1.01 / 255 * 4.5
            assert float((given - wanted).abs().max()) <= level
            assert float((given - wanted).abs().mean()) <= 1e-4


def test_grey_for_a_network_of_colours_is_normalised_as_grey() -> None:
    module = features("test_resnet", "histology", 3, channels=1)
    assert module.planes == 1
    (pixels,) = drawn(module, 1)
    ready = module.prepare(torch.from_numpy(pixels.astype(np.float32))[None, None], None)
    wanted = network_input(pixels, module.policy.intensity(pixels), module.policy, 64, 3)
    assert ready.shape == (1, 3, 64, 64)
    torch.testing.assert_close(ready[0], wanted, rtol=0, atol=1.01 / 255 * 4.5)


def test_floating_intensities_are_not_rounded() -> None:
    module = features("test_resnet", "xray")
    pixels = np.random.default_rng(0).random((90, 70), np.float32)
    ready = module.prepare(torch.from_numpy(pixels)[None, None], None)
    wanted = network_input(pixels, module.policy.intensity(pixels), module.policy, 64, 1)
    torch.testing.assert_close(ready[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0, 5])
@pytest.mark.parametrize("modality", ["xray", "ultrasound", "ct", "photo"])
def test_a_constant_image_is_prepared_as_predict_does(modality: str, value: int) -> None:
    module = features("test_resnet", modality)
    pixels = np.full((40, 50), value, {"xray": np.uint16, "ct": np.int16}.get(modality, np.uint8))
    ready = module.prepare(torch.from_numpy(pixels.astype(np.float32))[None, None], None)
    wanted = network_input(pixels, module.policy.intensity(pixels), module.policy, 64, 1)
    assert torch.isfinite(ready).all()
    torch.testing.assert_close(ready[0], wanted, rtol=0, atol=1e-5)


def test_a_large_ultrasound_is_sampled_as_ingest_does() -> None:
    module = features("test_resnet", "ultrasound")
    pixels = np.random.default_rng(1).integers(0, 255, (1100, 1300), dtype=np.uint8)
    pixels[:, :400] = 0
    measured = module.prepare.measure(torch.from_numpy(pixels.astype(np.float32))[None, None])  # type: ignore[misc]
    np.testing.assert_allclose(measured[0].numpy(), module.policy.intensity(pixels), rtol=1e-6)


@pytest.mark.parametrize("kind", ["class", "findings"])
def test_classes_are_those_of_predict(kind: str) -> None:
    found = model(kind, "xray")
    module = deployed(found)
    for number, batch in enumerate(parity.batches_of(module)):
        probabilities, called = module(*batch)
        answers = applied(found, module, number)
        torch.testing.assert_close(
            probabilities.detach(), torch.tensor(np.stack([a.scores for a in answers])).float(), rtol=0, atol=1e-5
        )
        names = [found.called(each.scores) for each in answers]
        if kind == "class":
            assert [("a", "b", "c")[each] for each in called.tolist()] == [name for (name,) in names]
        else:
            assert [tuple(np.array(["a", "b", "c"])[row.numpy()]) for row in called] == names


def test_masks_are_those_of_predict_in_the_images_own_pixels() -> None:
    found = model("mask", "xray")
    module = deployed(found)
    for number, batch in enumerate(parity.batches_of(module)):
        probabilities, mask = module(*batch)
        assert mask.shape == (len(batch[0]), *batch[0].shape[2:])
        torch.testing.assert_close(probabilities.sum(1), torch.ones(mask.shape), rtol=0, atol=1e-5)
        wanted = np.stack([np.array([0, 7, 255])[each.labels] for each in applied(found, module, number)])
        assert len(np.unique(wanted)) > 1
        assert (mask.numpy() != wanted).mean() < 2e-3  # near ties


def test_boxes_are_those_of_predict_in_the_images_own_pixels() -> None:
    found = model("boxes", "xray")
    module = deployed(found)
    for number, batch in enumerate(parity.batches_of(module)):
        boxes, called = module(*batch)
        for rows, there, answer in zip(boxes.detach().numpy(), called, applied(found, module, number), strict=True):
            kept = found.kept(answer.boxes)
            own = rows[there.numpy()]
            assert len(own) < (rows[:, 5] >= 0).sum() == len(answer.boxes.scores)
            assert len(own) == len(kept.scores) > 0
            np.testing.assert_allclose(own[:, :4], kept.xyxy, atol=2e-2)
            np.testing.assert_allclose(own[:, 4], kept.scores, atol=1e-4)
            assert own[:, 5].tolist() == kept.classes.tolist()
            assert isinstance(kept, Found)


def test_a_tile_is_taken_as_it_is_and_its_intensities_are_given() -> None:
    found = model("mask", "xray", input="tiles")
    module = deployed(found)
    assert module.inputs == ("image", "intensity")
    image = torch.rand(2, 1, 64, 64) * 100
    probabilities, mask = module(image, torch.tensor([[10.0, 90.0, 50.0, 20.0]] * 2, dtype=torch.float64))
    wanted = found.applied.head(((image - 10) / 80).clamp(0, 1).sub(0.5).div(0.25))
    torch.testing.assert_close(probabilities, wanted, rtol=0, atol=1e-6)
    assert mask.shape == (2, 64, 64)


# As files.


def names(module: Deployed) -> str:
    return json.dumps({"outputs": module.outputs})


ARCHITECTURES = [
    ("test_resnet", 1, 64),
    ("test_convnext", 3, 64),
    ("tf_efficientnet_lite0", 1, 64),
    ("test_vit", 3, 64),
    ("swin_tiny_patch4_window7_224", 1, 56),
]


@pytest.mark.parametrize(("name", "in_chans", "size"), ARCHITECTURES)
def test_backbones_run_elsewhere(name: str, in_chans: int, size: int, tmp_path: Path) -> None:
    module = features(name, "xray" if in_chans == 1 else "histology", in_chans, size)
    example = parity.batches_of(module)[0]
    for write, file in ((graphs.write_program, "m.pt2"), (graphs.write_onnx, "m.onnx")):
        found = compare(module, write(module, example, tmp_path / file, names(module)))
        assert found.passed, found
        assert found.outputs["features"] <= TOLERANCE
        assert [batch[0] for batch in found.batches] == [count for count, _, _ in SIZES]


@pytest.mark.parametrize(
    ("modality", "changes"),
    [
        ("ultrasound", {}),
        ("mri", {}),
        ("photo", {}),
        ("ct", {"windows": ("lung", (40.0, 400.0)), "slices": 3}),
    ],
)
def test_modalities_run_elsewhere(modality: str, changes: dict[str, Any], tmp_path: Path) -> None:
    in_chans = 6 if modality == "ct" else 1
    module = features("test_resnet", modality, in_chans, 64, **changes)
    assert module.inputs == (("image", "intensity") if modality == "mri" else ("image",))
    run = graphs.write_onnx(module, parity.batches_of(module)[0], tmp_path / "m.onnx", names(module))
    found = compare(module, run)
    assert found.passed, found


@pytest.mark.parametrize("kind", ["class", "findings", "mask", "boxes"])
def test_models_run_elsewhere(kind: str, tmp_path: Path) -> None:
    in_chans = 3 if kind in ("class", "mask") else 1
    module = deployed(model(kind, "photo" if in_chans == 3 else "xray", in_chans=in_chans))
    example = parity.batches_of(module)[0]
    ways = [(graphs.write_program, "m.pt2"), (graphs.write_onnx, "m.onnx")]
    for write, file in ways[kind == "findings" :]:  # of the two heads alike one way is enough
        found = compare(module, write(module, example, tmp_path / file, names(module)))
        assert found.passed, found


def test_boxes_of_equal_scores_may_change_places_and_nothing_else() -> None:
    module = deployed(model("boxes", "xray"))

    def swapped(batch: parity.Tensors) -> parity.Tensors:
        return tuple(each.flip(1) for each in module(*batch))

    assert set(compare(module, swapped).outputs.values()) == {0.0}
    assert not compare(module, lambda batch: (module(*batch)[0] * 1.001, module(*batch)[1])).passed
    assert not compare(module, lambda batch: (module(*batch)[0], ~module(*batch)[1])).passed


@pytest.mark.parametrize("modality", ["ultrasound", "xray", "ct"])
def test_pixels_averaged_by_fours_are_rounded_as_opencv_does(modality: str) -> None:
    module = features("test_resnet", modality)
    kind = {"ultrasound": np.uint8, "xray": np.uint16, "ct": np.int16}[modality]
    pixels = np.random.default_rng(0).integers(0, 200, (128, 128)).astype(kind)
    ready = module.prepare(torch.from_numpy(pixels.astype(np.float32))[None, None])
    wanted = network_input(pixels, module.policy.intensity(pixels), module.policy, 64, 1)
    torch.testing.assert_close(ready[0], wanted, rtol=0, atol=1e-5)


def test_a_file_that_says_something_else_does_not_pass() -> None:
    module = features("test_resnet", "xray")
    found = compare(module, lambda batch: (module(*batch)[0] * (1 + 1e-3),))
    assert found.outputs["features"] == pytest.approx(1e-3, rel=1e-2)
    assert not found.passed
    assert not compare(module, lambda batch: (module(*batch)[0][:, :5],)).passed
    assert not compare(module, lambda batch: (module(*batch)[0] * torch.nan,)).passed
