"""What a model has said of scans in boxes, and how it is written down: a table, COCO JSON, cells of a line, a picture.

Corners are continuous, in pixels of the source file as it lies: the left edge of its first pixel is 0. Of a NIfTI
volume they count voxels of the file along its own axes, of anything else rows and columns as they are displayed. With
``--resample-tilt`` they are those of the slices once moved.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed import __version__
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.intensity import Intensity
from sslmed.data.scan import Scan
from sslmed.data.views import Pixels
from sslmed.durable import write_atomically, write_json
from sslmed.evaluation.explain import overlay_boxes
from sslmed.evaluation.linking import Object, link
from sslmed.supervised.answered import Answered, as_shown, unit
from sslmed.supervised.model import Model

BOXES, COCO = "boxes.csv", "boxes.json"
WEAK = "boxes come from class labels alone"
COLUMNS = (
    *("file", "part", "class", "score", "slice_first", "slice_last", "left", "top", "right", "bottom"),
    *("left_mm", "top_mm", "right_mm", "bottom_mm", "width_mm", "height_mm", "depth_mm", "weak"),
)

Corners = npt.NDArray[np.float32]


def objects(answered: Answered, model: Model) -> tuple[Object, ...]:
    """The objects of a scan whose boxes reach the threshold of their class, see `linking.link`."""
    return link([model.kept(each) for each in answered.found])


def cells(answered: Answered, model: Model, there: Sequence[Object]) -> dict[str, Any]:
    """Of each class with boxes how many objects are there, and the highest score of any box, blank without one."""
    names = model.boxed
    counts = Counter(each.label for each in there)
    best: dict[int, float] = {}
    for found in answered.found:
        for label, score in zip(found.classes.tolist(), found.scores.tolist(), strict=True):
            best[label] = max(score, best.get(label, 0.0))
    highest = {f"highest:{name}": f"{best[label]:.6f}" if label in best else "" for label, name in names.items()}
    return {f"boxes:{name}": counts[label] for label, name in names.items()} | highest


def boxes_on(answered: Answered, model: Model, shown: Sequence[tuple[Pixels, Intensity]]) -> Pixels:
    """The image with its boxes, RGB (H, W, 3) uint8, to be seen as it is; of a volume or clip the slice or frame with
    the highest score, without boxes the middle one.

    Args:
        shown: pixels and intensity of each image of the scan.
    """
    kept = [model.kept(each) for each in answered.found]
    scores = [float(each.scores.max(initial=0.0)) for each in kept]
    most = int(np.argmax(scores)) if any(map(len, kept)) else len(kept) // 2
    found, scan = kept[most], answered.scan
    picture = as_shown(scan, unit(*shown[most], model.card.slices))
    down, across = (False, False) if scan.kind == "volume" else scan.flipped[1:]
    corners = Boxes(found.xyxy, found.classes).flipped((picture.shape[0], picture.shape[1]), down, across).xyxy
    names = [model.boxed[label] for label in found.classes.tolist()]
    words = [f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist(), strict=True)]
    return overlay_boxes(picture, corners, found.classes, words)


class BoxFiles:
    """The boxes of scans, gathered for ``boxes.csv`` and ``boxes.json``.

    Attributes:
        scans: how many were added.
        holding: those of them with a box.
        counts: objects of each class.
    """

    def __init__(self, model: Model) -> None:
        self.scans, self.holding = 0, 0
        self.counts: Counter[str] = Counter()
        self._about, self._backbone, self._names = model.about, model.card.backbone.name, model.boxed
        self._lines: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, answered: Answered, there: Sequence[Object]) -> None:
        """Take a scan and its `objects`."""
        self.scans += 1
        self.holding += bool(there)
        self.counts.update(self._names[each.label] for each in there)
        first = len(self._images) + 1
        self._list(answered)
        for number, each in enumerate(there, start=1):
            slices, corners = _as_numbered(answered, each)
            self._lines.append(self._line(answered, each, slices, corners))
            for at, box, score in zip(slices.tolist(), corners.tolist(), each.scores.tolist(), strict=True):
                self._annotate(first + at, each.label, box, score)
                if answered.scan.kind != "image":
                    self._annotations[-1]["object"] = number

    def write(self, folder: Path) -> None:
        """Both files, each whole or not at all.

        Raises:
            DiskError: they cannot be written.
        """
        with write_atomically(folder / BOXES) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(self._lines)
        weak = self._about.weak
        said = f"{WEAK}, found" if weak else "boxes found"
        info = {"description": f"{said} by sslmed {__version__} {self._about.name} on {self._backbone}", "weak": weak}
        classes = [{"id": label + 1, "name": name} for label, name in self._names.items()]
        content = {"info": info, "images": self._images, "annotations": self._annotations, "categories": classes}
        write_json(folder / COCO, content)

    def _list(self, answered: Answered) -> None:
        """Every image, those without boxes too: there is nothing in them."""
        scan = answered.scan
        name = f"{answered.name}#{scan.part}" if scan.part else answered.name
        names = [name] if scan.kind == "image" else [f"{name}#{at}" for at in range(1, answered.images + 1)]
        height, width = _size(scan)
        for each in names:
            number = len(self._images) + 1
            self._images.append({"id": number, "file_name": each, "height": height, "width": width})

    def _annotate(self, image: int, label: int, box: Sequence[float], score: float) -> None:
        left, top, right, bottom = box
        width, height = right - left, bottom - top
        self._annotations.append(
            {
                "id": len(self._annotations) + 1,
                "image_id": image,
                "category_id": label + 1,
                "bbox": [left, top, width, height],
                "area": width * height,
                "score": score,
                "iscrowd": 0,
            }
        )

    def _line(
        self, answered: Answered, each: Object, slices: npt.NDArray[np.int64], corners: Corners
    ) -> dict[str, Any]:
        scan = answered.scan
        left, top, right, bottom = np.append(corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)).tolist()
        first, last = int(slices.min()) + 1, int(slices.max()) + 1
        numbers = {"left": left, "top": top, "right": right, "bottom": bottom}
        if scan.spacing is not None and scan.kind != "clip":
            down, across = scan.spacing[-2:]
            numbers |= {"left_mm": left * across, "top_mm": top * down}
            numbers |= {"right_mm": right * across, "bottom_mm": bottom * down}
            numbers |= {"width_mm": (right - left) * across, "height_mm": (bottom - top) * down}
        if scan.spacing is not None and scan.kind == "volume":
            numbers["depth_mm"] = (last - first + 1) * scan.spacing[0]
        line = {"file": answered.name, "part": scan.part, "class": self._names[each.label]}
        line |= {"score": f"{each.score:.6f}", "weak": "yes" if self._about.weak else "no"}
        if scan.kind != "image":
            line |= {"slice_first": str(first), "slice_last": str(last)}
        return line | {name: f"{value:.7g}" for name, value in numbers.items()}


def _as_numbered(answered: Answered, each: Object) -> tuple[npt.NDArray[np.int64], Corners]:
    """Of an object's boxes (n,) the slices or frames, from 0, and (n, 4) the corners, as the module's text has them.

    Slices of a volume that is no NIfTI go to the head, the front or the right where it is placed in the patient.
    """
    scan = answered.scan
    back, down, across = _turns(scan)
    slices = answered.images - 1 - each.slices if back else each.slices
    boxes = Boxes(each.xyxy, np.full(len(each.xyxy), each.label, np.int16))
    return slices, boxes.flipped(_size(scan), down, across).xyxy


def _turns(scan: Scan) -> tuple[bool, bool, bool]:
    """Which axes (slice, down, across) run against those of the file."""
    if scan.kind != "volume" or scan.grid is None:
        return False, scan.flipped[1], scan.flipped[2]
    against = {int(axis): bool(sign < 0) for axis, sign in scan.grid.turn.tolist()}
    return against[2], against[1], against[0]


def _size(scan: Scan) -> tuple[int, int]:
    shape = scan.pixels.shape
    return (shape[0], shape[1]) if scan.kind == "image" else (shape[1], shape[2])
