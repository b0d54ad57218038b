"""Which tensor of a file is which of a network: by the name in a known layout, or, as a last resort, by order."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sslmed.config import DataError, UsageError
from sslmed.models.key_layouts import CLASSIFIERS, KEY_LAYOUTS, PLAIN, Changes, KeyLayout, State
from sslmed.models.layout import Layout

COUNTER = "num_batches_tracked"  # BatchNorm uses it only without momentum, and many files leave it out
BY_ORDER = "by order"
SHOWN = 3
_SHELLS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


class Wanted(NamedTuple):
    """What is to be filled: the network's tensors by name, and which depend on the input."""

    tensors: State
    where: Layout

    @property
    def needed(self) -> list[str]:
        """Names that a file must have."""
        return [name for name in self.tensors if not name.endswith(COUNTER)]


@dataclass(frozen=True)
class Match:
    """Which tensor goes where.

    Attributes:
        layout: the name of the family, or ``by order``.
        tensors: of the file, by the network's names, with what the layout changes.
        changes: that it made: the tensor's name, what it was, what it became.
        pairs: the network's name -> the file's, of all tensors under the prefix, whether the network has them or not.
        missing: needed, and not there.
        dropped: left out by design, by the file's names.
        surplus: left out, and no layout says why.
        prefix: what the names of the network have before them.
    """

    layout: str
    tensors: State
    changes: Changes
    pairs: dict[str, str]
    missing: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    prefix: str = ""


def match(
    state: State,
    wanted: Wanted,
    source: str,
    *,
    family: KeyLayout | None = None,
    prefix: str | None = None,
    ordered: bool = True,
    partial: bool = False,
) -> Match:
    """Find each of the network's tensors in a file.

    Args:
        source: what errors call the file.
        family: whose names the file has; by default that is found out.
        prefix: what the network's names have before them there; by default one that the family has.
        ordered: whether ``state`` keeps the order of the network that it came from.
        partial: take what there is, if that is at least one tensor.

    Raises:
        UsageError: no name has ``prefix``.
        DataError: tensors are missing, or there are more than the network has.
    """
    attempts = _attempts(state, wanted, family, prefix)
    best = min(attempts, key=lambda attempt: len(attempt.missing))  # of equals the first, which is preferred
    if best.missing and prefix is None:
        _refuse_prefix(state, wanted, source, family)
    if best.missing:
        told = family is not None or prefix is not None  # then the names are not foreign
        best = _incomplete(state, wanted, best, source, None if told else ordered, partial)
    _refuse_more(best, wanted, source)
    return best


