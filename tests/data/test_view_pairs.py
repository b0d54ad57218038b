"""Asymmetric views where they are legal, and what is said of knobs that they replace."""

import pytest

from sslmed.data.modality import MODALITIES, with_views
from sslmed.data.view_pairs import pair_notes, view_pair


@pytest.mark.parametrize("name", MODALITIES)
def test_views_differ_where_solarisation_is_legal(name: str) -> None:
    modality = MODALITIES[name]
    first, second = view_pair(modality, True)
    if "solarize" not in modality.legal:
        assert first == second == modality.view
        return
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.crop == second.crop == modality.view.crop


def test_a_replaced_knob_is_said_where_it_was_set() -> None:
    photo = MODALITIES["photo"]
    assert not pair_notes(photo, True)
    (note,) = pair_notes(with_views(photo, {"blur": 0.0, "hflip": 0.1}), True)
    assert "replace views.blur; method.asymmetric=false" in note
    assert not pair_notes(with_views(MODALITIES["xray"], {"blur": 0.5}), True)
