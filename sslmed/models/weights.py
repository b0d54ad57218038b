"""Weights of other trainings: read without running code, fitted to a timm network, with a report of what was done."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sslmed.config import DataError, MissingInputError
from sslmed.image_size import ImageSize, sides
from sslmed.models.backbones import resample_patches, resample_positions
from sslmed.models.layout import Layout, layout

State = dict[str, torch.Tensor]

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # the averaged weights where there are any, as timm takes them
CLASSIFIERS = ("fc", "head", "heads", "classifier")  # as torchvision, timm and others call theirs
COUNTER = "num_batches_tracked"  # BatchNorm uses it only without momentum, and many files leave it out
SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """How a network was filled.

    Attributes:
        source: where the weights came from, in words.
        matched: tensors that were taken as they are.
        adapted: tensors that were changed to fit: name, what it was, what it became.
        dropped: tensors that the network has no place for: the classifier's, or another network's beside it.
        missing: BatchNorm's counters of batches, where the file has none.
        by_order: the names were foreign, so that tensors were taken in their order.
    """

    source: str
    matched: int
    adapted: tuple[tuple[str, str, str], ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    by_order: bool

    def lines(self) -> list[str]:
        """For people."""
        parts = [f"{self.matched} tensors matched"]
        if self.adapted:
            parts.append(
                f"{len(self.adapted)} adapted ({_some(f'{n} {old} -> {new}' for n, old, new in self.adapted)})"
            )
        if self.dropped:
            parts.append(f"{len(self.dropped)} dropped ({_some(self.dropped)})")
        lines = [f"weights from {self.source}: {', '.join(parts)}"]
        if self.by_order:
            lines.append(
                "note: the names there are foreign; tensors were matched by their order. Kinds and shapes agree, but "
                "compare the scores with a random start"
            )
        return lines


def read(path: Path | str) -> State:
    """The tensors of a weight file, by name; a state dict inside a checkpoint is taken out.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote to ``.pth``, ``.pt`` or ``.bin``.

    Raises:
        MissingInputError: there is no file.
        DataError: anything but tensors by name is in it. Nothing in it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"there is no weight file at {path}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is no weight file by its name; allowed: {', '.join(SUFFIXES)}")
    try:
        if path.suffix == SAFETENSORS:
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that holds something else may make the readers raise anything
        raise DataError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}); what needs code to be read is refused.\n"
            "Save the weights with torch.save(model.state_dict(), FILE), or as .safetensors"
        ) from error
    while isinstance(content, dict):
        inside = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inside is None:
            break
        content = inside
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} holds no tensors by name, but a {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not _plain(value)]
    if others:
        raise DataError(
            f"{path} holds other things than plain tensors: {_some(others)}. Allowed: a state dict, by itself or under "
            f"{', '.join(WRAPPERS)}"
        )
    return {str(name): value for name, value in content.items()}


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
    network: nn.Module, state: State, source: str, size: ImageSize | None = None, *, ordered: bool = True
) -> LoadReport:
    """Load ``state`` into a timm network: by name, or by order when the names are foreign. All of it, or nothing.

    Names may have a prefix in common, such as ``module.``. Another number of input channels, another patch size and
    another grid of learnt positions are adapted.

    Args:
        source: what the report and the errors call it.
        size: of the input that the weights were trained with, pixels; without it positions are taken to be of a square.
        ordered: whether ``state`` keeps the order of the network that it came from; ``.safetensors`` does not.

    Raises:
        DataError: a tensor of the network is missing, of another shape or not finite, or there is more than it has.
    """
    where, wanted = layout(network), network.state_dict()
    pairs, by_order = _pairs(state, wanted, where, source, ordered)
    patch = state[pairs[where.patches]].shape[2:] if where.patches in pairs else None
    ready: State = {}
    adapted: list[tuple[str, str, str]] = []
    wrong: list[str] = []
    for name, found in pairs.items():
        tensor, target = state[found], wanted[name]
        changes: list[tuple[str, str]] = []
        if name in where.inputs:
            tensor, changes = _to_input(tensor, target, resized=name == where.patches)
        elif name == where.positions:
            tensor, changes = _to_grid(tensor, target, where.grid, _trained_grid(patch, size))
        if tensor.shape != target.shape or tensor.is_floating_point() != target.is_floating_point():
            wrong.append(f"{name} is {_shape(tensor)}, the network's {_shape(target)}")
        elif not bool(torch.isfinite(tensor).all()):
            wrong.append(f"{name} has values that are not finite")
        adapted += [(name, *change) for change in changes]
        ready[name] = tensor
    if wrong:
        raise DataError(
            f"the weights from {source} do not fit: {_some(wrong)}.\n"
            "Check backbone.name, backbone.patch, backbone.pool and data.size, or give other weights"
        )
    network.load_state_dict(wanted | ready)
    used, changed = set(pairs.values()), {name for name, _, _ in adapted}
    return LoadReport(
        source,
        len(ready) - len(changed),
        tuple(adapted),
        tuple(name for name in state if name not in used),
        tuple(name for name in wanted if name not in pairs),
        by_order,
    )


