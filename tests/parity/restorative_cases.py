"""Cases of restoration."""

from case import Case

CASES: list[Case] = []
