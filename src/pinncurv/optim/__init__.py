"""Optimization with any curvature operator, on any objective that is a sum of squares.

``optimizer.py`` composes a curvature with its average and inverse (``preconditioner.py``), a
momentum (``momentum.py``), a step size (``step_sizes.py``, ``geodesic_flow.py``) and a damping that
may adapt (``damping.py``). What a momentum and a step size see is ``situation.py``; ``trial.py``
tries an update before it is taken.
``protocols.py`` says what is asked of each, so that none needs to come from this package.
``identity.py`` says what a saved state belongs to. ``first_order.py`` steps optimizers of torch the
same way, among them the self-scaled quasi-Newton methods of ``quasi_newton.py``. ``held_out.py``
measures the loss on other points.
"""

from pinncurv.optim.batch import GrowingBatch as GrowingBatch
from pinncurv.optim.damping import (
    ConstantDamping as ConstantDamping,
    DampingRule as DampingRule,
    LevenbergMarquardt as LevenbergMarquardt,
    LossDamping as LossDamping,
    ShortStepDamping as ShortStepDamping,
)
from pinncurv.optim.first_order import FirstOrder as FirstOrder
from pinncurv.optim.geodesic_flow import GeodesicFlow as GeodesicFlow
from pinncurv.optim.held_out import HeldOut as HeldOut, exhausted as exhausted
from pinncurv.optim.momentum import (
    HeavyBall as HeavyBall,
    Momentum as Momentum,
    Spring as Spring,
    WarmStart as WarmStart,
)
from pinncurv.optim.optimizer import CurvatureOptimizer as CurvatureOptimizer
from pinncurv.optim.preconditioner import (
    ExponentialAverage as ExponentialAverage,
    Intervals as Intervals,
    Preconditioner as Preconditioner,
    Start as Start,
    from_first as from_first,
    from_identity as from_identity,
    from_zero as from_zero,
)
from pinncurv.optim.progress import StoppedProgress as StoppedProgress
from pinncurv.optim.protocols import (
    Curvature as Curvature,
    Inverse as Inverse,
    LeastSquares as LeastSquares,
    LinearizedLoss as LinearizedLoss,
    StepRecord as StepRecord,
    offers as offers,
)
from pinncurv.optim.quasi_newton import SSBFGS as SSBFGS, SSBroyden as SSBroyden
from pinncurv.optim.situation import Situation as Situation
from pinncurv.optim.step_sizes import (
    ArmijoLineSearch as ArmijoLineSearch,
    CGBacktracking as CGBacktracking,
    FixedStep as FixedStep,
    GridLineSearch as GridLineSearch,
    NormConstrained as NormConstrained,
    Proposal as Proposal,
    QuadraticModel as QuadraticModel,
    StepSize as StepSize,
)
