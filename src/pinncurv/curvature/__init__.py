"""Curvature operators of a PINN loss, built from the linearizations of its terms.

``jacobian.py``, ``gauss_newton.py`` and ``kfac.py`` are the operators, each with the recipe that
an optimizer takes; ``products.py`` has the few matrix products that everything follows from.
``objective.py`` is the loss on one batch, and ``coverage.py`` reports on every parameter.
A new operator is a new file that turns linearizations into a linear operator.
"""

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
    gauss_newton_blocks,
    gauss_newton_diagonal,
)
from pinncurv.curvature.hessian import (
    Hessian,
    HessianLinearOperator,
    ResidualHessian,
    ResidualHessianLinearOperator,
)
from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.kfac import (
    KFAC,
    Expand,
    KFACLinearOperator,
    Reduce,
    WeightSharing,
    expand,
    reduce,
)
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

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonalGaussNewton",
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
    "JacobianLinearOperator",
    "KFACFactors",
    "KFACLinearOperator",
    "KroneckerNotConverged",
    "LinearizedObjective",
    "Objective",
    "OptimalKronecker",
    "OptimalKroneckerLinearOperator",
    "ParameterCoverage",
    "ParameterSpace",
    "PartialTraces",
    "Reduce",
    "ResidualHessian",
    "ResidualHessianLinearOperator",
    "SubspaceGaussNewton",
    "SubspaceGaussNewtonLinearOperator",
    "SubspaceInverseLinearOperator",
    "SubspaceSolverLinearOperator",
    "WeightSharing",
    "coverage",
    "expand",
    "gauss_newton_blocks",
    "gauss_newton_diagonal",
    "optimal_kronecker",
    "reduce",
]
