"""The folder that leaves a run: weights under timm's names, a card, a manifest of digests and a self-test.

model.safetensors        the backbone
head.safetensors         the head, for a fine-tuned model
familiarity.safetensors  mean and covariance of the features of what it was trained on, for a fine-tuned model
card.json  README.md     what it is, for programs and for people
fingerprint.safetensors  keyed digests of the patients and images that training saw
selftest.safetensors     an input and its features
MANIFEST.json            sha256 of each file
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from torch import nn

from sslmed import image_size
from sslmed.artifact.card import SCHEMA, readme
from sslmed.artifact.card import Card as Card
from sslmed.artifact.card import DataCard as DataCard
from sslmed.artifact.card import HeadCard as HeadCard
from sslmed.config import DataError, DiskError, MissingInputError
from sslmed.data import identity
from sslmed.data.modality import MODALITIES, Modality, in_words, named, with_windows
from sslmed.data.sampling import Rows
from sslmed.data.store import Store
from sslmed.durable import PARTIAL, sha256
from sslmed.keyed_rng import rng
from sslmed.models.backbones import build

MANIFEST = "MANIFEST.json"
MIXED_KEYS = "mixed"  # no site has this key id, so that "seen in training?" is answered "cannot tell"
SELF_TEST_TOLERANCE = 1e-4  # relative to the largest feature: other CPUs add in another order


@dataclass(frozen=True)
class SelfTest:
    """The outcome of running the stored input through the loaded weights."""

    passed: bool
    difference: float


def write(
    folder: Path,
    network: nn.Module,
    card: Card,
    seen: np.ndarray[Any, np.dtype[np.uint8]],
    head: nn.Module | None = None,
    familiarity: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an artifact, whole or not at all, in place of an earlier one of the same run.

    Args:
        network: the timm network; its self-test features are computed here.
        seen: what training saw, (n, 8), as ``data.identity.fingerprint`` makes it.
        head: the supervised head.
        familiarity: statistics of the features of what training saw, without a patient's own.

    Raises:
        DiskError: disk full, read-only or an I/O error; an earlier artifact is untouched.
    """
    from safetensors import SafetensorError

    earlier = _earlier(folder)
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)  # a process was killed between the two renames
    for orphan in (earlier, *folder.parent.glob(f".{folder.name}.*{PARTIAL}")):  # of one that was killed while it wrote
        shutil.rmtree(orphan, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        _save_tensors(partial / "model.safetensors", _state(network))
        if head is not None:
            _save_tensors(partial / "head.safetensors", _state(head))
        if familiarity is not None:
            _save_tensors(partial / "familiarity.safetensors", familiarity)
        _save_tensors(partial / "fingerprint.safetensors", {"seen": torch.from_numpy(np.array(seen, dtype=np.uint8))})
        images = _self_test_input(card)
        _save_tensors(partial / "selftest.safetensors", {"input": images, "features": _features(network, images)})
        (partial / "card.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(readme(card), encoding="utf-8")
        digests = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone, but an artifact is for others
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _swap(partial, folder)
    except (OSError, SafetensorError) as error:  # safetensors has no other word for a full disk
        raise DiskError(f"cannot write {folder}: {error}. What was there before is untouched.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.earlier")


def _swap(new: Path, folder: Path) -> None:
    earlier = _earlier(folder)
    if folder.exists():
        folder.rename(earlier)
    try:
        new.rename(folder)
    except OSError:
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def resolve(path: Path | str) -> Path:
    """The artifact folder of an artifact or of a run.

    Raises:
        MissingInputError: nothing is there.
        DataError: something else is there, or the run has not finished.
    """
    path = Path(path)
    for folder in (path, path / "artifact"):
        if (folder / MANIFEST).is_file():
            return folder
    if not path.exists():
        raise MissingInputError(f"there is no run or artifact at {path}")
    if (path / "run.json").is_file():
        raise DataError(f"the run {path} has no artifact yet; finish it with the same command and --resume")
    raise DataError(f"{path} is neither a run nor an artifact: it holds no {MANIFEST}")


def read_card(path: Path | str) -> Card:
    """The card of an artifact or run, after every file's digest has been checked.

    Raises:
        MissingInputError: nothing is there.
        DataError: a file is missing or damaged, or the card is of a newer version.
    """
    folder = resolve(path)
    damaged = damage(folder)
    if damaged:
        raise DataError(f"the artifact {folder} is damaged: {'; '.join(damaged[:3])}. Get it again, or make it again.")
    content = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    if content.get("schema_version") != SCHEMA:
        raise DataError(
            f"{folder} has card version {content.get('schema_version')}; this sslmed reads version {SCHEMA}"
        )
    try:
        card = Card.model_validate(content)
    except pydantic.ValidationError as error:
        raise DataError(f"the card of {folder} is not valid: {error.errors()[0]['msg']}") from error
    if card.modality not in MODALITIES:
        raise DataError(f"{folder} is for {card.modality} images; this sslmed knows {', '.join(MODALITIES)}")
    return card


def damage(folder: Path) -> list[str]:
    """What does not match the manifest, a line a file; empty when the artifact is whole."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = {str(name): str(digest) for name, digest in digests.items()}
    except (OSError, ValueError, AttributeError):
        return [f"{MANIFEST} is not readable"]
    found = []
    for name, digest in names.items():
        if Path(name).name != name or not (folder / name).is_file():
            found.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            found.append(f"{name} does not match its digest")
    required = {"model.safetensors", "card.json", "selftest.safetensors", "fingerprint.safetensors"}
    return found + [f"{name} is not in the manifest" for name in sorted(required - set(names))]


def load_backbone(path: Path | str) -> nn.Module:
    """The pretrained timm network in evaluation mode: images (N, C, H, W) -> pooled features (N, D).

    Args:
        path: an artifact, or a finished run.

    Raises:
        MissingInputError: nothing is there.
        DataError: a file is damaged, or its tensors are not those of the architecture on the card.
    """
    card = read_card(path)
    network = build(card.backbone, card.size, seed=0).network
    _load_tensors(network, resolve(path) / "model.safetensors")
    return network.eval()


def load_head(path: Path | str, head: nn.Module) -> None:
    """Fill ``head`` with the artifact's tensors."""
    _load_tensors(head, resolve(path) / "head.safetensors")


def read_familiarity(path: Path | str) -> dict[str, torch.Tensor] | None:
    """What ``write`` was given, or None."""
    from safetensors.torch import load_file

    file = resolve(path) / "familiarity.safetensors"
    return load_file(file) if file.is_file() else None


def read_fingerprint(path: Path | str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Keyed digests (n, 8) of the patients and images that training saw, with those of its parents."""
    from safetensors.numpy import load_file

    return np.asarray(load_file(resolve(path) / "fingerprint.safetensors")["seen"])


def fingerprint(store: Store, rows: Rows) -> identity.Fingerprint:
    """Keyed digests (n, 8) of the patients and images in ``rows``."""
    return identity.fingerprint(store.patients(rows), store.index.content[rows])


def patients_seen(path: Path | str, store: Store, rows: Rows) -> int | None:
    """How many patients of ``rows`` the artifact's training saw; None when that cannot be told."""
    key_id = read_card(path).data.key_id
    return identity.seen(read_fingerprint(path), key_id, store.patients(rows), store.index.content[rows], store.key_id)


def self_test(path: Path | str) -> SelfTest:
    """Run the stored input through the weights and compare with the stored features."""
    from safetensors.torch import load_file

    network = load_backbone(path)
    stored = load_file(resolve(path) / "selftest.safetensors")
    features = _features(network, stored["input"])
    difference = float((features - stored["features"]).abs().max() / stored["features"].abs().max().clamp_min(1e-12))
    return SelfTest(difference <= SELF_TEST_TOLERANCE, difference)


def check_fits(card: Card, modality: str, channels: int) -> None:
    """Refuse a store that the artifact was not made for.

    Raises:
        DataError: another modality, or other channels than an image becomes with the card's windows and slices.
    """
    planes = channels * card.slices * max(1, len(card.windows))
    if card.modality != modality or planes not in (1, card.backbone.in_chans):  # a single plane is repeated
        raise DataError(
            f"backbone was trained on {card.backbone.in_chans}-channel {card.modality}; "
            f"the store holds {planes}-channel {modality}"
        )


def policy(card: Card) -> Modality:
    """The modality with the windows that the artifact was trained with.

    Raises:
        DataError: this sslmed normalises such images otherwise than the one that trained it.
    """
    found = with_windows(named(card.modality), card.windows)
    if in_words(found) != card.normalisation:
        raise DataError(
            f"the artifact was trained on {card.modality} images normalised by {card.normalisation};\n"
            f"this sslmed normalises them by {in_words(found)}. Use the sslmed that made it, {card.sslmed_version}."
        )
    return found


def describe(store: Store, rows: Rows) -> DataCard:
    """What the card says of the ``rows`` that training read."""
    return DataCard(
        fingerprint=store.fingerprint,
        key_id=store.key_id,
        split_digest=store.split_digest,
        images=len(rows),
        patients=len(np.unique(store.patients(rows))),
    )


def inherit(
    data: DataCard, seen: np.ndarray[Any, np.dtype[np.uint8]], parent: Path | str
) -> tuple[DataCard, np.ndarray[Any, np.dtype[np.uint8]]]:
    """What a training saw together with what the artifact ``parent`` that it started from had seen.

    Digests under two keys cannot be told apart, so then the key is ``MIXED_KEYS``.
    """
    everybody = np.unique(np.concatenate([seen, read_fingerprint(parent)]), axis=0)
    if read_card(parent).data.key_id != data.key_id:
        data = data.model_copy(update={"key_id": MIXED_KEYS})
    return data, everybody


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    # contiguous: safetensors refuses channels_last tensors
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def _load_tensors(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{path} does not hold this network's tensors: {str(error).splitlines()[0]}") from error


def _self_test_input(card: Card) -> torch.Tensor:
    stream = rng(0, 0, 0, "self-test")
    shape = (2, card.backbone.in_chans, *image_size.sides(card.size))
    return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))


@torch.inference_mode()
def _features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    features: torch.Tensor = network(images.to(device)).float().cpu().contiguous()
    network.train(training)
    return features
