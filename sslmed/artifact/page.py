"""The card of an artifact for people: README.md, with the front matter that Hugging Face reads."""

import json
import textwrap
from collections.abc import Iterable

from sslmed import image_size
from sslmed.artifact.card import Card, Measured, non_commercial
from sslmed.models.backbones import timm_arguments

OVERALL = "overall"  # whose the scores of a fine-tuned model as a whole are
NOT_STATED = "not stated"
# What Hugging Face calls the licences that weights usually have; it takes no other word but "other".
LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "unlicense", "cc0-1.0"),
        *("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
        *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
        *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "odbl", "odc-by", "pddl", "eupl-1.1", "eupl-1.2"),
    }
)


def readme(card: Card) -> str:
    """The page as Markdown. What nobody has stated is said to be not stated."""
    parts = [
        _front(card),
        f"# {_title(card)}",
        _what(card),
        "Not a medical device: research use only.",
        f"## Intended use\n\n{_or_not(card.stated.intended_use)}",
        f"## Limits\n\n{_or_not(card.stated.limits)}",
        f"## Licences\n\n{_licences(card)}",
        f"## Data\n\n{_data(card)}",
        f"## Training\n\n{_training(card)}",
        f"## Scores\n\n{_scores(card)}",
        f"## Loading\n\n{_loading(card)}",
        f"## Checking\n\n{_checking()}",
    ]
    return "\n\n".join(parts) + "\n"


# The parts, in their order.


def _front(card: Card) -> str:
    stated = card.stated.licence.strip()
    known = stated.lower() in LICENCES
    lines = [f"license: {stated.lower() if known else 'other'}"]
    if not known:
        lines.append(f"license_name: {json.dumps(stated or NOT_STATED)}")
    task = {"mask": "image-segmentation", "boxes": "object-detection"}.get(card.head.kind if card.head else "")
    lines.append("library_name: timm")
    lines.append(f"pipeline_tag: {task or ('image-classification' if card.head else 'image-feature-extraction')}")
    tags = ["medical-imaging", "self-supervised-learning", "sslmed", card.modality, _method(card)]
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---"])


def _title(card: Card) -> str:
    return f"{card.backbone.name}, {card.modality}, {_method(card)}"


def _method(card: Card) -> str:
    return str(card.method.get("name", "none"))


def _what(card: Card) -> str:
    channels = card.backbone.in_chans
    of = f"{channels}-channel" + (f" ({card.slices} neighbouring slices)" if card.slices > 1 else "")
    windows = f", windows {', '.join(map(str, card.windows))}" if card.windows else ""
    task = "A backbone"
    if card.head:
        task = f"`{card.head.name}` of `{card.head.target}`: {', '.join(card.head.classes)}"
    return (
        f"{task}. {of} {card.modality} images, {image_size.in_words(card.size)} pixels, "
        f"{card.normalisation}{windows}.\n"
        f"{card.num_features} features; made by sslmed {card.sslmed_version} with torch {card.torch_version}."
    )


def _licences(card: Card) -> str:
    lines = [
        f"- of the weights: {_or_not(card.stated.licence)}",
        f"- of the data that training read: {_or_not(card.stated.data_licence)}",
    ]
    if card.parent is not None:
        lines.append(f"- of the weights that training started from: {_or_not(card.parent_licence)}")
    if any(map(non_commercial, (card.stated.licence, card.stated.data_licence, card.parent_licence))):
        lines.append("\nOne of these forbids commercial use.")
    return "\n".join(lines)


def _data(card: Card) -> str:
    data = card.data
    if not data.fingerprint:
        return "Whom these weights have seen is not known; whether they have seen a test patient cannot be told."
    return (
        f"Trained on {data.images} images of {data.patients} patients (data fingerprint `{data.fingerprint[:16]}`, "
        f"split `{data.split_digest[:16]}`,\nsite key `{data.key_id}`). `fingerprint.safetensors` holds keyed digests "
        "of them. By these `sslmed evaluate` tells\nhow many test patients were seen, where it has the same key; "
        "without that key nobody is told from them."
    )


