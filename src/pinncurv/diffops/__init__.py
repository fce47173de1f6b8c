"""Differential operators: what to read off a jet.

``operator.py`` is what an operator must declare, ``operators.py`` are the shipped ones on the
coordinates of ``coordinates.py``, ``random_directions.py`` estimates those of second order from few
directions, and ``plan.py`` evaluates several of them in one pass. A new operator is a subclass of
``DifferentialOperator`` anywhere.
"""

from pinncurv.diffops.operator import (
    DifferentialOperator as DifferentialOperator,
    named_parameters_of as named_parameters_of,
)
from pinncurv.diffops.operators import (
    Bilaplacian as Bilaplacian,
    Directional as Directional,
    Divergence as Divergence,
    FactoredSecondOrder as FactoredSecondOrder,
    Gradient as Gradient,
    Hessian as Hessian,
    Laplacian as Laplacian,
    Partial as Partial,
    SecondOrder as SecondOrder,
    Value as Value,
)
from pinncurv.diffops.plan import Plan as Plan, evaluate as evaluate
from pinncurv.diffops.random_directions import (
    RandomCoordinates as RandomCoordinates,
    RandomDirections as RandomDirections,
    RandomSigns as RandomSigns,
)
from pinncurv.jets import Derivative as Derivative
