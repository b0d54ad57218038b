"""``sslmed export``: a model for other readers, with the proof that it still says the same."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sslmed import __version__, artifact, image_size
from sslmed.artifact import Card
from sslmed.artifact.manifest import sign
from sslmed.artifact.writing import made
from sslmed.config import DataError, SslmedError
from sslmed.console import command
from sslmed.durable import sha256
from sslmed.exporting import parity, timm_folder
from sslmed.exporting.deployed import Deployed, Features, deployed
from sslmed.exporting.graphs import Run, Tensors, refused, write_onnx, write_program
from sslmed.exporting.page import page
from sslmed.exporting.parity import Parity
from sslmed.models.backbones import from_folder
from sslmed.supervised.model import load

ABOUT = "export.json"
Format = Literal["timm", "onnx", "torch-export"]
GRAPHS: dict[str, tuple[str, Callable[[Deployed, Tensors, Path, str], Run]]] = {
    "onnx": ("model.onnx", write_onnx),
    "torch-export": ("model.pt2", write_program),
}


@dataclass(frozen=True)
class ExportResult:
    """A written export.

    Attributes:
        file: what another reader opens.
        inputs, outputs: of a graph, their names.
        parity: max |difference| / max |value| of each output beside the model in torch.
        prepared: the same of the network's input beside what ``sslmed predict`` gives it; nothing in timm's format.
        batches: (images, height, width) that were tried.
        notes: what does not go along.
    """

    out: str
    format: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: dict[str, float]
    prepared: float | None
    batches: tuple[tuple[int, int, int], ...]
    notes: tuple[str, ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        apart = ", ".join(f"{name} {value:.1e}" for name, value in self.parity.items())
        tried = ", ".join(f"{count} of {height} x {width}" for count, height, width in self.batches)
        lines = [f"exported {self.file}", f"parity with torch on drawn images ({tried}): {apart}"]
        if self.prepared is not None:
            lines.append(f"preparation beside sslmed predict's: {self.prepared:.1e}")
        return [*lines, *(f"note: {each}" for each in self.notes), f"how to use it: {Path(self.out) / 'README.md'}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def export(model: str | Path, out: str | Path, *, form: Format) -> ExportResult:
    """Write a model in another format and compare it with the model in torch; what differs is not kept.

    ``timm`` is a backbone in the Hugging Face layout, which ``local-dir:`` and ``hf-hub:`` read. ``onnx`` and
    ``torch-export`` are one file that takes images of any size as their source has them, and any number of them, and
    gives what ``predict`` gives: features, calibrated probabilities, masks or boxes in the source's own pixels.

    Args:
        model: a run or an artifact.
        out: a new folder.
        form: the format.

    Raises:
        MissingInputError: nothing is there.
        DataError: a damaged artifact, or an export that does not say what the model says.
        OutputExistsError: ``out`` is there already.
        MissingDependencyError: onnx, onnxruntime or onnxscript is not installed.
        DiskError: it cannot be written.
    """
    out, card = Path(out), artifact.read_card(model)
    with made(out) as partial:
        written = _timm(model, card, partial) if form == "timm" else _graph(model, card, partial, form)
        found = written.parity
        if not found.passed:
            worst = ", ".join(f"{name} {value:.1e}" for name, value in found.outputs.items())
            raise DataError(
                f"the {form} export of {model} does not say what the model says: {worst}, preparation "
                f"{found.prepared:.1e}; allowed are {parity.TOLERANCE:.0e} and {parity.PREPARED:g}. Nothing was kept."
            )
        result = ExportResult(
            out=str(out),
            format=form,
            file=str(out / written.file),
            inputs=written.inputs,
            outputs=tuple(found.outputs) if written.inputs else (),
            parity=found.outputs,
            prepared=found.prepared if written.inputs else None,
            batches=found.batches,
            notes=_notes(card, form),
            next=command("sslmed", "verify", out),
        )
        _describe(partial, model, card, result)
    return result


@dataclass(frozen=True)
class _Written:
    file: str
    parity: Parity
    inputs: tuple[str, ...] = ()


def _timm(model: str | Path, card: Card, folder: Path) -> _Written:
    shutil.copyfile(artifact.resolve(model) / "model.safetensors", folder / "model.safetensors")
    config = json.dumps(timm_folder.config(card), indent=2)
    (folder / timm_folder.CONFIG).write_text(config + "\n", encoding="utf-8")
    shape = (card.backbone.in_chans, *image_size.sides(card.size))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        apart = parity.difference(artifact.load_backbone(model)(images), from_folder(folder)(images))
    return _Written(timm_folder.CONFIG, Parity({"features": apart}, 0.0, ((2, *shape[1:]),)))


def _graph(model: str | Path, card: Card, folder: Path, form: str) -> _Written:
    if card.head is None:
        module: Deployed = Features(artifact.policy(card), card, artifact.load_backbone(model))
    else:
        module = deployed(load(model))
    name, write = GRAPHS[form]
    try:
        run = write(module, parity.batches_of(module)[0], folder / name, card.model_dump_json())
    except (SslmedError, OSError):
        raise
    except Exception as error:
        raise refused(error, module, form) from error
    return _Written(name, parity.compare(module, run), module.inputs)


def _notes(card: Card, form: str) -> tuple[str, ...]:
    if card.head is None:
        return ()
    if form == "timm":
        return (f"timm takes the backbone alone, without its head '{card.head.name}'; --format onnx takes both",)
    weak = "its weak boxes stay behind; the file gives the classes or findings that they were made from"
    return (weak,) if card.head.weak else ()


def _describe(folder: Path, model: str | Path, card: Card, result: ExportResult) -> None:
    """The page and the record, without a path of this machine."""
    (folder / "README.md").write_text(page(card, result.format, result.inputs, result.outputs), encoding="utf-8")
    about = result.as_dict() | {
        "file": Path(result.file).name,
        "weights": sha256(artifact.resolve(model) / "model.safetensors"),
        "versions": {"sslmed": __version__, "torch": torch.__version__},
    }
    del about["out"], about["next"]
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    sign(folder)
