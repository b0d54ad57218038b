"""How deep in a network each parameter lies, as timm groups them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sslmed.config import UsageError

_WITH_PREVIOUS = 99999  # timm's mark for what belongs to the group before it (timm.models MATCH_PREV_GROUP)
_Key = tuple[float, ...]


def layer_numbers(network: nn.Module) -> tuple[dict[str, int], int]:
    """The number of each parameter's layer, by its name, and the depth of the network.

    Layer 0 is the stem: of a transformer the patch embedding, positions and class token. Then comes one layer a block,
    as timm's ``group_matcher`` groups them. What follows the last block, such as the final norm, has the number
    ``depth``, which is where a head would stand: a layer-wise decay of learning rates is ``decay ** (depth - number)``
    (BEiT: Bao et al., arXiv 2106.08254; as in MAE's reference, util/lr_decay.py).

    Raises:
        UsageError: timm does not group the parameters of this network.
    """
    if not hasattr(network, "group_matcher"):
        raise UsageError(
            f"timm does not say in which order the layers of {type(network).__name__} come; layer-wise learning rates "
            "and freezing the first layers need a network for which it does, such as a ResNet, ConvNeXt, Swin or ViT"
        )
    key = _key_function(network.group_matcher(coarse=False))  # type: ignore[operator]
    keys = {name: key(name) for name, _ in network.named_parameters()}
    blocks = [each for each in keys.values() if each[0] != float("inf")]
    last = max(each for each in blocks if each[-1] != _WITH_PREVIOUS)
    # timm counts the final norm to the last block; as in the papers it is a layer of its own here
    number, depth = {}, -1
    for each in sorted(set(blocks)):
        if each <= last:
            depth += depth < 0 or each[-1] != _WITH_PREVIOUS
            number[each] = depth
    return {name: number.get(each, depth + 1) for name, each in keys.items()}, depth + 1


def _key_function(matcher: Any) -> Callable[[str], _Key]:
    """What puts names in order: timm gives a function, or expressions whose groups are numbers."""
    if callable(matcher):
        return lambda name: _as_key(matcher(name))
    patterns = [
        (re.compile(pattern), place, suffix or ())
        for place, given in enumerate(_mapping(matcher).values())
        for pattern, suffix in ([(given, ())] if isinstance(given, str) else given or ())
    ]

    def key(name: str) -> _Key:
        for pattern, place, suffix in patterns:
            found = pattern.match(name)
            if found:
                return _as_key([place, *(group for group in found.groups() if group is not None), *suffix])
        return (float("inf"),)

    return key


def _mapping(matcher: Any) -> Mapping[str, Any]:
    if not isinstance(matcher, Mapping):
        raise TypeError(f"timm's group_matcher gave a {type(matcher).__name__}")
    return matcher


def _as_key(given: Any) -> _Key:
    return tuple(float(each) for each in given) if isinstance(given, Iterable) else (float(given),)