def some(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    return ", ".join([*listed[:SHOWN], *more])


# By name.


def _attempts(state: State, wanted: Wanted, family: KeyLayout | None, prefix: str | None) -> list[Match]:
    bare = _bare(state)
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        bare = bare if any(name.startswith(prefix) for name in bare) else {name: name for name in state}
        if not any(name.startswith(prefix) for name in bare):
            first = dict.fromkeys(f"{name.partition('.')[0]}." for name in state if "." in name)
            raise UsageError(f"no name begins with the prefix {prefix}; they begin with {some(first)}")
    inner = [name.removeprefix(prefix or "") for name in bare if name.startswith(prefix or "")]
    families = [family] if family else [each for each in KEY_LAYOUTS.values() if each.recognises([*bare, *inner])]
    families = families if family else [*families, PLAIN]
    return [
        attempt
        for each in families
        for before in ((prefix,) if prefix is not None else each.prefixes)
        for attempt in _by_name(state, bare, wanted, each, before)
    ]


def _bare(state: State) -> dict[str, str]:
    """The file's names by the same without what wraps a whole network, unless that makes two names one."""
    bare = {}
    for name in state:
        inner = name
        while inner.startswith(_SHELLS):
            inner = inner.partition(".")[2]
        bare[inner] = name
    return bare if len(bare) == len(state) else {name: name for name in state}


def _by_name(state: State, bare: dict[str, str], wanted: Wanted, family: KeyLayout, prefix: str) -> Iterator[Match]:
    classifiers = tuple(f"{prefix}{name}." for name in wanted.where.classifiers)
    for names in family.names:
        under = {name: name.removeprefix(prefix) for name in bare if name.startswith(prefix)}
        pairs = {names.renamed(inner): bare[name] for name, inner in under.items()}
        tensors, changes = {name: state[found] for name, found in pairs.items()}, Changes()
        if names.convert:
            tensors, changes = names.convert(tensors, wanted.tensors)
        used = {found for name, found in pairs.items() if name in wanted.tensors}
        rest = {inner: name for inner, name in bare.items() if name not in used}
        design = [name for inner, name in rest.items() if family.drops(inner, prefix) or inner.startswith(classifiers)]
        yield Match(
            family.name,
            {name: tensor for name, tensor in tensors.items() if name in wanted.tensors},
            changes,
            pairs,
            tuple(name for name in wanted.needed if name not in pairs),
            tuple(design),
            tuple(name for name in rest.values() if name not in set(design)),
            prefix,
        )


def _refuse_more(found: Match, wanted: Wanted, source: str) -> None:
    """Refuse a network of which ours is a part, such as one with more blocks."""
    parts = {name.partition(".")[0] for name in wanted.tensors if "." in name}
    surplus = set(found.surplus)
    more = [name for name, old in found.pairs.items() if old in surplus and name.partition(".")[0] in parts]
    if more:
        raise DataError(
            f"the weights from {source} are of a larger network: the network asked for has no {some(more)}.\n"
            "Check backbone.name"
        )


# What to do, and to say, when something is missing.


def _incomplete(state: State, wanted: Wanted, best: Match, source: str, ordered: bool | None, partial: bool) -> Match:
    """Another match than ``best``, or the same when it may be ``partial``."""
    renamed = _renamed_groups(state, wanted, best)
    explained = {name for group in renamed if group.same for name in group.missing}
    why = f"of {len(wanted.needed)} tensors {len(best.missing)} are missing: {some(best.missing)}"
    # With fewer missing the names are the network's own, and it is another network.
    if 2 * len(best.missing) > len(wanted.needed) and not explained.issuperset(best.missing):
        if ordered:
            found, difference = _in_order(state, wanted)
            if found is not None:
                return found
            why += f"; nor does the order agree: {difference}"
        elif ordered is not None:
            why += "; .safetensors keeps no order to go by"
    if partial and len(best.missing) < len(wanted.needed):
        return best
    hints = [f"'{group.found}' would fit '{group.wanted}'" for group in renamed]
    hint = f"\n{some(hints)}: rename it in the file" if hints else ""
    raise DataError(
        f"the weights from {source} do not fill this network: {why}.{hint}\n"
        "Check backbone.name and backbone.pool, or give other weights"
    )


def _refuse_prefix(state: State, wanted: Wanted, source: str, family: KeyLayout | None) -> None:
    """Refuse names that would all fit without a prefix that no layout has, and name it."""
    needed, found = set(wanted.needed), dict[tuple[str, int], set[str]]()
    for name in state:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            before, inner = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
            for number, names in enumerate(_EVERY_NAMES):
                if (own := names.renamed(inner)) in needed:
                    found.setdefault((before, number), set()).add(own)
    whole = list(dict.fromkeys(before for (before, _), names in found.items() if names == needed))
    if len(whole) > 1:
        raise DataError(
            f"{source} holds several such networks, under {some(whole)}; choose one and use the artifact of\n"
            f"{_remedy(source, whole[0])}"
        )
    if whole:
        who = f"the layout {family.name} does not know" if family else "no layout knows"
        raise DataError(
            f"the names in {source} begin with '{whole[0]}', which {who}; under it all {len(needed)} tensors "
            f"would fit. Use the artifact of\n{_remedy(source, whole[0])}"
        )


_EVERY_NAMES = tuple(dict.fromkeys(names for family in KEY_LAYOUTS.values() for names in family.names))


def _remedy(source: str, prefix: str) -> str:
    return f"  sslmed import {source} --prefix {prefix} --backbone NAME --modality M --out ARTIFACT"


class _Group(NamedTuple):
    """Tensors of the file that would fit missing ones. ``same``: their names agree but for the group's own."""

    found: str
    wanted: str
    missing: tuple[str, ...]
    same: bool


def _renamed_groups(state: State, wanted: Wanted, best: Match) -> list[_Group]:
    """For each part of the network that is missing as a whole, the part of the file that has just its tensors."""
    there = set(wanted.needed) - set(best.missing)
    lost = _parted(best.missing, lambda name: [_first_part(name, there)])
    left = {*best.dropped, *(best.pairs[name] for name in there)}
    spare = _parted((name for name, old in best.pairs.items() if old not in left), _every_part)
    tensors = {name: state[old] for name, old in best.pairs.items()}
    found = (_group(part, names, spare, tensors, wanted, best.prefix) for part, names in lost.items())
    return [group for group in found if group is not None]


def _group(
    part: str, names: list[str], spare: dict[str, list[str]], tensors: State, wanted: Wanted, prefix: str
) -> _Group | None:
    shapes = {name.removeprefix(part): _comparable(name, wanted.tensors[name], wanted.where) for name in names}
    kinds = Counter(_kind(name, wanted.tensors[name]) for name in names)
    same, alike = [], []
    for other, theirs in spare.items():
        inner = {name.removeprefix(other): name for name in theirs}
        if inner.keys() == shapes.keys() and all(
            _comparable(part + rest, tensors[name], wanted.where) == shapes[rest] for rest, name in inner.items()
        ):
            same.append(other)
        elif Counter(_kind(name, tensors[name]) for name in theirs) == kinds:
            alike.append(other)
    if not same and len({tuple(spare[other]) for other in alike}) != 1:
        return None
    nearest = min(same or alike, key=lambda other: (abs(other.count(".") - part.count(".")), len(other)))
    dot = "" if part in names else "."
    return _Group(f"{prefix}{nearest}{dot}", f"{part}{dot}", tuple(names), bool(same))


def _parted(names: Iterable[str], parts: Callable[[str], Iterable[str]]) -> dict[str, list[str]]:
    """Names by the parts that they are in, without counters."""
    found = dict[str, list[str]]()
    for name in names:
        for part in parts(name) if not name.endswith(COUNTER) else ():
            found.setdefault(part, []).append(name)
    return found


def _every_part(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:cut]) for cut in range(1, len(parts) + 1))


