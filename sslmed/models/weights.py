"""Weights of other trainings: read without running code, fitted to a timm network, with a report of what was done."""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sslmed.config import DataError, MissingInputError
from sslmed.image_size import ImageSize, sides
from sslmed.models.backbones import resample_patches, resample_positions
from sslmed.models.key_layouts import PLAIN, WRAPPERS, KeyLayout, State
from sslmed.models.key_matching import BY_ORDER, COUNTER, Wanted, match, shape_of, some
from sslmed.models.layout import layout

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".pth.tar", ".ckpt")


@dataclass(frozen=True)
class LoadReport:
    """How a network was filled.

    Attributes:
        source: where the weights came from, in words.
        matched: tensors that were taken as they are.
        adapted: tensors that were changed to fit: name, what it was, what it became.
        dropped: tensors left out by design: the classifier's, the pretext task's, another network's beside it.
        surplus: tensors left out that no layout knows of.
        missing: tensors of the network that the source has not: BatchNorm's counters, and with ``partial`` any.
        layout: the family whose names the tensors had, or ``by order``: the names were foreign.
    """

    source: str
    matched: int
    adapted: tuple[tuple[str, str, str], ...]
    dropped: tuple[str, ...]
    surplus: tuple[str, ...]
    missing: tuple[str, ...]
    layout: str

    @property
    def by_order(self) -> bool:
        """Whether tensors were taken in their order."""
        return self.layout == BY_ORDER

    @property
    def random(self) -> tuple[str, ...]:
        """What is missing and matters."""
        return tuple(name for name in self.missing if not name.endswith(COUNTER))

    @property
    def changes(self) -> tuple[str, ...]:
        """What was adapted, a line each."""
        return tuple(f"{name} {old} -> {new}" for name, old, new in self.adapted)

    def lines(self) -> list[str]:
        """For people."""
        counted = {
            "adapted": self.changes,
            "dropped by design": self.dropped,
            "dropped that no layout knows": self.surplus,
            "missing": self.random,
        }
        parts = [f"{self.matched} tensors matched"]
        parts += [f"{len(names)} {how} ({some(names)})" for how, names in counted.items() if names]
        family = "" if self.by_order or self.layout == PLAIN.name else f", as {self.layout} names them"
        lines = [f"weights from {self.source}{family}: {', '.join(parts)}"]
        if self.by_order:
            lines.append(
                "note: the names there are foreign; tensors were matched by their order. Kinds and shapes agree, but "
                "compare the scores with a random start"
            )
        if self.random:
            whole = self.matched + len({name for name, _, _ in self.adapted}) + len(self.random)
            lines.append(f"warning: {len(self.random)} of the network's {whole} tensors stay random")
        return lines


