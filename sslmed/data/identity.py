"""Who is in a data set, without saying who: keyed digests of patients and images, and whether two sets share patients.

A plain hash of a patient id is undone by hashing every possible id. HMAC-SHA256 under a key that stays at the site is
not, and still lets two stores of that site be compared.
"""

import hashlib
import hmac
import os
import secrets
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, DiskError

_KEY_BYTES = 32
_FINGERPRINT_BYTES = 8  # 64 of 128 bits: a false match among 10^6 by 10^6 patients has a chance of 5 in 10^8

Fingerprint = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SiteKey:
    """The secret of one site. Its ``repr`` shows the id only."""

    secret: bytes = field(repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", hashlib.sha256(self.secret).hexdigest()[:8])

    def patient(self, pid: str) -> str:
        """32 hexadecimal characters that stand for the patient.

        Ids that differ only in case, in white space or in Unicode form are one patient.

        Raises:
            DataError: the id is blank.
        """
        normalised = " ".join(unicodedata.normalize("NFKC", pid).casefold().split())
        if not normalised:
            raise DataError("a patient id is blank; every image needs one, and a patient's images need the same one")
        return self._digest(b"patient", normalised.encode())[:32]

    def content(self, pixels: np.ndarray[Any, np.dtype[Any]]) -> str:
        """64 hexadecimal characters, equal for images of equal shape and values, whatever their file or bit depth."""
        if pixels.dtype.kind in "ui":  # the same 8-bit picture saved with 16 bits is the same picture
            pixels = pixels.astype(np.result_type(np.min_scalar_type(pixels.min()), np.min_scalar_type(pixels.max())))
        little_endian = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
        return self._digest(f"{little_endian.dtype.str}{pixels.shape}".encode(), little_endian.data)

    def _digest(self, purpose: bytes, content: bytes | memoryview) -> str:
        digest = hmac.new(self.secret, purpose + b"\0", hashlib.sha256)
        digest.update(content)
        return digest.hexdigest()


def load_or_make_key(path: Path) -> SiteKey:
    """The key in ``path``; a new one is written there, readable by its owner alone, when the file does not exist.

    Raises:
        DataError: the file holds something else.
        DiskError: the key cannot be read or written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _load(path)
    except OSError as error:
        raise DiskError(f"cannot write the site key {path}: {error.strerror}") from error
    secret = secrets.token_bytes(_KEY_BYTES)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
        file.flush()
        os.fsync(descriptor)
    return SiteKey(secret)


def fingerprint(patients: npt.NDArray[np.bytes_], contents: npt.NDArray[np.bytes_]) -> Fingerprint:
    """Who and what is in a set of images, as sorted, unique digests cut to 8 bytes: (n, 8) uint8.

    Images count beside patients, because a patient may go by another name in another store: by the file's when the
    first had no CSV.

    Args:
        patients: of each image, (N,) as `SiteKey.patient` gives them; repeats do not matter.
        contents: of each image, (N,) as `SiteKey.content` gives them.
    """
    values = np.unique(np.concatenate([_cut(patients), _cut(contents)]))
    return values.astype(">u8").view(np.uint8).reshape(-1, _FINGERPRINT_BYTES)  # concatenate goes to native order


def seen(
    known: Fingerprint,
    key_id: str,
    patients: npt.NDArray[np.bytes_],
    contents: npt.NDArray[np.bytes_],
    own_key_id: str,
) -> int | None:
    """How many different patients of some images are in ``known``, by their key or by one of their images.

    None means that it cannot be told, because ``known`` was made under another site's key: that is never "0".

    Args:
        patients, contents: of each image, as for `fingerprint`, made under the key ``own_key_id``.
    """
    if key_id != own_key_id:
        return None
    digests = np.ascontiguousarray(known, np.uint8).reshape(-1).view(">u8")
    found = np.isin(_cut(patients), digests) | np.isin(_cut(contents), digests)
    return len(np.unique(patients[found]))


def _cut(digests: npt.NDArray[np.bytes_]) -> npt.NDArray[Any]:
    """The first 8 bytes of hexadecimal digests, (N,) big-endian."""
    width = digests.dtype.itemsize
    characters = np.ascontiguousarray(digests).view("S1").reshape(-1, width)[:, : 2 * _FINGERPRINT_BYTES]
    return np.frombuffer(bytes.fromhex(characters.tobytes().decode("ascii")), ">u8")


def _load(path: Path) -> SiteKey:
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise DiskError(f"cannot read the site key {path}: {error.strerror}") from error
    except ValueError:  # also UnicodeDecodeError
        secret = b""
    if len(secret) != _KEY_BYTES:
        raise DataError(
            f"{path} is no site key: it must hold {2 * _KEY_BYTES} hexadecimal characters. "
            "Give the file of the first store with --key; a new key could not recognise its patients."
        )
    return SiteKey(secret)
