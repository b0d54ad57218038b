"""Runs that several tests read: trained once, on phantoms, with timm's smallest ResNet."""

import numpy as np
import pytest

from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.pretrain import PretrainResult, pretrain
from sslmed.data.store import Store
from sslmed.data.writers import write_image

PRETRAIN = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "method.hidden=64",
    "train.epochs=2",
    "train.batch_size=16",
    "train.precision=32",
    "monitor.knn_every=1",
    "monitor.log_every=1",
)
FINETUNE = (
    "data.workers=0",
    "train.max_steps=6",
    "train.batch_size=16",
    "train.save_every_steps=4",
    "train.precision=32",
    "stop.check_every=2",
    "optim.lr=1e-3",
)


@pytest.fixture(scope="session")
def pretrain_settings() -> tuple[str, ...]:
    return PRETRAIN


@pytest.fixture(scope="session")
def finetune_settings() -> tuple[str, ...]:
    """What to set when the weights come from an artifact."""
    return FINETUNE


@pytest.fixture(scope="session")
def random_settings() -> tuple[str, ...]:
    """What to set when the weights are random."""
    return (*FINETUNE, "backbone.name=test_resnet", "data.size=32")


@pytest.fixture(scope="session")
def pretrained(phantom_store: Store, tmp_path_factory: pytest.TempPathFactory) -> PretrainResult:
    """Two epochs. Read it, never change it."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    return pretrain("xray/simclr_resnet18", phantom_store.path, out, overrides=PRETRAIN)


@pytest.fixture(scope="session")
def tuned(phantom_store: Store, pretrained: PretrainResult, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """The pretrained backbone with a classifier. Read it, never change it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    return finetune("xray/classification", phantom_store.path, out, start=pretrained.run, overrides=FINETUNE)


@pytest.fixture(scope="session")
def photo_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Colour photos of twenty patients in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(20):
        name = folder / "raw" / ("dog" if number % 2 else "cat")
        name.mkdir(parents=True, exist_ok=True)
        write_image(name / f"{number}.png", random.integers(0, 256, (40, 36, 3), dtype=np.uint8))
    ingest(folder / "raw", folder / "store", modality="photo")
    return Store(folder / "store")


class Reads:
    """Which rows of a store were read, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        pixels = Store.pixels

        def noted(store: Store, row: int, slices: int = 1) -> np.ndarray:
            self.rows.append(int(row))
            return pixels(store, row, slices)

        patch.setattr(Store, "pixels", noted)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)
