"""What methods.py compares, on which images, and by which protocol; methods_page.py says the same in words."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sslmed.methods import METHODS
from sslmed.methods.restorative import Restorative

SIZE, THREADS = 96, 1
STEPS = 166  # of SimCLR: some five CPU minutes where nothing else runs, nine beside a second process
SEEDS, REPLICATES = range(5), 2000
COMPONENTS = 256
IMAGENET, CONTINUED, RANDOM, PCA = "imagenet", "continued", "random", "pca"
LITE = "tf_efficientnet_lite0"
TUNED = ("train.max_steps=250", "train.batch_size=8", "train.precision=32", "optim.lr=2e-3", f"data.size={SIZE}")
BUDGET, TUNE_SEEDS = "k=20", range(3)
RESTORATIVE = tuple(name for name, kind in METHODS.items() if issubclass(kind, Restorative))
SEGMENTING = ("mae", "simmim", "ijepa", *RESTORATIVE)
ALONE = " backbone"  # behind a restorative method: its decoder stays behind
# Where a moving average leaves the run: recipes' momenta are for 100 epochs, and would keep 37 and 67 % of the random
# start here. These, constant, keep 5 %. I-JEPA has its recipe's: faster, its tokens soon know their place alone.
MOMENTUM = {"dino": 0.92, "ibot": 0.8}
AVERAGES = (*MOMENTUM, "ijepa")


@dataclass(frozen=True)
class Images:
    """One set of images.

    Attributes:
        title: what they are.
        folder: below ``--data``.
        ingest: keyword arguments of ``sslmed.ingest``; paths are relative to ``folder``.
        target: the label column, where the features are probed.
        budgets: of labels.
        channels: of the network.
        source: below ``folder``.
    """

    title: str
    folder: str
    ingest: dict[str, Any]
    target: str = ""
    budgets: str = ""
    channels: int = 1
    source: str = "."


SETS = {
    "xray": Images(
        "Paediatric chest X-rays, normal or pneumonia (Kermany et al. 2018), split by patient", "xray_pneumonia",
        {"modality": "xray", "labels": "labels.csv", "label_columns": ("label", "subtype")}, "label", "1%,10%,100%",
    ),
    "histology": Images(
        "Lung tissue, H&E, three classes (LC25000, Borkowski et al. 2019). Its authors made it from 250 originals a "
        "class by turning and shearing, and say not which is which, so that a split by image leaks: an easy task, and "
        "intervals are too narrow",
        "histology_lung", {"modality": "histology"}, "class", "10%,100%", 3,
    ),
    "nerves": Images(
        "Nerves and vessels in ultrasound (tmkand, CC BY 4.0), split by image: whose they are is not known, and some "
        "are much alike", "ultrasound_nerve",
        {"modality": "ultrasound", "masks": "masks", "mask_classes": ("background", "structure 1", "structure 2")},
        source="images",
    ),
}  # fmt: skip


def with_rows(page: str, change: Callable[[str, list[str]], None]) -> str:
    """docs/methods.md after ``change`` has had the name and the columns of each method's row."""
    lines = page.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if name := re.match(r"\| \[`(\w+)`\]", line):
            cells = line.split(" | ")
            change(name[1], cells)
            lines[number] = " | ".join(cells)
    return "".join(lines)
