"""``sslmed pull``: a published artifact from a folder or a URL, every byte of it as its publisher said."""

import contextlib
import hashlib
import http.client
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sslmed import __version__, artifact
from sslmed.artifact import MANIFEST, manifest
from sslmed.config import DataError, MissingInputError, OutputExistsError, SslmedError, TemporaryError, UsageError
from sslmed.console import command, say
from sslmed.supervised import self_test

TIMEOUT = 60  # seconds without a byte
PART = 1 << 20  # bytes read at a time
MOST = {".safetensors": 16 << 30}  # bytes of a file; of others
MOST_OTHERS = 64 << 20
NOT_THERE = (401, 403, 404, 410)  # hubs hide what is private behind the first two
LATER = (408, 425, 429)


@dataclass(frozen=True)
class PullResult:
    """An artifact that has come whole.

    Attributes:
        size: bytes in all.
        difference: of its self-test on this machine.
    """

    source: str
    artifact: str
    kind: str
    files: int
    size: int
    difference: float
    next: str

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"pulled {self.kind}, {self.files} files, {self.size / 1e6:.1f} MB: every digest, "
            f"self-test within {self.difference:.1e}",
            f"artifact: {self.artifact}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


class Stream(Protocol):
    """What a file comes by; no bytes are its end."""

    def read(self, size: int, /) -> bytes: ...


class Fetch(Protocol):
    """Opens a file of the source by its name."""

    def __call__(self, name: str, /) -> contextlib.AbstractContextManager[Stream]: ...


def pull(source: str | Path, out: str | Path, *, sha256: str) -> PullResult:
    """Fetch what ``sslmed publish`` made and check every byte of it; nothing is left of what does not pass.

    Args:
        source: a folder, or the http or https URL under which its files lie.
        out: the artifact to make.
        sha256: of its MANIFEST.json, as ``sslmed publish`` printed it, from someone who is trusted.

    Raises:
        UsageError: a digest or a URL that cannot be one.
        MissingInputError: the source or one of its files is not there.
        DataError: what came is not what was published, is no artifact, or fails the self-test.
        OutputExistsError: there is something at ``out``.
        DiskError: it cannot be written.
        TemporaryError: the network or the server failed.
    """
    out, digest = Path(out), sha256.strip().lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UsageError(f"--sha256 is '{sha256[:80]}'; it has 64 hexadecimal digits, as `sslmed publish` printed them")
    if out.exists() or out.is_symlink():
        raise OutputExistsError(f"the output {out} exists already; remove it, or give another --out")
    fetch = _fetch(source)
    listed = _manifest(fetch, source, digest)
    with artifact.made(out) as folder:
        _into(folder / MANIFEST, listed)
        names = manifest.parse(listed)
        for number, (name, wanted) in enumerate(names.items(), start=1):
            say(f"{number}/{len(names)} {name}")
            if _save(fetch, name, folder / name) != wanted:
                raise DataError(f"{name} from {source} is not what was published: its sha256 is another")
        outcome = _tested(folder, source)
        card, size = artifact.read_card(folder), sum(path.stat().st_size for path in folder.iterdir())
    use = ("predict", out, "SOURCE", "--out", "DIR") if card.head else ("evaluate", out, "--data", "STORE")
    kind = f"{card.kind} {card.backbone.name}"
    following = command("sslmed", *use)
    return PullResult(str(source), str(out), kind, len(names) + 1, size, outcome.difference, following)


def _manifest(fetch: Fetch, source: str | Path, digest: str) -> bytes:
    """The manifest, once it is known to be the right one and to name nothing but what an artifact holds."""
    listed = b""
    with fetch(MANIFEST) as stream:
        while len(listed) <= manifest.LARGEST and (part := stream.read(manifest.LARGEST + 1 - len(listed))):
            listed += part
    if len(listed) > manifest.LARGEST or hashlib.sha256(listed).hexdigest() != digest:
        raise DataError(
            f"the {MANIFEST} of {source} has another sha256 than {digest}: it was changed, or is another model's.\n"
            "Ask its publisher for the digest, or get it from elsewhere"
        )
    try:
        names = manifest.parse(listed)
    except ValueError as error:
        raise DataError(f"the {MANIFEST} of {source} is refused: {error}") from error
    if gaps := manifest.gaps(names):
        raise DataError(f"{source} is no published artifact: {'; '.join(gaps[:3])}")
    return listed


