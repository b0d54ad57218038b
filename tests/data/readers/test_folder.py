import os
from pathlib import Path

import pytest

from sslmed.config import DataError, MissingInputError
from sslmed.data.readers import Listing, find, listing


def touch(top: Path, *names: str) -> None:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()


def named(found: Listing, top: Path) -> list[list[str]]:
    return [[path.relative_to(top).as_posix() for path in paths] for paths in (found.images, found.others)]


def test_find_is_sorted_skips_hidden_files_and_survives_a_link_to_the_top(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "a/1.jpg", "a/notes.txt", ".hidden/3.png", "a/.4.png", "c.tif")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    found = listing(tmp_path)
    assert named(found, tmp_path) == [["a/1.jpg", "b/2.PNG", "c.tif"], ["a/notes.txt"]]
    assert found.outside == []
    assert find(tmp_path / "c.tif") == [tmp_path / "c.tif"]
    assert find(tmp_path / "a" / "notes.txt") == []


def test_suffixes_of_two_parts(tmp_path: Path) -> None:
    names = ["a.NII.gz", "b.nii", "c.npy", "d.npz", "e.1.2.nii.gz", "f.dcm"]
    touch(tmp_path, *names, "g.gz", "h.nii.zip", "nii.gz", "i.tar.gz")
    assert named(listing(tmp_path), tmp_path) == [names, ["g.gz", "h.nii.zip", "i.tar.gz", "nii.gz"]]


def test_links_that_leave_the_source_are_listed_and_not_followed(tmp_path: Path) -> None:
    top, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    touch(top, "a/1.png", "z.png")
    touch(elsewhere, "secret.png", "more/2.png")
    touch(tmp_path, "source-2/3.png")  # its path begins with that of the source
    (top / "a" / "file.png").symlink_to(elsewhere / "secret.png")
    (top / "a" / "folder").symlink_to(elsewhere)
    (top / "back").symlink_to("../source-2")
    (top / "gone.png").symlink_to(tmp_path / "nothing.png")
    (top / "chain.png").symlink_to("a/file.png")  # through a link within
    (top / "inside.png").symlink_to("a/1.png")
    (top / "b").symlink_to("a")
    (top / "lost.png").symlink_to("a/nothing.png")
    found = listing(top)
    # a and b are one folder, which is listed once
    assert named(found, top) == [["a/1.png", "inside.png", "z.png"], ["lost.png"]]
    outside = [path.relative_to(top).as_posix() for path in found.outside]
    assert outside == ["a/file.png", "a/folder", "back", "chain.png", "gone.png"]


def test_the_source_itself_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path, "real/a/1.png")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real" / "a" / "1.png")
    found = listing(tmp_path / "link")
    assert found.images == [tmp_path / "link" / "a" / "1.png"]
    assert (found.others, found.outside) == ([tmp_path / "link" / "again"], [])
    (tmp_path / "one.png").symlink_to("real/a/1.png")
    assert find(tmp_path / "one.png") == [tmp_path / "one.png"]


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "IM0001")  # without a suffix, where the content would be asked
    found = listing(tmp_path)
    assert named(found, tmp_path) == [[], ["IM0001", "a.png"]]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="absent"):
        find(tmp_path / "absent")


def test_a_folder_that_cannot_be_read_is_no_silent_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("a"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="a cannot be read: Permission denied"):
        find(tmp_path)
