"""``sslmed publish``: an artifact with a complete card, as a folder for a hub or a mirror."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslmed import artifact
from sslmed.artifact import MANIFEST, Card, Measured, StatedConfig, non_commercial
from sslmed.config import DataError, OutputExistsError, UsageError
from sslmed.console import command
from sslmed.durable import sha256
from sslmed.exporting import timm_folder
from sslmed.settings_errors import unknown
from sslmed.supervised import evaluated, measured, self_test
from sslmed.training.starts import licence_of

# What stands in the command that would do, where nobody has said it yet.
EXAMPLES = {
    "licence": "CC-BY-4.0",
    "data_licence": "CC0-1.0",
    "intended_use": "WHAT FOR, FOR WHOM",
    "limits": "WHAT NOT FOR",
}


@dataclass(frozen=True)
class PublishResult:
    """A published folder.

    Attributes:
        sha256: of its MANIFEST.json, which is what someone needs who pulls it.
        files: how many there are, the manifest included.
        warnings: what its readers must know of the licences.
    """

    model: str
    to: str
    sha256: str
    files: int
    warnings: tuple[str, ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(f"warning: {each}" for each in self.warnings),
            f"published {self.model}: {self.files} files in {self.to}",
            f"sha256 of {MANIFEST}: {self.sha256}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def publish(
    model: str | Path, to: str | Path, *, stated: Sequence[str] = (), evaluation: str | Path | None = None
) -> PublishResult:
    """Make a folder ready for a hub or a mirror: the artifact, what only a person can say of it, its scores.

    The folder holds the artifact's files with a complete card and its page, ``config.json``, by which timm loads it,
    and the manifest of all of them.

    Args:
        model: a run or an artifact.
        to: the folder to make.
        stated: ``key=value`` for the fields of `StatedConfig`, on top of what the card says.
        evaluation: what ``sslmed evaluate`` wrote of this backbone; by default what lies in its run.

    Raises:
        UsageError: an unknown key, or an evaluation of a model that has scores of its own.
        MissingInputError: nothing is there.
        DataError: the artifact is damaged, its card has gaps, or the evaluation is of other weights.
        OutputExistsError: there is something at ``to``.
        DiskError: the folder cannot be written.
    """
    to, given = Path(to), _given(stated)
    if to.exists() or to.is_symlink():
        raise OutputExistsError(f"the output {to} exists already; remove it, or give another --to")
    card = artifact.read_card(model)
    said, heeded = StatedConfig(**(card.stated.model_dump() | given)), licence_of(card)
    _refuse_gaps(said, model, to, evaluation)
    card = card.model_copy(update={"stated": said, "measured": _measured(card, model, evaluation)})
    self_test.check(model)
    others = {timm_folder.CONFIG: json.dumps(timm_folder.config(card), indent=2) + "\n"}
    with artifact.rewritten(artifact.resolve(model), to, card, others) as folder:
        self_test.check(folder)  # what was copied, should someone have changed it meanwhile
        digest, files = sha256(folder / MANIFEST), len(list(folder.iterdir()))
    following = command("sslmed", "pull", to, "--sha256", digest, "--out", "ARTIFACT")
    return PublishResult(str(model), str(to), digest, files, _warnings(heeded, said.licence), following)


def _given(stated: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    allowed = StatedConfig.model_fields
    for text in stated:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is not KEY=VALUE; allowed keys: {', '.join(allowed)}")
        if key not in allowed:
            raise UsageError(f"'{key}' {unknown(key, allowed, {})}; allowed: {', '.join(allowed)}")
        if key in given:
            raise UsageError(f"'{key}' is given twice")
        given[key] = value.strip()
    return given


def _refuse_gaps(said: StatedConfig, model: str | Path, to: Path, evaluation: str | Path | None) -> None:
    gaps = [name for name, text in said.model_dump().items() if not text.strip()]
    if not gaps:
        return
    words = [f"{name}={text.strip() or EXAMPLES[name]}" for name, text in said.model_dump().items()]
    own = [] if evaluation is None else ["--evaluation", evaluation]
    raise DataError(
        f"the card of {model} has gaps: {', '.join(gaps)} {'is' if len(gaps) == 1 else 'are'} not stated, and only you "
        f"can say {'it' if len(gaps) == 1 else 'them'}. With your words in place of these:\n"
        f"{command('sslmed', 'publish', model, *words, '--to', to, *own)}"
    )


def _measured(card: Card, model: str | Path, evaluation: str | Path | None) -> Measured | None:
    """The scores of a backbone by ``evaluate``; a fine-tuned model has its own."""
    if card.head is not None:
        if evaluation is not None:
            raise UsageError(f"{model} is a fine-tuned model, which has test scores of its own; leave --evaluation out")
        return card.measured
    usual = evaluated.usual_folder(artifact.resolve(model))
    if evaluation is None and not (usual / evaluated.NAME).is_file():
        return card.measured
    folder = usual if evaluation is None else Path(evaluation)
    found = evaluated.read(folder)
    if found.protocol.get("weights") != artifact.weights(model):
        raise DataError(
            f"the evaluation in {folder} is of other weights than those of {model}, or does not say of which.\n"
            f"Evaluate these: {command('sslmed', 'evaluate', model, '--data', found.data, '--out', 'DIR')}\n"
            "and publish with --evaluation DIR"
        )
    return measured.of_backbone(found)


def _warnings(heeded: str, stated: str) -> tuple[str, ...]:
    """Of a licence that goes further than the one that these weights came under."""
    if not non_commercial(heeded) or non_commercial(stated):
        return ()
    return (
        f"these weights, or those that they started from, are for non-commercial use: {heeded}; "
        f"the licence that you state, {stated}, does not say so",
    )
