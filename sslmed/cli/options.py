"""Arguments and options that several verbs have, and how their text is read."""

from pathlib import Path
from typing import Annotated

import typer

from sslmed.config import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name (sslmed recipes ls) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings on top of the recipe, such as train.epochs=50.", show_default=False
    ),
]
Model = Annotated[Path, typer.Argument(metavar="RUN|ARTIFACT", help="A finished run or an artifact.")]
Data = Annotated[Path, typer.Option("--data", metavar="STORE", help="The store that sslmed ingest made.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
Labels = Annotated[
    Path | None, typer.Option(metavar="CSV", help="Columns file, patient, perhaps split, and label:NAME.")
]
LabelColumns = Annotated[
    str, typer.Option(metavar="A,B", help="The label columns of a CSV that does not use the prefix label:.")
]
Masks = Annotated[Path | None, typer.Option(metavar="DIR", help="Masks called like their images: PNG, NIfTI.")]
MaskClasses = Annotated[str, typer.Option(metavar="A,B", help="Names of the masks' values 0, 1, ...")]
Boxes = Annotated[Path | None, typer.Option(metavar="DIR|JSON", help="Boxes: Pascal VOC folder, or COCO JSON.")]
Tilt = Annotated[bool, typer.Option("--resample-tilt", help="Read CT with a tilted gantry, its slices sheared back.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images; 0 reads in this one.")]


def image_size(text: str) -> int | tuple[int, int]:
    """``96``, or ``96x128``: height, then width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--size is '{text}'; allowed: 96 for a square, or height x width such as 96x128, in pixels")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def words(text: str) -> list[str]:
    """What commas part."""
    return [word.strip() for word in text.split(",") if word.strip()]
