"""Self-supervised pretraining for medical images. Importing it imports no torch: that comes with use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sslmed.artifact import load_backbone
    from sslmed.artifact.inputs import load_images
    from sslmed.commands.check import check
    from sslmed.commands.demo import demo
    from sslmed.commands.evaluate import evaluate
    from sslmed.commands.export import export
    from sslmed.commands.finetune import finetune
    from sslmed.commands.import_weights import import_weights
    from sslmed.commands.ingest import ingest
    from sslmed.commands.label import label
    from sslmed.commands.predict import predict
    from sslmed.commands.pretrain import pretrain
    from sslmed.commands.preview import preview
    from sslmed.commands.publish import publish
    from sslmed.commands.pull import pull
    from sslmed.commands.verify import verify

__version__ = "0.1.0"
__all__ = [
    "check",
    "demo",
    "evaluate",
    "export",
    "finetune",
    "import_weights",
    "ingest",
    "label",
    "load_backbone",
    "load_images",
    "predict",
    "pretrain",
    "preview",
    "publish",
    "pull",
    "verify",
]

_HOME = {name: f"sslmed.commands.{name}" for name in __all__}
_HOME |= {"load_backbone": "sslmed.artifact", "load_images": "sslmed.artifact.inputs"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sslmed' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
