"""Boxes to a COCO JSON file, which `sslmed.data.annotations.box_files` reads back as it was."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslmed.data.annotations.boxes import Boxes
from sslmed.durable import write_json


def write_coco(path: Path, images: Mapping[str, tuple[tuple[int, int], Boxes]], classes: Sequence[str]) -> None:
    """Write the boxes of images; one without boxes is listed too, as an image that holds nothing.

    Args:
        images: by the name of its file, of each the height and width, and its boxes.
        classes: names of the boxes' numbers.

    Raises:
        DiskError: the file cannot be written.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, (name, ((height, width), boxes)) in enumerate(images.items(), 1):
        listed.append({"id": image, "file_name": name, "height": height, "width": width})
        for (left, top, right, bottom), number in zip(boxes.xyxy.tolist(), boxes.classes.tolist(), strict=True):
            across, down = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": number + 1,
                    "bbox": [left, top, across, down],
                    "area": across * down,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    write_json(path, {"images": listed, "annotations": annotations, "categories": categories})
