"""What the momentum of a momentum encoder becomes at another batch size."""

from typing import Literal

from sslmed.models.momentum import rescaled_momentum

MomentumRule = Literal["scaled", "constant"]
QUOTED_FOR = 256  # images a batch, as learning rates are (Goyal et al., arXiv 1706.02677)


def momentum_at(batch_size: int, momentum: float, rule: MomentumRule) -> float:
    """The momentum at a global batch: ``scaled`` is momentum ** (B / 256), the same memory in samples at any batch."""
    return momentum if rule == "constant" else rescaled_momentum(momentum, batch_size, QUOTED_FOR)


def momentum_notes(batch_size: int, momentum: float, rule: MomentumRule) -> list[str]:
    """What to say before training where the rule changes the momentum."""
    here = momentum_at(batch_size, momentum, rule)
    if here == momentum:
        return []
    return [
        f"method.momentum {momentum:g} is quoted for batch {QUOTED_FOR}; at batch {batch_size} it is {here:.6g} "
        "(method.momentum_rule=constant keeps it)"
    ]
