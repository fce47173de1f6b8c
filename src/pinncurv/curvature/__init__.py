"""Curvature operators of a PINN loss, built from the linearizations of its terms.

Exact: ``jacobian.py``, ``gauss_newton.py`` (inverted by ``woodbury.py`` or ``iterative.py``),
``kernel.py``, ``hessian.py``. Approximations: ``kfac.py``, ``channel_kronecker.py``, ``ekfac.py``,
``optimal_kronecker.py``, ``subspace.py``, ``nystroem.py``. Each file has its operator and the
recipe that an optimizer takes;
``objective.py`` is the loss on one batch, and ``coverage.py`` reports on every parameter.
Costs are multiplications and numbers held, for N points, S channels, V residual components, layers
of d_in inputs (and bias) and d_out outputs, D parameters in all and R = Σ_t N_t V_t residuals; sums
over layers and terms are left out. To them the linearizations add a forward and V backward passes
and N S (d_in + V d_out) numbers, or with ``chunk_size`` passes instead of numbers for every use.
A new operator is a new file that turns linearizations into a linear operator.
"""

from pinncurv.curvature.channel_kronecker import (
    ChannelFactors,
    ChannelKronecker,
    ChannelKroneckerLinearOperator,
)
from pinncurv.curvature.coverage import Coverage, ParameterCoverage, coverage
from pinncurv.curvature.ekfac import (
    EKFAC,
    EigenBasis,
    EKFACLinearOperator,
    KFACFactors,
    PartialTraces,
)
from pinncurv.curvature.gauss_newton import (
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    GaussNewtonLinearOperator,
    MatrixFreeGaussNewton,
    gauss_newton_diagonal,
)
from pinncurv.curvature.hessian import (
    Hessian,
    HessianLinearOperator,
    ResidualHessian,
    ResidualHessianLinearOperator,
)
from pinncurv.curvature.iterative import InverseRecipe, PreconditionedCG, Recipe
from pinncurv.curvature.jacobian import Jacobian, JacobianLinearOperator
from pinncurv.curvature.kernel import Kernel, KernelLinearOperator
from pinncurv.curvature.kfac import (
    KFAC,
    Expand,
    KFACLinearOperator,
    Reduce,
    WeightSharing,
    expand,
    reduce,
)
from pinncurv.curvature.nystroem import Nystroem, NystroemSketch, SketchedInverseLinearOperator
from pinncurv.curvature.objective import LinearizedObjective, Objective
from pinncurv.curvature.optimal_kronecker import (
    KroneckerNotConverged,
    OptimalKronecker,
    OptimalKroneckerLinearOperator,
    optimal_kronecker,
)
from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.subspace import (
    InSubspace,
    SubspaceGaussNewton,
    SubspaceGaussNewtonLinearOperator,
    SubspaceInverseLinearOperator,
    SubspaceSolverLinearOperator,
)
from pinncurv.curvature.woodbury import KernelInverseLinearOperator, Woodbury

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonalGaussNewton",
    "ChannelFactors",
    "ChannelKronecker",
    "ChannelKroneckerLinearOperator",
    "Coverage",
    "DiagonalGaussNewton",
    "EKFACLinearOperator",
    "EigenBasis",
    "Expand",
    "GaussNewton",
    "GaussNewtonLinearOperator",
    "Hessian",
    "HessianLinearOperator",
    "InSubspace",
    "InverseRecipe",
    "Jacobian",
    "JacobianLinearOperator",
    "KFACFactors",
    "KFACLinearOperator",
    "Kernel",
    "KernelInverseLinearOperator",
    "KernelLinearOperator",
    "KroneckerNotConverged",
    "LinearizedObjective",
    "MatrixFreeGaussNewton",
    "Nystroem",
    "NystroemSketch",
    "Objective",
    "OptimalKronecker",
    "OptimalKroneckerLinearOperator",
    "ParameterCoverage",
    "ParameterSpace",
    "PartialTraces",
    "PreconditionedCG",
    "Recipe",
    "Reduce",
    "ResidualHessian",
    "ResidualHessianLinearOperator",
    "SketchedInverseLinearOperator",
    "SubspaceGaussNewton",
    "SubspaceGaussNewtonLinearOperator",
    "SubspaceInverseLinearOperator",
    "SubspaceSolverLinearOperator",
    "WeightSharing",
    "Woodbury",
    "coverage",
    "expand",
    "gauss_newton_diagonal",
    "optimal_kronecker",
    "reduce",
]
