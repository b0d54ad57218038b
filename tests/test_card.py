"""The card, and the page that says it to people."""

from typing import Any

import pytest
import yaml

from sslmed.artifact import OVERALL, Card, DataCard, HeadCard, ImportCard, Measured, Score, StatedConfig, non_commercial
from sslmed.artifact.page import LICENCES, readme
from sslmed.data.modality import MODALITIES, in_words
from sslmed.models.backbones import BackboneConfig

DATA = DataCard(fingerprint="f" * 64, key_id="12345678", split_digest="d" * 64, images=7, patients=3)
HEAD = HeadCard(name="classification", target="finding", classes=("clear", "no|dule"), config={})


def card(**changes: Any) -> Card:
    settings: dict[str, Any] = {
        "backbone": BackboneConfig(name="test_resnet"),
        "num_features": 64,
        "size": (32, 48),
        "modality": "xray",
        "normalisation": in_words(MODALITIES["xray"]),
        "method": {"name": "simclr", "temperature": 0.2},
        "recipe": {"train": {"seed": 31}},
        "data": DATA,
        "steps": 12,
    }
    return Card(**(settings | changes))


def front(page: str) -> dict[str, Any]:
    begin, text, _ = page.split("---\n", 2)
    assert begin == ""
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n\n")[1].split("\n## ")[0].strip()


def score(**changes: Any) -> Score:
    named = {"start": "pretrained", "budget": "10%", "by": "linear", "metric": "auroc"}
    return Score(**(named | {"value": 0.875, "low": 0.8125, "high": 0.9375} | changes))


# The page.


def test_what_nobody_has_stated_is_said_to_be_so() -> None:
    page = readme(card())
    for title in ("Intended use", "Limits"):
        assert section(page, title) == "not stated"
    assert section(page, "Licences") == ("- of the weights: not stated\n- of the data that training read: not stated")
    assert section(page, "Scores") == "None are stated."
    assert "Last logged: nothing." in section(page, "Training")
    assert "Not a medical device: research use only." in page
    for title in (line[3:] for line in page.splitlines() if line.startswith("## ")):
        assert section(page, title), f"'{title}' is empty"


def test_what_is_stated_stands_under_its_heading() -> None:
    said = StatedConfig(licence="MIT", data_licence="CC0-1.0", intended_use="for\n\nresearch", limits="no children")
    page = readme(
        card(stated=said, parent="a" * 64, parent_licence="CC-BY-NC-4.0", monitors={"loss": 1.25, "rankme": 7})
    )
    assert section(page, "Intended use") == "for\n\nresearch"
    assert section(page, "Limits") == "no children"
    assert section(page, "Licences").splitlines() == [
        "- of the weights: MIT",
        "- of the data that training read: CC0-1.0",
        "- of the weights that training started from: CC-BY-NC-4.0",
        "",
        "One of these forbids commercial use.",
    ]
    training = section(page, "Training")
    assert "Last logged: loss 1.25, rankme 7." in training
    assert '"seed": 31' in training
    assert '"temperature": 0.2' in training
    assert "a" * 64 in training
    assert "7 images of 3 patients" in section(page, "Data")


def test_the_front_matter_is_what_a_hub_reads() -> None:
    known = front(readme(card(stated=StatedConfig(licence="CC-BY-4.0"))))
    assert known == {
        "license": "cc-by-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["medical-imaging", "self-supervised-learning", "sslmed", "xray", "simclr"],
    }
    for odd in ('"quoted": {yes}\n---\nlicense: mit', "Our own, see LICENSE", "no", "é # x"):
        found = front(readme(card(stated=StatedConfig(licence=odd))))
        assert (found["license"], found["license_name"]) == ("other", odd.strip())
    assert front(readme(card()))["license_name"] == "not stated"
    for kind, task in (
        ("class", "image-classification"),
        ("mask", "image-segmentation"),
        ("boxes", "object-detection"),
    ):
        assert front(readme(card(head=HEAD.model_copy(update={"kind": kind}))))["pipeline_tag"] == task
    assert front(readme(card(method={"name": 'a"b: c'})))["tags"][-1] == 'a"b: c'
    assert all(name == name.lower() for name in LICENCES)


def test_scores_of_a_backbone_start_by_start() -> None:
    scores = (score(), score(start="random", value=0.5, low=0.25, high=0.75), score(metric="f1"))
    measured = Measured(about=("on 9 patients", "0 of 9 test patients were seen"), headline="auroc", scores=scores)
    assert section(readme(card(measured=measured)), "Scores").splitlines() == [
        "- on 9 patients",
        "- 0 of 9 test patients were seen",
        "",
        "| of | labels | by | metric | value [95 % interval] |",
        "| --- | --- | --- | --- | --- |",
        "| pretrained | 10% | linear | auroc | 0.875 [0.812, 0.938] |",
        "| random | 10% | linear | auroc | 0.500 [0.250, 0.750] |",
        "",
        "Every score is in `card.json`.",
    ]


def test_scores_of_a_model_in_all_and_by_class() -> None:
    named = [(OVERALL, "auroc"), (OVERALL, "f1"), ("no|dule", "auroc"), ("no|dule", "f1")]
    scores = tuple(score(start=start, metric=metric, by="classification") for start, metric in named)
    page = readme(card(head=HEAD, measured=Measured(about=("x",), headline="auroc", scores=scores)))
    rows = [line.split(" | ")[0:4:3] for line in section(page, "Scores").splitlines() if "0.875" in line]
    assert rows == [["| overall", "auroc"], ["| overall", "f1"], ["| no\\|dule", "auroc"]]
    assert "`classification` of `finding`: clear, no|dule" in page
    assert "sslmed.predict(" in page


def test_imported_weights_say_where_they_came_from() -> None:
    came = ImportCard(
        layout="moco",
        source="a page",
        digest="e" * 64,
        matched=5,
        dropped=tuple(f"q{n}" for n in range(40)),
        missing=("b",),
    )
    unknown = DataCard(fingerprint="", key_id="mixed", split_digest="", images=0, patients=0)
    page = readme(card(imported=came, data=unknown, method={"name": "imported"}, steps=0, recipe={}))
    training = section(page, "Training")
    for words in ("Imported, not trained here: a page", "`moco`", "e" * 64, "5 tensors fitted", "Left out (40): `q0`",
                  "and 28 more", "Missing there, and therefore random (1): `b`", "No recipe."):  # fmt: skip
        assert words in training
    assert "Adapted" not in training
    assert "cannot be told" in section(page, "Data")
    assert "0 images" not in page


# The card.


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [
        *((each, True) for each in ("CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "CC BY NC 4.0", "non-commercial use only")),
        *((each, True) for each in ("Noncommercial", "Research, Non-Commercial", "for non commercial use")),
        *((each, False) for each in ("", "MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "NCSA", "Incl. ncurses")),
    ],
)
def test_which_licences_forbid_commercial_use(licence: str, forbids: bool) -> None:
    assert non_commercial(licence) == forbids


def test_a_card_of_before_has_nothing_stated() -> None:
    old = card().model_dump(mode="json")
    for name in ("stated", "monitors", "measured", "imported", "parent_licence"):
        del old[name]
    assert Card.model_validate(old) == card()


def test_numbers_that_are_none_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            score(value=bad)
        with pytest.raises(ValueError, match="finite"):
            card(monitors={"loss": bad})
