from pathlib import Path

import pytest

from sslmed.data.annotations.matching import Finder, files_below


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", "a.jpg"),
        ("a.jpg", "a.jpg"),
        ("a.jpg.png", "a.jpg"),
        ("a_mask.png", "a.jpg"),
        ("a-Mask.PNG", "a.jpg"),
        ("a_seg.nii.gz", "a.jpg"),
        ("a_labels.tif", "a.jpg"),
        ("p1/b_mask.png", "images/p1/b.png"),
        ("masks/p1/b.png", "images/p1/b.png"),
        ("case_3.nii.gz", "case_3_0000.nii.gz"),
        ("s/seg.nii.gz", "s/image.nii.gz"),
        ("only.png", "deep/down/only.tiff"),
        ("somewhere/a.png", "a.jpg"),
        ("1.2.840.png", "1.2.840.dcm"),
    ],
)
def test_names_that_mean_an_image(name: str, image: str) -> None:
    images = [
        "a.jpg",
        "images/p1/b.png",
        "images/p2/b.png",
        "case_3_0000.nii.gz",
        "s/image.nii.gz",
        "deep/down/only.tiff",
        "1.2.840.dcm",
    ]
    assert Finder(images).find(name) == [image]


def test_another_patients_image_of_the_same_name_is_not_meant() -> None:
    assert Finder(["p1/1.png"]).find("p2/1.png") == []
    assert Finder(["p1/1.png", "p2/1.png"]).find("1.png") == ["p1/1.png", "p2/1.png"]
    assert Finder(["p1/1.png", "p2/1.png"]).find("p2/1_mask.png") == ["p2/1.png"]
    assert Finder(["a.png"]).find("ab.png") == []
    assert Finder(["a.png", "a.jpg"]).find("a.jpg") == ["a.jpg"]
    assert Finder(["a.png", "a.jpg"]).find("a.tif") == ["a.png", "a.jpg"]


def test_files_below_leave_out_what_is_hidden_and_links_that_lead_out(tmp_path: Path) -> None:
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("masks/b.png", "masks/sub/a.png", "masks/.hidden.png", "outside/secret.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "masks" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tmp_path / "masks" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "masks" / "inside.png").symlink_to(tmp_path / "masks" / "b.png")
    found, outside = files_below(tmp_path / "masks")
    assert [name for name, _ in found] == ["b.png", "inside.png", "sub/a.png"]
    assert outside == ["folder", "link.png"]
