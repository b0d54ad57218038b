"""``sslmed demo``: the whole way on synthetic X-rays, on a CPU, offline, in about two minutes."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sslmed
from sslmed.config import OutputExistsError
from sslmed.console import command, say
from sslmed.data.phantoms import write_phantoms
from sslmed.evaluation import predictions
from sslmed.evaluation.protocol import Estimate, Interval

PATIENTS = 180
LABELS = "k=15"  # patients of each of the two classes: 30 labelled patients
BACKBONE = ("backbone.name=resnet10t", "data.size=64", "data.workers=0")
PRETRAIN = (*BACKBONE, "train.max_steps=220", "train.batch_size=32", "monitor.knn_every=5")
FINETUNE = (
    "train.max_steps=60",
    "train.batch_size=16",
    "stop.check_every=15",
    "data.workers=0",
    f"labels.budget={LABELS}",
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, whichever way it went: test AUROC with 95 % intervals, and the paired difference."""

    out: str
    broken: tuple[str, ...]
    val_patients: int
    pretrained: tuple[float, float, float]
    random: tuple[float, float, float]
    difference: tuple[float, float, float]
    seconds: float
    next: str

    def lines(self) -> list[str]:
        """For people."""
        verdict = (
            "helped"
            if self.difference[1] > 0
            else "hurt"
            if self.difference[2] < 0
            else "made no difference that this test can show"
        )
        return [
            "",
            f"SYNTHETIC images, {LABELS.removeprefix('k=')} labelled train patients a class, "
            f"{self.val_patients} val patients to stop on;",
            "AUROC on unseen test patients [95 % interval]:",
            f"  from the pretrained backbone  {_text(self.pretrained)}",
            f"  from random weights           {_text(self.random)}",
            f"  difference, paired            {_text(self.difference, '+')}",
            f"Here pretraining {verdict}. The whole demo took {self.seconds:.0f} s; everything is in {self.out}.",
            "",
            "With your own images (PNG, JPEG or TIFF X-rays; a CSV with file, patient and label:NAME columns):",
            "  sslmed ingest IMAGES --out store --modality xray --labels labels.csv",
            "  sslmed pretrain xray/simclr_resnet18 --data store --out run",
            "  sslmed evaluate run --data store",
            "  sslmed finetune xray/classification --data store --from run --out model",
            "  sslmed predict model NEW_IMAGES --out predictions",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def demo(out: str | Path = "sslmed-demo") -> DemoResult:
    """Draw synthetic X-rays, ingest, pretrain, fine-tune on few labels beside a random start, verify, predict.

    Args:
        out: a new folder for all of it.

    Raises:
        OutputExistsError: ``out`` is there already.
    """
    started, out = time.monotonic(), Path(out)
    if out.exists():
        raise OutputExistsError(
            f"the output {out} exists already. Look at it with `sslmed verify {out / 'pretrained'}`, "
            f"give another place with `sslmed demo --out DIR`, or delete it and run the demo again."
        )
    say("1/5 drawing synthetic X-rays (no patient is shown; two files are broken on purpose)")
    phantoms = write_phantoms(out / "images", PATIENTS)
    say("2/5 ingest: check every file, split by patient")
    store = sslmed.ingest(out / "images", out / "store", modality="xray", labels=phantoms.labels)
    for line in store.lines():
        say(f"    {line}")
    say("3/5 pretrain a small ResNet with SimCLR, without labels")
    pretrained = sslmed.pretrain("xray/simclr_resnet18", out / "store", out / "pretrained", overrides=PRETRAIN)
    say("4/5 fine-tune on few labels, from the pretrained and from random weights")
    runs: dict[str, list[Path]] = {}
    val_patients = 0
    for name, start, extra in (("pretrained", pretrained.run, ()), ("random", "random", BACKBONE)):
        tuned = sslmed.finetune(
            "xray/classification", out / "store", out / f"finetuned-{name}", start=start, overrides=(*FINETUNE, *extra)
        )
        runs[name], val_patients = [Path(tuned.run)], tuned.val_patients
    say("5/5 verify the artifact and predict files")
    sslmed.verify(out / "finetuned-pretrained")
    sslmed.predict(out / "finetuned-pretrained", out / "images", out / "predictions")
    estimates = {each.arm: each for each in predictions.compare(runs, reference="random") if each.metric == "auroc"}
    return DemoResult(
        str(out),
        phantoms.broken,
        val_patients,
        _triple(estimates["pretrained"].value),
        _triple(estimates["random"].value),
        _difference(estimates["pretrained"]),
        time.monotonic() - started,
        command("sslmed", "evaluate", out / "pretrained", "--data", out / "store"),
    )


def _difference(estimate: Estimate) -> tuple[float, float, float]:
    return _triple(estimate.difference or estimate.value)


def _triple(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def _text(triple: tuple[float, float, float], sign: str = "") -> str:
    value, low, high = triple
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
