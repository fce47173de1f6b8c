"""How good an approximation of a curvature matrix is: spectra, similarity, steps.

Everything takes any square curvlinops ``PyTorchLinearOperator``, computes in float64 whatever the
operator's precision, and draws random numbers from an explicit generator only. Results are tensors
or frozen dataclasses. What is exact has a plain name; ``estimate_...`` has standard errors.

The same arguments mean the same everywhere: ``operator`` is C, symmetric, and positive semidefinite
where there is a ``damping`` λ >= 0; ``inverse`` is P⁻¹, positive definite, by default (C + λI)⁻¹; a
``gradient`` g or ``direction`` is ``[D]`` or a list of tensors in parameter order; ``blocks`` are
layers, by default those of an operator that is block diagonal over layers; ``vectors`` counts
random probes (at least 2), ``generator`` draws them. A ``ValueError`` says where operators and
vectors do not fit each other, something is not finite, or a number is out of range.

- ``compare``: one approximation against one operator, in one call.
- ``spectra``, ``density``, ``eigenpairs``: all eigenvalues, their density, those at either end.
- ``generalized``: eigenvalues and condition number of P⁻¹(C + λI).
- ``frobenius``, ``frobenius_estimates``, ``mass``: similarity as matrices, also by layer.
- ``steps``: direction and decrease of a step, overlap of eigenspaces, iterations of a solver.
- ``lanczos``: the Lanczos process with full reorthogonalization, plain and preconditioned.
"""

from pinncurv.comparison.density import (
    SpectralDensity as SpectralDensity,
    spectral_density as spectral_density,
)
from pinncurv.comparison.eigenpairs import (
    Eigenpairs as Eigenpairs,
    EigenpairsNotConverged as EigenpairsNotConverged,
    largest_eigenpairs as largest_eigenpairs,
    smallest_eigenpairs as smallest_eigenpairs,
)
from pinncurv.comparison.estimates import Estimate as Estimate
from pinncurv.comparison.frobenius import (
    FrobeniusComparison as FrobeniusComparison,
    frobenius as frobenius,
    frobenius_by_layer as frobenius_by_layer,
    frobenius_by_layer_pair as frobenius_by_layer_pair,
)
from pinncurv.comparison.frobenius_estimates import (
    FrobeniusEstimate as FrobeniusEstimate,
    estimate_frobenius as estimate_frobenius,
    estimate_frobenius_by_layer_pair as estimate_frobenius_by_layer_pair,
)
from pinncurv.comparison.generalized import (
    ExtremeEigenvalues as ExtremeEigenvalues,
    condition_number as condition_number,
    generalized_extremes as generalized_extremes,
    generalized_spectrum as generalized_spectrum,
)
from pinncurv.comparison.lanczos import (
    LanczosDecomposition as LanczosDecomposition,
    RitzPairs as RitzPairs,
    lanczos as lanczos,
)
from pinncurv.comparison.mass import (
    mass as mass,
    squared_block_norms as squared_block_norms,
    squared_block_norms_from_kernels as squared_block_norms_from_kernels,
)
from pinncurv.comparison.pair import Comparison as Comparison, compare as compare
from pinncurv.comparison.spectra import (
    effective_dimension as effective_dimension,
    estimate_effective_dimension as estimate_effective_dimension,
    spectrum as spectrum,
)
from pinncurv.comparison.steps import (
    QuadraticDecrease as QuadraticDecrease,
    StepComparison as StepComparison,
    best_decrease as best_decrease,
    cg_records as cg_records,
    compare_steps as compare_steps,
    decrease_fraction as decrease_fraction,
    quadratic_decrease as quadratic_decrease,
    step_cosine as step_cosine,
    subspace_overlap as subspace_overlap,
)
