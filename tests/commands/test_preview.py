"""The pictures of a store: there, of the right rows, with what was drawn on them, and without a name."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from nibabel import Nifti1Image
from PIL import Image

from sslmed import cli
from sslmed.commands.ingest import ingest
from sslmed.commands.preview import oddities, preview
from sslmed.config import OutputExistsError, UsageError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.writer import annotate
from sslmed.data.phantoms import phantom
from sslmed.data.previews import panels
from sslmed.data.store import Store
from sslmed.data.writers import write_image

CT_STACK = """
backbone: {name: test_resnet, in_chans: 9}
data: {size: 64, windows: [lung, [40, 400], bone], slices: 3}
method: {name: byol, hidden: 64}
"""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[panels.Shown]:
    """What is handed to the drawing of images."""
    kept: list[panels.Shown] = []
    images = panels.images

    def noted(samples: list[panels.Shown], classes: panels.Classes) -> bytes:
        kept.extend(samples)
        return images(samples, classes)

    monkeypatch.setattr(panels, "images", noted)
    return kept


def ct(folder: Path, count: int = 3) -> Path:
    """CT volumes of 6 slices as NIfTI, in HU, thick slices."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        body = phantom(np.random.default_rng(number), (64, 48)).astype(np.float32) / 65535
        values = np.stack([body * 1500 - 1000 + 10 * slice_ for slice_ in range(6)], axis=2).astype(np.int16)
        Nifti1Image(values, np.diag([0.5, 0.5, 4.0, 1.0])).to_filename(folder / f"case{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def ct_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("ct")
    ct(folder / "images")
    (folder / "masks").mkdir()
    for number in range(3):
        mask = np.zeros((64, 48, 6), np.uint8)
        mask[20:30, 20:30, 4] = 1
        Nifti1Image(mask, np.diag([0.5, 0.5, 4.0, 1.0])).to_filename(folder / "masks" / f"case{number}.nii.gz")
    ingest(folder / "images", folder / "store", modality="ct", masks=folder / "masks", mask_classes=("none", "lesion"))
    return Store(folder / "store")


def opened(path: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(Path(path).read_bytes())).convert("RGB")).astype(int)


def test_grey_images_without_labels_or_masks(phantom_store: Store, tmp_path: Path, drawn: list[panels.Shown]) -> None:
    result = preview(phantom_store.path, out=tmp_path / "out", count=4)
    assert result.pictures == (str(tmp_path / "out" / "images.png"),)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images.png"]
    assert (len(result.rows), len(drawn), result.warnings) == (4, 4, ())
    sample, row = drawn[0], result.rows[0]
    assert np.array_equal(sample.pixels, phantom_store.pixels(row))
    assert sample.ranges == (phantom_store.intensity(row)[:2],)
    side = int(np.median(np.minimum(phantom_store.index.height, phantom_store.index.width)))
    assert sample.planes.shape == sample.views[0].shape == (1, side, side)
    assert len(sample.views) == 3
    assert not np.array_equal(sample.views[0], sample.views[1])
    assert opened(result.pictures[0]).shape[0] > 800
    assert result.next.startswith("sslmed pretrain xray/simclr_resnet18 --data ")


