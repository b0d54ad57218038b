"""Multi-crop: two views of most of an image, and several smaller ones of a part of it (SwAV, arXiv 2006.09882)."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from sslmed.config import Config, UsageError
from sslmed.data.modality import Modality, changed_knobs
from sslmed.data.views import ViewConfig

GLOBAL_VIEWS = 2
MOVED = 0.1  # relative change of a scale that is worth saying
Area = Annotated[float, Field(gt=0, le=1)]


class MultiCropConfig(Config):
    """The knobs of multi-crop, which several methods share.

    Lesions are small, and a crop without its lesion is a wrong positive: both ranges of crops are those of 3DINO
    (Xu et al., arXiv 2501.11755), which pretrains on CT and MRI. The papers' own for photographs are wider: 0.14 to 1
    and 0.05 to 0.14 (SwAV), 0.4 to 1 and 0.05 to 0.4 (DINO).

    Attributes:
        local_views: how many smaller views there are beside the two whole ones; 0 is none.
        local_scale: their sides over those of the input; 96 of 224 pixels in the papers. A transformer takes the
            nearest whole number of patches.
        global_crop: least and greatest area of the two whole views, as fractions of the image.
        local_crop: of the smaller ones.
    """

    local_views: Annotated[int, Field(ge=0, le=32)] = 6
    local_scale: Annotated[float, Field(gt=0, le=1)] = 96 / 224
    global_crop: tuple[Area, Area] = (0.48, 1.0)
    local_crop: tuple[Area, Area] = (0.16, 0.48)

    @model_validator(mode="after")
    def _crops_ascend(self) -> Self:
        for name, (low, high) in (("global_crop", self.global_crop), ("local_crop", self.local_crop)):
            if low > high:
                raise ValueError(f"{name} is [{low}, {high}]; allowed: two numbers up to 1, the smaller first")
        return self

    def crops(self, modality: Modality, scale: float) -> tuple[ViewConfig, ...]:
        """Two views with ``global_crop``, then the smaller ones; all else is the modality's.

        Args:
            scale: of the smaller ones, as the network takes it.

        Raises:
            UsageError: the modality forbids such small crops.
        """
        for name in ("global_crop", "local_crop") if self.local_views else ("global_crop",):
            _refuse_beyond(modality, name, getattr(self, name))
        whole = modality.view.model_copy(update={"crop": self.global_crop})
        part = modality.view.model_copy(update={"crop": self.local_crop, "scale": scale})
        return (*[whole] * GLOBAL_VIEWS, *[part] * self.local_views)

    def crop_notes(self, modality: Modality, scale: float) -> list[str]:
        """What is idle, and what became of ``local_scale``."""
        found = []
        if "crop" in changed_knobs(modality):
            found.append("views.crop has no effect here; set method.global_crop and method.local_crop")
        if self.local_views and abs(scale / self.local_scale - 1) > MOVED:
            found.append(
                f"method.local_scale {self.local_scale:.3g} becomes {scale:.3g}, the nearest whole number of patches"
            )
        return found


def _refuse_beyond(modality: Modality, name: str, crop: tuple[float, float]) -> None:
    low, high = modality.legal["crop"]
    if not low <= crop[0] <= crop[1] <= high:
        raise UsageError(
            f"'method.{name}' is {list(crop)}; allowed for {modality.name}: from {low:g} to {high:g}. Smaller crops "
            "of such images mostly miss the finding"
        )
