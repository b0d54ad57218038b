"""The view that only moves an image."""

import pytest

from sslmed.data.geometry_view import GEOMETRY, geometry_view, idle_knobs
from sslmed.data.modality import MODALITIES, with_views
from sslmed.data.views import ViewConfig


@pytest.mark.parametrize("name", MODALITIES)
def test_geometry_is_the_modalitys_and_everything_else_is_neutral(name: str) -> None:
    view, whole = geometry_view(MODALITIES[name]), MODALITIES[name].view
    for knob, field in ViewConfig.model_fields.items():
        assert getattr(view, knob) == (getattr(whole, knob) if knob in GEOMETRY else field.default)


def test_settings_that_do_nothing_are_named() -> None:
    assert not idle_knobs(MODALITIES["xray"], "denoising")
    changed = with_views(MODALITIES["xray"], {"crop": [0.6, 1.0], "gamma": 0.1, "blur": 0.5})
    assert idle_knobs(changed, "denoising", ("crop", "aspect")) == [
        "of views, denoising uses crop, aspect alone: views.blur, views.gamma has no effect"
    ]
