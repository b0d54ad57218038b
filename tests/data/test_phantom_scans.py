import csv
from pathlib import Path

import numpy as np
import pytest

from sslmed.config import OutputExistsError, UsageError
from sslmed.data.acceptance import accept_scan
from sslmed.data.annotations.box_files import read_boxes
from sslmed.data.annotations.masks import match_masks, onto
from sslmed.data.intensity import foreground
from sslmed.data.modality import MODALITIES
from sslmed.data.phantom_scans import CLASSES, DRAWN, PICTURES, SHAPE, SPACING, beam, chest, head, tile, write_scans
from sslmed.data.readers import find, read
from sslmed.data.readers.mask import read_masks
from sslmed.data.ultrasound import sector


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_written_is_taken_by_its_modality(name: str, tmp_path: Path) -> None:
    made = write_scans(tmp_path / "raw", name, patients=4)
    files = find(made.folder)
    assert len(files) == made.scans == (4 if name in ("ct", "mri") else 4 * PICTURES)
    with made.labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [path.relative_to(made.folder).as_posix() for path in files]
    assert {row["label:finding"] for row in rows} == set(CLASSES)
    assert len({row["patient"] for row in rows}) == made.patients == 4
    for path in files:
        scan = read(path)
        accept_scan(MODALITIES[name], scan)
        if scan.kind == "volume":
            assert scan.pixels.shape == SHAPE
            assert scan.pixels.dtype == np.int16
            assert scan.spacing == pytest.approx(SPACING)


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_scans(tmp_path / name, "ct", patients=2, seed=3)
    first, second = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_lesion_differs_and_every_patient_does() -> None:
    for draw in DRAWN.values():
        assert not np.array_equal(draw(stream(1), False).pixels, draw(stream(1), True).pixels)
        assert not np.array_equal(draw(stream(1), False).pixels, draw(stream(2), False).pixels)


@pytest.mark.parametrize("name", DRAWN)
def test_masks_change_nothing_else_and_each_scan_has_its_own(name: str, tmp_path: Path) -> None:
    plain = write_scans(tmp_path / "plain", name, patients=4)
    made = write_scans(tmp_path / "masked", name, patients=4, masks=True)
    assert plain.masks is None
    assert not (plain.folder / "masks").exists()
    assert made.masks == made.folder / "masks"
    with made.labels.open(newline="") as file:
        label = {row["file"]: row["label:finding"] for row in csv.DictReader(file)}
    for file_name in ("labels.csv", *label):
        assert (plain.folder / file_name).read_bytes() == (made.folder / file_name).read_bytes()
    found = match_masks(made.masks, {each: each for each in label})
    assert found.masks.keys() == label.keys()
    assert not found.strays
    for file_name, path in found.masks.items():
        scan, (mask,) = read(made.folder / file_name), read_masks(path)
        depth = len(scan.pixels) if scan.kind == "volume" else 1
        values = onto(mask, depth, scan.pixels.shape[1:] if depth > 1 else scan.pixels.shape[:2], scan.affine)
        assert values.max() == (label[file_name] == "lesion")


@pytest.mark.parametrize("name", ["ultrasound", "histology", "photo"])
def test_boxes_change_nothing_else_and_each_picture_is_listed(name: str, tmp_path: Path) -> None:
    plain = write_scans(tmp_path / "plain", name, patients=4)
    made = write_scans(tmp_path / "boxed", name, patients=4, boxes=True)
    assert plain.boxes is None
    assert made.boxes == made.folder / "boxes.json"
    with made.labels.open(newline="") as file:
        label = {row["file"]: row["label:finding"] for row in csv.DictReader(file)}
    for file_name in ("labels.csv", *label):
        assert (plain.folder / file_name).read_bytes() == (made.folder / file_name).read_bytes()
    drawn = read_boxes(made.boxes)
    assert drawn.classes == ("lesion",)
    assert {each.names[0]: bool(each.corners) for each in drawn.images} == {
        file_name: finding == "lesion" for file_name, finding in label.items()
    }


@pytest.mark.parametrize("name", ["ct", "mri"])
def test_volumes_have_no_boxes(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"volumes of '(ct|mri)'; ask for masks, .* 'boxes around masks'"):
        write_scans(tmp_path / "new", name, boxes=True)
    assert not (tmp_path / "new").exists()


def values_where(name: str, lesion: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values inside and outside of the lesions of five patients, as a share of each one's span."""
    inside, outside = [], []
    for seed in range(5):
        drawn = DRAWN[name](stream(seed), lesion)
        pixels = drawn.pixels[..., 0] if drawn.pixels.ndim == 3 and drawn.pixels.shape[2] == 3 else drawn.pixels
        pixels = pixels.astype(float) / (1 if name == "ct" else np.percentile(pixels, 99))
        assert drawn.lesion.shape == pixels.shape
        inside.append(pixels[drawn.lesion])
        outside.append(pixels[~drawn.lesion])
    return np.concatenate(inside), np.concatenate(outside)


def test_masks_lie_on_the_lesions() -> None:
    for name in DRAWN:
        assert not values_where(name, False)[0].size, "no lesion, no mask"
    tissue, _ = values_where("ct", True)
    assert abs(tissue.mean() - 60) < 2
    assert abs(tissue.std() - 15) < 2, "all of it has the value that is drawn, but for the noise"
    bright, rest = values_where("mri", True)
    assert bright.std() < 0.15 * bright.mean()
    assert np.median(bright) > 1.5 * np.median(rest[rest > 0.3])
    drawn = beam(stream(3), True)
    echoes = drawn.pixels[drawn.pixels.shape[0] // 3 :]
    dark = drawn.lesion[drawn.pixels.shape[0] // 3 :]
    assert echoes[dark].mean() < 0.3 * echoes[~dark & (echoes > 0)].mean()
    crowded, sparse = values_where("histology", True)
    assert crowded.mean() < sparse.mean() - 0.05, "nuclei are dark in red"


def test_a_ct_has_padding_air_lung_tissue_and_bone() -> None:
    values = chest(stream(), True).pixels
    assert values.min() == -2000
    for low, high in ((-1100, -900), (-950, -750), (0, 100), (400, 700)):
        assert ((values > low) & (values < high)).mean() > 0.005


def test_mr_volumes_have_scales_of_their_own_and_air() -> None:
    volumes = [head(stream(seed), False).pixels for seed in range(6)]
    tops = [float(np.percentile(volume, 99)) for volume in volumes]
    assert max(tops) > 5 * min(tops)
    for volume in volumes:
        mask, air = foreground(volume)
        assert 0.3 < mask.mean() < 0.8
        assert air.mean() > 0.1


def test_an_ultrasound_has_figures_that_the_sector_leaves_out() -> None:
    picture = beam(stream(), True).pixels
    found = sector(picture)
    assert found is not None
    assert picture[:30, :16].max() == 255
    assert not found[:30, :16].any()
    assert 0.3 < found.mean() < 0.8


def test_tissue_is_stained_more_where_there_is_a_lesion() -> None:
    clear, lesion = (
        np.mean([tile(stream(seed), each).pixels[..., 0].mean() for seed in range(5)]) for each in (False, True)
    )
    assert lesion < clear - 10


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputExistsError):
        write_scans(tmp_path, "ct")
    with pytest.raises(UsageError, match="no phantoms of 'pet'"):
        write_scans(tmp_path / "new", "pet")
