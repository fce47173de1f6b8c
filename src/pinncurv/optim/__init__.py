"""Optimization with any curvature operator, on any objective that is a sum of squares.

``optimizer.py`` composes a curvature with its inverse (``preconditioner.py``), a step size
(``step_sizes.py``), a momentum (``momentum.py``), an average (``averaging.py``) and a damping that
may adapt (``damping.py``); ``attempt.py`` and ``trial.py`` try an update before it is taken.
``protocols.py`` says what is asked of each, so that none needs to come from this package.
``first_order.py`` steps optimizers of torch the same way.
"""

from pinncurv.optim.averaging import ExponentialAverage, from_first, from_identity, from_zero
from pinncurv.optim.damping import (
    ConstantDamping,
    DampingRule,
    LevenbergMarquardt,
    ShortStepDamping,
)
from pinncurv.optim.first_order import FirstOrder
from pinncurv.optim.momentum import Descent, HeavyBall, Momentum, Spring, WarmStart
from pinncurv.optim.optimizer import CurvatureOptimizer
from pinncurv.optim.preconditioner import Intervals, Preconditioner
from pinncurv.optim.protocols import (
    Chunked,
    Curvature,
    Differentiable,
    Evaluable,
    Evaluation,
    Inverse,
    IterativeInverse,
    LeastSquares,
    LinearizedLoss,
    Randomized,
    ResidualInverse,
    StepRecord,
    Storable,
    ThroughJacobian,
)
from pinncurv.optim.step_sizes import (
    CGBacktracking,
    FixedStep,
    GridLineSearch,
    NormConstrained,
    Proposal,
    QuadraticModel,
    Situation,
    StepSize,
)

__all__ = [
    "CGBacktracking",
    "Chunked",
    "ConstantDamping",
    "Curvature",
    "CurvatureOptimizer",
    "DampingRule",
    "Descent",
    "Differentiable",
    "Evaluable",
    "Evaluation",
    "ExponentialAverage",
    "FirstOrder",
    "FixedStep",
    "GridLineSearch",
    "HeavyBall",
    "Intervals",
    "Inverse",
    "IterativeInverse",
    "LeastSquares",
    "LevenbergMarquardt",
    "LinearizedLoss",
    "Momentum",
    "NormConstrained",
    "Preconditioner",
    "Proposal",
    "QuadraticModel",
    "Randomized",
    "ResidualInverse",
    "ShortStepDamping",
    "Situation",
    "Spring",
    "StepRecord",
    "StepSize",
    "Storable",
    "ThroughJacobian",
    "WarmStart",
    "from_first",
    "from_identity",
    "from_zero",
]
