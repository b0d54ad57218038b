import csv
from pathlib import Path

import numpy as np
import pytest

from sslmed.config import OutputExistsError, UsageError
from sslmed.data.acceptance import accept_scan
from sslmed.data.intensity import foreground
from sslmed.data.modality import MODALITIES
from sslmed.data.phantom_scans import CLASSES, DRAWN, PICTURES, SHAPE, SPACING, beam, chest, head, tile, write_scans
from sslmed.data.readers import find, read
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
        assert not np.array_equal(draw(stream(1), False), draw(stream(1), True))
        assert not np.array_equal(draw(stream(1), False), draw(stream(2), False))


def test_a_ct_has_padding_air_lung_tissue_and_bone() -> None:
    values = chest(stream(), True)
    assert values.min() == -2000
    for low, high in ((-1100, -900), (-950, -750), (0, 100), (400, 700)):
        assert ((values > low) & (values < high)).mean() > 0.005


def test_mr_volumes_have_scales_of_their_own_and_air() -> None:
    volumes = [head(stream(seed), False) for seed in range(6)]
    tops = [float(np.percentile(volume, 99)) for volume in volumes]
    assert max(tops) > 5 * min(tops)
    for volume in volumes:
        mask, air = foreground(volume)
        assert 0.3 < mask.mean() < 0.8
        assert air.mean() > 0.1


def test_an_ultrasound_has_figures_that_the_sector_leaves_out() -> None:
    picture = beam(stream(), True)
    found = sector(picture)
    assert found is not None
    assert picture[:30, :16].max() == 255
    assert not found[:30, :16].any()
    assert 0.3 < found.mean() < 0.8


def test_tissue_is_stained_more_where_there_is_a_lesion() -> None:
    clear, lesion = (np.mean([tile(stream(seed), each)[..., 0].mean() for seed in range(5)]) for each in (False, True))
    assert lesion < clear - 10


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputExistsError):
        write_scans(tmp_path, "ct")
    with pytest.raises(UsageError, match="no phantoms of 'pet'"):
        write_scans(tmp_path / "new", "pet")
