"""A checkpoint's file: whole or absent, checked when read, with a few earlier ones beside it."""

import errno
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from sslmed.config import DataError, DiskError
from sslmed.durable import PARTIAL
from sslmed.training.checkpoint import DurableCheckpointIO
from sslmed.training.checkpoint_files import STATE, keep, load, newest, write

CONTENT = {
    STATE: {"step": 12, "rng": torch.arange(5, dtype=torch.uint8)},
    "state_dict": OrderedDict(weight=torch.linspace(0, 1, 40), bias=torch.tensor([1.0, -2.0], dtype=torch.bfloat16)),
    "callbacks": {"Monitor": {"best": -float("inf"), "names": ["a", None, True]}},
}
TORCH_SAVE = torch.save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    write(CONTENT, path)
    return path


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


def test_what_was_saved_is_loaded(path: Path) -> None:
    assert same(load(path), CONTENT)
    assert same(DurableCheckpointIO().load_checkpoint(path), CONTENT)
    assert list(path.parent.iterdir()) == [path]


def half_written(error: BaseException | None) -> Any:
    def save(content: Any, file: Path) -> None:
        TORCH_SAVE(content, file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if error is not None:
            raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # what torch makes of it
        None,  # a disk that swallows bytes without a word
    ],
    ids=["OSError", "RuntimeError", "silent"],
)
def test_a_save_that_fails_half_way_leaves_the_earlier_checkpoint(
    error: BaseException | None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", half_written(error))
    with pytest.raises(DiskError, match="untouched") as caught:
        write({STATE: {"step": 99}}, path)
    assert str(path) in str(caught.value)
    assert same(load(path), CONTENT)
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_at_the_sync_leaves_the_earlier_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        write({STATE: {"step": 99}}, path)
    assert same(load(path), CONTENT)


def test_no_flipped_byte_goes_unnoticed(path: Path) -> None:
    """Bytes between the members are padding and change nothing; any other is found, whatever it makes torch do."""
    content = path.read_bytes()
    attributes = [match.start() + 38 for match in re.finditer(rb"PK\x01\x02", content)]  # no checksum covers these
    found = 0
    for place in [*range(0, len(content), 7), *attributes]:
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert same(load(path), CONTENT), f"byte {place} of {len(content)}"
        except DataError:
            found += 1
    assert found > 0.3 * len(content) / 7


def test_a_flipped_byte_of_a_weight_is_a_data_error(path: Path) -> None:
    content = path.read_bytes()
    weights = CONTENT["state_dict"]["weight"].numpy().tobytes()
    assert content.count(weights) == 1
    place = content.index(weights) + 21
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match="damaged; delete it to start again"):
        load(path)


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_a_data_error(share: float, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="damaged"):
        load(path)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def test_nothing_in_a_checkpoint_is_executed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({STATE: {"step": 1}, "trap": Trap()}, path)
    with pytest.raises(DataError, match="cannot be read"):
        load(path)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_another_programs_file_is_a_data_error(content: Any, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(DataError, match="not written by sslmed"):
        load(path)


def test_what_a_killed_writer_left_is_swept(path: Path) -> None:
    orphan = path.with_name(f".last.ckpt.0123abcd{PARTIAL}")
    orphan.write_bytes(b"half")
    assert newest(path, print) == (path, 12)
    assert list(path.parent.iterdir()) == [path]
    orphan.write_bytes(b"half")
    path.unlink()
    assert newest(path, print) is None
    assert list(path.parent.iterdir()) == []


# Those kept beside it.


@pytest.fixture
def three(path: Path) -> Path:
    """Steps 10 and 11 kept beside the last, 12."""
    for step in (10, 11, 12):
        write({**CONTENT, STATE: {"step": step}}, path)
        if step < 12:
            keep(path, step, 2)
    return path


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


def test_as_many_are_kept_as_asked_for_the_newest(three: Path) -> None:
    assert names(three) == ["last.ckpt", "step-00000010.ckpt", "step-00000011.ckpt"]
    keep(three, 12, 2)
    assert names(three) == ["last.ckpt", "step-00000011.ckpt", "step-00000012.ckpt"]
    keep(three, 12, 0)
    assert names(three) == ["last.ckpt"]


def test_the_last_never_disappears_while_it_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    keep(path, 12, 3)
    assert names(path) == ["last.ckpt"]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(CONTENT["state_dict"]["weight"].numpy().tobytes()) + 21] ^= 1
    path.write_bytes(content)


def test_the_newest_whole_one_is_taken_and_the_damaged_are_named(three: Path) -> None:
    damage(three)
    damage(three.with_name("step-00000011.ckpt"))
    said: list[str] = []
    found = newest(three, said.append)
    assert found == (three.with_name("step-00000010.ckpt"), 10)
    assert len(said) == 2
    for line, name in zip(said, ("last.ckpt", "step-00000011.ckpt"), strict=True):
        assert f"{name} is damaged" in line
        assert "going on from step-00000010.ckpt, step 10" in line
    assert names(three) == ["last.ckpt.damaged", "step-00000010.ckpt", "step-00000011.ckpt.damaged"]
    assert newest(three, said.append) == found
    assert len(said) == 2


def test_when_all_are_damaged_the_last_is_named(path: Path) -> None:
    damage(path)
    with pytest.raises(DataError, match=r"last\.ckpt is damaged; delete it to start again"):
        newest(path, print)
    assert names(path) == ["last.ckpt"]
