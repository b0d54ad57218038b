"""How fast a store is read, how fast and in how much memory it is made: ratios of interleaved runs.

    python benchmarks/store.py --data ../shared/data

``ct`` and ``xray``: images a second in random order, no chunk cache, checksums on where the format has any. Every arm
reads the same images from files that the system has in its cache; a round is 64 reads of each arm in turn. ``planes``:
slices along the other axes and crops beside whole slices as chunks. ``ingest``: two workers over one on DICOM files in
JPEG 2000. ``memory``: the greatest resident memory of an ingest against the number of files.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells

import sslmed
from sslmed.data.readers import read_series
from sslmed.data.shards.format import tile
from sslmed.data.shards.hdf5 import chunk_filters
from sslmed.data.store import Store

ROUNDS, READS = 11, 64
COPIES = 16  # of the eight slices of the CT, each with other noise in its lowest bit, so that no two are the same
RAGGED, LARGE = 400, 50  # radiographs
MEMORY = (1000, 4000, 16000)  # files
RESULTS = Path(__file__).parent / "results" / "store"
Read = Callable[[int], Any]


def main() -> None:
    """Measure what is missing, keep it, print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of ct_dicom and xray_pneumonia")
    data = parser.parse_args().data
    cells = Cells(RESULTS, "python benchmarks/store.py --data ../shared/data")
    with tempfile.TemporaryDirectory() as folder:
        parts = {"ct": ct, "xray": xray, "planes": planes, "ingest": ingest, "memory": memory}
        for name, measure in parts.items():
            place = Path(folder) / name
            place.mkdir()
            result = cells.run(name, lambda: measure(data, place), rounds=ROUNDS, reads=READS)  # noqa: B023
            print(name)
            for row, value in result.items():
                print(f"  {row:58} {value}")


def ct(data: Path, place: Path) -> dict[str, Any]:
    """Random slices of 512 x 512: the store over pydicom, gzip HDF5 and PNG."""
    volume = _volume(data)
    files = _dicom_files(data, volume, place / "dicom", None)
    made = sslmed.ingest(place / "dicom", place / "store", modality="ct", key=place / "key")
    store = Store(made.path)
    arms = {
        "store": store.pixels,
        "pydicom": lambda row: _pydicom(files[row]),
        "gzip": _gzip(list(volume), place / "gzip.h5"),
        "png": _png([(image + 2048).astype(np.uint16) for image in volume], place / "png"),
    }
    assert all(np.array_equal(arms["store"](row), arms["pydicom"](row)) for row in (0, 17, 127))
    sizes = {"store": _bytes(made.path), "gzip": _bytes(place / "gzip.h5"), "png": _bytes(place / "png")}
    return _reads(arms, len(volume)) | {
        f"bytes of {name} over raw": round(size / volume.nbytes, 3) for name, size in sizes.items()
    }


def xray(data: Path, place: Path) -> dict[str, Any]:
    """Random radiographs of many shapes: the store over gzip HDF5 and PNG; small ones, and as large as detectors.

    The small ones are cut at their edges. The large ones are the same, enlarged to 600 to 1200 pixels of 12 bits, with
    grain: there are no larger radiographs among the sets.
    """
    files = sorted((data / "xray_pneumonia" / "images").iterdir())
    small, large = files[:: len(files) // RAGGED][:RAGGED], files[:: len(files) // LARGE][:LARGE]
    return _ragged("small", [_cut(file, number) for number, file in enumerate(small)], place / "small") | _ragged(
        "large", [_enlarged(file, number) for number, file in enumerate(large)], place / "large"
    )


def _ragged(size: str, pictures: list[np.ndarray[Any, Any]], place: Path) -> dict[str, Any]:
    place.mkdir()
    read_png = _png(pictures, place / "png")
    made = sslmed.ingest(place / "png", place / "store", modality="xray", patient="[^/]+", key=place / "key")
    store = Store(made.path)
    rows = np.argsort(sorted(range(len(pictures)), key=str))  # the store has them in the order of their names
    arms = {
        "store": lambda at: store.pixels(int(rows[at])),
        "gzip": _gzip(pictures, place / "gzip.h5"),
        "png": read_png,
    }
    assert all(np.array_equal(arms["store"](at), arms["png"](at)) for at in (0, 7, len(pictures) - 1))
    raw = sum(picture.nbytes for picture in pictures)
    sizes = {"store": _bytes(made.path), "gzip": _bytes(place / "gzip.h5"), "png": _bytes(place / "png")}
    found: dict[str, Any] = {"shapes": len({picture.shape for picture in pictures})} | _reads(arms, len(pictures))
    found |= {f"bytes of {name} over raw": round(each / raw, 3) for name, each in sizes.items()}
    return {f"{size}, {name}": value for name, value in found.items()}


def _cut(file: Path, number: int) -> np.ndarray[Any, Any]:
    import cv2

    bottom, right = np.random.default_rng(number).integers(96, 129, 2).tolist()
    return np.ascontiguousarray(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)[:bottom, :right])