def test_the_place_by_itself_is_beside_the_store(phantom_store: Store, tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(phantom_store.path)
    assert preview(tmp_path / "store", count=1).pictures == (str(tmp_path / "store-preview" / "images.png"),)


def test_it_shows_what_training_would_read(phantom_store: Store, tmp_path: Path, drawn: list[panels.Shown]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "backbone: {name: test_resnet}\ndata: {size: [32, 48]}\nmethod: {name: mae}\nviews: {rotate: 0}\n"
    )
    recipe.write_text(recipe.read_text().replace("test_resnet", "vit_tiny_patch16_224"))
    result = preview(phantom_store.path, recipe=recipe, out=tmp_path / "out", count=2)
    assert [view.shape for view in drawn[0].views] == [(1, 32, 48)] * 3
    assert drawn[0].planes.shape == (1, 32, 48)
    assert len({view.tobytes() for view in drawn[0].views}) == 3  # one view an epoch, of three epochs
    assert result.next.startswith(f"sslmed pretrain {recipe} ")


def test_a_recipe_that_does_not_go_with_the_store_is_refused(phantom_store: Store, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: {name: simclr}\nviews: {vflip: 0.5}\n")
    with pytest.raises(UsageError, match="vflip"):
        preview(phantom_store.path, recipe=recipe, out=tmp_path / "out")
    recipe.write_text("method: {name: simclr}\ndata: {windows: [lung]}\n")
    with pytest.raises(UsageError, match="windows"):
        preview(phantom_store.path, recipe=recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classification_recipe_leads_to_finetune(phantom_store: Store, tmp_path: Path) -> None:
    result = preview(phantom_store.path, recipe="xray/classification", out=tmp_path / "out", count=1)
    assert result.next.startswith("sslmed finetune xray/classification ")


def test_colour_is_one_panel(photo_store: Store, tmp_path: Path, drawn: list[panels.Shown]) -> None:
    result = preview(photo_store.path, out=tmp_path / "out", count=3)
    assert all(sample.colour and list(sample.names) == [0] for sample in drawn)
    assert drawn[0].planes.shape[0] == 3
    assert np.ptp(opened(result.pictures[0])[..., 0] - opened(result.pictures[0])[..., 2]) > 50


def test_volumes_get_planes_across_them_and_slices_with_a_class(
    ct_store: Store, tmp_path: Path, drawn: list[panels.Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[list[panels.Cut]] = []
    draw = panels.cuts
    monkeypatch.setattr(panels, "cuts", lambda rows, classes: cuts.extend(rows) or draw(rows, classes))
    result = preview(ct_store.path, out=tmp_path / "out", count=3)
    assert [Path(picture).name for picture in result.pictures] == ["images.png", "volumes.png"]
    assert [int(ct_store.index.slice[row]) for row in result.rows] == [4, 4, 4]
    assert all(sample.mask is not None and sample.mask.any() for sample in drawn)
    assert drawn[0].spacing == "4 x 0.5 x 0.5 mm"
    (across, front, side), *_ = cuts
    assert len(cuts) == 3
    assert (across.pixels.shape, across.aspect) == ((48, 64), 1)
    assert (front.pixels.shape, front.aspect) == ((6, 64), 8)
    assert (side.pixels.shape, side.aspect) == ((6, 48), 8)
    assert (across.upside_down, front.upside_down, side.upside_down) == (False, True, True)  # the head is above
    for cut in (across, front, side):
        assert cut.mask is not None
        assert cut.mask.shape == cut.pixels.shape
        assert cut.mask.any()


def test_windows_and_neighbouring_slices_are_panels_of_their_own(
    ct_store: Store, tmp_path: Path, drawn: list[panels.Shown]
) -> None:
    (tmp_path / "recipe.yaml").write_text(CT_STACK)
    preview(ct_store.path, recipe=tmp_path / "recipe.yaml", out=tmp_path / "out", count=1)
    (sample,) = drawn
    assert sample.planes.shape == (9, 64, 64)
    assert sample.names == {0: "lung, slice -1", 1: "lung, this slice", 4: "40/400, this slice", 7: "bone, this slice"}
    assert sample.ranges == ((-1250, 250), (-160, 240), (-500, 1500))
    assert sample.main == 1
    assert [view.shape for view in sample.views] == [(9, 64, 64)] * 3


def test_masks_are_seen(ct_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = preview(ct_store.path, out=tmp_path / "masked", count=3)
    monkeypatch.setattr(Store, "mask", lambda *_: None)
    plain = preview(ct_store.path, out=tmp_path / "plain", count=3)
    assert masked.rows == plain.rows
    changed = (opened(masked.pictures[0])[:-30] != opened(plain.pictures[0])[:-30]).any(axis=2)  # less the legend
    assert 200 < changed.sum() < changed.size / 4


def test_boxes_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        write_image(folder / f"{number}.png", random.integers(0, 256, (40, 36, 3), dtype=np.uint8))
    ingest(folder, tmp_path / "store", modality="photo")
    plain = preview(tmp_path / "store", out=tmp_path / "plain", count=2)
    boxes = Boxes(np.array([[4, 4, 30, 30]], np.float32), np.zeros(1, np.int16))
    annotate(tmp_path / "store", boxes=dict.fromkeys(range(4), boxes), box_classes=("cell",))
    boxed = preview(tmp_path / "store", out=tmp_path / "boxed", count=2)
    assert opened(plain.pictures[0]).shape == opened(boxed.pictures[0]).shape
    assert (opened(plain.pictures[0]) != opened(boxed.pictures[0])).any(axis=2).sum() > 200


def test_it_does_not_write_over_anything(phantom_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    preview(phantom_store.path, out=out, count=1)  # an empty folder is as good as none
    before = (out / "images.png").read_bytes()
    with pytest.raises(OutputExistsError):
        preview(phantom_store.path, out=out, count=1, seed=1)
    assert (out / "images.png").read_bytes() == before
    with pytest.raises(OutputExistsError):
        preview(phantom_store.path, out=out / "images.png", count=1)
    for inside in (phantom_store.path, phantom_store.path / "pictures"):
        with pytest.raises(UsageError, match="inside the store"):
            preview(phantom_store.path, out=inside, count=1)


@pytest.mark.parametrize("count", [0, 51])
def test_how_many(count: int, phantom_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 50"):
        preview(phantom_store.path, out=tmp_path / "out", count=count)


def test_the_same_seed_gives_the_same_pictures(phantom_store: Store, tmp_path: Path) -> None:
    files = [
        Path(preview(phantom_store.path, out=tmp_path / f"{number}", count=2, seed=seed).pictures[0]).read_bytes()
        for number, seed in enumerate((0, 0, 1))
    ]
    assert files[0] == files[1] != files[2]


def test_no_name_is_drawn(tmp_path: Path, drawn: list[panels.Shown]) -> None:
    folder = tmp_path / "Lovelace"
    folder.mkdir()
    for number in range(3):
        write_image(folder / f"Ada{number}.png", phantom(np.random.default_rng(number), (64, 48)))
    (folder / "labels.csv").write_text(
        "file,patient\n" + "".join(f"Ada{number}.png,id{number}\n" for number in range(3))
    )
    ingest(folder, tmp_path / "store", modality="xray", labels=folder / "labels.csv")
    preview(tmp_path / "store", count=3)
    told = [f"{sample.title}{sample.spacing}{sample.names}" for sample in drawn]
    assert not [text for text in told for name in ("Ada", "Lovelace", "id") if name in text]


# What looks wrong.


def shown(pixels: np.ndarray, low: float, high: float, planes: np.ndarray | None = None) -> panels.Shown:
    given = np.random.default_rng(0).normal(0, 1, (1, 8, 8)) if planes is None else planes
    return panels.Shown("", pixels, ((low, high),), given, {0: ""}, (), (0, 0, 8, 8))


def test_a_window_beside_the_values_is_seen() -> None:
    ramp = np.arange(1000, dtype=np.int16).reshape(20, 50)
    assert oddities(shown(ramp, 0, 1000)) == []
    assert oddities(shown(ramp, 5, 990)) == []
    (above,) = oddities(shown(ramp, 0, 500))
    assert above == "55% of what is not background lies above the window from 0 to 500"
    (below,) = oddities(shown(ramp, 400, 1000))
    assert below.startswith("33% of what is not background lies below")


def test_dark_background_below_the_window_is_usual() -> None:
    pixels = np.full((20, 50), 3, np.int16)
    pixels[5:15, 10:40] = np.arange(300).reshape(10, 30) + 500
    assert oddities(shown(pixels, 500, 800)) == []


def test_a_flat_input_is_seen() -> None:
    ramp = np.arange(1000, dtype=np.int16).reshape(20, 50)
    flat = np.full((1, 8, 8), -2.0)
    assert oddities(shown(ramp, 0, 1000, flat)) == ["its network input is nearly flat: standard deviation 0.000"]
    two = np.concatenate([np.random.default_rng(0).normal(0, 1, (1, 8, 8)), flat])
    assert oddities(shown(ramp, 0, 1000, two))[0].startswith("plane 1 of its network input")


def test_a_wrong_window_is_told_by_the_command(ct_store: Store, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "backbone: {name: test_resnet}\nmethod: {name: simclr}\ndata: {size: 32, windows: [[3000, 80]]}\n"
    )
    result = preview(ct_store.path, recipe=recipe, out=tmp_path / "out", count=1)
    assert any("lies below the window" in warning for warning in result.warnings)
    assert any("nearly flat" in warning for warning in result.warnings)
    assert [line for line in result.lines() if line.startswith("warning: row ")]


def test_the_command_line(phantom_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preview", str(phantom_store.path), "--out", str(tmp_path / "out"), "--count", "1", "--json"]
    assert cli.run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == [str(tmp_path / "out" / "images.png")]
    assert cli.run(arguments) == 73