def _save(fetch: Fetch, name: str, path: Path) -> str:
    """Write a file as it comes; its sha256."""
    most, size, digest = MOST.get(path.suffix, MOST_OTHERS), 0, hashlib.sha256()
    with fetch(name) as stream, path.open("xb") as file:
        while part := stream.read(PART):
            size += len(part)
            if size > most:
                raise DataError(f"{name} is larger than the {most >> 20} MB that such a file may have")
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _tested(folder: Path, source: str | Path) -> artifact.SelfTest:
    try:
        return self_test.check(folder)
    except DataError as error:  # of a folder that is gone when this is read
        raise DataError(str(error).replace(str(folder), str(source))) from error


def _into(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)


# Where files come from.


def _fetch(source: str | Path) -> Fetch:
    text = str(source)
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        folder = Path(source)
        if not folder.is_dir():
            raise MissingInputError(f"there is no folder at {folder}; give what `sslmed publish` made, or its URL")
        return partial(_opened, folder)
    if scheme[1].lower() not in ("http", "https"):
        raise UsageError(f"{text}: {scheme[1]} is no way to pull; allowed: a folder, or an http or https URL")
    try:
        parts = urllib.parse.urlsplit(text)
        host, _ = parts.hostname, parts.port  # which may be no number
    except ValueError as error:
        raise UsageError(f"{text} is no URL: {error}") from error
    if not host or parts.query or parts.fragment or "?" in text or "#" in text or parts.username is not None:
        raise UsageError(f"{text}: give the plain URL of the folder, without a query, a fragment or a password")
    if re.search(r"[\x00-\x20\x7f-\U0010ffff]", text):
        raise UsageError(f"{text}: a URL has no blanks and no letters beyond ASCII; write them as %20 and so on")
    return partial(_downloaded, text.rstrip("/"))


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[Stream]:
    path = folder / name
    if path.is_symlink():
        raise DataError(f"{path} is a symbolic link; put the file itself there")
    if not path.is_file():
        raise MissingInputError(f"{path} is missing")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} is not readable: {error.strerror}") from error
    with file:
        yield file


@contextlib.contextmanager
def _downloaded(base: str, name: str) -> Iterator[Stream]:
    url = f"{base}/{name}"
    request = urllib.request.Request(url, headers={"User-Agent": f"sslmed/{__version__}"})  # noqa: S310  # http(s) alone
    try:
        answer = opener().open(request, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _told(url, error) from error
    with contextlib.closing(answer):
        yield _Body(url, answer)


def opener() -> urllib.request.OpenerDirector:
    """Speaks http and https and nothing else, so that no redirect leads to a local file."""
    made = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        made.add_handler(handler())
    return made


class _Body:
    """An answer's content; whatever fails while it comes is told in our own words."""

    def __init__(self, url: str, answer: Any) -> None:
        self.url, self.answer, self.come = url, answer, 0
        length = answer.headers.get("Content-Length")
        self.length = int(length) if length is not None and length.isdecimal() else None

    def read(self, size: int, /) -> bytes:
        try:
            part: bytes = self.answer.read(size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _told(self.url, error) from error
        self.come += len(part)
        if not part and self.length is not None and self.come < self.length:
            raise TemporaryError(f"{self.url} broke off after {self.come} of {self.length} bytes; pull again")
        return part


def _told(url: str, error: Exception) -> SslmedError:
    """The error that a person can act on."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        if error.code in NOT_THERE:
            return MissingInputError(f"there is nothing for everyone at {url} (HTTP {error.code} {error.reason})")
        if error.code >= 500 or error.code in LATER:
            return TemporaryError(f"{url} cannot be had now (HTTP {error.code} {error.reason}); pull again later")
        return DataError(f"{url} cannot be pulled (HTTP {error.code} {error.reason})")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DataError(f"{url}: the server's certificate is not trusted: {reason.verify_message}")
    if isinstance(error, ValueError | http.client.InvalidURL) or isinstance(reason, str):  # led to another kind of URL
        return DataError(f"{url} cannot be pulled: {reason}")
    return TemporaryError(f"{url} cannot be reached: {str(reason) or type(error).__name__}; pull again later")
