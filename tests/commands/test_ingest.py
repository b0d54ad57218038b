import csv
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sslmed.commands.ingest import IngestResult, ingest
from sslmed.config import DataError, MissingInputError, OutputExistsError, UsageError
from sslmed.data.identity import load_or_make_key
from sslmed.data.phantoms import write_phantoms
from sslmed.data.store import Store
from sslmed.data.writers import write_image

REAL = Path(__file__).parents[3] / "shared" / "data" / "xray_pneumonia"


def picture(number: int, shape: tuple[int, ...] = (24, 20), dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, np.iinfo(dtype).max, shape, dtype)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve patients with two images each."""
    folder = tmp_path / "raw"
    (folder / "images").mkdir(parents=True)
    for number in range(24):
        write_image(folder / "images" / f"secret{number // 2:02d}_{number % 2}.png", picture(number))
    return folder


def write_csv(source: Path, header: str = "file,patient,label:finding", rows: list[str] | None = None) -> Path:
    if rows is None:
        names = sorted(path.name for path in (source / "images").iterdir())
        rows = [f"images/{name},{name[:8]},{'ab'[int(name[6:8]) % 2]}" for name in names]
    path = source / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def columns(path: Path) -> dict[str, list[object]]:
    index = Store(path).index
    return {name: getattr(index, name).tolist() for name in index.__dataclass_fields__}


def test_phantoms_become_a_store_and_broken_files_are_listed(tmp_path: Path) -> None:
    phantoms = write_phantoms(tmp_path / "raw", patients=12)
    result = ingest(phantoms.folder, tmp_path / "store", modality="xray", labels=phantoms.labels)
    assert (result.images, result.patients) == (phantoms.images, phantoms.patients)
    assert sorted(skipped.file for skipped in result.skipped) == sorted(phantoms.broken)
    assert all(skipped.reason and str(tmp_path) not in skipped.reason for skipped in result.skipped)
    store = Store(tmp_path / "store")
    assert len(store) == phantoms.images
    assert store.classes("finding") == ("clear", "nodule")
    assert {"uint8", "uint16"} == {name.decode() for name in np.unique(store.index.dtype)}
    assert store.verify() == []
    sides = {patient: set() for patient in store.index.patient.tolist()}
    for patient, side in zip(store.index.patient.tolist(), store.index.split.tolist(), strict=True):
        sides[patient].add(side)
    assert all(len(side) == 1 for side in sides.values())


def test_pixels_ranges_and_key_table_belong_together(source: Path, tmp_path: Path) -> None:
    write_image(source / "images" / "secret00_0.png", picture(99, (30, 40), np.uint16) // 16)  # 12 bit in 16
    result = ingest(source, tmp_path / "store", modality="xray", labels=write_csv(source))
    store = Store(result.path)
    with (result.private / "key_table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["file"] for row in table] == sorted(row["file"] for row in table)
    np.testing.assert_array_equal(store.pixels(0), picture(99, (30, 40), np.uint16) // 16)
    np.testing.assert_array_equal(store.pixels(5), picture(5))
    low, high = np.percentile(store.pixels(0), (0.5, 99.5))
    assert store.intensity(0)[:2] == pytest.approx((low, high))
    key = load_or_make_key(result.key)
    for row in table:
        assert store.index.patient[int(row["sample"])].decode() == row["patient_key"] == key.patient(row["patient"])
    assert store.key_id == key.id


def test_nothing_inside_the_store_says_who(source: Path, tmp_path: Path) -> None:
    result = ingest(source, tmp_path / "store", modality="xray", labels=write_csv(source))
    for path in result.path.iterdir():
        content = path.read_bytes()
        assert b"secret" not in content, path
        assert str(source).encode() not in content, path
        assert b"labels.csv" not in content, path
    assert {path.name for path in result.path.iterdir()} == {"store.json", "index.h5", "labels-1.h5", "shard-00000.h5"}
    assert stat.S_IMODE(result.private.stat().st_mode) == 0o700
    for name in ("data_report.json", "key_table.csv"):
        assert stat.S_IMODE((result.private / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(result.key.stat().st_mode) == 0o600


def test_workers_make_the_same_store(source: Path, tmp_path: Path) -> None:
    (source / "images" / "secret03_1.png").write_bytes(b"no picture")
    labels = write_csv(source)
    alone = ingest(source, tmp_path / "alone", modality="xray", labels=labels, size=16)
    helped = ingest(source, tmp_path / "helped", modality="xray", labels=labels, size=16, workers=2)
    assert columns(alone.path) == columns(helped.path)
    assert Store(alone.path).fingerprint == Store(helped.path).fingerprint
    assert alone.skipped == helped.skipped


def test_one_site_key_for_all_stores_and_it_is_said_when_made(source: Path, tmp_path: Path) -> None:
    first = ingest(source, tmp_path / "one", modality="xray", patient=r"(secret\d+)_")
    second = ingest(source, tmp_path / "two", modality="xray", patient=r"(secret\d+)_")
    other = ingest(source, tmp_path / "three", modality="xray", patient=r"(secret\d+)_", key=tmp_path / "other.key")
    assert any("made the site key" in note for note in first.notes)
    assert not any("made the site key" in note for note in second.notes)
    assert Store(first.path).index.patient.tolist() == Store(second.path).index.patient.tolist()
    assert not set(Store(first.path).index.patient.tolist()) & set(Store(other.path).index.patient.tolist())


def test_patients_by_regular_expression(source: Path, tmp_path: Path) -> None:
    (source / "images" / "stray.png").write_bytes((source / "images" / "secret00_0.png").read_bytes())
    result = ingest(source, tmp_path / "store", modality="xray", patient=r"secret\d+")
    assert result.patients == 12
    assert [skipped.file for skipped in result.skipped] == ["images/stray.png"]
    assert "finds none" in result.skipped[0].reason
    with pytest.raises(DataError, match="none of the 25 images"):
        ingest(source, tmp_path / "s2", modality="xray", patient="nobody")
    with pytest.raises(UsageError, match="no regular expression"):
        ingest(source, tmp_path / "s3", modality="xray", patient="(")


def test_without_patients_it_warns(source: Path, tmp_path: Path) -> None:
    result = ingest(source, tmp_path / "store", modality="xray")
    assert result.patients == 24
    assert any("patient of its own" in warning for warning in result.warnings)
    assert result.labels == {}


def test_class_folders_are_labels_and_said(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "raw" / ("sick" if number % 2 else "well")
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{number}.png", picture(number))
    result = ingest(tmp_path / "raw", tmp_path / "store", modality="xray")
    assert result.labels == {"class": {"sick": 6, "well": 6}}
    assert any("2 folder names (sick, well) are taken as the label 'class'" in note for note in result.warnings)
    assert Store(result.path).target("class").tolist() == [0] * 6 + [1] * 6


def test_folders_of_patients_are_no_classes(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "raw" / f"patient{number // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{number}.png", picture(number))
    assert ingest(tmp_path / "raw", tmp_path / "store", modality="xray", patient=r"patient\d").labels == {}


def test_files_that_the_csv_does_not_name(source: Path, tmp_path: Path) -> None:
    labels = write_csv(source, rows=[f"images/secret{n:02d}_0.png,secret{n:02d},{'ab'[n % 2]}" for n in range(12)])
    result = ingest(source, tmp_path / "store", modality="xray", labels=labels)
    assert (result.images, len(result.skipped)) == (12, 12)
    assert "not in the labels CSV" in result.skipped[0].reason
    result = ingest(source, tmp_path / "all", modality="xray", labels=labels, patient=r"secret\d+")
    assert (result.images, result.patients, result.skipped) == (24, 12, ())
    assert result.labels["finding"] == {"a": 6, "b": 6, "(blank)": 12}


def test_multilabel_meta_and_blank_cells(source: Path, tmp_path: Path) -> None:
    rows = [f"images/secret{n:02d}_0.png,p{n},{n % 2},{'' if n == 3 else 1 - n % 2},{n},v{n % 3}" for n in range(12)]
    labels = write_csv(source, "file,patient,label:effusion,label:mass,meta:age,meta:view", rows)
    store = Store(ingest(source, tmp_path / "store", modality="xray", labels=labels).path)
    assert [column.kind for column in store.labels.values()] == ["binary", "binary"]
    assert store.target("mass").tolist() == [1, 0, 1, -1, 1, 0, 1, 0, 1, 0, 1, 0]
    assert store.meta("age").tolist() == list(range(12))
    assert store.meta_columns["view"].categories == ("v0", "v1", "v2")


def test_label_columns_without_prefix(source: Path, tmp_path: Path) -> None:
    labels = write_csv(source, "file,patient,finding")
    result = ingest(source, tmp_path / "store", modality="xray", labels=labels, label_columns=["finding"])
    assert result.labels == {"finding": {"a": 12, "b": 12}}
    unnamed = ingest(source, tmp_path / "unnamed", modality="xray", labels=labels)
    assert any("no label column" in warning for warning in unnamed.warnings)
    with pytest.raises(UsageError, match="--labels"):
        ingest(source, tmp_path / "s2", modality="xray", label_columns=["finding"])


def split_of(result: IngestResult) -> list[int]:
    return Store(result.path).index.split.tolist()


def test_split_column_and_split_files(source: Path, tmp_path: Path) -> None:
    sides = ["train", "val", "test", ""]
    names = sorted(path.name for path in (source / "images").iterdir())
    rows = [f"images/{name},{name[:8]},{sides[int(name[6:8]) % 4]}" for name in names]
    by_column = ingest(source, tmp_path / "a", modality="xray", labels=write_csv(source, "file,patient,split", rows))
    assert split_of(by_column) == [number // 2 % 4 for number in range(24)]
    assert "6 images without a split are unlabelled" in by_column.warnings
    split = tmp_path / "split.csv"
    split.write_text("file,split\n" + "\n".join(f"images/{name},{sides[int(name[6:8]) % 3]}" for name in names))
    by_file = ingest(source, tmp_path / "b", modality="xray", patient=r"secret\d+", split=split)
    assert split_of(by_file) == [number // 2 % 3 for number in range(24)]
    split.write_text("patient,split\nsecret00,test\nsecret01,val\nsomebody,train\n")
    by_patient = ingest(source, tmp_path / "c", modality="xray", patient=r"secret\d+", split=split)
    assert split_of(by_patient) == [2, 2, 1, 1] + [3] * 20
    assert "1 patients of split.csv were not ingested" in by_patient.warnings
    split.write_text("patient,split\nsomebody,test\n")
    with pytest.raises(DataError, match="names none of the patients"):
        ingest(source, tmp_path / "d", modality="xray", patient=r"secret\d+", split=split)


def test_an_unnamed_image_follows_its_patient(source: Path, tmp_path: Path) -> None:
    labels = write_csv(source, "file,patient,split", ["images/secret04_0.png,SECRET04,test"])
    result = ingest(source, tmp_path / "store", modality="xray", labels=labels, patient=r"secret\d+")
    assert split_of(result) == [3] * 8 + [2, 2] + [3] * 14


def test_leakage_is_refused_and_leaves_no_store(source: Path, tmp_path: Path) -> None:
    rows = ["images/secret00_0.png,p0,train", "images/secret00_1.png, P0 ,test"]
    with pytest.raises(DataError, match=r"1 patient on two sides.*(?s:.*)secret00_0\.png \(train\)"):
        ingest(source, tmp_path / "a", modality="xray", labels=write_csv(source, "file,patient,split", rows))
    (source / "images" / "secret01_0.png").write_bytes((source / "images" / "secret00_0.png").read_bytes())
    rows = ["images/secret00_0.png,p0,train", "images/secret01_0.png,p1,test"]
    with pytest.raises(DataError, match="1 identical image on two sides"):
        ingest(source, tmp_path / "a", modality="xray", labels=write_csv(source, "file,patient,split", rows))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial", "a.private", "raw", "site.key"]
    assert [path.name for path in (tmp_path / "a.private").iterdir()] == ["progress"]
    with pytest.raises(DataError) as caught:
        ingest(source, tmp_path / "a", modality="xray", labels=write_csv(source, "file,patient,split", rows))
    assert "What was read is kept" in str(caught.value).splitlines()[-1]
    assert str(tmp_path / ".a.partial") in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


def test_identical_images_are_counted(source: Path, tmp_path: Path) -> None:
    (source / "images" / "secret01_0.png").write_bytes((source / "images" / "secret00_0.png").read_bytes())
    result = ingest(source, tmp_path / "store", modality="xray", patient=r"secret\d+")
    assert any(warning.startswith("1 scans are identical") for warning in result.warnings)
    assert split_of(result)[0] == split_of(result)[2]


def test_size_shrinks_and_keeps_the_depth(source: Path, tmp_path: Path) -> None:
    write_image(source / "images" / "big.png", picture(50, (100, 60), np.uint16))
    store = Store(ingest(source, tmp_path / "store", modality="xray", size=22).path)
    assert store.pixels(0).shape == (37, 22)
    assert store.pixels(0).dtype == np.uint16
    np.testing.assert_array_equal(store.pixels(1), picture(0))  # its shorter side is 20 already


def test_colour_is_refused_in_xrays_and_kept_in_photos(source: Path, tmp_path: Path) -> None:
    write_image(source / "images" / "colour.png", picture(50, (20, 20, 3)))
    xray = ingest(source, tmp_path / "xray", modality="xray")
    assert [skipped.file for skipped in xray.skipped] == ["images/colour.png"]
    assert "is in colour" in xray.skipped[0].reason
    photo = ingest(source, tmp_path / "photo", modality="photo")
    np.testing.assert_array_equal(Store(photo.path).pixels(0), picture(50, (20, 20, 3)))


def test_one_file_is_a_source(source: Path, tmp_path: Path) -> None:
    result = ingest(source / "images" / "secret00_0.png", tmp_path / "store", modality="xray")
    assert result.images == 1


def test_the_report_lists_every_file_and_why(source: Path, tmp_path: Path) -> None:
    (source / "notes.txt").write_text("hello")
    (source / "images" / "broken.png").write_bytes(b"")
    result = ingest(source, tmp_path / "store", modality="xray", patient=r"secret\d+|broken")
    report = json.loads((result.private / "data_report.json").read_text())
    assert {each["file"]: each["reason"] for each in report["skipped"]}.keys() == {"images/broken.png", "notes.txt"}
    assert report["images"] == 24
    assert report["source"] == str(source)
    assert json.loads(json.dumps(result.as_dict()))["next"] == result.next
    assert f"--data {tmp_path / 'store'}" in result.next
    text = "\n".join(result.lines())
    assert "images/broken.png: is empty" in text


BAD = {
    "a store among the images": (2, lambda source: {"out": source / "store"}),
    "no source": (66, lambda source: {"source": source / "absent"}),
    "no source, with labels": (66, lambda source: {"source": source / "absent", "labels": write_csv(source)}),
    "empty folder": (65, lambda source: {"source": (source / "empty", (source / "empty").mkdir())[0]}),
    "no CSV": (66, lambda source: {"labels": source / "absent.csv"}),
    "no split file": (66, lambda source: {"split": source / "absent.csv"}),
    "absent files": (65, lambda source: {"labels": write_csv(source, rows=["images/absent.png,p,x"])}),
    "no patients": (65, lambda source: {"labels": write_csv(source, "file,label:x", ["images/secret00_0.png,x"])}),
    "bad modality": (2, lambda _: {"modality": "xry"}),
    "bad size": (2, lambda _: {"size": 3}),
    "bad workers": (2, lambda _: {"workers": -1}),
    "bad key": (65, lambda source: {"key": write_csv(source)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_its_code_and_a_short_message(source: Path, tmp_path: Path, name: str) -> None:
    code, change = BAD[name]
    options = {"source": source, "modality": "xray", "out": tmp_path / "store"} | change(source)
    with pytest.raises((UsageError, MissingInputError, DataError)) as caught:
        ingest(**options)
    assert caught.value.exit_code == code
    assert len(str(caught.value).splitlines()) <= 6
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store.private").exists()


def test_all_bad_says_the_first_reasons(source: Path, tmp_path: Path) -> None:
    for path in (source / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"none of the 24 images") as caught:
        ingest(source, tmp_path / "store", modality="xray")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[1].strip().startswith("images/secret00_0.png: ")
    assert lines[4].strip() == "and 21 more"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "site.key"]


def test_an_existing_output_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(OutputExistsError, match="exists"):
        ingest(source, tmp_path / "store", modality="xray")
    assert not (tmp_path / "site.key").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_no_store_and_no_process(source: Path, tmp_path: Path, workers: int) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal
        from sslmed.commands import ingest as module
        def interrupting(items, total, label):
            for number, item in enumerate(items):
                yield item
                if number == 10:
                    os.killpg(os.getpid(), signal.SIGINT)
        module.progress = interrupting
        if __name__ == "__main__":
            module.ingest({str(source)!r}, {str(tmp_path / "store")!r}, modality="xray", workers={workers})
        """)
    )
    ended = subprocess.run(
        [sys.executable, script], start_new_session=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stderr.count("KeyboardInterrupt") == 1, ended.stderr
    assert ended.returncode != 0
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".store.partial-*"))


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_names_that_are_no_text_survive(source: Path, tmp_path: Path) -> None:
    name = os.fsencode(source / "images") + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes((source / "images" / "secret00_0.png").read_bytes())
    Path(os.fsdecode(name + b".txt")).write_bytes(b"")
    result = ingest(source, tmp_path / "store", modality="xray")
    assert result.images == 25
    assert b"caf\xe9.png" in (result.private / "key_table.csv").read_bytes()
    json.loads((result.private / "data_report.json").read_text())


@pytest.mark.real
def test_real_radiographs(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    result = ingest(
        REAL,
        tmp_path / "store",
        modality="xray",
        labels=REAL / "labels.csv",
        label_columns=("label", "subtype"),
        workers=2,
    )
    assert (result.images, result.patients) == (4737, 2743)
    assert result.labels["label"] == {"normal": 1340, "pneumonia": 3397}
    assert [skipped.file for skipped in result.skipped] == ["SOURCE.md"]
    share = {name: count["patients"] / 2743 for name, count in result.splits.items()}
    assert share == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.005)
    store = Store(result.path)
    test = store.target("label")[store.rows("test")]
    assert test.mean() == pytest.approx(3397 / 4737, abs=0.05)
