"""``sslmed import``: published weights of another training in, an artifact out, with a report of every tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from sslmed import artifact
from sslmed.artifact import Card, DataCard, ImportCard, StatedConfig
from sslmed.config import OutputExistsError, UsageError
from sslmed.console import command
from sslmed.data import modality as modalities
from sslmed.durable import sha256
from sslmed.image_size import ImageSize
from sslmed.models import key_layouts, weights
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.key_layouts import KeyLayout
from sslmed.models.weights import LoadReport
from sslmed.settings_errors import problems

METHOD = "imported"
SEED = 0  # of tensors that the file lacks


@dataclass(frozen=True)
class ImportResult:
    """What became of the file.

    Attributes:
        layout: the family whose names it has, or ``by order``.
        matched: tensors that were taken as they are.
        adapted: those that were changed to fit, a line each.
        dropped: tensors that were left out by design.
        surplus: tensors that were left out and that no layout knows of.
        missing: tensors that stayed random.
        licence: as it was stated.
        usual_licence: of the files of that family; nobody says that it is this file's.
        digest: sha256 of the file.
        report: all that people should read, a line each.
    """

    artifact: str
    layout: str
    matched: int
    adapted: tuple[str, ...]
    dropped: tuple[str, ...]
    surplus: tuple[str, ...]
    missing: tuple[str, ...]
    licence: str
    usual_licence: str
    digest: str
    report: tuple[str, ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        return [*self.report, f"artifact: {self.artifact}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def import_weights(
    file: Path | str,
    out: Path | str,
    *,
    backbone: str,
    modality: str,
    in_chans: int | None = None,
    size: ImageSize = 224,
    patch: int | None = None,
    pool: str | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    licence: str = "",
    source: str = "",
    allow_partial: bool = False,
) -> ImportResult:
    """Turn a file of foreign weights into an artifact, which every other command takes.

    Nothing in the file is run. Every tensor of the network has to be in it. The card says that nobody knows whom the
    weights have seen.

    Args:
        file: ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.pth.tar`` or ``.ckpt``.
        out: the artifact to make.
        backbone: timm's name of their network.
        modality: of the images that they are to be used for.
        in_chans: input channels that they are adapted to; by default 3 where images of the modality come in colour.
        size: of the input that they are adapted to, pixels: the side of a square, or height and width.
        patch: side of a transformer's patches, pixels; timm's own by default.
        pool: ``token`` or ``avg``; timm's own by default.
        layout: the family whose names the file has; by default found.
        prefix: what the network's names have before them there; by default one that the family has.
        licence: theirs, an SPDX identifier such as ``CC-BY-NC-4.0``.
        source: where they come from: a page, a paper.
        allow_partial: let tensors that the file lacks stay random.

    Raises:
        UsageError: a network, modality, number, layout or prefix that does not exist.
        MissingInputError: there is no file.
        DataError: it holds more than tensors, or does not fill the network.
        OutputExistsError: ``out`` exists.
        DiskError: the artifact cannot be written.
    """
    path, folder = Path(file), Path(out)
    if folder.exists() or folder.is_symlink():
        raise OutputExistsError(f"the output {folder} exists already; remove it, or give another --out")
    policy = modalities.named(modality)
    family = key_layouts.named(layout) if layout is not None else None
    in_chans = max(policy.channels) if in_chans is None else in_chans
    config = _settings({"name": backbone, "in_chans": in_chans, "init": "file", "patch": patch, "pool": pool})
    state = weights.read(path, family)
    built = build(config, size, SEED)
    report = weights.fill(
        built.network,
        state,
        str(path),
        ordered=path.suffix != weights.SAFETENSORS,
        family=family,
        prefix=prefix,
        partial=allow_partial,
    )
    digest = sha256(path)
    card = Card(
        backbone=config,
        num_features=built.num_features,
        size=size,
        modality=policy.name,
        channels=in_chans if in_chans in policy.channels else 1,
        normalisation=modalities.in_words(policy),
        method={"name": METHOD},
        recipe={},
        data=DataCard(fingerprint="", key_id=artifact.MIXED_KEYS, split_digest="", images=0, patients=0),
        steps=0,
        parent=digest,
        parent_licence=licence,
        stated=StatedConfig(licence=licence),
        imported=_imported(report, digest, source),
    )
    artifact.write(folder, built.network, card, np.empty((0, 8), np.uint8))
    return _result(folder, report, card, digest)


def _settings(given: Mapping[str, Any]) -> BackboneConfig:
    try:
        return BackboneConfig.model_validate(given)
    except ValidationError as error:
        path, text = problems(BackboneConfig, given, error, {})[0]
        option = {"name": "backbone"}.get(path[0], path[0]).replace("_", "-")
        raise UsageError(f"--{option} {text}") from error


def _imported(report: LoadReport, digest: str, source: str) -> ImportCard:
    return ImportCard(
        layout=report.layout,
        source=source,
        digest=digest,
        matched=report.matched,
        adapted=report.changes,
        dropped=(*report.dropped, *report.surplus),
        missing=report.random,
    )


def _result(folder: Path, report: LoadReport, card: Card, digest: str) -> ImportResult:
    family = key_layouts.KEY_LAYOUTS.get(report.layout)  # none when tensors were taken by order
    stated, usual = card.stated.licence, family.licence if family else ""
    return ImportResult(
        artifact=str(folder),
        layout=report.layout,
        matched=report.matched,
        adapted=report.changes,
        dropped=report.dropped,
        surplus=report.surplus,
        missing=report.random,
        licence=stated,
        usual_licence=usual,
        digest=digest,
        report=(*report.lines(), *_remarks(card, family)),
        next=command("sslmed", "evaluate", folder, "--data", "STORE"),
    )


def _remarks(card: Card, family: KeyLayout | None) -> Iterator[str]:
    """What to know of intensities and of the licence."""
    if family and family.note:
        yield f"note: {family.name}: {family.note}"
    yield (
        f"note: images will be normalised as {card.modality}: {card.normalisation}; the weights know those intensities "
        "that they were trained with"
    )
    licence = card.stated.licence
    if not licence:
        said = f"{family.licence} is usual ({family.source})" if family and family.licence else ""
        whose = f"; {family.name}: {said or family.source}" if family else ""
        yield f"note: the licence is not stated, give --licence{whose}"
        licence = family.usual_licence if family else ""
    if artifact.non_commercial(licence):
        yield f"warning: these weights are for non-commercial use: {licence}"
