"""Where dense linear algebra ends, and how exact iterations are: one policy for all solvers.

To decide otherwise for one operator, choose its inverse: ``DenseLinearOperator(C.to_dense(),
C.shapes).inverse(λ)`` or ``CGInverseLinearOperator(C, λ, preconditioner, tolerance)``.
"""

# Largest matrix that is formed and factorized, for n³ / 3 and n² numbers in float64, where the
# alternative is conjugate gradients without a good preconditioner, or none.
LARGEST_DENSE = 2048

# Largest matrix where it is the exact one, on the cheaper side of residuals and parameters: 0.5 GB,
# and half a minute on two cores.
LARGEST_SIDE = 8192

# Largest block of a layer likewise, where conjugate gradients have a good preconditioner.
LARGEST_BLOCK = 1024

# Largest exact block of a parameter that is no weight of a linear layer, in KFAC and its relatives.
LARGEST_PARAMETER = 4096

# Largest matrix that gets an eigendecomposition instead of a Cholesky factorization. It serves all
# dampings and knows which eigenvalues are negative by rounding only, but takes some thirty times
# longer, which grows into minutes.
LARGEST_EIGH = 1024

# How many residuals of conjugate gradients are kept, for the next to be conjugate to them, and
# how many numbers they may have. In a system with condition 1e10, rounding otherwise decides within
# a dozen iterations where a truncated solve ends.
KEPT_RESIDUALS = 256
KEPT_NUMBERS = 1 << 26

# Relative norm of the residual that conjugate gradients reach.
TOLERANCE = 1e-10
