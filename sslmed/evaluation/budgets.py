"""Label budgets: which labelled training patients a probe or a fine-tuning gets. Nested, keyed draws by patient.

The patient, not the image, is what is drawn: images of one patient resemble each other, so counting them as independent
makes few labels look like many. Draws of one seed are nested (the 1 % draw lies inside the 10 % draw). Draws of classes
and findings are stratified; draws of masks are not, since most images show most classes. At 100 % every seed draws the
same patients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from sslmed.config import Config, UsageError
from sslmed.keyed_rng import key

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

# Below this many labelled train patients 1 % is no patient or two, so that budgets count patients instead.
FEW_PATIENTS = 200
NAMED = 3


@dataclass(frozen=True)
class Budget:
    """How many labelled training patients a probe gets: a share of them, or a number of each class.

    Attributes:
        text: As the user wrote it: ``1%`` or ``k=5``.
        share: In (0, 1], or None.
        each: Patients of each class, of masks in all; at least 1, or None.
    """

    text: str
    share: float | None = None
    each: int | None = None


class LabelsConfig(Config):
    """Which labelled train patients fine-tuning gets.

    Attributes:
        budget: a share of them such as ``10%``, or ``k=5`` patients of each class, of masks in all.
        seed: of the draw; draws of one seed are nested.
    """

    budget: str = "100%"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        try:
            budgets = parse(self.budget)
        except UsageError as error:
            raise ValueError(str(error)) from error
        if len(budgets) != 1:
            raise ValueError(f"budget is '{self.budget}'; allowed: one budget, such as 10% or k=5")
        return self


@dataclass(frozen=True)
class Skipped:
    """A budget that cannot be drawn, and why."""

    budget: str
    why: str


@dataclass(frozen=True, eq=False)
class Draw:
    """The labelled images of one budget under one seed.

    Attributes:
        rows: (n,) ascending positions in the arrays that ``draws`` was given.
        patients: How many patients these images are of.
        everyone: Whether this is every labelled patient, so that all seeds drew the same set.
    """

    budget: Budget
    seed: int
    rows: Rows
    patients: int
    everyone: bool


def parse(text: str) -> tuple[Budget, ...]:
    """Read budgets such as ``1%,10%,100%`` or ``k=5``, in the order given.

    Raises:
        UsageError: an unreadable, out-of-range or repeated budget.
    """
    budgets = tuple(_budget(part.strip()) for part in text.split(","))
    meanings = [(budget.share, budget.each) for budget in budgets]
    if len(set(meanings)) < len(meanings):
        raise UsageError(f"budgets '{text}' name one budget twice; give each once, such as 1%,10%,100%")
    return budgets


def default_budgets(patients: int, *, drawn: bool = False) -> str:
    """The budgets of a study that names none.

    Args:
        patients: How many labelled train patients there are; below 200 shares would be too few of them.
        drawn: Of masks and boxes k counts patients in all, and one patient holds many of them.
    """
    if drawn:
        return "k=5,k=20,100%"
    return "k=1,k=5,k=10,100%" if patients < FEW_PATIENTS else "1%,10%,100%"


def draws(
    patients: Array,
    target: Array,
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    *,
    stratified: bool = True,
    classes: Sequence[str] = (),
) -> tuple[list[Draw], list[Skipped]]:
    """Choose training patients for every budget and seed.

    Each seed puts all labelled patients into one order: first one patient of each class, then the classes in
    proportion (Webster's divisor method). A share is a prefix of that order, which makes draws nested and stratified
    at once. A patient who shows several classes or findings counts as the rarest of them; those who show none are a
    class of their own. Without strata the order is chance alone, and ``k`` counts patients in all. The order depends on
    ids and seed, not on that of rows.

    A budget is skipped when a draw of it lacks a class that the pool shows, or has fewer than ``k`` patients who show
    it; with strata also when it lacks patients who show none.

    Args:
        patients: (N,) patient keys, bytes or text.
        target: (N,) class indices, -1 for unlabelled; or (N, K) of what each image shows, booleans or 0, 1 and -1 for
            unknown. A row of -1 alone is unlabelled.
        seeds: One draw for each; at 100 % all seeds give the same set.
        stratified: False for masks.
        classes: The K names, for what is skipped.

    Returns:
        The draws, budgets in the order given and seeds within; and the budgets that were skipped.
    """
    shown, known = _shown(target)
    rows = np.flatnonzero(known)
    ids, owner = np.unique(patients[rows], return_inverse=True)
    pool = _Pool(_by_patient(shown[rows], owner, len(ids)), stratified, classes)
    names = [_text(patient) for patient in ids]
    orders = {seed: _order(names, pool.strata, seed) for seed in seeds}
    chosen: list[Draw] = []
    skipped: list[Skipped] = []
    for budget in budgets:
        members = [_take(budget, *orders[seed]) for seed in seeds]
        why = next((why for each in members if (why := pool.lacks(budget, each))), None)
        if why is None:
            chosen += [_draw(budget, seed, each, rows, owner) for seed, each in zip(seeds, members, strict=True)]
        else:
            skipped.append(Skipped(budget.text, why))
    return chosen, skipped


class _Pool:
    """All P labelled patients: what each shows, its stratum, and whether a draw of them will do."""

    def __init__(self, shows: Array, stratified: bool, classes: Sequence[str]) -> None:
        self.shows, self.stratified, self.classes = shows, stratified, classes
        self.nothing: Array = np.asarray(~shows.any(axis=1))
        commonness = np.where(shows, shows.sum(axis=0), np.iinfo(np.int64).max)
        rarest = np.where(self.nothing, shows.shape[1], commonness.argmin(axis=1))
        self.strata = rarest if stratified else np.zeros(len(shows), dtype=np.int64)

    def lacks(self, budget: Budget, members: Array) -> str | None:
        """Why the draw of ``members`` will not do, None when it does."""
        count = len(self.shows)
        if count == 0:
            return "no training patient has a label"
        if not self.stratified and budget.each is not None and budget.each > count:
            return f"there are {count} labelled training patients"
        there, drawn = self.shows.sum(axis=0), self.shows[members].sum(axis=0)
        least = (budget.each or 1) if self.stratified else 1
        short = np.flatnonzero((there > 0) & (drawn < least))
        if budget.each is not None and self.stratified and len(short):
            rarest = int(short[drawn[short].argmin()])
            if there[rarest] < least:
                return f"{self._name(rarest)} is shown by {there[rarest]} labelled training patients"
            return f"a draw has {drawn[rarest]} patients who show {self._name(rarest)}"
        missing = [self._name(label) for label in short.tolist()]
        if self.stratified and self.nothing.any() and not self.nothing[members].any():
            missing.append("patient without any finding")
        if not missing:
            return None
        listed = f"no {', no '.join(missing[:NAMED])} in a draw of {len(members)} of {count} labelled training patients"
        return f"below one patient a class: {listed}" if self.stratified else listed

    def _name(self, label: int) -> str:
        return self.classes[label] if len(self.classes) else f"class {label}"


def _budget(text: str) -> Budget:
    allowed = "a share of the training patients such as 1% (above 0, up to 100), or k=5 for patients of each class"
    try:
        if text.endswith("%") and 0 < float(text[:-1]) <= 100:
            return Budget(text, share=float(text[:-1]) / 100)
        if text.startswith("k=") and int(text[2:]) >= 1:
            return Budget(text, each=int(text[2:]))
    except ValueError:
        pass
    raise UsageError(f"'{text}' is not a budget; allowed: {allowed}")


def _shown(target: Array) -> tuple[Array, Array]:
    """(N, K) what each image shows, and (N,) whether anything is known of it."""
    if target.ndim == 2:
        return target == 1, np.asarray((target >= 0).any(axis=1))
    return target[:, None] == np.arange(target.max(initial=0) + 1), target >= 0


def _by_patient(shown: Array, owner: Array, count: int) -> Array:
    """(P, K): what any image of each patient shows."""
    shows = np.zeros((count, shown.shape[1]), dtype=bool)
    for label in range(shown.shape[1]):
        shows[owner[shown[:, label]], label] = True
    return shows


def _text(patient: Any) -> str:
    return patient.decode() if isinstance(patient, bytes) else str(patient)


def _order(names: Sequence[str], strata: Array, seed: int) -> tuple[Array, Array]:
    """All patients in the order in which they are drawn, and each patient's place within its stratum.

    The (j + 1)-th of n patients of a stratum stands at (j + 1/2) / n, the first of each stratum before all others.
    """
    by_chance = sorted(range(len(names)), key=lambda index: key(seed, "few-label draw", names[index]))
    place = np.zeros(len(names), dtype=np.int64)
    position = np.zeros(len(names))
    for label in np.unique(strata):
        members = [index for index in by_chance if strata[index] == label]
        place[members] = np.arange(len(members))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    position[place == 0] = 0.0
    return np.lexsort((strata, position)), place


def _take(budget: Budget, order: Array, place: Array) -> Array:
    if budget.each is not None:
        return np.flatnonzero(place < budget.each)
    # Half up, not half to even; the tiny term forgives shares such as 0.29, whose product falls just below a half.
    return order[: math.floor((budget.share or 0.0) * len(order) + 0.5 + 1e-9)]


def _draw(budget: Budget, seed: int, members: Array, labelled: Array, owner: Array) -> Draw:
    rows = labelled[np.isin(owner, members)].astype(np.int64)
    return Draw(budget, seed, rows, len(members), everyone=len(rows) == len(labelled))
