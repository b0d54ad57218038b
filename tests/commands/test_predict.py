import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sslmed.commands.finetune import FinetuneResult
from sslmed.commands.predict import predict
from sslmed.commands.pretrain import PretrainResult
from sslmed.config import DataError, MissingInputError, OutputExistsError
from sslmed.data.readers import find, read
from sslmed.data.writers import write_image
from sslmed.evaluation import predictions
from sslmed.supervised import applying
from sslmed.supervised.model import load

Table = list[dict[str, str]]


def table(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def predicted(tuned: FinetuneResult, phantom_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions of every phantom. Read it, never change it."""
    out = tmp_path_factory.mktemp("predicted") / "new" / "out"
    predict(tuned.run, phantom_images, out)
    return out / "predictions.csv"


def test_the_table(predicted: Path, tuned: FinetuneResult, phantom_images: Path) -> None:
    rows = table(predicted)
    probabilities = ["probability:clear", "probability:nodule"]
    assert list(rows[0]) == ["file", "part", "images", "predicted", *probabilities, "unlikeness", "unusual"]
    assert {(row["part"], row["images"]) for row in rows} == {("", "1")}
    readable = [path for path in find(phantom_images) if "broken" not in path.name]
    assert [row["file"] for row in rows] == [path.relative_to(phantom_images).as_posix() for path in readable]
    assert len(rows) > applying.BATCH  # several batches
    cut = load(tuned.run).about.thresholds
    assert cut is not None
    for row in rows:
        clear, nodule = float(row["probability:clear"]), float(row["probability:nodule"])
        assert clear + nodule == pytest.approx(1, abs=2e-6)
        if abs(nodule - cut[1]) > 1e-5:  # the table has six digits
            assert row["predicted"] == ("nodule" if nodule >= cut[1] else "clear")
    assert [path.name for path in predicted.parent.iterdir()] == ["predictions.csv"]


def test_files_are_seen_as_the_store_shows_them(predicted: Path, tuned: FinetuneResult, phantom_images: Path) -> None:
    """A file goes through readers, range and letterbox by itself, and must end with the score that its row had."""
    with (phantom_images.parent / "store.private" / "key_table.csv").open(newline="") as file:
        row_of = {line["file"]: int(line["sample"]) for line in csv.DictReader(file)}
    kept = predictions.read(Path(tuned.run))
    score = {int(row): scores[1] for row, scores in zip(kept.row, kept.scores, strict=True)}
    compared = 0
    for line in table(predicted):
        if row_of[line["file"]] in score:
            compared += 1
            assert float(line["probability:nodule"]) == pytest.approx(score[row_of[line["file"]]], abs=2e-5)
    assert compared == len(score)


def test_unreadable_files_are_skipped_and_listed(tuned: FinetuneResult, phantom_images: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    good = [path for path in find(phantom_images / "images") if "broken" not in path.name][:3]
    for path in (*good, *(phantom_images / "images").glob("broken*")):
        shutil.copy(path, source)
    write_image(source / "colour.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    result = predict(tuned.artifact, source, tmp_path / "out")
    assert result.images == 3
    assert [name for name, _ in result.skipped] == ["broken_text.png", "broken_truncated.png", "colour.png"]
    reasons = [reason for _, reason in result.skipped]
    assert "no PNG" in reasons[0]
    assert "truncated" in reasons[1]
    assert "in colour" in reasons[2]
    assert all(str(tmp_path) not in reason for reason in reasons)
    assert [row["file"] for row in table(Path(result.out))] == [path.name for path in good]
    assert sum(result.predicted.values()) == 3
    lines = "\n".join(result.lines())
    assert "skipped 3 files:" in lines
    assert "broken_truncated.png: " in lines
    assert result.out in result.next
    json.dumps(result.as_dict())


def test_the_last_file_may_be_the_broken_one(tuned: FinetuneResult, phantom_images: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(find(phantom_images / "images")[0], source / "a.png")
    (source / "z.png").write_bytes(b"nothing")
    assert predict(tuned.run, source, tmp_path / "out").images == 1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_size_changes_nothing(
    batch: int,
    predicted: Path,
    tuned: FinetuneResult,
    phantom_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(applying, "BATCH", batch)
    source = tmp_path / "images"
    source.mkdir()
    for path in find(phantom_images / "images")[:5]:
        shutil.copy(path, source)
    result = predict(tuned.run, tmp_path, tmp_path / "out")
    expected = {row["file"]: float(row["probability:nodule"]) for row in table(predicted)}
    for row in table(Path(result.out)):
        assert float(row["probability:nodule"]) == pytest.approx(expected[row["file"]], abs=2e-5)


def test_one_file(tuned: FinetuneResult, phantom_images: Path, predicted: Path, tmp_path: Path) -> None:
    path = find(phantom_images / "images")[0]
    result = predict(tuned.run, path, tmp_path / "out")
    (row,) = table(Path(result.out))
    expected = next(each for each in table(predicted) if each["file"] == f"images/{path.name}")
    assert row["file"] == path.name
    assert float(row["probability:nodule"]) == pytest.approx(float(expected["probability:nodule"]), abs=2e-5)
    assert result.predicted == Counter([row["predicted"]])


def test_all_unreadable(tuned: FinetuneResult, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.png", "b.png"):
        (source / name).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of the 2 files .* could be read; the first: a\.png: ") as caught:
        predict(tuned.run, source, tmp_path / "out")
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images(tuned: FinetuneResult, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no image of a format that is read here: .*\.png"):
        predict(tuned.run, tmp_path, tmp_path / "out")


def test_missing_inputs(tuned: FinetuneResult, phantom_images: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no file or folder at"):
        predict(tuned.run, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(MissingInputError, match="no run or artifact"):
        predict(tmp_path / "absent", phantom_images, tmp_path / "out")


def test_a_backbone_without_a_head(pretrained: PretrainResult, phantom_images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without a head; run `sslmed finetune`") as caught:
        predict(pretrained.run, phantom_images, tmp_path / "out")
    assert caught.value.exit_code == 65


def test_an_existing_output(tuned: FinetuneResult, phantom_images: Path, predicted: Path) -> None:
    before = predicted.read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        predict(tuned.run, phantom_images, predicted.parent)
    assert predicted.read_bytes() == before


def test_pixels_are_not_changed_on_the_way_in(phantom_images: Path) -> None:
    """What the other tests compare is worth something only if the phantoms differ in depth and size."""
    kinds = {(read(path).pixels.dtype.name, read(path).pixels.shape) for path in find(phantom_images / "images")[:20]}
    assert {name for name, _ in kinds} == {"uint8", "uint16"}
    assert len(kinds) > 4