def _enlarged(file: Path, number: int) -> np.ndarray[Any, Any]:
    import cv2

    stream = np.random.default_rng(number)
    shape = tuple(stream.integers(600, 1201, 2).tolist())
    pixels = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE).astype(np.float32) * 16
    pixels = cv2.resize(pixels, shape, interpolation=cv2.INTER_CUBIC)
    return np.clip(pixels + stream.normal(0, 8, pixels.shape), 0, 4095).astype(np.uint16)


def planes(data: Path, place: Path) -> dict[str, Any]:
    """Slices along each axis and crops of 64 pixels: tiles over whole slices as chunks, from the same values."""
    import h5py
    import hdf5plugin  # noqa: F401

    volume = _volume(data)[:96]
    with h5py.File(place / "chunks.h5", "w") as file:
        for name, chunk in (("tiles", (1, tile(512), tile(512))), ("slices", (1, 512, 512))):
            file.create_dataset(name, data=volume, chunks=chunk, **chunk_filters())
    file = h5py.File(place / "chunks.h5", rdcc_nbytes=0)
    windows = {
        "slice": lambda at: (at % 96, slice(None), slice(None)),
        "plane across the rows": lambda at: (slice(None), at % 512, slice(None)),
        "plane across the columns": lambda at: (slice(None), slice(None), at % 512),
        "crop of 64": lambda at: (slice(at % 32, at % 32 + 64), slice(at % 448, at % 448 + 64), slice(200, 264)),
    }
    found = {}
    for what, window in windows.items():
        arms = {name: (lambda at, name=name, window=window: file[name][window(at)]) for name in ("tiles", "slices")}
        taken = _times(arms, 4096, reads=16)
        found[f"seconds of tiles over slices, {what}"] = _ratio(taken["tiles"] / taken["slices"])
    return found


def ingest(data: Path, place: Path) -> dict[str, Any]:
    """Files a second with two workers over one; series of 16 slices of 512 x 512 in JPEG 2000."""
    from pydicom.uid import JPEG2000Lossless

    _dicom_files(data, np.concatenate([_volume(data)] * 4), place / "dicom", JPEG2000Lossless)
    taken: dict[int, list[float]] = {1: [], 2: []}
    for number in range(5):
        for workers, times in taken.items():
            started = time.perf_counter()
            out = place / f"store-{number}-{workers}"
            sslmed.ingest(place / "dicom", out, modality="ct", key=place / "key", workers=workers)
            times.append(time.perf_counter() - started)
            shutil.rmtree(out)
    return {"two workers over one": _ratio(np.array(taken[1]) / np.array(taken[2]))}


