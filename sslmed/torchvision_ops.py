"""Lets torchvision be imported beside a torch that it was not compiled for.

With a CPU-only torch, the torchvision of the package index cannot load its compiled library and then fails at import
with "operator torchvision::nms does not exist"; timm, lightly, torchmetrics and Lightning fail with it. sslmed needs
none of the compiled operators, so that declaring the two that torchvision describes at import is enough. Called from
the ``__init__`` of every package that imports torch, before anything that imports torchvision.
"""

import contextlib
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library


def mend() -> None:
    """Declare torchvision's ``nms`` and ``qnms`` unless its own library provides them; a second call does nothing.

    Loading torchvision's library is tried first: a working torchvision keeps its own operators.
    """
    if _missing():
        _load_compiled()
    if missing := _missing():
        library = torch.library.Library("torchvision", "FRAGMENT")
        _declared.append(library)
        for name in missing:
            library.define(_SCHEMAS[name])


def _missing() -> list[str]:
    return [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]


def _load_compiled() -> None:
    spec = find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in sorted(Path(folder).glob("_C*.so")):
            with contextlib.suppress(OSError):  # compiled for another torch: that is what is mended here
                torch.ops.load_library(str(library))
