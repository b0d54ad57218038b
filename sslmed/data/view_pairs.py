"""Two views that are made differently, as in BYOL and the methods after it."""

from sslmed.data.modality import Modality, changed_knobs
from sslmed.data.views import ViewConfig

REPLACED = {"blur", "solarize"}


def view_pair(modality: Modality, asymmetric: bool) -> tuple[ViewConfig, ViewConfig]:
    """The first view always blurred; the second rarely, and solarised in one of five (BYOL, arXiv 2006.07733, table 6).

    Not ``asymmetric``, or where solarisation is not legal, both are the modality's own view.
    """
    view = modality.view
    if not asymmetric or "solarize" not in modality.legal:
        return view, view
    return (
        view.model_copy(update={"blur": 1.0, "solarize": 0.0}),
        view.model_copy(update={"blur": 0.1, "solarize": 0.2}),
    )


def pair_notes(modality: Modality, asymmetric: bool) -> list[str]:
    """Names the settings of views that the asymmetry replaces."""
    idle = changed_knobs(modality) & REPLACED
    if not idle or view_pair(modality, asymmetric)[0] == modality.view:
        return []
    names = ", ".join(f"views.{knob}" for knob in sorted(idle))
    return [f"the paper's asymmetric views replace {names}; method.asymmetric=false keeps yours"]