# Which tensor goes where.


def _pairs(state: State, wanted: State, where: Layout, source: str, ordered: bool) -> tuple[dict[str, str], bool]:
    """The name in ``state`` of each of the network's tensors, and whether it was found by order."""
    needed = [name for name in wanted if not name.endswith(COUNTER)]
    prefix = _prefix(state, needed, source)
    missing = [name for name in needed if prefix + name not in state]
    if not missing:
        _refuse_more(state, wanted, where, prefix, source)
        return {name: prefix + name for name in wanted if prefix + name in state}, False
    why = f"of {len(needed)} tensors {len(missing)} are missing: {_some(missing)}"
    if 2 * len(missing) > len(needed):  # otherwise the names are the network's own, and it is another network
        if ordered:
            pairs, difference = _in_order(state, wanted, where)
            if not difference:
                return pairs, True
            why += f"; nor does the order agree: {difference}"
        else:
            why += f"; {SAFETENSORS} keeps no order to go by"
    raise DataError(
        f"the weights from {source} do not fill this network: {why}.\n"
        "Check backbone.name and backbone.pool, or give other weights"
    )


def _prefix(state: State, needed: Sequence[str], source: str) -> str:
    """What the names in ``state`` have before the network's own."""
    names, found = set(needed), Counter[str]()
    for name in state:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in names:
                found["".join(f"{part}." for part in parts[:cut])] += 1
    whole = [prefix for prefix, count in found.items() if count == len(names)]
    if len(whole) > 1 and "" not in whole:
        raise DataError(f"{source} holds several such networks, under {_some(whole)}; save one of them by itself")
    if whole:
        return "" if "" in whole else whole[0]
    return max(found, key=lambda prefix: found[prefix], default="")


def _refuse_more(state: State, wanted: State, where: Layout, prefix: str, source: str) -> None:
    """Refuse a network of which ours is a part, such as one with more blocks."""
    parts = {name.partition(".")[0] for name in wanted if "." in name}
    classifiers = tuple(f"{name}." for name in where.classifiers)
    own = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    more = [name for name in own if name not in wanted and name.partition(".")[0] in parts]
    more = [name for name in more if not name.startswith(classifiers)]
    if more:
        raise DataError(
            f"the weights from {source} are of a larger network: the network asked for has no {_some(more)}.\n"
            "Check backbone.name"
        )


def _in_order(state: State, wanted: State, where: Layout) -> tuple[dict[str, str], str]:
    """The network's names with those of ``state`` in their order, and how they differ: shape, last part of the name."""
    short = list(state)
    while len({name.partition(".")[0] for name in short}) == 1 and all("." in name for name in short):
        short = [name.partition(".")[2] for name in short]
    found = [
        name for name, rest in zip(state, short, strict=True) if rest.partition(".")[0].strip("_") not in CLASSIFIERS
    ]
    counted = any(name.endswith(COUNTER) for name in found)
    names = [name for name in wanted if counted or not name.endswith(COUNTER)]
    for name, foreign in zip(names, found, strict=False):
        tensor, target = state[foreign], wanted[name]
        same_kind = name.rpartition(".")[2] == foreign.rpartition(".")[2]
        if not same_kind or _comparable(name, tensor, where) != _comparable(name, target, where):
            return {}, f"{foreign} {_shape(tensor)} stands where {name} {_shape(target)} should"
    if len(names) != len(found):
        return {}, f"{len(found)} tensors, where the network has {len(names)}"
    return dict(zip(names, found, strict=True)), ""


def _comparable(name: str, tensor: torch.Tensor, where: Layout) -> tuple[int, ...]:
    """The shape, without what can be adapted."""
    shape = tuple(tensor.shape)
    if name in where.inputs and len(shape) == 4:
        return (shape[0],) if name == where.patches else (shape[0], *shape[2:])
    return (shape[0], *shape[2:]) if name == where.positions and len(shape) == 3 else shape


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
        changes.append((_shape(tensor[0, 0]), f"{_shape(target[0, 0])} pixels"))
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


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(str(length) for length in tensor.shape) or "one number"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = [f"and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    return ", ".join([*listed[:SHOWN], *more])
