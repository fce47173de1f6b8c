"""Differential operators: what to read off a jet.

``operator.py`` is what an operator must declare, ``operators.py`` are the shipped ones on the
coordinates of ``coordinates.py``, and ``plan.py`` evaluates several of them in one pass. A new
operator is a subclass of ``DifferentialOperator`` anywhere.
"""

from pinncurv.diffops.operator import Channels, DifferentialOperator, Requirement
from pinncurv.diffops.operators import (
    Directional,
    FactoredSecondOrder,
    Gradient,
    Laplacian,
    Partial,
    SecondOrder,
    Value,
)
from pinncurv.diffops.plan import Plan, evaluate, make_plan

__all__ = [
    "Channels",
    "DifferentialOperator",
    "Directional",
    "FactoredSecondOrder",
    "Gradient",
    "Laplacian",
    "Partial",
    "Plan",
    "Requirement",
    "SecondOrder",
    "Value",
    "evaluate",
    "make_plan",
]
