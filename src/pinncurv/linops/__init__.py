"""Structured linear operators on parameter space, and their inverses.

All operators are ``SymmetricLinearOperator``s, that is curvlinops ``PyTorchLinearOperator``s with a
left product, ``to_dense``, ``diagonal``, ``trace`` and ``inverse(damping)``.

Costs are multiplications and numbers held, for layers of d_in inputs (and bias) and d_out outputs,
so blocks of n = d_in d_out, and D parameters in all; sums over layers are left out.

- ``operator``: the base class, the protocol of operators that can be averaged, damping's check.
- ``blocks``, ``layerwise``: layers as blocks of the parameter space, block-diagonal operators.
- ``factors``, ``kronecker``: Kronecker factors, and operators that are sums of Kronecker products.
- ``kronecker_expansion``: the same where the factors need not be positive semidefinite.
- ``eigenform``: operators that are diagonal in a Kronecker-factored basis (EKFAC, inverses).
- ``dense``: dense, dense block-diagonal and diagonal operators.
- ``inverses``, ``kronecker_inverse``: the inverse (C + λ I)⁻¹.
- ``restriction``: operators on some layers, and operators made of several such.
- ``factor_damping``, ``simultaneous``: the inverse with damping in every Kronecker factor.
- ``cg``, ``cg_inverse``: preconditioned conjugate gradients, and the inverse by them.
- ``psd``: the one path for factorizations of positive semidefinite matrices.
"""

from pinncurv.linops.blocks import Block, check_blocks, flat_positions, from_joint, to_joint
from pinncurv.linops.cg import (
    CGIterate,
    CGRecord,
    CGResult,
    RelativeProgress,
    StoppingRule,
    conjugate_gradients,
)
from pinncurv.linops.cg_inverse import CGInverseLinearOperator, CGNotConverged
from pinncurv.linops.dense import (
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
)
from pinncurv.linops.eigenform import (
    KroneckerBasis,
    KroneckerCongruenceLinearOperator,
    KroneckerEigenLinearOperator,
)
from pinncurv.linops.factor_damping import (
    FactorDamping,
    FactorDampings,
    factor_damped_inverse,
    same,
    trace_norm,
)
from pinncurv.linops.factors import KroneckerFactors, merge
from pinncurv.linops.inverses import (
    BlockFactorizedInverseLinearOperator,
    Damped,
    FactorizedInverseLinearOperator,
    factorize_damped_blocks,
)
from pinncurv.linops.kronecker import SumKroneckerLinearOperator
from pinncurv.linops.kronecker_expansion import KroneckerExpansionLinearOperator, KroneckerRecord
from pinncurv.linops.layerwise import LayerwiseLinearOperator, term_position
from pinncurv.linops.operator import Averageable, SymmetricLinearOperator, check_damping
from pinncurv.linops.psd import (
    CholeskyFactorization,
    EigenFactorization,
    Factorization,
    FactorizationError,
    FactorizationReport,
    eigh,
    factorize,
    symmetrize,
)
from pinncurv.linops.restriction import (
    BlockDiagonalLinearOperator,
    RestrictedLinearOperator,
    Selection,
    block_diagonal,
    restrict,
)
from pinncurv.linops.simultaneous import SimultaneousDiagonalization, diagonalize

__all__ = [
    "Averageable",
    "Block",
    "BlockDiagonalLinearOperator",
    "BlockFactorizedInverseLinearOperator",
    "CGInverseLinearOperator",
    "CGIterate",
    "CGNotConverged",
    "CGRecord",
    "CGResult",
    "CholeskyFactorization",
    "Damped",
    "DenseBlockDiagonalLinearOperator",
    "DenseLinearOperator",
    "DiagonalLinearOperator",
    "EigenFactorization",
    "FactorDamping",
    "FactorDampings",
    "Factorization",
    "FactorizationError",
    "FactorizationReport",
    "FactorizedInverseLinearOperator",
    "KroneckerBasis",
    "KroneckerCongruenceLinearOperator",
    "KroneckerEigenLinearOperator",
    "KroneckerExpansionLinearOperator",
    "KroneckerFactors",
    "KroneckerRecord",
    "LayerwiseLinearOperator",
    "RelativeProgress",
    "RestrictedLinearOperator",
    "Selection",
    "SimultaneousDiagonalization",
    "StoppingRule",
    "SumKroneckerLinearOperator",
    "SymmetricLinearOperator",
    "block_diagonal",
    "check_blocks",
    "check_damping",
    "conjugate_gradients",
    "diagonalize",
    "eigh",
    "factor_damped_inverse",
    "factorize",
    "factorize_damped_blocks",
    "flat_positions",
    "from_joint",
    "merge",
    "restrict",
    "same",
    "symmetrize",
    "term_position",
    "to_joint",
    "trace_norm",
]
