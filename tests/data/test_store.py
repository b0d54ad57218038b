import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from sslmed.config import DataError, DiskError, MissingInputError, OutputExistsError, TemporaryError, UsageError
from sslmed.data.annotations.writer import annotate
from sslmed.data.intensity import Intensity
from sslmed.data.shards.format import STORE_JSON, LabelColumn, MetaColumn, digest
from sslmed.data.shards.tables import NewScan
from sslmed.data.shards.writer import StoreWriter
from sslmed.data.splits import SPLITS
from sslmed.data.store import Store
from sslmed.durable import write_json


def images(count: int = 12) -> list[np.ndarray]:
    """Noise of several shapes, depths and channels."""
    stream = np.random.default_rng(0)
    shapes = [((40, 32), np.uint8), ((24, 48), np.uint16), ((40, 32), np.uint16), ((20, 20, 3), np.uint8)]
    chosen = [shapes[number % len(shapes)] for number in range(count)]
    return [stream.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True) for shape, dtype in chosen]


def build(folder: Path, pictures: list[np.ndarray], **options: int) -> Path:
    count = len(pictures)
    with StoreWriter(folder, modality="photo", key_id="0123abcd", **options) as writer:
        for number, pixels in enumerate(pictures):
            intensity = Intensity(number, number + 100.5, number + 50, 25)
            writer.add(NewScan(pixels, intensity, f"{number:064x}"))
        patients = np.array([f"{number // 2:032x}".encode() for number in range(count)])
        split = (np.arange(count) // 2 % 4).astype(np.uint8)
        with writer.finish(patients=patients, split=split, split_digest="d" * 64) as hidden:
            annotate(
                hidden,
                labels=[
                    (LabelColumn("finding", "class", ("clear", "nodule")), (np.arange(count) % 3 - 1).astype(np.int16)),
                    (LabelColumn("a/b é", "binary", ("0", "1")), (np.arange(count) % 2).astype(np.int16)),
                ],
                meta=[
                    (MetaColumn("age", "number"), np.where(np.arange(count) % 2, np.nan, np.arange(count))),
                    (MetaColumn("view", "category", ("AP", "PA")), (np.arange(count) % 3 - 1).astype(np.int32)),
                ],
            )
    return folder


def one(writer: StoreWriter, pixels: np.ndarray) -> None:
    writer.add(NewScan(pixels, Intensity(0, 1, 0.5, 0.25), "c"))


def finish(writer: StoreWriter, count: int) -> None:
    with writer.finish(patients=np.full(count, b"p"), split=np.zeros(count, np.uint8), split_digest=""):
        pass


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return build(tmp_path / "store", images())


def chunk_place(path: Path, group: str, row: int) -> tuple[int, int]:
    with h5py.File(path) as file:
        chunk = file[group].id.get_chunk_info(row)
        return chunk.byte_offset, chunk.size


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_pixels_come_back_as_they_were_stored(store: Path) -> None:
    opened = Store(store)
    assert len(opened) == 12
    for row, picture in enumerate(images()):
        pixels = opened.pixels(row)
        assert pixels.dtype == picture.dtype
        np.testing.assert_array_equal(pixels, picture)
        assert opened.intensity(row) == (row, row + 100.5, row + 50, 25)


def test_index_says_what_was_added(store: Path) -> None:
    index = Store(store).index
    pictures = images()
    assert index.height.tolist() == [picture.shape[0] for picture in pictures]
    assert index.width.tolist() == [picture.shape[1] for picture in pictures]
    assert index.channels.tolist() == [picture.shape[2] if picture.ndim == 3 else 1 for picture in pictures]
    assert index.dtype.tolist() == [picture.dtype.name.encode() for picture in pictures]
    assert index.patient[5] == f"{2:032x}".encode()
    assert index.content[5] == f"{5:064x}".encode()
    assert len(index) == 12


def test_rows_by_split_are_sorted_and_a_wrong_name_is_named(store: Path) -> None:
    opened = Store(store)
    assert opened.rows("val").tolist() == [2, 3, 10, 11]
    assert opened.rows("unlabelled", "train").tolist() == [0, 1, 6, 7, 8, 9]
    assert opened.rows().tolist() == list(range(12))
    assert opened.patients(opened.rows("val")).tolist() == [f"{n:032x}".encode() for n in (1, 1, 5, 5)]
    with pytest.raises(UsageError, match=r"'valid'.*train, val, test, unlabelled"):
        opened.rows("valid")


def test_labels_and_meta(store: Path) -> None:
    opened = Store(store)
    assert opened.default_target() == "finding"
    assert opened.classes("finding") == ("clear", "nodule")
    assert opened.target("finding").tolist() == [-1, 0, 1] * 4
    assert opened.target("a/b é").tolist() == [0, 1] * 6
    assert opened.labels["a/b é"].kind == "binary"
    np.testing.assert_array_equal(opened.meta("age")[:4], [0, np.nan, 2, np.nan])
    assert opened.meta("view").tolist() == [-1, 0, 1] * 4
    with pytest.raises(UsageError, match=r"no label 'findings'; it has finding"):
        opened.target("findings")
    with pytest.raises(UsageError, match="no meta column 'sex'"):
        opened.meta("sex")


def test_a_store_without_labels_has_no_target(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", modality="xray", key_id="0") as writer:
        one(writer, np.zeros((9, 9), np.uint8))
        finish(writer, 1)
    assert Store(tmp_path / "s").default_target() is None


def test_shards_stay_below_their_limit(tmp_path: Path) -> None:
    pictures = [np.random.default_rng(n).integers(0, 65536, (32, 32), np.uint16) for n in range(10)]
    opened = Store(build(tmp_path / "store", pictures, shard_bytes=3 * 2048))
    assert opened.index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    for row, picture in enumerate(pictures):
        np.testing.assert_array_equal(opened.pixels(row), picture)
    assert opened.verify() == []


def test_the_same_images_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (Store(build(tmp_path / name, images())) for name in "ab")
    assert first.fingerprint == second.fingerprint
    changed = images()
    changed[7][3, 3] ^= 1
    assert Store(build(tmp_path / "c", changed)).fingerprint != first.fingerprint


def test_a_pickled_store_carries_no_handle_and_insists_on_its_store(store: Path) -> None:
    opened = Store(store)
    expected = opened.pixels(3)
    sent = pickle.dumps(opened)
    assert len(sent) < 2000
    np.testing.assert_array_equal(pickle.loads(sent).pixels(3), expected)  # noqa: S301
    shutil.rmtree(store)
    build(store, images(4))
    with pytest.raises(DataError, match="no longer the store"):
        pickle.loads(sent)  # noqa: S301


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_reads_in_workers_equal_reads_here(store: Path, method: str) -> None:
    opened = Store(store)
    expected = [opened.pixels(row) for row in range(12)]  # the parent's handles are open before the workers start
    rows = list(range(12)) * 20
    with multiprocessing.get_context(method).Pool(2) as pool:
        read = pool.map(opened.pixels, rows, chunksize=10)
    assert all(np.array_equal(got, expected[row]) for got, row in zip(read, rows, strict=True))
    np.testing.assert_array_equal(opened.pixels(0), expected[0])


def test_a_forked_process_opens_files_of_its_own(store: Path) -> None:
    opened = Store(store)
    opened.pixels(0)
    before = {name: file for name, (file, _) in opened._open.items()}
    child = os.fork()
    if child == 0:
        opened.pixels(0)
        fresh = all(file is not before[name] for name, (file, _) in opened._open.items())
        os._exit(0 if fresh else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_groups_and_shards_do_not_pile_up_handles(tmp_path: Path) -> None:
    pictures = [np.full((8 + number % 90, 8 + number // 90), number, np.uint16) for number in range(300)]
    opened = Store(build(tmp_path / "store", pictures, shard_bytes=1500))
    order = np.random.default_rng(0).permutation(300)
    assert all((opened.pixels(int(row)) == row).all() for row in order)
    assert len(opened.about["shards"]) > 64
    assert len(opened._open) <= 64


def test_every_flipped_byte_of_a_chunk_is_found_and_named(store: Path) -> None:
    shard = store / "shard-00000.h5"
    whole = shard.read_bytes()
    offset, size = chunk_place(shard, "uint16_24x48x1", 1)  # sample 5
    for position in np.linspace(offset, offset + size - 1, 24).astype(int):
        flip(shard, position)
        with pytest.raises(DataError, match=r"shard-00000\.h5: sample 5 \(uint16_24x48x1, row 1\)"):
            Store(store).pixels(5)
        np.testing.assert_array_equal(Store(store).pixels(1), images()[1])
        shard.write_bytes(whole)


def test_verify_names_what_is_damaged(store: Path) -> None:
    assert Store(store).verify() == []
    offset, size = chunk_place(store / "shard-00000.h5", "uint16_40x32x1", 2)  # sample 10
    flip(store / "shard-00000.h5", offset + size // 2)
    findings = Store(store).verify()
    assert findings[0] == "shard-00000.h5: SHA-256 differs"
    assert [finding.split(" (")[0].split(": ")[1] for finding in findings[1:]] == ["sample 10"]
    (store / "shard-00000.h5").unlink()
    assert Store(store).verify() == ["shard-00000.h5: missing"]


@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_a_truncated_or_missing_shard_is_a_data_error(store: Path, keep: float) -> None:
    shard = store / "shard-00000.h5"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] if keep == -1 else content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="sample 0"):
        Store(store).pixels(0)
    shard.unlink()
    with pytest.raises(DataError, match="sample 0"):
        Store(store).pixels(0)


def test_links_out_of_a_shard_are_refused(store: Path, tmp_path: Path) -> None:
    shard = store / "shard-00000.h5"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.zeros((3, 24, 48), np.uint16)
    (tmp_path / "raw").write_bytes(bytes(3 * 24 * 48 * 2))
    replacements = {
        "soft": lambda file: file.__setitem__("uint16_24x48x1", h5py.SoftLink("/uint16_40x32x1")),
        "external": lambda file: file.__setitem__(
            "uint16_24x48x1", h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
        ),
        "storage": lambda file: file.create_dataset(
            "uint16_24x48x1", (3, 24, 48), np.uint16, external=[(str(tmp_path / "raw"), 0, 3 * 24 * 48 * 2)]
        ),
        "virtual": lambda file: file.create_virtual_dataset(
            "uint16_24x48x1", virtual_layout(str(tmp_path / "other.h5"))
        ),
        "another dtype": lambda file: file.create_dataset("uint16_24x48x1", (3, 24, 48), np.uint8),
        "a group": lambda file: file.create_group("uint16_24x48x1"),
    }
    whole = shard.read_bytes()
    for name, replace in replacements.items():
        shard.write_bytes(whole)
        with h5py.File(shard, "r+") as file:
            del file["uint16_24x48x1"]
            replace(file)
        with pytest.raises(DataError, match="sample 1"):
            Store(store).pixels(1)
        assert np.array_equal(Store(store).pixels(0), images()[0]), name
    shard.rename(tmp_path / "moved.h5")
    shard.symlink_to(tmp_path / "moved.h5")
    with pytest.raises(DataError, match="symbolic link"):
        Store(store).pixels(0)


def virtual_layout(path: str) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((3, 24, 48), np.uint16)
    layout[:] = h5py.VirtualSource(path, "secret", (3, 24, 48))
    return layout


def test_opening_what_is_no_whole_store(store: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no store at"):
        Store(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is no store"):
        Store(tmp_path / "empty")
    about = (store / STORE_JSON).read_text()
    (store / STORE_JSON).write_text(about.replace('"clear"', '"nothing"'))
    with pytest.raises(DataError, match="does not match its own digest"):
        Store(store)
    for broken in ("", "[]", about[:-20], '{"schema": 2}', "\xff"):
        (store / STORE_JSON).write_text(broken, encoding="latin-1")
        with pytest.raises(DataError, match=r"store\.json"):
            Store(store)


def test_another_schema_says_what_to_do(store: Path) -> None:
    about = dict(Store(store).about) | {"schema": 3}
    write_json(store / STORE_JSON, about | {"digest": digest(about)})
    with pytest.raises(DataError, match="has store schema 3; this sslmed reads schema 2"):
        Store(store)


def test_shard_names_cannot_lead_out_of_the_store(store: Path) -> None:
    about = dict(Store(store).about)
    about["shards"] = [{**about["shards"][0], "file": "../shard-00000.h5"}]
    write_json(store / STORE_JSON, about | {"digest": digest(about)})
    with pytest.raises(DataError, match="damaged"):
        Store(store)


def test_a_damaged_index_is_found_at_opening(store: Path) -> None:
    flip(store / "index.h5", 3000)
    with pytest.raises(DataError, match=r"index\.h5 is damaged"):
        Store(store)
    assert len(Store(store, verify=False)) == 12
    assert Store(store, verify=False).verify() == ["index.h5: SHA-256 differs"]
    (store / "index.h5").unlink()
    with pytest.raises(DataError, match=r"index\.h5 is missing"):
        Store(store)


def test_a_million_rows_open_in_well_under_a_second(tmp_path: Path) -> None:
    rows = 1_000_000
    with StoreWriter(tmp_path / "store", modality="xray", key_id="0") as writer:
        one(writer, np.zeros((8, 8), np.uint8))
        writer._tables.rows.extend(np.repeat(writer._tables.rows.all(), rows - 1))
        label = (LabelColumn("finding", "class", ("a", "b")), np.zeros(rows, np.int16))
        with writer.finish(patients=np.full(rows, b"p"), split=np.zeros(rows, np.uint8), split_digest="") as hidden:
            annotate(hidden, labels=[label])
    started = time.perf_counter()
    opened = Store(tmp_path / "store")
    assert len(opened.rows("train")) == rows
    assert len(opened.target("finding")) == rows
    assert time.perf_counter() - started < 2  # about 0.3 s on an idle slow core


def test_an_existing_target_is_never_touched(store: Path) -> None:
    before = Store(store).fingerprint
    with pytest.raises(OutputExistsError, match="exists"):
        StoreWriter(store, modality="xray", key_id="0")
    assert Store(store).fingerprint == before
    assert not list(store.parent.glob(".*partial*"))


def stop_halfway(target: Path) -> None:
    with StoreWriter(target, modality="xray", key_id="0") as writer:
        one(writer, np.zeros((9, 9), np.uint8))
        raise KeyboardInterrupt


def write_nothing(target: Path) -> None:
    with StoreWriter(target, modality="xray", key_id="0") as writer:
        finish(writer, 0)


def test_leaving_the_writer_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop_halfway(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no image"):
        write_nothing(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", modality="xray", key_id="0") as writer:
        with pytest.raises(TemporaryError, match="another process is writing"):
            StoreWriter(tmp_path / "s", modality="xray", key_id="0")
        one(writer, np.zeros((9, 9), np.uint8))
        finish(writer, 1)
    assert len(Store(tmp_path / "s")) == 1


KILLED = """
    import os, signal, sys
    import numpy as np
    from pathlib import Path
    from sslmed.data.shards import writer as store_writer
    from sslmed.data.intensity import Intensity
    from sslmed.data.shards.tables import NewScan
    if sys.argv[2] == "finish":  # the last moment before the store appears
        calls = []
        store_writer.refuse_existing = lambda _: calls.append(1) or len(calls) > 1 and os.kill(os.getpid(), 9)
    with store_writer.StoreWriter(Path(sys.argv[1]), modality="xray", key_id="0") as writer:
        for number in range(20):
            writer.add(NewScan(np.full((64, 64), number, np.uint16), Intensity(0, 1, 0, 1), "c"))
            if str(number) == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)
        with writer.finish(patients=np.full(20, b"p"), split=np.zeros(20, np.uint8), split_digest=""):
            pass
"""


@pytest.mark.parametrize("moment", ["0", "13", "finish"])
def test_a_killed_writer_leaves_no_store_and_the_next_one_cleans_up(tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "s"), moment]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (tmp_path / "s").exists()
    assert (tmp_path / ".s.partial").is_dir()
    build(tmp_path / "s", images(2))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert len(Store(tmp_path / "s")) == 2


def test_a_full_disk_is_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as a quota does; Python ignores SIGXFSZ
    try:
        with pytest.raises(DiskError, match="cannot write"):
            build(tmp_path / "s", [np.random.default_rng(n).integers(0, 65536, (64, 64), np.uint16) for n in range(20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_opening_a_store_imports_no_torch(store: Path) -> None:
    code = "import sys, sslmed.data.store as s; s.Store(sys.argv[1]).pixels(0); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code, str(store)], check=False).returncode == 0


def test_splits_are_the_known_four() -> None:
    assert SPLITS == ("train", "val", "test", "unlabelled")  # their positions are stored: reordering breaks old stores