def read(path: Path | str, family: KeyLayout | None = None) -> State:
    """The tensors of a weight file, by name; a state dict inside a checkpoint is taken out.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote under one of the other ``SUFFIXES``.
        family: whose checkpoint it is, which says where to look first.

    Raises:
        MissingInputError: there is no file.
        DataError: anything but tensors by name is in it. Nothing in it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"there is no weight file at {path}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is no weight file by its name; allowed: {', '.join(SUFFIXES)}")
    content = _content(path)
    wrappers = tuple(dict.fromkeys((*(family.wrappers if family else ()), *WRAPPERS)))
    while isinstance(content, dict):
        inside = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), None)
        if inside is None:
            break
        content = inside
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} holds no tensors by name, but a {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not _plain(value)]
    if others:
        raise DataError(
            f"{path} holds other things than plain tensors: {some(others)}. Allowed: a state dict, by itself or under "
            f"{', '.join(wrappers)}"
        )
    return {str(name): value for name, value in content.items()}


def _content(path: Path) -> Any:
    try:
        if path.suffix == SAFETENSORS:
            return load_file(path)
        # Settings of the command line lie beside the weights in DINO's and MAE's files. A Namespace only holds values,
        # which are read as strictly as all others.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that holds something else may make the readers raise anything
        raise DataError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}); what needs code to be read is refused.\n"
            "Save the weights with torch.save(model.state_dict(), FILE), or as .safetensors"
        ) from error


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def digest(state: State) -> str:
    """sha256 of names, shapes, kinds and values, for weights that lie in no file."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fill(
    network: nn.Module,
    state: State,
    source: str,
    size: ImageSize | None = None,
    *,
    ordered: bool = True,
    family: KeyLayout | None = None,
    prefix: str | None = None,
    partial: bool = False,
) -> LoadReport:
    """Load ``state`` into a timm network: by the names of a known layout, or by order when they are foreign.

    All of it, or nothing. Another number of input channels, another patch size and another grid of learnt positions
    are adapted.

    Args:
        source: what the report and the errors call it.
        size: of the input that the weights were trained with, pixels; without it positions are taken to be of a square.
        ordered: whether ``state`` keeps the order of the network that it came from; ``.safetensors`` does not.
        family: whose names they are; found by itself by default.
        prefix: what stands before the network's names; by default one that the family has.
        partial: let tensors that ``state`` lacks stay as they are, if it has at least one.

    Raises:
        UsageError: no name has ``prefix``.
        DataError: a tensor of the network is missing, of another shape or not finite, or there is more than it has.
    """
    where, wanted = layout(network), network.state_dict()
    found = match(state, Wanted(wanted, where), source, family=family, prefix=prefix, ordered=ordered, partial=partial)
    patch = found.tensors[where.patches].shape[2:] if where.patches in found.tensors else None
    ready: State = {}
    adapted, wrong = list(found.changes), list[str]()
    for name, tensor in found.tensors.items():
        target, changes = wanted[name], list[tuple[str, str]]()
        if name in where.inputs:
            tensor, changes = _to_input(tensor, target, resized=name == where.patches)
        elif name == where.positions:
            tensor, changes = _to_grid(tensor, target, where.grid, _trained_grid(patch, size))
        if tensor.shape != target.shape or tensor.is_floating_point() != target.is_floating_point():
            wrong.append(f"{name} is {shape_of(tensor)}, the network's {shape_of(target)}")
        elif not bool(torch.isfinite(tensor).all()):
            wrong.append(f"{name} has values that are not finite")
        adapted += [(name, *change) for change in changes]
        ready[name] = tensor
    if wrong:
        raise DataError(
            f"the weights from {source} do not fit: {some(wrong)}.\n"
            "Check backbone.name, backbone.patch, backbone.pool and data.size, or give other weights"
        )
    network.load_state_dict(wanted | ready)
    return LoadReport(
        source,
        len(ready) - len({name for name, _, _ in adapted}),
        tuple(adapted),
        found.dropped,
        found.surplus,
        tuple(name for name in wanted if name not in ready),
        found.layout,
    )


# Making them fit.


def channels(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Input weights (O, C, ...) for ``count`` channels, so that a grey image repeated over channels acts as before.

    One channel gets the sum, fewer get sums of every ``count``-th; more are copies in turn, each with its share. For
    one channel, and for a multiple of those there were, this is timm's rule.
    """
    old = weight.shape[1]
    fewer = min(old, count)
    same = (torch.arange(old)[:, None] % fewer == torch.arange(count)[None] % fewer).to(weight.dtype)
    shares = (same / same.sum(dim=1, keepdim=True)).to(weight)
    return torch.einsum("oc...,cn->on...", weight, shares).contiguous()


def _to_input(
    tensor: torch.Tensor, target: torch.Tensor, *, resized: bool
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """The weights (O, C, h, w) for the channels of ``target`` and, when ``resized``, for its patches."""
    changes: list[tuple[str, str]] = []
    if tensor.ndim != 4 or not tensor.numel() or not tensor.is_floating_point():
        return tensor, changes
    if tensor.shape[1] != target.shape[1]:
        changes.append((f"{tensor.shape[1]}", f"{target.shape[1]} channels"))
        tensor = channels(tensor.to(target.dtype), target.shape[1])
    if resized and tensor.shape[2:] != target.shape[2:]:
        changes.append((shape_of(tensor[0, 0]), f"{shape_of(target[0, 0])} pixels"))
        tensor = resample_patches(tensor.to(target.dtype), (target.shape[2], target.shape[3]))
    return tensor, changes


def _to_grid(
    tensor: torch.Tensor, target: torch.Tensor, grid: tuple[int, int], trained: tuple[int, int] | None
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """The positions (1, prefix + rows * columns, D) for ``grid``; a ``trained`` grid that is not known is square."""
    prefix = target.shape[1] - grid[0] * grid[1]
    tokens = tensor.shape[1] - prefix if tensor.ndim == 3 and tensor.shape[2] == target.shape[2] else 0
    if trained is None or trained[0] * trained[1] != tokens:
        side = math.isqrt(max(tokens, 0))
        trained = (side, side)
    if trained == grid or not tokens or trained[0] * trained[1] != tokens:
        return tensor, []
    change = ("{} x {}".format(*trained), "{} x {} patches".format(*grid))
    return resample_positions(tensor.to(target.dtype), trained, grid), [change]


def _trained_grid(patch: Sequence[int] | None, size: ImageSize | None) -> tuple[int, int] | None:
    if size is None or patch is None or len(patch) != 2 or not all(patch):
        return None
    return sides(size)[0] // patch[0], sides(size)[1] // patch[1]
