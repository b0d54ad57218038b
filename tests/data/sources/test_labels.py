import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data.sources.labels import class_folders, encode_labels, encode_meta, read_labels, read_split_file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "with, comma.png", "sub/c.png", unicodedata.normalize("NFD", "é.png")):
        (folder / name).write_bytes(b"x")
    (tmp_path / "elsewhere.png").write_bytes(b"x")
    return folder


def table(source: Path, text: str | bytes, **options: object):
    path = source.parent / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path, source, **options)


def test_prefixed_columns(source: Path) -> None:
    read = table(source, "file,patient,split,label:finding,meta:age\na.png,P1,Train,x,33\nsub/c.png, P2 ,,, 4\n")
    assert (read.labels, read.meta) == (("finding",), ("age",))
    assert (read.rows["a.png"].patient, read.rows["a.png"].split, read.rows["a.png"].values) == (
        "P1",
        "train",
        ("x", "33"),
    )
    assert (read.rows["sub/c.png"].patient, read.rows["sub/c.png"].split) == ("P2", "")
    assert read.rows["sub/c.png"].values == ("", "4")
    assert read.warnings == []


def test_bom_crlf_quotes_blank_lines_and_unicode(source: Path) -> None:
    text = '﻿file,patient,label:größe\r\n"with, comma.png",P1,"a ""b"", c"\r\n\r\né.png,P2,ü\r\n'
    read = table(source, text)
    assert read.labels == ("größe",)
    assert read.rows["with, comma.png"].values == ('a "b", c',)
    assert read.rows[unicodedata.normalize("NFC", "é.png")].patient == "P2"  # the disk has the other form


@pytest.mark.parametrize("name", ["a.png", "images/a.png", "./sub/../a.png", "images\\a.png"])
def test_paths_are_relative_to_the_source_or_to_the_csv(source: Path, name: str) -> None:
    assert list(table(source, f"file,patient\n{name},P\n").rows) == ["a.png"]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "sub/../../../../../etc/hostname"])
def test_paths_that_lead_out_are_refused(source: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"line 2: .* leads out of"):
        table(source, f"file,patient\n{name},P\n")


def test_rows_of_files_beside_the_source_are_counted_not_read(source: Path) -> None:
    read = table(source, "file,patient\na.png,P\nelsewhere.png,P\n")
    assert list(read.rows) == ["a.png"]
    assert read.warnings == [f"1 rows of labels.csv name files outside {source}: not read"]


