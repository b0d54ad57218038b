"""A small X-ray backbone from public images to a published folder; on one machine its weights are the same each time.

    python benchmarks/checkpoint.py --data ../shared/data --out xray-backbone [--twice]

Ingest with a public key, so that everyone gets the same split; SimCLR by the shipped recipe ``xray/simclr_resnet10t``;
probes with intervals beside random weights; a card; the folder that ``sslmed pull`` takes. What came out is kept in
``benchmarks/results/checkpoint/checkpoint.json``. ``--twice`` does the training again and compares the digests.
Training is on the CPU in float32 with two threads: other processors, and other numbers of threads, round otherwise.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import cells
import hardware
import torch
from xrays import open_store

import sslmed
from sslmed.durable import sha256, write_json

ROOT = Path(__file__).parents[1]
RECIPE = "xray/simclr_resnet10t"
SETTINGS = ("train.precision=32", "train.devices=cpu", "data.workers=0")
STATED = (
    "licence=Apache-2.0",
    "data_licence=CC-BY-4.0",
    "intended_use=A start for fine-tuning on a few labelled paediatric chest radiographs, and an example of a complete "
    "artifact. Research only.",
    "limits=Trained for minutes on images of one hospital, of children aged one to five, at 96 pixels. Not tried on "
    "adults, on other devices or on other findings than pneumonia. Not a diagnosis.",
)
THREADS = 2


def main() -> None:
    given = _arguments()
    torch.set_num_threads(THREADS)
    store = open_store(given.data / "xray_pneumonia", given.work)
    started = time.monotonic()
    run = sslmed.pretrain(RECIPE, store.path, given.work / "checkpoint", overrides=(*SETTINGS, *given.settings))
    minutes = (time.monotonic() - started) / 60
    evaluated = sslmed.evaluate(run.run, store.path, target="label", seeds=given.seeds)
    sslmed.publish(run.run, given.out, stated=STATED)
    record: dict[str, Any] = {
        "command": "python benchmarks/checkpoint.py --data ../shared/data --out xray-backbone --twice",
        "recipe": RECIPE,
        "settings": [*SETTINGS, *given.settings],
        "weights_sha256": sha256(given.out / "model.safetensors"),
        "bytes": sum(path.stat().st_size for path in given.out.iterdir()),
        "minutes": round(minutes, 1),
        "seen": evaluated.seen,
        "test_patients": evaluated.test_patients,
        "auroc": [
            {"budget": row.budget, "by": row.probe, "start": row.arm, **_interval(row.value)}
            for row in evaluated.rows
            if row.metric == "auroc"
        ],
        "commit": given.commit or cells.commit(),
        "device": cells.device(),
        "machine": hardware.flags(),
    }
    if given.twice:
        again = sslmed.pretrain(RECIPE, store.path, given.work / "again", overrides=(*SETTINGS, *given.settings))
        record["again_sha256"] = sha256(Path(again.artifact) / "model.safetensors")
        shutil.rmtree(given.work / "again")
    given.results.mkdir(parents=True, exist_ok=True)
    write_json(given.results / "checkpoint.json", record)
    print(json.dumps(record, indent=2))


def _interval(value: Any) -> dict[str, float]:
    return {"mean": round(value.mean, 4), "low": round(value.low, 4), "high": round(value.high, 4)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds xray_pneumonia")
    parser.add_argument("--out", type=Path, required=True, help="the folder to publish")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work" / "checkpoint")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--commit", help="of this code, where it lies without its history")
    parser.add_argument("settings", nargs="*", help="on top of the recipe, such as train.max_steps=2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
