"""A trained head on whole images: what several looks come to, and how an image finds its way back to its own grid."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stores
import torch

from sslmed import artifact
from sslmed.config import DataError
from sslmed.data.input import network_input
from sslmed.data.modality import named
from sslmed.data.store import Store
from sslmed.recipe import load_finetune
from sslmed.supervised.applying import Answer, Applied
from sslmed.supervised.looks import Look
from sslmed.supervised.model import Model, load
from sslmed.supervised.tuning import carry_out, open_run, prepare

SMALL = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.precision=32",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.write_shapes(tmp_path_factory.mktemp("applying") / "store", patients=8)


def model(shapes: Store, name: str, *overrides: str) -> Model:
    """Two steps old, from its artifact."""
    job = prepare(load_finetune("xray/segmentation", (*SMALL, *overrides)), shapes, "random")
    run = open_run(job, shapes.path.parent / name, False)
    with run:
        carry_out(job, run)
    return load(run.artifact)


@pytest.fixture(scope="module")
def upright(shapes: Store) -> Model:
    """Trained without mirroring."""
    return model(shapes, "upright")


@pytest.fixture(scope="module")
def mirrored(shapes: Store) -> Model:
    return model(shapes, "mirrored", "views.hflip=0.5")


def seen(shapes: Store, applied: Applied) -> torch.Tensor:
    """The network's input of three images, whole and 32 x 32."""
    intensity = named("xray").intensity
    given = [(shapes.pixels(row), intensity(shapes.pixels(row))) for row in range(3)]
    return torch.stack([network_input(*each, applied.policy, applied.size, applied.channels) for each in given])


def answers(shapes: Store, applied: Applied) -> list[Answer]:
    return list(applied([(shapes.pixels(row), shapes.intensity(row)) for row in range(3)]))


def labels_of(scores: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """By hand, of (K, 32, 32) scores of an image of 40 x 48: rows 2 to 28 of the input are the image's."""
    inside = scores[:, 2:29]
    whole = torch.nn.functional.interpolate(inside[None], shape, mode="bilinear", align_corners=False)[0]
    return whole.argmax(dim=0).numpy().astype(np.uint8)


def test_several_looks_are_the_mean_of_the_image_and_its_mirror(shapes: Store, mirrored: Model) -> None:
    several = mirrored.with_looks().applied
    assert several.looks == (Look(), Look(mirrored=True))
    assert artifact.HeadCard.model_validate(mirrored.about.model_dump()).mirrors == ("hflip",)
    images = seen(shapes, several)
    with torch.inference_mode():
        mean = (several.head(images) + several.head(images.flip(3)).flip(3)) / 2
    found, plain = answers(shapes, several), answers(shapes, mirrored.applied)
    for each, scores in zip(found, mean, strict=True):
        np.testing.assert_array_equal(each.labels, labels_of(scores, (40, 48)))
    assert any((a.labels != b.labels).any() for a, b in zip(found, plain, strict=True))


def test_without_mirrors_the_looks_are_smaller_images(shapes: Store, upright: Model) -> None:
    several = upright.with_looks().applied
    assert several.looks == (Look(), Look(scale=0.95), Look(scale=0.9))
    images = seen(shapes, several)
    with torch.inference_mode():
        scores = torch.stack([look.back(several.head(look.there(images))) for look in several.looks])
    found, plain = answers(shapes, several), answers(shapes, upright.applied)
    for at, each in enumerate(found):
        np.testing.assert_array_equal(each.labels, labels_of(scores.mean(dim=0)[at], (40, 48)))
        np.testing.assert_array_equal(plain[at].labels, labels_of(scores[0, at], (40, 48)))
    assert any((a.labels != b.labels).any() for a, b in zip(found, plain, strict=True))


def test_the_mode_of_training_is_given_back(shapes: Store, upright: Model) -> None:
    upright.applied.head.train()
    found = answers(shapes, upright.applied)
    assert upright.applied.head.training
    upright.applied.head.eval()
    for one, other in zip(found, answers(shapes, upright.applied), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


def test_what_images_look_like_is_told_only_where_it_is_asked_for(shapes: Store, upright: Model) -> None:
    assert upright.familiarity is not None
    described = answers(shapes, upright.applied)
    silent = answers(shapes, replace(upright.applied, described=False))
    assert {each.appearance.size for each in silent} == {0}
    alone = list(upright.applied.appearances([(shapes.pixels(row), shapes.intensity(row)) for row in range(3)]))
    np.testing.assert_allclose([each.appearance for each in described], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "shrunk_to", "covered"),
    [
        ((32, 32), None, True),
        ((31, 400), None, False),
        ((80, 96), 40, True),
        ((80, 96), 24, False),  # shrunk to 24 x 29
        ((28, 30), 40, False),  # nothing is enlarged
    ],
)
def test_tiles_need_images_as_large(
    shape: tuple[int, int], shrunk_to: int | None, covered: bool, upright: Model
) -> None:
    applied = replace(upright.applied, tiles=True, shrunk_to=shrunk_to)
    if covered:
        applied.check_covers(shape)
    else:
        with pytest.raises(DataError, match=f"is {shape[0]} x {shape[1]} pixels, smaller than the model's tiles"):
            applied.check_covers(shape)
    replace(applied, tiles=False).check_covers(shape)


def test_tiles_of_a_larger_image_are_those_of_the_shrunk_one_enlarged(shapes: Store, upright: Model) -> None:
    small, intensity = shapes.pixels(0), shapes.intensity(0)
    large = np.kron(small, np.ones((2, 2), np.uint8)).astype(np.uint8)
    tiles = replace(upright.applied, tiles=True, shrunk_to=40)
    (of_small,), (of_large,) = list(tiles([(small, intensity)])), list(tiles([(large, intensity)]))
    assert of_small.labels is not None
    assert len(np.unique(of_small.labels)) > 1
    np.testing.assert_array_equal(of_large.labels, np.kron(of_small.labels, np.ones((2, 2), np.uint8)))


def test_a_run_and_its_artifact_are_one_model(shapes: Store, upright: Model) -> None:
    again = load(Path(shapes.path.parent / "upright"))
    for one, other in zip(answers(shapes, again.applied), answers(shapes, upright.applied), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
