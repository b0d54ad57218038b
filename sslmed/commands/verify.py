"""``sslmed verify``: is this store, run or artifact what was written?"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslmed import artifact
from sslmed.config import DataError, MissingInputError
from sslmed.console import command
from sslmed.data.shards.format import STORE_JSON
from sslmed.data.store import Store
from sslmed.training import checkpoint_files


@dataclass(frozen=True)
class VerifyResult:
    """Something whole. What is damaged raises."""

    path: str
    kind: str
    checked: str
    next: str

    def lines(self) -> list[str]:
        """For people."""
        return [f"{self.path}: {self.kind}, whole: {self.checked}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def verify(path: str | Path) -> VerifyResult:
    """Check every digest of a store, run or artifact, and run the self-test of its weights on this machine.

    Raises:
        MissingInputError: nothing is there.
        DataError: it is damaged; the message lists how.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"there is nothing at {path}")
    if (path / STORE_JSON).is_file():
        return _store(path)
    parts = []
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"))
    for checkpoint in checkpoints:
        checkpoint_files.load(checkpoint)
    if checkpoints:
        parts.append("checkpoint" if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints")
    folder = artifact.resolve(path)
    card = artifact.read_card(folder)
    outcome = artifact.self_test(folder)
    if not outcome.passed:
        raise DataError(
            f"{folder}: the self-test differs by {outcome.difference:.1e}, allowed {artifact.SELF_TEST_TOLERANCE:.0e}: "
            "these weights or this machine's arithmetic are not what was published"
        )
    parts.append(f"every digest, self-test within {outcome.difference:.1e}")
    use = ("predict", path, "SOURCE", "--out", "DIR") if card.head else ("evaluate", path, "--data", "STORE")
    return VerifyResult(str(path), f"{card.kind} {card.backbone.name}", ", ".join(parts), command("sslmed", *use))


def _store(path: Path) -> VerifyResult:
    store = Store(path)
    findings = store.verify()
    if findings:
        more = [f"and {len(findings) - 4} more"] if len(findings) > 4 else []
        raise DataError("\n".join([f"{path} is damaged:", *findings[:4], *more]))
    next_command = command("sslmed", "pretrain", f"{store.modality}/simclr_resnet18", "--data", path, "--out", "RUN")
    return VerifyResult(str(path), f"store of {len(store)} {store.modality} images", "every digest", next_command)
