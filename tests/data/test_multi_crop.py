"""Multi-crop: which views there are, what they keep of the modality, what is refused."""

import pytest

from sslmed.config import UsageError
from sslmed.data.modality import MODALITIES, with_views
from sslmed.data.multi_crop import MultiCropConfig


@pytest.mark.parametrize("modality", MODALITIES.values(), ids=MODALITIES)
def test_views_differ_from_the_modalitys_in_crop_and_scale_alone(modality: object) -> None:
    views = MultiCropConfig(local_views=3).crops(modality, 0.4)  # type: ignore[arg-type]
    assert len(views) == 5
    for number, view in enumerate(views):
        own = modality.view.model_dump()  # type: ignore[attr-defined]
        expected = {"crop": (0.48, 1.0), "scale": 1.0} if number < 2 else {"crop": (0.16, 0.48), "scale": 0.4}
        assert view.model_dump() == own | expected
    assert views[4].size(96) == (38, 38)


def test_none_is_allowed() -> None:
    assert len(MultiCropConfig(local_views=0, local_crop=(0.01, 0.1)).crops(MODALITIES["xray"], 1.0)) == 2


def test_what_the_user_has_changed_stays() -> None:
    xray = with_views(MODALITIES["xray"], {"blur": 0.0, "hflip": 0.5})
    for view in MultiCropConfig().crops(xray, 0.5):
        assert (view.blur, view.hflip) == (0.0, 0.5)


def test_crops_that_miss_the_finding_are_refused_for_the_modality() -> None:
    small = MultiCropConfig(local_crop=(0.05, 0.4))
    with pytest.raises(UsageError, match=r"'method.local_crop' is \[0.05, 0.4\]; allowed for xray: from 0.15 to 1"):
        small.crops(MODALITIES["xray"], 0.5)
    assert small.crops(MODALITIES["photo"], 0.5)[2].crop == (0.05, 0.4)
    with pytest.raises(UsageError, match=r"'method.global_crop'"):
        MultiCropConfig(global_crop=(0.1, 1.0)).crops(MODALITIES["ct"], 0.5)


@pytest.mark.parametrize("knob", ["global_crop", "local_crop"])
@pytest.mark.parametrize("crop", [(0.5, 0.4), (0.0, 0.5), (0.5, 1.5)])
def test_impossible_crops_are_refused(knob: str, crop: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=knob):
        MultiCropConfig(**{knob: crop})


def test_idle_and_moved_settings_are_told() -> None:
    config, xray = MultiCropConfig(), MODALITIES["xray"]
    assert config.crop_notes(xray, 96 / 224) == []
    assert config.crop_notes(xray, 5 / 12) == [], "3 % are not worth a word"
    (note,) = config.crop_notes(with_views(xray, {"crop": [0.2, 1.0]}), 96 / 224)
    assert "views.crop has no effect" in note
    (note,) = config.crop_notes(xray, 0.5)
    assert "method.local_scale 0.429 becomes 0.5" in note
    assert MultiCropConfig(local_views=0).crop_notes(xray, 1.0) == []
