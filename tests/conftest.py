"""What every test runs under: a torchvision that imports, no network, few threads."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
THREADS = str(min(2, os.cpu_count() or 1))  # tiny networks are slower on many threads
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, THREADS)

import pytest  # noqa: E402
import ranks  # noqa: E402
import torch  # noqa: E402

from sslmed import torchvision_ops  # noqa: E402
from sslmed.data.store import Store  # noqa: E402

torchvision_ops.mend()
ranks.context()  # before anything starts the forkserver, which takes what is preloaded only then
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_loopback_allowed = False


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connecting and looking up names raise; a ``ddp`` test may use the loopback."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo))
        yield


@pytest.fixture(autouse=True)
def loopback_for_ddp(request: pytest.FixtureRequest) -> Iterator[None]:
    global _loopback_allowed
    _loopback_allowed = request.node.get_closest_marker("ddp") is not None
    yield
    _loopback_allowed = False


def _guarded(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX:
            _refuse_unless_loopback(str(address[0]))
        return connect(self, address)

    return guarded


def _guarded_lookup(lookup: Any) -> Any:
    def guarded(host: Any, *rest: Any, **named: Any) -> Any:
        _refuse_unless_loopback(str(host))
        return lookup(host, *rest, **named)

    return guarded


def _refuse_unless_loopback(host: str) -> None:
    if not (_loopback_allowed and host in ("127.0.0.1", "::1", "localhost")):
        raise RuntimeError(f"a test tried to reach {host}: tests open no socket (see tests/conftest.py)")


@pytest.fixture(scope="session")
def phantom_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of synthetic X-rays with labels.csv; two files are broken on purpose. Read it, never change it."""
    from sslmed.data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms") / "images"
    write_phantoms(folder, patients=40)
    return folder


@pytest.fixture(scope="session")
def phantom_store(phantom_images: Path) -> Store:
    """Those images as a store. Read it, never change it."""
    from sslmed.commands.ingest import ingest

    path, key = phantom_images.parent / "store", phantom_images.parent / "phantoms.key"
    key.write_text("0" * 64 + "\n", encoding="ascii")  # always the same patients in train: learning is tested on them
    ingest(phantom_images, path, modality="xray", labels=phantom_images / "labels.csv", key=key)
    return Store(path)
