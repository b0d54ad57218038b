"""``sslmed verify``: is this store, run, artifact or export what was written?"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sslmed import artifact, run
from sslmed.config import DataError, MissingInputError, SslmedError
from sslmed.console import command
from sslmed.data.shards.format import STORE_JSON
from sslmed.data.store import Store
from sslmed.recipe import load
from sslmed.supervised import self_test
from sslmed.training import checkpoint_files

EXPORT_JSON = "export.json"
MOST_LINES = 4  # of findings that an error shows


@dataclass(frozen=True)
class VerifyResult:
    """The verdict.

    Attributes:
        checked: what was looked at, in words.
        findings: what is damaged, a line each; none where all is whole.
        difference: of the self-test, relative to the largest number; None where there is none.
    """

    path: str
    kind: str
    verdict: Literal["whole", "damaged"]
    checked: str
    findings: tuple[str, ...]
    difference: float | None
    next: str

    def lines(self) -> list[str]:
        """For people."""
        if self.verdict == "whole":
            return [f"{self.path}: {self.kind}, whole: {self.checked}"]
        return [f"{self.path}: {self.kind}, damaged:", *self.findings]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


class Damaged(DataError):
    """Something is not what was written; ``result`` has all that was found."""

    def __init__(self, result: VerifyResult) -> None:
        self.result = result
        found = result.findings
        more = [f"and {len(found) - MOST_LINES} more"] if len(found) > MOST_LINES else []
        super().__init__("\n".join([f"{result.path} is damaged:", *found[:MOST_LINES], *more]))


def verify(path: str | Path) -> VerifyResult:
    """Check every digest of a store, run, artifact or export, and run the self-test of its weights on this machine.

    Nothing is changed. A run's recipe, ``run.json`` and metrics, which have no digest, are parsed.

    Raises:
        MissingInputError: nothing is there.
        DataError: it is none of these.
        Damaged: it is damaged; the message lists how.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"there is nothing at {path}")
    if (path / STORE_JSON).is_file():
        return _store(path)
    if (path / EXPORT_JSON).is_file():
        return _export(path)
    if (path / "run.json").is_file():
        return _run(path)
    return _artifact(artifact.resolve(path), path)


def _store(path: Path) -> VerifyResult:
    opened: list[Store] = []
    findings = _told(lambda: opened.append(Store(path))) or opened[0].verify()
    if findings:
        raise _damaged(path, "store", findings, command("sslmed", "ingest", "SOURCE", "--out", "STORE"))
    (store,) = opened
    following = command("sslmed", "pretrain", f"{store.modality}/simclr_resnet18", "--data", path, "--out", "RUN")
    return _whole(path, f"store of {len(store)} {store.modality} images", "every digest", following)


def _export(path: Path) -> VerifyResult:
    findings = artifact.damage(path, artifact=False)
    if findings:
        again = command("sslmed", "export", "RUN", "--format", "FORMAT", "--out", "DIR")
        raise _damaged(path, "export", findings, again)
    return _whole(path, "export", "every digest", command("head", path / "README.md"))


def _artifact(folder: Path, path: Path, before: Sequence[str] = (), checked: Sequence[str] = ()) -> VerifyResult:
    """Of the artifact in ``folder``, which ``path`` stands for.

    Args:
        before: findings elsewhere in the run.
        checked: what was looked at there.
    """
    outcomes: list[artifact.SelfTest] = []
    findings = artifact.damage(folder) or _told(lambda: outcomes.append(self_test.check(folder)))
    if before or findings:
        again = command("sslmed", "pull", "DIR", "--sha256", "DIGEST", "--out", "ARTIFACT")
        raise _damaged(path, "run" if checked else "artifact", [*before, *findings], again)
    card, (outcome,) = artifact.read_card(folder), outcomes
    use = ("predict", path, "SOURCE", "--out", "DIR") if card.head else ("evaluate", path, "--data", "STORE")
    parts = [*checked, f"every digest, self-test within {outcome.difference:.1e}"]
    kind = f"{card.kind} {card.backbone.name}"
    return _whole(path, kind, ", ".join(parts), command("sslmed", *use), outcome.difference)


def _run(path: Path) -> VerifyResult:
    """Of a run; one that has not come to its end may lack an artifact."""
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"))
    states: list[dict[str, Any]] = []
    findings = _told(lambda: states.append(run.read(path)))
    done = bool(states) and states[0].get("status") == "done"
    findings += _told(lambda: load(path / "recipe.yaml"))
    findings += _told(lambda: _metrics(path / "metrics.jsonl", done))
    for checkpoint in checkpoints:
        findings += _told(lambda file=checkpoint: checkpoint_files.load(file))  # type: ignore[misc]
    links = [name for name in ("run.json", "recipe.yaml", "metrics.jsonl") if (path / name).is_symlink()]
    links += [f"checkpoints/{file.name}" for file in checkpoints if file.is_symlink()]
    findings += [f"{name} is a symbolic link; put the file itself there" for name in links]
    parts = ["run.json, recipe and metrics"]
    if checkpoints:
        parts.append("checkpoint" if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints")
    if (path / "artifact").exists():
        return _artifact(path / "artifact", path, findings, parts)
    if done:
        findings.append("the run came to its end, but its artifact is missing")
    if findings:
        raise _damaged(path, "run", findings, command("sslmed", "verify", path))
    verb = str(states[0]["command"])
    again = command("sslmed", verb, path / "recipe.yaml", "--data", "STORE", "--out", path, "--resume")
    return _whole(path, f"unfinished run of {verb}", ", ".join([*parts, "no artifact yet"]), again)


def _metrics(path: Path, done: bool) -> None:
    """Parse every line; of a run that was killed the last one may be cut off."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines if done else lines[:-1], start=1):
        if line or number < len(lines):
            try:
                whole = isinstance(json.loads(line)["step"], int)
            except (ValueError, KeyError, TypeError, RecursionError):
                whole = False
            if not whole:
                raise DataError(f"{path.name}, line {number}: no step and its numbers")


def _told(check: Callable[[], object]) -> list[str]:
    """What a check that fails says, on one line."""
    try:
        check()
    except (SslmedError, OSError) as error:
        return [(str(error).splitlines() or [type(error).__name__])[0]]
    return []


def _whole(path: Path, kind: str, checked: str, following: str, difference: float | None = None) -> VerifyResult:
    return VerifyResult(str(path), kind, "whole", checked, (), difference, following)


def _damaged(path: Path, kind: str, findings: Sequence[str], following: str) -> Damaged:
    return Damaged(VerifyResult(str(path), kind, "damaged", "", tuple(findings), None, following))
