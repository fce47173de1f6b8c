"""Curvature operators of a PINN loss, built from the linearizations of its terms.

Exact: ``jacobian.py``, ``gauss_newton.py`` (inverted by
``exact_inverse.py``, ``woodbury.py`` or ``iterative.py``),
``kernel.py``, ``hessian.py``. Approximations: ``kfac.py``, ``channel_kronecker.py``, ``ekfac.py``,
``optimal_kronecker.py``, ``subspace.py``, ``nystroem.py``. Each file has its operator and the
recipe that an optimizer takes;
``objective.py`` is the loss on one batch, and ``treatment.py`` reports on every parameter.
Costs are multiplications and numbers held, for N points, S channels, V residual components, layers
of d_in inputs (and bias) and d_out outputs, D parameters in all and R = Σ_t N_t V_t residuals; sums
over layers and terms are left out. To them the linearizations add a forward and V backward passes
and N S (d_in + V d_out) numbers, or with ``chunk_size`` passes instead of numbers for every use.
A new operator is a new file that turns linearizations into a linear operator.
"""

from pinncurv.curvature.channel_kronecker import (
    ChannelFactors as ChannelFactors,
    ChannelKronecker as ChannelKronecker,
    ChannelKroneckerLinearOperator as ChannelKroneckerLinearOperator,
)
from pinncurv.curvature.ekfac import (
    EKFAC as EKFAC,
    EigenBasis as EigenBasis,
    EKFACLinearOperator as EKFACLinearOperator,
    KFACFactors as KFACFactors,
    PartialTraces as PartialTraces,
)
from pinncurv.curvature.exact_inverse import (
    CheaperSide as CheaperSide,
    ParameterInverseLinearOperator as ParameterInverseLinearOperator,
)
from pinncurv.curvature.gauss_newton import (
    BlockDiagonalGaussNewton as BlockDiagonalGaussNewton,
    DiagonalGaussNewton as DiagonalGaussNewton,
    GaussNewton as GaussNewton,
    GaussNewtonLinearOperator as GaussNewtonLinearOperator,
    MatrixFreeGaussNewton as MatrixFreeGaussNewton,
    gauss_newton_diagonal as gauss_newton_diagonal,
)
from pinncurv.curvature.hessian import (
    Hessian as Hessian,
    HessianLinearOperator as HessianLinearOperator,
    ResidualHessian as ResidualHessian,
    ResidualHessianLinearOperator as ResidualHessianLinearOperator,
)
from pinncurv.curvature.iterative import (
    InverseRecipe as InverseRecipe,
    PreconditionedCG as PreconditionedCG,
    Recipe as Recipe,
)
from pinncurv.curvature.jacobian import (
    Jacobian as Jacobian,
    JacobianLinearOperator as JacobianLinearOperator,
)
from pinncurv.curvature.kernel import Kernel as Kernel, KernelLinearOperator as KernelLinearOperator
from pinncurv.curvature.kfac import (
    KFAC as KFAC,
    Expand as Expand,
    KFACLinearOperator as KFACLinearOperator,
    Reduce as Reduce,
    WeightSharing as WeightSharing,
    expand as expand,
    reduce as reduce,
)
from pinncurv.curvature.nystroem import (
    Nystroem as Nystroem,
    NystroemSketch as NystroemSketch,
    SketchedInverseLinearOperator as SketchedInverseLinearOperator,
)
from pinncurv.curvature.objective import (
    LinearizedObjective as LinearizedObjective,
    Objective as Objective,
)
from pinncurv.curvature.optimal_kronecker import (
    KroneckerNotConverged as KroneckerNotConverged,
    OptimalKronecker as OptimalKronecker,
    OptimalKroneckerLinearOperator as OptimalKroneckerLinearOperator,
    optimal_kronecker as optimal_kronecker,
)
from pinncurv.curvature.parameters import ParameterSpace as ParameterSpace
from pinncurv.curvature.subspace import (
    Choice as Choice,
    Deflated as Deflated,
    InSubspace as InSubspace,
    SubspaceGaussNewton as SubspaceGaussNewton,
    SubspaceGaussNewtonLinearOperator as SubspaceGaussNewtonLinearOperator,
    SubspaceInverseLinearOperator as SubspaceInverseLinearOperator,
    SubspaceSolverLinearOperator as SubspaceSolverLinearOperator,
    pivoted_points as pivoted_points,
    uniform_points as uniform_points,
)
from pinncurv.curvature.treatment import (
    Coverage as Coverage,
    ParameterCoverage as ParameterCoverage,
    coverage as coverage,
)
from pinncurv.curvature.woodbury import (
    KernelInverseLinearOperator as KernelInverseLinearOperator,
    Woodbury as Woodbury,
)
