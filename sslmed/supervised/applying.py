"""A trained head on whole images: pixels in, an answer in the image's own grid out, for val, test and predict."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sslmed.config import DataError
from sslmed.data.input import as_tensor, network_input, to_image
from sslmed.data.intensity import Intensity
from sslmed.data.modality import Modality
from sslmed.data.views import Pixels, placed, shrink
from sslmed.evaluation.detections import Found
from sslmed.evaluation.familiarity import appearance
from sslmed.evaluation.probes import evaluating
from sslmed.heads.head import Head
from sslmed.image_size import ImageSize, sides
from sslmed.models.box_windows import slide_boxes
from sslmed.models.windows import slide_labels
from sslmed.supervised.looks import Look, answered, found
from sslmed.supervised.weak_boxes import boxes_around

BATCH = 32  # images at once
TILES = 8  # windows at once
LEAST = 0.5  # pixels of an image: a box has longer sides

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of an image.

    Attributes:
        appearance: (D,), what the image looks like; nothing unless asked for.
        scores: probabilities (K,) of an image's classes or findings; empty for masks and boxes.
        labels: (H, W), the class of each of the image's own pixels; None for all but masks.
        boxes: in the image's own pixels; None where the head gives none.
    """

    appearance: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    labels: Labels | None = None
    boxes: Found | None = None


@dataclass(frozen=True)
class Applied:
    """A head and how images become its input.

    Attributes:
        head: runs where its parameters are, in evaluation mode, and is left as it came.
        size: of the network input, pixels.
        tiles: see ``SegmentationConfig.input`` and ``LocalizationConfig.input``.
        shrunk_to: see ``HeadCard``.
        looks: test-time augmentation; by default the image alone.
        described: whether answers say what images look like.
        locating: whether a head that locates gives its boxes too.
    """

    head: Head
    policy: Modality
    size: ImageSize
    channels: int
    tiles: bool = False
    shrunk_to: int | None = None
    looks: tuple[Look, ...] = (Look(),)
    described: bool = False
    locating: bool = False

    def __call__(self, images: Iterable[tuple[Pixels, Intensity]]) -> Iterator[Answer]:
        """Answers in the order of ``images``, which are (pixels as a store has them, intensity of their scan).

        ``BATCH`` images are held at once; of masks a batch's probabilities beside them, (K, H, W) of one image at a
        time, and in tiles a band as high as a window (see `models.windows`).

        Raises:
            DataError: an image is smaller than a tile.
        """
        for batch in _batches(images):
            yield from self._batch(batch)

    def appearances(self, images: Iterable[tuple[Pixels, Intensity]]) -> Iterator[npt.NDArray[np.float32]]:
        """What each image looks like, (D,), see `evaluation.familiarity`; of tiles the whole image too, of any size."""
        for batch in _batches(images):
            yield from self._appearance(self._inputs(batch))

    def check_covers(self, shape: tuple[int, ...]) -> None:
        """Refuse an image of (height, width) that is smaller than a tile, once it is shrunk as the store's were.

        Raises:
            DataError: with both sizes.
        """
        if not self.tiles:
            return
        height, width = shape[:2]
        scale = min(1.0, self.shrunk_to / min(height, width)) if self.shrunk_to else 1.0
        window = sides(self.size)
        if round(height * scale) < window[0] or round(width * scale) < window[1]:
            raise DataError(
                f"is {height} x {width} pixels, smaller than the model's tiles of {window[0]} x {window[1]}; "
                "fine-tune with a smaller data.size, or with head.input=whole"
            )

    def _batch(self, images: list[tuple[Pixels, Intensity]]) -> list[Answer]:
        inputs = self._inputs(images)
        seen = self._appearance(inputs) if self.described else np.empty((len(images), 0), np.float32)
        with evaluating(self.head), torch.inference_mode():
            if self.head.kind == "boxes":
                return self._boxes(images, inputs, seen)
            if self.tiles:
                return [_answer(one, labels=self._tiled(*image)) for one, image in zip(seen, images, strict=True)]
            scores = answered(self.head, inputs, self.looks)
            if self.locating:
                return self._weak(images, inputs, seen, scores.double().cpu().numpy())
        if self.head.kind != "mask":
            return [_answer(one, scores=each) for one, each in zip(seen, scores, strict=True)]
        shapes = [pixels.shape[:2] for pixels, _ in images]
        return [
            _answer(one, labels=to_image(each, shape, self.size).argmax(0))
            for one, each, shape in zip(seen, scores, shapes, strict=True)
        ]

    def _boxes(
        self, images: list[tuple[Pixels, Intensity]], inputs: torch.Tensor, seen: npt.NDArray[np.float32]
    ) -> list[Answer]:
        if self.tiles:
            each = [self._boxes_tiled(*image) for image in images]
        else:
            config: Any = self.head.config
            boxes = found(self.head, inputs, self.looks, config.overlap, config.detections).float().cpu().numpy()
            shapes = [pixels.shape[:2] for pixels, _ in images]
            each = [boxes_on(one, shape, self.size) for one, shape in zip(boxes, shapes, strict=True)]
        return [Answer(one, np.empty(0), boxes=own) for one, own in zip(seen, each, strict=True)]

    def _weak(
        self,
        images: list[tuple[Pixels, Intensity]],
        inputs: torch.Tensor,
        seen: npt.NDArray[np.float32],
        scores: npt.NDArray[np.float64],
    ) -> list[Answer]:
        """Answers with the boxes that a head of labels ``locates``."""
        head: Any = self.head
        heat = answered(head.heat, inputs, self.looks).float().cpu().numpy()
        answers = []
        for (pixels, _), one, own, chances in zip(images, seen, heat, scores, strict=True):
            top, left, height, width = placed(pixels.shape[:2], self.size)
            inside = own[:, top : top + height, left : left + width]
            rows = boxes_around(inside, chances, head.located, head.config.share)
            rows[:, :4] += np.array([left, top, left, top], np.float32)
            answers.append(Answer(one, chances, boxes=boxes_on(rows, pixels.shape[:2], self.size)))
        return answers

    def _boxes_tiled(self, pixels: Pixels, intensity: Intensity) -> Found:
        image, (height, width) = self._at_own_resolution(pixels, intensity)
        head: Any = self.head
        suppress, most = head.config.overlap, head.config.detections
        predict: Callable[[torch.Tensor], torch.Tensor] = lambda tiles: found(  # noqa: E731
            head, tiles.to(self._device), self.looks, suppress, most
        )
        rows = slide_boxes(image, sides(self.size), predict, stride=head.stride, suppress=suppress, batch=TILES)
        scale = np.array([width / image.shape[2], height / image.shape[1]] * 2, np.float32)
        return _found(rows.numpy()[:, :4] * scale, rows.numpy(), (height, width))

    def _tiled(self, pixels: Pixels, intensity: Intensity) -> Labels:
        image, shape = self._at_own_resolution(pixels, intensity)
        predict: Callable[[torch.Tensor], torch.Tensor] = lambda tiles: answered(  # noqa: E731
            self.head, tiles.to(self._device), self.looks
        )
        labels = slide_labels(image, sides(self.size), predict, batch=TILES)
        return _enlarged(labels, shape)

    def _at_own_resolution(self, pixels: Pixels, intensity: Intensity) -> tuple[torch.Tensor, tuple[int, int]]:
        """The image (C, h, w) that tiles are cut from, and the height and width that it had."""
        height, width = pixels.shape[:2]
        self.check_covers((height, width))
        if self.shrunk_to:
            pixels = shrink(pixels, self.shrunk_to)
        return as_tensor(self.policy.normalise(pixels, intensity), self.channels), (height, width)

    def _inputs(self, images: Iterable[tuple[Pixels, Intensity]]) -> torch.Tensor:
        whole = [network_input(*image, self.policy, self.size, self.channels) for image in images]
        return torch.stack(whole).to(self._device)

    def _appearance(self, inputs: torch.Tensor) -> npt.NDArray[np.float32]:
        with evaluating(self.head), torch.inference_mode():
            return np.asarray(appearance(self.head.backbone, inputs).cpu().numpy(), np.float32)

    @property
    def _device(self) -> torch.device:
        return next(self.head.parameters()).device


