"""Differential operators: what to read off a jet.

``operator.py`` is what an operator must declare, ``operators.py`` are the shipped ones on the
coordinates of ``coordinates.py``, and ``plan.py`` evaluates several of them in one pass. A new
operator is a subclass of ``DifferentialOperator`` anywhere.
"""

from pinncurv.diffops.operator import DifferentialOperator, named_parameters_of
from pinncurv.diffops.operators import (
    Bilaplacian,
    Directional,
    Divergence,
    FactoredSecondOrder,
    Gradient,
    Hessian,
    Laplacian,
    Partial,
    SecondOrder,
    Value,
)
from pinncurv.diffops.plan import Plan, evaluate
from pinncurv.jets import Derivative

__all__ = [
    "Bilaplacian",
    "Derivative",
    "DifferentialOperator",
    "Directional",
    "Divergence",
    "FactoredSecondOrder",
    "Gradient",
    "Hessian",
    "Laplacian",
    "Partial",
    "Plan",
    "SecondOrder",
    "Value",
    "evaluate",
    "named_parameters_of",
]
