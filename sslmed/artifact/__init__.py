"""The folder that leaves a run: weights under timm's names, a card, a manifest of digests and a self-test.

model.safetensors        the backbone
head.safetensors         the head, for a fine-tuned model
decoder.safetensors      neck and decoder of a restorative pretext task, from which a segmentation may start
familiarity.safetensors  mean and covariance of the features of what it was trained on, for a fine-tuned model
card.json  README.md     what it is, for programs and for people
fingerprint.safetensors  keyed digests of the patients and images that training saw
selftest.safetensors     an input and its features, and what the head answers
MANIFEST.json            sha256 of each file
config.json              of a published one: what timm reads from a hub or a folder
"""

from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from torch import nn

from sslmed.artifact import selftest
from sslmed.artifact.card import SCHEMA
from sslmed.artifact.card import Card as Card
from sslmed.artifact.card import DataCard as DataCard
from sslmed.artifact.card import HeadCard as HeadCard
from sslmed.artifact.card import ImportCard as ImportCard
from sslmed.artifact.card import Measured as Measured
from sslmed.artifact.card import Score as Score
from sslmed.artifact.card import StatedConfig as StatedConfig
from sslmed.artifact.card import non_commercial as non_commercial
from sslmed.artifact.manifest import MANIFEST as MANIFEST
from sslmed.artifact.manifest import damage as damage
from sslmed.artifact.manifest import read_json
from sslmed.artifact.page import OVERALL as OVERALL
from sslmed.artifact.selftest import Answers
from sslmed.artifact.selftest import SelfTest as SelfTest
from sslmed.artifact.writing import DECODER as DECODER
from sslmed.artifact.writing import made as made
from sslmed.artifact.writing import rewritten as rewritten
from sslmed.artifact.writing import write as write
from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data import identity
from sslmed.data.modality import MODALITIES, Modality, in_words, named, with_windows
from sslmed.data.sampling import Rows
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.models.backbones import build

MIXED_KEYS = "mixed"  # no site has this key id, so that "seen in training?" is answered "cannot tell"
SELF_TEST_TOLERANCE = selftest.TOLERANCE
SEEN_BYTES = 8  # of a digest in the fingerprint


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
    content = read_json(folder / "card.json")
    if not isinstance(content, dict):
        raise DataError(f"the card of {folder} is not valid: it has no fields")
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


def load_backbone(path: Path | str) -> nn.Module:
    """The pretrained timm network in evaluation mode: images (N, C, H, W) -> pooled features (N, D).

    Args:
        path: an artifact, or a finished run.

    Raises:
        MissingInputError: nothing is there.
        DataError: a file is damaged, or its tensors are not those of the architecture on the card.
    """
    card = read_card(path)
    try:
        network = build(card.backbone, card.size, seed=0).network
    except UsageError as error:  # what a person would be told of their recipe
        raise DataError(f"the network of {path} cannot be built here: {str(error).splitlines()[0]}") from error
    _load_tensors(network, resolve(path) / "model.safetensors")
    return network.eval()


def weights(path: Path | str) -> str:
    """The sha256 of the backbone's file."""
    return sha256(resolve(path) / "model.safetensors")


def load_head(path: Path | str, head: nn.Module) -> None:
    """Fill ``head`` with the artifact's tensors."""
    _load_tensors(head, resolve(path) / "head.safetensors")


def read_decoder(path: Path | str) -> dict[str, torch.Tensor]:
    """The neck and the decoder beside a backbone whose card names them, by the names of the segmentation head.

    Raises:
        DataError: their file is missing, or no file of tensors.
    """
    return _read_tensors(resolve(path) / DECODER)


def read_familiarity(path: Path | str) -> dict[str, torch.Tensor] | None:
    """What ``write`` was given, or None."""
    file = resolve(path) / "familiarity.safetensors"
    return _read_tensors(file) if file.is_file() else None


def read_fingerprint(path: Path | str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Keyed digests (n, 8) of the patients and images that training saw, with those of its parents."""
    file = resolve(path) / "fingerprint.safetensors"
    seen = _read_tensors(file).get("seen")
    if seen is None or seen.dtype != torch.uint8 or seen.ndim != 2 or seen.shape[1] != SEEN_BYTES:
        raise DataError(f"{file} does not hold digests of patients")
    return np.asarray(seen.numpy())


def fingerprint(store: Store, rows: Rows) -> identity.Fingerprint:
    """Keyed digests (n, 8) of the patients and images in ``rows``."""
    return identity.fingerprint(store.patients(rows), store.index.content[rows])


def patients_seen(path: Path | str, store: Store, rows: Rows) -> int | None:
    """How many patients of ``rows`` the artifact's training saw; None when that cannot be told."""
    key_id = read_card(path).data.key_id
    return identity.seen(read_fingerprint(path), key_id, store.patients(rows), store.index.content[rows], store.key_id)


def self_test(path: Path | str, answers: Answers | None = None) -> SelfTest:
    """Run the stored input through the weights and compare with what is stored.

    Args:
        answers: what the loaded head makes of images; compared where the artifact has kept some.

    Raises:
        DataError: the artifact is damaged, or holds no self-test of its card.
    """
    kept = _read_tensors(resolve(path) / "selftest.safetensors")
    return selftest.compared(read_card(path), kept, load_backbone(path), answers)


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


def _load_tensors(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(_read_tensors(path), strict=True)
    except (DataError, RuntimeError) as error:
        raise DataError(f"{path} does not hold this network's tensors: {str(error).splitlines()[0]}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no file of tensors: {str(error).splitlines()[0]}") from error
