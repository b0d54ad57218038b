import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sslmed import durable
from sslmed.config import DiskError
from sslmed.durable import sha256, write_atomically, write_json


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def write_then(error: BaseException, path: Path) -> None:
    with write_atomically(path) as partial:
        partial.write_text("half of what was m")
        raise error


def test_it_writes_beside_the_target_and_renames(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path) as partial:
        assert partial.parent == path.parent
        assert partial.name.startswith(".")  # readers of the folder skip hidden files
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_it_syncs_content_then_renames_then_syncs_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the content would leave an empty file after a power cut."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with write_atomically(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=os.strerror)
def test_a_full_disk_leaves_the_old_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail_with(number))
    with pytest.raises(DiskError, match=os.strerror(number)) as caught, write_atomically(path) as partial:
        partial.write_text("new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(DiskError, match="No space left"):
        write_then(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("oops"), KeyboardInterrupt(), OSError(errno.EBADF, "bad")], ids=repr)
def test_any_other_failure_stays_what_it_is_and_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        write_then(error, path)
    assert caught.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path) as first:
        with write_atomically(path) as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_json_is_sorted_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [True, None]})
    assert path.read_text() == json.dumps({"a": [True, None], "b": 1}, indent=2) + "\n"
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["b"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # longer than a read buffer
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert durable.PARTIAL == ".partial"  # .gitignore and the sweep of orphans know it