def test_label_columns_by_name_and_unused_ones_are_said(source: Path) -> None:
    read = table(source, "file,patient,label,subtype,site\na.png,P,n,x,1\n", label_columns=["label", "subtype"])
    assert read.labels == ("label", "subtype")
    assert read.warnings == ["columns of labels.csv that were not used: 'site' (labels: --label-columns NAME,NAME)"]
    with pytest.raises(UsageError, match=r"no label column 'lable'; it has 'label', 'site', 'subtype'"):
        table(source, "file,patient,label,subtype,site\na.png,P,n,x,1\n", label_columns=["lable"])
    with pytest.raises(UsageError, match="no label column 'patient'"):
        table(source, "file,patient,label\na.png,P,n\n", label_columns=["patient"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("name,patient\na.png,P\n", "no column 'file'"),
        ("file,label\na.png,x\n", "no column 'patient'.*--patient REGEX"),
        ("file;patient\na.png;P\n", "separates its columns with ';'"),
        ("file\tpatient\na.png\tP\n", r"separates its columns with '\\t'"),
        ("file,patient,x,x\na.png,P,1,2\n", "column 'x' more than once"),
        ("file,patient\na.png,P,3\n", "line 2: 3 cells, but 2 columns"),
        ("file,patient\na.png,P\nb.png\n", "line 3: 1 cells"),
        ("file,patient\na.png,\n", "line 2: the patient of 'a.png' is blank"),
        ("file,patient\n,P\n", "line 2: the file is blank"),
        ("file,patient,split\na.png,P,valid\n", "line 2: split 'valid' is none of train, val, test, unlabelled"),
        ("file,patient,label:\na.png,P,x\n", "needs a name"),
        ("file,patient,label:x,label: x\na.png,P,x,x\n", "needs a name of its own"),
        ("file,patient,label:x\na.png,P,1\na.png,P,2\n", "lines 2 and 3 say different things of 'a.png'"),
        ("file,patient\na.png,P\nimages/a.png,Q\n", "lines 2 and 3 say different things"),
        ("file,patient\n0.png,P\n1.png,P\na.png,P\n2,P\n3,P\n", "names 4 files .*: '0.png', '1.png', '2' and 1 more"),
        ('file,patient\n"a.png,P\n', "is not a CSV"),
        ("file,patient\na\0.png,P\n", "NUL"),
        (b"file,patient\na.png,M\xfcller\n", "is not UTF-8"),
        ("file,patient\na.png,P\n".encode("utf-16"), "is not UTF-8"),
    ],
)  # fmt: skip
def test_bad_tables_say_what_is_wrong(source: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        table(source, text)
    assert len(str(caught.value).splitlines()) <= 6


def test_a_missing_csv_is_a_missing_input(source: Path) -> None:
    with pytest.raises(MissingInputError):
        read_labels(source / "none.csv", source)


def test_repeated_rows_that_agree_count_once(source: Path) -> None:
    read = table(source, "file,patient\na.png,P\na.png,P\n")
    assert len(read.rows) == 1
    assert read.warnings == ["1 rows of labels.csv repeat another row"]


def test_without_need_of_a_patient(source: Path) -> None:
    assert table(source, "file,label:x\na.png,1\n", need_patient=False).rows["a.png"].patient == ""


def test_text_is_a_class() -> None:
    column, numbers = encode_labels("finding", ["pneumonia", "", "normal", "pneumonia"])
    assert (column.kind, column.classes) == ("class", ("normal", "pneumonia"))
    assert numbers.tolist() == [1, -1, 0, 1]
    assert numbers.dtype == np.int16


@pytest.mark.parametrize("values", [["0", "1", "", "1"], ["0.0", "1.0", "", "1"]])
def test_zero_and_one_is_binary(values: list[str]) -> None:
    column, numbers = encode_labels("effusion", values)
    assert (column.kind, column.classes) == ("binary", ("0", "1"))
    assert numbers.tolist() == [0, 1, -1, 1]


def test_only_ones_stay_the_second_class() -> None:
    column, numbers = encode_labels("effusion", ["1", "1"])
    assert column.classes == ("0", "1")
    assert numbers.tolist() == [1, 1]


def test_whole_numbers_are_sorted_as_numbers() -> None:
    column, numbers = encode_labels("grade", ["10", "2.0", "2", "-1", ""])
    assert column.classes == ("-1", "2", "10")
    assert numbers.tolist() == [2, 1, 1, 0, -1]


def test_too_many_classes() -> None:
    with pytest.raises(DataError, match="40000 different values"):
        encode_labels("id", [str(number) for number in range(40_000)])


def test_meta_numbers_categories_and_identifiers() -> None:
    column, numbers = encode_meta("age", ["3.5", "", "-1"])
    assert column.kind == "number"
    np.testing.assert_array_equal(numbers, [3.5, np.nan, -1])
    column, numbers = encode_meta("view", ["PA", "", "AP"])
    assert (column.categories, numbers.tolist()) == (("AP", "PA"), [1, -1, 0])
    with pytest.raises(DataError, match="looks like an identifier"):
        encode_meta("name", [f"person {number}" for number in range(1001)])


def test_split_file_by_file_and_by_patient(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text("file,split\n./a/b.png,TEST\nc.png,train\n")
    assert read_split_file(path) == ("file", {"a/b.png": "test", "c.png": "train"})
    path.write_text("patient,split\nP1,val\nP1,val\n")
    assert read_split_file(path) == ("patient", {"P1": "val"})
    path.write_text("patient,split\nP1,val\nP1,test\n")
    with pytest.raises(DataError, match="line 3: patient 'P1' is in val and in test"):
        read_split_file(path)
    path.write_text("who,split\nP1,val\n")
    with pytest.raises(DataError, match="needs the columns"):
        read_split_file(path)


def test_class_folders() -> None:
    assert class_folders(["x/a/1.png", "x/a/2.png", "b/1.png", "b/2.png", "top.png"]) == ["a", "a", "b", "b", ""]
    assert class_folders(["a/1.png", "a/2.png"]) is None  # one folder
    assert class_folders(["train/1.png", "train/2.png", "test/1.png", "Val/2.png"]) is None
    assert class_folders([f"p{n}/1.png" for n in range(10)]) is None  # rather patients than classes
    assert class_folders([f"{n % 101}/{n}.png" for n in range(404)]) is None  # more than 100


def test_a_folder_stands_for_all_that_is_below_it(source: Path) -> None:
    read = table(source, "file,patient,label:x\nsub,P1,whole\nsub/c.png,P1,own\na.png,P2,other\n")
    assert list(read.rows) == ["sub", "sub/c.png", "a.png"]
    found = {name: row.values for name in ("sub/c.png", "sub/d/e.dcm", "a.png") if (row := read.row(name))}
    assert found == {"sub/c.png": ("own",), "sub/d/e.dcm": ("whole",), "a.png": ("other",)}
    assert read.row("b.png") is None
    whole = table(source, "file,patient,label:x\n.,P1,all\nb.png,P2,one\n").row("sub/c.png")
    assert whole is not None
    assert whole.values == ("all",)


def test_names_in_the_place_of_files(source: Path) -> None:
    names = {"a.png", "gone/d.png", unicodedata.normalize("NFC", "é.png")}
    text = f"file,label:x\ngone/d.png,1\nimages/a.png,2\n{unicodedata.normalize('NFD', 'é.png')},3\ngone,4\nb.png,5\n"
    read = table(source, text, need_patient=False, names=names)
    assert list(read.rows) == ["gone/d.png", "a.png", unicodedata.normalize("NFC", "é.png"), "gone"]
    assert read.absent == ["b.png"]  # it is on the disk, but was not named
    with pytest.raises(DataError, match="leads out of"):
        table(source, "file,label:x\n../../x,1\n", need_patient=False, names=names)