def memory(_: Path, place: Path) -> dict[str, Any]:
    """Greatest resident memory of an ingest process, in MB, by number of files; and what a further file adds."""
    from sslmed.data.writers import write_image

    folder = place / "images"
    folder.mkdir()
    peaks: dict[str, float] = {}
    script = "import sys, sslmed; sslmed.ingest(*sys.argv[1:3], modality='xray', patient='[^/]+', shard_bytes=2**24)"
    made = 0
    for count in MEMORY:
        for number in range(made, count):
            pixels = np.random.default_rng(number).integers(0, 4096, (64, 64), np.uint16)
            write_image(folder / f"{number:05d}.tif", pixels)
        made = count
        # VmHWM: getrusage would give what this process, from which it is forked, once had.
        code = f"{script}; print(*(line for line in open('/proc/self/status') if 'VmHWM' in line))"
        run = [sys.executable, "-c", code, str(folder), str(place / f"store-{count}")]
        told = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        peaks[f"MB of {count} files of 8 kB"] = round(int(re.findall(r"VmHWM:\s+(\d+)", told)[0]) / 1024, 1)
    *_, before, last = peaks.values()
    a_file = (last - before) * 1024 / (MEMORY[-1] - MEMORY[-2])
    return peaks | {
        "kB a further file adds": round(a_file, 2),
    }


def _volume(data: Path) -> np.ndarray[Any, Any]:
    """(128, 512, 512) int16: the chest CT again and again, its lowest bit drawn anew."""
    scan = read_series(sorted((data / "ct_dicom" / "chest").glob("*.dcm")))
    copies = []
    for number in range(COPIES):
        noise = np.random.default_rng(number).integers(0, 2, scan.pixels.shape, np.int16)
        copies.append((scan.pixels & ~1) | noise)
    return np.concatenate(copies)


def _dicom_files(data: Path, volume: np.ndarray[Any, Any], place: Path, syntax: Any) -> list[Path]:
    """The volume as series of 16 slices each, uncompressed or compressed, named in their order."""
    import pydicom

    place.mkdir()
    like = pydicom.dcmread(sorted((data / "ct_dicom" / "chest").glob("*.dcm"))[0])
    files = []
    for number, image in enumerate(volume):
        like.SeriesInstanceUID = f"1.2.3.{number // 16}"
        like.SOPInstanceUID = like.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number // 16}.{number}"
        like.ImagePositionPatient = [0, 0, float(number % 16)]
        stored = ((image - float(like.RescaleIntercept)) / float(like.RescaleSlope)).astype(np.int16)
        copy = pydicom.Dataset(like)
        copy.file_meta = pydicom.dataset.FileMetaDataset(like.file_meta)
        copy.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        copy.PixelData = stored.tobytes()
        if syntax is not None:
            copy.compress(syntax)
        files.append(place / f"{number:04d}.dcm")
        copy.save_as(files[-1], enforce_file_format=True)
    return files


def _pydicom(path: Path) -> np.ndarray[Any, Any]:
    """What a Dataset that reads DICOM files does: decode, rescale to HU, int16."""
    import pydicom

    dataset = pydicom.dcmread(path)
    return pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset).astype(np.int16)


def _gzip(pictures: Sequence[np.ndarray[Any, Any]], path: Path) -> Read:
    import h5py

    with h5py.File(path, "w") as file:
        for number, picture in enumerate(pictures):
            file.create_dataset(str(number), data=picture, chunks=picture.shape, compression="gzip", fletcher32=True)
    file = h5py.File(path, rdcc_nbytes=0)
    return lambda row: file[str(row)][:]


def _png(pictures: Sequence[np.ndarray[Any, Any]], place: Path) -> Read:
    import cv2

    place.mkdir()
    for number, picture in enumerate(pictures):
        cv2.imwrite(str(place / f"{number}.png"), picture)
    return lambda row: cv2.imread(str(place / f"{row}.png"), cv2.IMREAD_UNCHANGED)


def _reads(arms: dict[str, Read], count: int) -> dict[str, Any]:
    taken = _times(arms, count)
    return {
        f"images a second, store over {name}": _ratio(times / taken["store"])
        for name, times in taken.items()
        if name != "store"
    }


def _times(arms: dict[str, Read], count: int, reads: int = READS) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of each round of each arm; every round reads other images, the same of each arm."""
    for read in arms.values():
        for row in range(min(count, 16)):
            read(row)
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS):
        rows = np.random.default_rng(number).integers(count, size=reads).tolist()
        for name, read in arms.items():
            started = time.perf_counter()
            for row in rows:
                read(row)
            taken[name].append(time.perf_counter() - started)
    return {name: np.array(times) for name, times in taken.items()}


def _ratio(values: np.ndarray[Any, Any]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


if __name__ == "__main__":
    main()
