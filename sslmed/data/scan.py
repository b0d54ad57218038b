"""What a reader hands over, before any modality has a say in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class NiftiGrid:
    """How a NIfTI file places its voxels, field by field, so that a file of the same grid can be written bit by bit.

    Attributes:
        shape: voxels along the file's axes (i, j, k).
        turn: (3, 2) int8, nibabel's orientation: for each of i, j, k the axis of (right, front, head) and its sign.
        fields: (25,) float64: qform_code, sform_code, xyzt_units, qfac, pixdim 1 to 3, quatern b, c, d, qoffset x, y,
            z, srow_x, srow_y, srow_z.
    """

    shape: tuple[int, int, int]
    turn: np.ndarray[Any, np.dtype[np.int8]]
    fields: np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Scan:
    """An image, volume or clip and where it comes from. Immutable: the pixels are made read-only.

    Whatever a file says of how its stored values are meant has been applied: rescaling, lookup tables, the window of a
    radiograph, inversion where white is zero, orientation tags, colour spaces.

    Attributes:
        pixels: an image (H, W) or (H, W, 3), a volume (D, H, W), a clip (D, H, W) or (D, H, W, 3), D in time;
            colours in RGB order. uint8, uint16, int16 or float32, finite.
        spacing: distances between pixel centres in mm: (down, across), or (slice to slice, down, across) of a volume;
            None where the format does not say it in a way that can be trusted (the print resolution of a PNG, JPEG or
            TIFF is no geometry). Of a projection radiograph it is measured at the detector, not in the patient.
        source: the file it was read from; the first of several.
        kind: what the axes are.
        affine: (4, 4) float64 that takes the indices (d, h, w, 1) of a voxel's centre to (x, y, z, 1) in mm, x
            growing to the patient's right, y to the front, z to the head (RAS+). Of one slice d is 0. None where the
            file does not place it in the patient.
        unit: what a value means: Hounsfield units, or nothing that holds beyond this file.
        modality: the file's own word for how it was taken, such as CT, MR, CR, DX, MG or US.
        patient: the patient's identifier as the file has it, "" where it has none: to be hashed, never stored or
            shown.
        study: likewise, the study's unique identifier.
        series: likewise, the series' unique identifier.
        position: of one slice, mm along its normal; None of anything else.
        identity: names, never values, of the attributes in the file that tell who the patient is.
        slices: the file of each slice, in order, of a volume that is a series of files.
        part: which scan of its file it is, where a file holds several: "3", or "train/12"; "" where it is the only one.
        labels: what the file itself says of the part, by label name (MedMNIST); its ``split`` likewise.
        orientation: where the source's own axes point, such as "LPS": nibabel's three ``aff2axcodes`` letters for the
            axes (column, row, slice) as the file has them; "" where the file does not say.
        annotated: whether the file says that text is burned into its pixels; None where it does not say.
        flipped: which axes (slice, down, across) were turned round since the file was read; see `sources.facing`.
        sheared: whether slices were moved against each other, so that nothing drawn on its files lies on it now.
        grid: how a NIfTI file places its voxels, to write others back exactly as they lay; None of other formats.
    """

    pixels: np.ndarray[Any, np.dtype[Any]]
    spacing: tuple[float, ...] | None
    source: Path
    kind: Literal["image", "volume", "clip"] = "image"
    affine: np.ndarray[Any, np.dtype[np.float64]] | None = None
    unit: Literal["", "HU"] = ""
    modality: str | None = None
    patient: str = field(default="", repr=False)
    study: str = field(default="", repr=False)
    series: str = field(default="", repr=False)
    position: float | None = None
    identity: tuple[str, ...] = ()
    slices: tuple[Path, ...] = ()
    part: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    orientation: str = ""
    annotated: bool | None = None
    flipped: tuple[bool, bool, bool] = (False, False, False)
    sheared: bool = False
    grid: NiftiGrid | None = None

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)
        if self.affine is not None:
            self.affine.setflags(write=False)
