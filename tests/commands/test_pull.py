import email.message
import hashlib
import http.client
import io
import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sslmed
from sslmed import artifact, cli
from sslmed.artifact import MANIFEST, manifest
from sslmed.artifact.manifest import sign
from sslmed.commands import pull as door
from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import FinetuneResult
from sslmed.commands.pretrain import PretrainResult
from sslmed.commands.publish import publish
from sslmed.commands.pull import pull
from sslmed.commands.verify import verify
from sslmed.config import DataError, MissingInputError, OutputExistsError, SslmedError, TemporaryError, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256

STATED = ("licence=MIT", "data_licence=CC0-1.0", "intended_use=tests", "limits=phantoms")
URL = "https://models.example/somebody/backbone/resolve/main"


@pytest.fixture(scope="session")
def published(pretrained: PretrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never change it."""
    return Path(publish(pretrained.run, tmp_path_factory.mktemp("published") / "model", stated=STATED).to)


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "source"))


def digest(folder: Path) -> str:
    return sha256(folder / MANIFEST)


def refused(source: object, tmp_path: Path, known: str, kind: type[SslmedError], words: str) -> None:
    """Refused in few words, and nothing is left of it, not even the folders above."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=words) as caught:
        pull(str(source), tmp_path / "new" / "out", sha256=known)
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) <= 6
    assert sorted(tmp_path.rglob("*")) == before