def _training(card: Card) -> str:
    began = "random weights" if card.parent is None else f"the weights with the sha256\n`{card.parent}`"
    monitors = ", ".join(f"{name} {value:.4g}" for name, value in card.monitors.items())
    lines = [f"Trained for {card.steps} steps, from {began}."]
    if card.imported:
        lines = [_imported(card)]
    lines.append(f"Last logged: {monitors or 'nothing'}.")
    lines.append(f"Method:\n\n{_json(card.method)}")
    recipe = {name: section for name, section in card.recipe.items() if name != "card"}  # what it stated is above
    lines.append(f"The whole recipe:\n\n{_json(recipe)}" if recipe else "No recipe.")
    return "\n\n".join(lines)


def _imported(card: Card) -> str:
    came = card.imported
    assert came is not None  # noqa: S101  # for the reader of types
    lines = [
        f"Imported, not trained here: {_or_not(came.source)}; a file of the layout `{came.layout}` with the sha256",
        f"`{came.digest}`. {came.matched} tensors fitted as they are.",
    ]
    for word, names in (
        ("Adapted", came.adapted),
        ("Left out", came.dropped),
        ("Missing there, and therefore random", came.missing),
    ):
        if names:
            lines.append(f"\n{word} ({len(names)}): {_few(names)}.")
    return "\n".join(lines)


def _scores(card: Card) -> str:
    measured = card.measured
    if measured is None:
        return "None are stated."
    about = "\n".join(f"- {sentence}" for sentence in measured.about)
    return f"{about}\n\n{_table(card, measured)}\n\nEvery score is in `card.json`."


def _table(card: Card, measured: Measured) -> str:
    """A backbone's by the metric that was named beforehand; a fine-tuned model's all, of classes by that metric."""
    head = measured.headline
    shown = [each for each in measured.scores if each.metric == head or (card.head and each.start == OVERALL)]
    rows = [
        (each.start, each.budget, each.by, each.metric, f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]")
        for each in shown or measured.scores
    ]
    titles = ("of", "labels", "by", "metric", "value [95 % interval]")
    return "\n".join(_row(cells) for cells in (titles, ("---",) * len(titles), *rows))


def _loading(card: Card) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(card.backbone, card.size).items())
    name = card.backbone.name
    predict = '\nsslmed.predict("artifact", "images", "out")  # the whole model, with its head'
    whole = predict if card.head else ""
    start = f"\n\n{_start(card)}" if card.decoder else ""
    return f"""`artifact` is this folder.

```python
import sslmed
backbone = sslmed.load_backbone("artifact")  # checks every digest{whole}

import timm
backbone = timm.create_model("{name}", {options}, checkpoint_path="artifact/model.safetensors")
```{start}"""


def _start(card: Card) -> str:
    return (
        "`decoder.safetensors` holds the neck and the U-Net decoder of the pretext task, all but the last layer. By\n"
        f"`sslmed finetune {card.modality}/segmentation --from artifact` a segmentation starts from them too;\n"
        "`head.decoder=random` leaves them out."
    )


def _checking() -> str:
    return (
        "`sslmed verify artifact` checks every file against `MANIFEST.json` and runs the self-test: a stored input has "
        "to give\nthe stored output. Who has the sha256 of `MANIFEST.json` from a source that they trust gets exactly "
        "these files by\n`sslmed pull DIR|URL --sha256 DIGEST --out artifact`."
    )


# Words.


def _or_not(text: str) -> str:
    return text.strip() or NOT_STATED


def _json(content: object) -> str:
    return f"```json\n{json.dumps(content, indent=1)}\n```"


def _few(names: tuple[str, ...], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return textwrap.fill(", ".join(f"`{name}`" for name in names[:most]), 118, break_long_words=False) + more


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"
