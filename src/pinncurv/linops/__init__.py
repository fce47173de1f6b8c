"""Structured linear operators on parameter space, and their inverses.

All operators are ``SymmetricLinearOperator``s, that is curvlinops ``PyTorchLinearOperator``s with a
left product, ``to_dense``, ``diagonal``, ``trace`` and ``inverse(damping)``.

Costs are multiplications and numbers held, for layers of d_in inputs (and bias) and d_out outputs,
so blocks of n = d_in d_out, and D parameters in all; sums over layers are left out.

- ``operator``: the base class, damping's check.
- ``combination``: sums, differences and multiples of operators.
- ``policy``: where dense linear algebra ends.
- ``blocks``, ``layerwise``: layers as blocks of the parameter space, block-diagonal operators.
- ``factors``, ``kronecker``: Kronecker factors, and operators that are sums of Kronecker products.
- ``kronecker_expansion``: the same where the factors need not be positive semidefinite.
- ``eigenform``: operators that are diagonal in a Kronecker-factored basis (EKFAC, inverses).
- ``dense``: dense, dense block-diagonal and diagonal operators.
- ``inverses``, ``kronecker_inverse``: the inverse (C + λ I)⁻¹.
- ``pseudo_inverse``: the inverse of singular dense operators without damping.
- ``restriction``: operators on some layers, and operators made of several such.
- ``factor_damping``, ``simultaneous``: the inverse with damping in every Kronecker factor.
- ``cg``, ``cg_inverse``: preconditioned conjugate gradients, and the inverse by them.
- ``pivoted_cholesky``: a few columns that stand for a matrix.
- ``reading``: few waits for the device.
- ``tall_svd``: the decomposition of many rows in their own memory.
- ``psd``: the one path for factorizations of positive semidefinite matrices.
"""

from pinncurv.linops.blocks import (
    Block as Block,
    check_blocks as check_blocks,
    flat_positions as flat_positions,
    from_joint as from_joint,
    to_joint as to_joint,
)
from pinncurv.linops.cg import (
    CGIterate as CGIterate,
    CGRecord as CGRecord,
    CGResult as CGResult,
    RelativeProgress as RelativeProgress,
    StoppingRule as StoppingRule,
    conjugate_gradients as conjugate_gradients,
)
from pinncurv.linops.cg_inverse import (
    CGInverseLinearOperator as CGInverseLinearOperator,
    CGNotConverged as CGNotConverged,
)
from pinncurv.linops.combination import (
    LayerwiseCombination as LayerwiseCombination,
    LinearCombination as LinearCombination,
    combine as combine,
)
from pinncurv.linops.dense import (
    DenseBlockDiagonalLinearOperator as DenseBlockDiagonalLinearOperator,
    DenseLinearOperator as DenseLinearOperator,
    DiagonalLinearOperator as DiagonalLinearOperator,
)
from pinncurv.linops.eigenform import (
    KroneckerBasis as KroneckerBasis,
    KroneckerCongruenceLinearOperator as KroneckerCongruenceLinearOperator,
    KroneckerEigenLinearOperator as KroneckerEigenLinearOperator,
)
from pinncurv.linops.factor_damping import (
    FactorDamping as FactorDamping,
    FactorDampings as FactorDampings,
    same as same,
    trace_norm as trace_norm,
)
from pinncurv.linops.factors import KroneckerFactors as KroneckerFactors, merge as merge
from pinncurv.linops.inverses import (
    BlockFactorizedInverseLinearOperator as BlockFactorizedInverseLinearOperator,
    Damped as Damped,
    FactorizedInverseLinearOperator as FactorizedInverseLinearOperator,
    factorize_damped as factorize_damped,
    factorize_damped_blocks as factorize_damped_blocks,
)
from pinncurv.linops.kronecker import SumKroneckerLinearOperator as SumKroneckerLinearOperator
from pinncurv.linops.kronecker_expansion import (
    KroneckerExpansionLinearOperator as KroneckerExpansionLinearOperator,
    KroneckerRecord as KroneckerRecord,
)
from pinncurv.linops.layerwise import (
    LayerwiseLinearOperator as LayerwiseLinearOperator,
    term_position as term_position,
)
from pinncurv.linops.operator import (
    PyTorchLinearOperator as PyTorchLinearOperator,
    SymmetricLinearOperator as SymmetricLinearOperator,
    check_damping as check_damping,
)
from pinncurv.linops.pivoted_cholesky import (
    PartialCholesky as PartialCholesky,
    pivoted_cholesky as pivoted_cholesky,
)
from pinncurv.linops.psd import (
    CholeskyFactorization as CholeskyFactorization,
    EigenFactorization as EigenFactorization,
    Factorization as Factorization,
    FactorizationError as FactorizationError,
    FactorizationReport as FactorizationReport,
    eigh as eigh,
    factorize as factorize,
    factorize_from as factorize_from,
    symmetrize as symmetrize,
)
from pinncurv.linops.pseudo_inverse import PseudoInverse as PseudoInverse
from pinncurv.linops.reading import (
    all_finite as all_finite,
    check as check,
    check_finite as check_finite,
    checks_wait as checks_wait,
    read as read,
)
from pinncurv.linops.resolution import (
    DampingBelowResolution as DampingBelowResolution,
    resolved_damping as resolved_damping,
    warn_below_resolution as warn_below_resolution,
)
from pinncurv.linops.restriction import (
    BlockDiagonalLinearOperator as BlockDiagonalLinearOperator,
    RestrictedLinearOperator as RestrictedLinearOperator,
    Selection as Selection,
    block_diagonal as block_diagonal,
    restrict as restrict,
)
from pinncurv.linops.simultaneous import (
    SimultaneousDiagonalization as SimultaneousDiagonalization,
    diagonalize as diagonalize,
)
