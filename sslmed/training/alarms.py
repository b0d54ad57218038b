"""What goes wrong in self-supervised training unsaid by the loss. Each alarm names what it saw and what to do."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from sslmed.config import TrainingAborted

Action = Literal["stop", "warn", "off"]
COLLAPSED = 0.1  # of the healthy 1 / sqrt(D)
BLANK = 1e-4  # standard deviation of normalised pixels, about 1 where there is something to see
EXPLODED = 100.0  # times the median so far
NORMS = 50  # logged values that the median is of
FEWEST_NORMS = 5


class Alarm:
    """Rings when something has looked wrong at every look for ``patience`` steps.

    Args:
        name: of its setting in the recipe's section monitor.
        say: prints a warning.
    """

    def __init__(self, name: str, action: Action, patience: int, say: Callable[[str], None]) -> None:
        self.name, self.action, self.patience, self.say = name, action, patience, say
        self.since: int | None = None

    def look(self, step: int, wrong: bool, message: Callable[[int], str]) -> None:
        """Take note of one look; ``message`` is given the step since which it has looked wrong.

        Raises:
            TrainingAborted: it rings and its action is ``stop``.
        """
        if not wrong or self.action == "off":
            self.since = None
            return
        if self.since is None:
            self.since = step
        if step - self.since < self.patience:
            return
        if self.action == "stop":
            raise TrainingAborted(f"{message(self.since)} (monitor.{self.name}=warn goes on.)")
        self.say(f"warning: {message(self.since)}")
        self.since = step


class Alarms:
    """The alarms of one training."""

    def __init__(self, actions: dict[str, Action], patience: int, log_every: int, say: Callable[[str], None]) -> None:
        self.collapse = Alarm("collapse", actions["collapse"], patience, say)
        self.frozen = Alarm("frozen", actions["frozen"], patience, say)
        # a single outlier is no explosion: it must last for two more looks
        self.explosion = {name: Alarm("explosion", actions["explosion"], 2 * log_every, say) for name in _NORMS}
        self.blank = Alarm("collapse", actions["collapse"], 2 * log_every, say)
        self._norms: dict[str, deque[float]] = {name: deque(maxlen=NORMS) for name in _NORMS}
        self._average: torch.Tensor | None = None  # norm of each tensor at the last look
        self._patience = patience

    def look_at_embeddings(self, step: int, std: float, width: int) -> None:
        """Have all images come to look alike?"""
        healthy = 1 / math.sqrt(width)
        self.collapse.look(
            step,
            std < COLLAPSED * healthy,
            lambda since: (
                f"the embeddings have collapsed: their standard deviation is {std:.2g} since step {since}, where "
                f"{healthy:.2g} is healthy. All images look alike to the network: lower optim.lr, lengthen "
                "optim.warmup, raise train.batch_size, or strengthen the views."
            ),
        )

    def look_at_views(self, step: int, std: float) -> None:
        """Is there anything to see? ``std`` is the mean over views of the standard deviation of their pixels."""
        self.blank.look(
            step,
            std < BLANK,
            lambda since: (
                f"the images are blank: since step {since} no view has one pixel unlike another. "
                "Look at them with `sslmed preview STORE`, and ingest the right ones."
            ),
        )

    def look_at_norm(self, step: int, name: str, norm: float) -> None:
        """Is the norm far above what it has been, or no number? ``name`` is gradient_norm or embedding_norm."""
        earlier = self._norms[name]
        usual = statistics.median(earlier) if len(earlier) >= FEWEST_NORMS else math.inf
        what, remedy = _NORMS[name]
        self.explosion[name].look(
            step,
            not norm <= EXPLODED * usual or math.isinf(norm),
            lambda since: (
                f"the norm of the {what} has exploded: {norm:.3g} since step {since}, where {usual:.3g} was usual. "
                f"{remedy}"
            ),
        )
        if self.explosion[name].since is None:  # what is wrong must not become what is usual
            earlier.append(norm)

    def look_at_average(self, step: int, total: int, average: nn.Module) -> None:
        """Does the momentum network still follow? Looked at in the first half: the cosine ends at a standstill."""
        now = torch.stack(torch._foreach_norm([p.detach() for p in average.parameters()])).double().cpu()
        earlier, self._average = self._average, now
        if earlier is None:
            return
        standing = torch.equal(now, earlier) and step <= total / 2
        self.frozen.patience = min(self._patience, total // 4)  # or a short training would end before it rings
        self.frozen.look(
            step,
            standing,
            lambda since: (
                f"the momentum network is frozen: none of its weights has moved since step {since}, so that the "
                "online network only learns to predict its random start. Lower method.momentum, or give "
                "method.momentum_rule=constant; a method of your own must update it in after_step."
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, or one that is preempted often would never ring."""
        return {
            "since": {name: alarm.since for name, alarm in self._all().items()},
            "norms": {name: list(norms) for name, norms in self._norms.items()},
            "average": None if self._average is None else self._average.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, alarm in self._all().items():
            alarm.since = state["since"][name]
        for name, norms in state["norms"].items():
            self._norms[name].extend(norms)
        if state["average"] is not None:
            self._average = torch.tensor(state["average"], dtype=torch.float64)

    def _all(self) -> dict[str, Alarm]:
        return {"collapse": self.collapse, "blank": self.blank, "frozen": self.frozen, **self.explosion}


_NORMS = {
    "gradient_norm": (
        "gradient",
        "The steps are too large: lower optim.lr or lengthen optim.warmup.",
    ),
    "embedding_norm": (
        "embeddings",
        "The weights grow unchecked, and with them the rounding errors: raise optim.weight_decay, or lower optim.lr.",
    ),
}