class Server:
    """Stands in for the network: a folder under a URL. ``answers`` overrides what a file's name gets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.answers: dict[str, Any] = {}

    def open(self, request: urllib.request.Request, timeout: float) -> Any:
        assert timeout == door.TIMEOUT
        self.asked.append(request.full_url)
        base, _, name = request.full_url.rpartition("/")
        assert base == URL
        answer = self.answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        if not (self.folder / name).is_file():
            raise failed(404)
        return Answer((self.folder / name).read_bytes())


class Answer(io.BytesIO):
    def __init__(self, content: bytes, length: int | None = None) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}


class Broken(Answer):
    """Fails in the middle of its content."""

    def __init__(self, error: Exception) -> None:
        super().__init__(b"x" * 10)
        self.error = error

    def read(self, size: int | None = -1, /) -> bytes:
        raise self.error


class Endless(Answer):
    def read(self, size: int | None = -1, /) -> bytes:
        return b"x" * (size or 0)


def failed(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError(URL, code, http.client.responses.get(code, ""), email.message.Message(), None)


@pytest.fixture
def server(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(copy)
    monkeypatch.setattr(door, "opener", lambda: made)
    return made


# What comes.


def test_a_folder_is_copied_whole(published: Path, tmp_path: Path) -> None:
    result = pull(published, tmp_path / "deep" / "out", sha256=digest(published).upper())
    out = Path(result.artifact)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in published.iterdir()
    }
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert result.files == len(list(out.iterdir()))
    assert result.size == sum(path.stat().st_size for path in out.iterdir())
    assert result.next == f"sslmed evaluate {out} --data STORE"
    assert list(out.parent.iterdir()) == [out]
    assert verify(out).verdict == "whole"
    images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(sslmed.load_backbone(out)(images), sslmed.load_backbone(published)(images))


def test_a_url_is_fetched_file_by_file(server: Server, tmp_path: Path) -> None:
    result = pull(f"{URL}/", tmp_path / "out", sha256=digest(server.folder))
    assert server.asked[0] == f"{URL}/{MANIFEST}"
    listed = json.loads((server.folder / MANIFEST).read_text())
    assert server.asked[1:] == [f"{URL}/{name}" for name in listed]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MANIFEST, *listed}
    assert result.lines()[0].startswith("pulled backbone test_resnet, ")


def test_on_the_command_line(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pull", str(published), "--sha256", digest(published), "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "backbone test_resnet"
    assert cli.run(words) == 73
    for missing in (words[:2] + words[4:], words[:4]):
        assert cli.run(missing) == 2


def test_a_fine_tuned_model(tuned: FinetuneResult, tmp_path: Path) -> None:
    folder = Path(publish(tuned.run, tmp_path / "published", stated=STATED).to)
    result = pull(folder, tmp_path / "out", sha256=digest(folder))
    assert result.kind == "classification test_resnet"
    assert result.next == f"sslmed predict {tmp_path / 'out'} SOURCE --out DIR"
    tensors = load_file(folder / "head.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, folder / "head.safetensors")
    sign(folder)
    refused(folder, tmp_path, digest(folder), DataError, "self-test differs")


def test_whom_it_has_seen_is_still_told(published: Path, phantom_store: Store, tmp_path: Path) -> None:
    pull(published, tmp_path / "out", sha256=digest(published))
    result = evaluate(
        tmp_path / "out", phantom_store.path, budgets="k=2", seeds=1, replicates=100, strict=True, out=tmp_path / "e"
    )
    assert f"0 of {result.test_patients} test patients were seen in pretraining" in "\n".join(result.lines())
    card = artifact.read_card(tmp_path / "out")
    elsewhere = card.data.model_copy(update={"key_id": "00000000"})
    (tmp_path / "out" / "card.json").write_text(card.model_copy(update={"data": elsewhere}).model_dump_json())
    sign(tmp_path / "out")
    options: dict[str, Any] = {"budgets": "k=2", "seeds": 1, "replicates": 100, "out": tmp_path / "f"}
    with pytest.raises(DataError, match="cannot tell whether test patients were seen"):
        evaluate(tmp_path / "out", phantom_store.path, strict=True, **options)
    told = evaluate(tmp_path / "out", phantom_store.path, **options)
    assert "cannot tell whether pretraining has seen them" in told.lines()[1]


# What is refused.


@pytest.mark.parametrize("given", ["", "abc", "g" * 64, "0" * 63, "0" * 65, "sha256:" + "0" * 64])
def test_a_digest_that_is_none(given: str, published: Path, tmp_path: Path) -> None:
    refused(published, tmp_path, given, UsageError, "64 hexadecimal digits")


def test_another_manifest_than_the_one_asked_for(published: Path, server: Server, tmp_path: Path) -> None:
    for source in (published, URL):
        refused(source, tmp_path, "0" * 64, DataError, "has another sha256")
    assert server.asked == [f"{URL}/{MANIFEST}"]  # and nothing else was fetched


def test_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path, "0" * 64, MissingInputError, "no folder at")
    refused(tmp_path, tmp_path, "0" * 64, MissingInputError, "MANIFEST.json is missing")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example/x",
        "file:///etc",
        "s3://bucket/x",
        "https://",
        "https:///x",
        "https://a.example/x?download=true",
        "https://a.example/x?",
        "https://a.example/x#part",
        "https://me:secret@a.example/x",
        "https://a.example:port/x",
        "https://a.example/a b",
        "https://a.example/\u00e9",
        "https://[::1/x",
    ],
)
def test_a_url_that_is_no_folder(url: str, tmp_path: Path) -> None:
    refused(url, tmp_path, "0" * 64, UsageError, "URL")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("number", range(7))
def test_one_flipped_byte_in_any_file(number: int, share: float, copy: Path, server: Server, tmp_path: Path) -> None:
    name = sorted(path.name for path in copy.iterdir())[number]
    known = digest(copy)
    content = bytearray((copy / name).read_bytes())
    content[int(share * len(content))] ^= 1
    (copy / name).write_bytes(content)
    for source in (copy, URL):
        refused(source, tmp_path, known, DataError, "sha256")


@pytest.mark.parametrize(
    "name",
    [
        *("../card.json", "../../out", "/etc/passwd", "a/b.json", "a\\b.json", "..", ".", "", ".hidden", "x\x00.json"),
        *("C:evil.json", "a b.json", "-rf", "caf\u00e9.json", "a" * 200 + ".json", MANIFEST, "~"),
    ],
)
def test_a_name_that_leads_elsewhere(name: str, copy: Path, server: Server, tmp_path: Path) -> None:
    listed = json.loads((copy / MANIFEST).read_text()) | {name: hashlib.sha256(b"evil").hexdigest()}
    (copy / MANIFEST).write_text(json.dumps(listed))
    for source in (copy, URL):
        refused(source, tmp_path, digest(copy), DataError, "no plain file name")
    assert server.asked == [f"{URL}/{MANIFEST}"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a list of names"),
        ("{}", "names 0 files"),
        (json.dumps({f"{n}.json": "0" * 64 for n in range(65)}), "names 65 files"),
        ('{"a.json": 3}', "no sha256"),
        ('{"a.json": "xyz"}', "no sha256"),
        ('{"a.json": "' + "0" * 64 + '", "a.json": "' + "1" * 64 + '"}', "names a.json twice"),
        ("[" * 100_000, "MANIFEST.json of"),
        ("\xff", "MANIFEST.json of"),
        ('{"a.json": "' + "0" * 64 + '"}', "no published artifact: card.json is not in the manifest"),
    ],
)
def test_a_manifest_of_something_else(content: str, words: str, copy: Path, tmp_path: Path) -> None:
    (copy / MANIFEST).write_text(content, encoding="latin-1")
    refused(copy, tmp_path, digest(copy), DataError, words)


def test_a_manifest_without_end(server: Server, copy: Path, tmp_path: Path) -> None:
    server.answers[MANIFEST] = Endless(b"")
    refused(URL, tmp_path, "0" * 64, DataError, "has another sha256")
    (copy / MANIFEST).write_text(" " * manifest.LARGEST + "{}")
    refused(copy, tmp_path, digest(copy), DataError, "has another sha256")


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_a_file_without_end(
    name: str, server: Server, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MOST_OTHERS", 3 << 20)
    monkeypatch.setitem(door.MOST, ".safetensors", 5 << 20)
    server.answers[name] = Endless(b"")
    refused(URL, tmp_path, digest(copy), DataError, f"{name} is larger than the {3 if 'card' in name else 5} MB")


@pytest.mark.parametrize("name", [MANIFEST, "card.json", "model.safetensors"])
def test_a_link_in_the_source(name: str, copy: Path, tmp_path: Path) -> None:
    known = digest(copy)
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    refused(copy, tmp_path, known, DataError, "symbolic link")


def test_a_file_that_is_missing(copy: Path, server: Server, tmp_path: Path) -> None:
    known = digest(copy)
    (copy / "README.md").unlink()
    refused(copy, tmp_path, known, MissingInputError, r"README\.md is missing")
    refused(URL, tmp_path, known, MissingInputError, "HTTP 404")


def test_swapped_weights_that_are_signed(copy: Path, tmp_path: Path) -> None:
    """Someone who can change the digest too is met by the self-test."""
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, copy / "model.safetensors")
    sign(copy)
    refused(copy, tmp_path, digest(copy), DataError, f"^{copy}: the self-test differs")


def test_an_export_is_no_artifact(copy: Path, tmp_path: Path) -> None:
    (copy / "model.onnx").write_bytes(b"graph")
    sign(copy)
    refused(copy, tmp_path, digest(copy), DataError, "model.onnx is of a kind that no artifact holds")


@pytest.mark.parametrize("make", ["folder", "file", "link"])
def test_what_is_there_is_left(make: str, published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if make == "folder":
        out.mkdir()
    elif make == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError) as caught:
        pull(published, out, sha256=digest(published))
    assert caught.value.exit_code == 73
    assert list(tmp_path.iterdir()) == [out]


# The network.

UNTRUSTED = ssl.SSLCertVerificationError(1, "certificate verify failed")
UNTRUSTED.verify_message = "self-signed certificate"


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: failed(404), MissingInputError, "HTTP 404 Not Found"),
        (lambda: failed(403), MissingInputError, "HTTP 403"),
        (lambda: failed(429), TemporaryError, "HTTP 429"),
        (lambda: failed(503), TemporaryError, "HTTP 503"),
        (lambda: failed(400), DataError, "HTTP 400"),
        (lambda: urllib.error.URLError(TimeoutError("timed out")), TemporaryError, "timed out"),
        (lambda: urllib.error.URLError(ConnectionRefusedError(111, "refused")), TemporaryError, "refused"),
        (lambda: urllib.error.URLError(OSError(-2, "Name or service not known")), TemporaryError, "not known"),
        (lambda: urllib.error.URLError(UNTRUSTED), DataError, "certificate is not trusted: self-signed"),
        (lambda: TimeoutError("timed out"), TemporaryError, "cannot be reached: timed out"),
        (lambda: http.client.RemoteDisconnected("closed"), TemporaryError, "closed"),
        (lambda: http.client.InvalidURL("no"), DataError, "cannot be pulled"),
        (lambda: urllib.error.URLError("unknown url type: ftp"), DataError, "cannot be pulled: unknown url type"),
        (lambda: Broken(TimeoutError("timed out")), TemporaryError, "timed out"),
        (lambda: Broken(http.client.IncompleteRead(b"")), TemporaryError, "cannot be reached"),
        (lambda: Broken(ConnectionResetError(104, "reset")), TemporaryError, "reset"),
        (lambda: Answer(b"{}", length=99), TemporaryError, "broke off after 2 of 99 bytes"),
    ],
)
@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors"])
def test_a_network_that_fails(
    name: str, make: Callable[[], Any], kind: type[SslmedError], words: str, server: Server, tmp_path: Path
) -> None:
    server.answers[name] = make()
    refused(URL, tmp_path, digest(server.folder), kind, words)
    assert {TemporaryError: 75, MissingInputError: 66, DataError: 65}[kind] == kind.exit_code


def test_no_redirect_leaves_the_web() -> None:
    handlers = {type(handler) for handler in door.opener().handlers}  # type: ignore[attr-defined]
    assert urllib.request.HTTPRedirectHandler in handlers
    assert not handlers & {urllib.request.FileHandler, urllib.request.FTPHandler, urllib.request.DataHandler}
    for url in ("file:///etc/hostname", "ftp://a.example/x", "data:text/plain,x"):
        with pytest.raises(urllib.error.URLError, match="unknown url type"):
            door.opener().open(url)
