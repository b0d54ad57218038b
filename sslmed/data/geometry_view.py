"""The view of methods that predict intensities: an image may move, its values stay true."""

from sslmed.data.modality import Modality, changed_knobs
from sslmed.data.views import ViewConfig

GEOMETRY = ("crop", "aspect", "hflip", "vflip", "rot90", "rotate")


def geometry_view(modality: Modality, kept: tuple[str, ...] = GEOMETRY) -> ViewConfig:
    """The modality's crop, flips and turns, or those of them that are ``kept``; every other knob is neutral."""
    return ViewConfig(**{knob: getattr(modality.view, knob) for knob in kept})


def idle_knobs(modality: Modality, method: str, kept: tuple[str, ...] = GEOMETRY) -> list[str]:
    """A sentence that names the settings of views which do nothing with ``geometry_view``, where there are any."""
    idle = [f"views.{knob}" for knob in sorted(changed_knobs(modality) - set(kept))]
    return [f"of views, {method} uses {', '.join(kept)} alone: {', '.join(idle)} has no effect"] if idle else []
