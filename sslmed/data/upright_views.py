"""The view of a task that asks where a patch was, and what gives the answer away."""

from sslmed.data.modality import Modality, changed_knobs
from sslmed.data.views import ViewConfig

STEEPEST = 15.0  # degrees
GREY = 0.66  # share of colour images without their colour, against chromatic aberration (VISSL, mmselfsup)


def upright_view(modality: Modality, mirrored: bool) -> ViewConfig:
    """The modality's view without what would move up, down, left and right: turns, flips, steep tilts.

    Colour is dropped more often where that is legal.

    Args:
        mirrored: keep the modality's own left-right flips.
    """
    view = modality.view
    still = {"rot90": 0.0, "vflip": 0.0, "rotate": min(view.rotate, STEEPEST)}
    still |= {} if mirrored else {"hflip": 0.0}
    still |= {"grey": max(view.grey, GREY)} if "grey" in modality.legal else {}
    return view.model_copy(update=still)


def placement_notes(method: str, modality: Modality, view: ViewConfig) -> list[str]:
    """Where such a task can hardly be solved, or without looking at the anatomy; and what ``view`` limits.

    Args:
        method: its name.
        view: the method's own.
    """
    name, found = modality.name, []
    if modality.upright is False:
        found.append(
            f"warning: {name} images have no up and down, so that where a patch was can hardly be told: {method} is "
            "weak here; use another method"
        )
    elif modality.upright is None:
        found.append(f"note: where {name} images have no up and down (tissue, smears) {method} learns little")
    if modality.annotated is not False:
        found.append(
            f"note: side markers, burned-in text and borders in {name} images tell {method} where a patch was; a "
            "narrower views.crop shows fewer of them"
        )
    limited = [knob for knob in sorted(changed_knobs(modality)) if getattr(view, knob) != getattr(modality.view, knob)]
    if limited:
        names = ", ".join(f"views.{knob}" for knob in limited)
        found.append(f"{method} limits {names}: it would contradict where a patch was, or give it away")
    return found