def boxes_on(rows: npt.NDArray[np.float32], shape: tuple[int, ...], size: ImageSize) -> Found:
    """Boxes that were found in a network's input, on the image itself: the way back from `network_input`.

    What lies beside the image, or under half a pixel of it, is left out.

    Args:
        rows: (D, 6) as `Localization.predict` has them.
        shape: height and width of the image.
        size: of the input.
    """
    top, left, height, width = placed(shape, size)
    scale = np.array([shape[1] / width, shape[0] / height] * 2, np.float32)
    corners = (rows[:, :4] - np.array([left, top, left, top], np.float32)) * scale
    return _found(corners, rows, shape)


def _found(corners: npt.NDArray[np.float32], rows: npt.NDArray[np.float32], shape: tuple[int, ...]) -> Found:
    """Of corners in the image's pixels, and of rows their scores and classes."""
    height, width = shape[:2]
    within = np.clip(corners, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)
    real = (rows[:, 5] >= 0) & (within[:, 2:] - within[:, :2] >= LEAST).all(axis=1)
    scores, classes = rows[real, 4].astype(np.float64), rows[real, 5].astype(np.int16)
    return Found(within[real], scores, classes)


def _batches(images: Iterable[tuple[Pixels, Intensity]]) -> Iterator[list[tuple[Pixels, Intensity]]]:
    remaining = iter(images)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def _answer(seen: npt.NDArray[np.float32], scores: torch.Tensor | None = None, labels: Any = None) -> Answer:
    return Answer(
        seen,
        np.empty(0) if scores is None else scores.double().cpu().numpy(),
        None if labels is None else np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels, np.uint8),
    )


def _enlarged(labels: Labels, shape: tuple[int, int]) -> Labels:
    """The nearest label of each pixel of a larger image."""
    if labels.shape == shape:
        return labels
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(shape, labels.shape, strict=True)
    )
    return np.ascontiguousarray(labels[np.ix_(rows, columns)])