def _first_part(name: str, there: set[str]) -> str:
    """The largest part of the network around ``name`` of which nothing is there."""
    parts = name.split(".")
    within = (".".join(parts[:cut]) for cut in range(1, len(parts)))
    return next((part for part in within if not any(other.startswith(f"{part}.") for other in there)), name)


def _kind(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return name.rpartition(".")[2], tuple(tensor.shape)


# By order.


def _in_order(state: State, wanted: Wanted) -> tuple[Match | None, str]:
    """The tensors in their order, or how they differ: shape, last part of the name."""
    short = list(state)
    while len({name.partition(".")[0] for name in short}) == 1 and all("." in name for name in short):
        short = [name.partition(".")[2] for name in short]
    found = [
        name for name, rest in zip(state, short, strict=True) if rest.partition(".")[0].strip("_") not in CLASSIFIERS
    ]
    counted = any(name.endswith(COUNTER) for name in found)
    names = [name for name in wanted.tensors if counted or not name.endswith(COUNTER)]
    for name, foreign in zip(names, found, strict=False):
        tensor, target = state[foreign], wanted.tensors[name]
        same_kind = name.rpartition(".")[2] == foreign.rpartition(".")[2]
        if not same_kind or _comparable(name, tensor, wanted.where) != _comparable(name, target, wanted.where):
            return None, f"{foreign} {shape_of(tensor)} stands where {name} {shape_of(target)} should"
    if len(names) != len(found):
        return None, f"{len(found)} tensors, where the network has {len(names)}"
    pairs = dict(zip(names, found, strict=True))
    taken = {name: state[old] for name, old in pairs.items()}
    return Match(BY_ORDER, taken, [], pairs, (), tuple(name for name in state if name not in set(found))), ""


def _comparable(name: str, tensor: torch.Tensor, where: Layout) -> tuple[int, ...]:
    """The shape, without what can be adapted."""
    shape = tuple(tensor.shape)
    if name in where.inputs and len(shape) == 4:
        return (shape[0],) if name == where.patches else (shape[0], *shape[2:])
    return (shape[0], *shape[2:]) if name == where.positions and len(shape) == 3 else shape


def shape_of(tensor: torch.Tensor) -> str:
    """The shape in words."""
    return " x ".join(str(length) for length in tensor.shape) or "one number"
