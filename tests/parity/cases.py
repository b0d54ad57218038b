"""What is compared with what: every loss of every method, with its formula and, where it is right, lightly's.

A new method adds its cases here; test_parity.py refuses a method without one.
"""

import contrastive_cases
import distillation_cases
import masked_cases
import predictive_cases
import restorative_cases
from case import Case as Case
from case import random as random

CASES = [
    *contrastive_cases.CASES,
    *distillation_cases.CASES,
    *masked_cases.CASES,
    *predictive_cases.CASES,
    *restorative_cases.CASES,
]
