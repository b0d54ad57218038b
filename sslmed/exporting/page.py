"""The README of an export: what goes in, what comes out, and the lines of code that do it."""

from collections.abc import Sequence

from sslmed import artifact, image_size
from sslmed.artifact import Card
from sslmed.data import intensity as of

VALUES = {
    of.hounsfield: "Hounsfield units",
    of.whole_image: "stored values, after modality and VOI LUT, with MONOCHROME1 inverted; any range",
    of.lit: "grey, 0 outside the sector; any range",
    of.dtype_range: "0 to 255; divide 16-bit colours by 257",
    of.tissue: "stored values; any range",
}
INTENSITY = (
    "`intensity` (N, 4) float64: low, high, mean and std by which each image is normalised, those of its whole volume "
    "or, of tiles, of its whole image: `sslmed.data.modality.named({modality!r}).intensity(pixels)`."
)
RANGES = {
    of.hounsfield: "the ends of its window",
    of.whole_image: "the 0.5 and 99.5 percentiles of the image",
    of.lit: "the 0.5 and 99.5 percentiles of what is above 0 in the clip or image",
    of.dtype_range: "0 and the greatest value of the dtype",
    of.tissue: "of the foreground of the whole volume",
}
RESULTS = {
    "features": "(N, {width}) float32, pooled",
    "probabilities": "(N, {count}{pixels}) float32, calibrated: {classes}",
    "called": "{called}",
    "mask": "(N, H, W) uint8, a value a pixel: {values}",
    "boxes": "(N, D, 6) float32: left, top, right, bottom in pixels of the image, score, class ({classes}), by falling "
    "score; class -1 is no box",
}


def page(card: Card, form: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """Markdown."""
    if form == "timm":
        return _timm(card)
    names = ", ".join(outputs) + ("," if len(outputs) == 1 else "")
    code = {
        "onnx": f"""import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
{names} = session.run(None, {{{", ".join(f'"{name}": {name}' for name in inputs)}}})""",
        "torch-export": f"""import torch
model = torch.export.load("model.pt2").module()
{names} = model({", ".join(inputs)})""",
    }[form]
    lines = [
        f"# {card.backbone.name}, {card.modality}, {card.kind}, as {form}",
        "",
        "```python",
        code,
        "```",
        "",
        f"In: `image` (N, {_planes(card)}, {_sides(card)}) float32, {VALUES[artifact.policy(card).intensity]}. N is "
        "free. Preparation is inside.",
    ]
    if "intensity" in inputs:
        lines.append(INTENSITY.format(modality=card.modality))
    if form == "torch-export":
        lines.append("It runs on the CPU, where it was made; for others see `torch.export.passes.move_to_device_pass`.")
    lines += _tiles(card)
    lines += ["", "Out:", "", *(f"- `{name}` {_result(card, name)}" for name in outputs)]
    return "\n".join([*lines, "", *_end(card)])


def _timm(card: Card) -> str:
    policy = artifact.policy(card)
    return f"""# {card.backbone.name}, {card.modality}, as timm

```python
import timm
backbone = timm.create_model("local-dir:FOLDER", pretrained=True)  # images (N, C, H, W) -> features (N, D)
```

Input: {card.backbone.in_chans} channels of {image_size.in_words(card.size)} pixels, {card.normalisation}.
Low and high are {RANGES[policy.intensity]}.{_order(card)}
`mean` and `std` in config.json are of intensities between low and high, scaled to [0, 1]{_scored(policy.normalise)}.
From a hub: `"hf-hub:OWNER/NAME"`. With `num_classes=K` timm puts a new classifier on it.

""" + "\n".join(_end(card))


def _order(card: Card) -> str:
    parts = [*([f"{card.slices} neighbouring slices"] if card.slices > 1 else []), *map(str, card.windows)]
    return f" Channels, slices of the first window first: {'; '.join(parts)}." if parts else ""


def _scored(normalise: object) -> str:
    return "; here they are of z-scores" if normalise is of.scored else ""


def _planes(card: Card) -> int | str:
    return card.channels * card.slices


def _tiles(card: Card) -> list[str]:
    """What the file leaves to its user."""
    head = card.head
    if head is None or head.config.get("input") != "tiles":
        return []
    shrunk = f", once its shorter side is at most {head.shrunk_to} pixels, by area averaging" if head.shrunk_to else ""
    return [
        f"An image is a tile of the whole one{shrunk}; answers are in pixels of the tile. `sslmed predict` cuts "
        "overlapping tiles and blends or joins their answers, which is left to you here."
    ]


def _sides(card: Card) -> str:
    if card.head is not None and card.head.config.get("input") == "tiles":
        return "{}, {}".format(*image_size.sides(card.size))  # a tile at the image's own resolution
    return "H, W"


def _result(card: Card, name: str) -> str:
    head = card.head
    if head is None:
        return RESULTS[name].format(width=card.num_features)
    numbered = ", ".join(f"{number} {each}" for number, each in enumerate(head.classes))
    called = "(N,) int64, the number of the class"
    if head.kind == "boxes":
        called = "(N, D) bool, which reach the threshold of their class"
    if head.kind == "findings":
        called = f"(N, {len(head.classes)}) bool, which findings are there"
    return RESULTS[name].format(
        width=card.num_features,
        count=len(head.classes),
        pixels=", H, W" if head.kind == "mask" else "",
        classes=numbered,
        called=called,
        values=", ".join(f"{value} {each}" for value, each in zip(head.values, head.classes, strict=False)),
    )


def _end(card: Card) -> list[str]:
    return [
        f"Licence of the weights: {card.stated.licence or 'not stated'}. Parity with the model is in export.json.",
        "Not a medical device: research use only.",
        "",
    ]
