"""How good an approximation of a curvature matrix is: spectra, similarity, steps.

Everything takes any square curvlinops ``PyTorchLinearOperator``, computes in float64 whatever the
operator's precision, and draws random numbers from an explicit generator only. Results are tensors
or frozen dataclasses. What is exact has a plain name; ``estimate_...`` has standard errors.

- ``compare``: one approximation against one operator, in one call.
- ``spectra``, ``density``, ``eigenpairs``: all eigenvalues, their density, those at either end.
- ``generalized``: eigenvalues and condition number of P⁻¹(C + λI).
- ``frobenius``, ``frobenius_estimates``, ``mass``: similarity as matrices, also by layer.
- ``steps``: direction and decrease of a step, overlap of eigenspaces, iterations of a solver.
- ``lanczos``: the Lanczos process with full reorthogonalization, plain and preconditioned.
"""

from pinncurv.comparison.compare import Comparison, compare
from pinncurv.comparison.density import SpectralDensity, spectral_density
from pinncurv.comparison.eigenpairs import (
    Eigenpairs,
    EigenpairsNotConverged,
    largest_eigenpairs,
    smallest_eigenpairs,
)
from pinncurv.comparison.estimates import Estimate
from pinncurv.comparison.frobenius import (
    FrobeniusComparison,
    frobenius,
    frobenius_by_layer,
    frobenius_by_layer_pair,
)
from pinncurv.comparison.frobenius_estimates import (
    FrobeniusEstimate,
    estimate_frobenius,
    estimate_frobenius_by_layer_pair,
)
from pinncurv.comparison.generalized import (
    ExtremeEigenvalues,
    condition_number,
    generalized_extremes,
    generalized_spectrum,
)
from pinncurv.comparison.lanczos import LanczosDecomposition, RitzPairs, lanczos
from pinncurv.comparison.mass import mass, squared_block_norms, squared_block_norms_from_kernels
from pinncurv.comparison.spectra import (
    effective_dimension,
    estimate_effective_dimension,
    spectrum,
)
from pinncurv.comparison.steps import (
    QuadraticDecrease,
    StepComparison,
    best_decrease,
    cg_records,
    compare_steps,
    decrease_fraction,
    quadratic_decrease,
    step_cosine,
    subspace_overlap,
)

__all__ = [
    "Comparison",
    "Eigenpairs",
    "EigenpairsNotConverged",
    "Estimate",
    "ExtremeEigenvalues",
    "FrobeniusComparison",
    "FrobeniusEstimate",
    "LanczosDecomposition",
    "QuadraticDecrease",
    "RitzPairs",
    "SpectralDensity",
    "StepComparison",
    "best_decrease",
    "cg_records",
    "compare",
    "compare_steps",
    "condition_number",
    "decrease_fraction",
    "effective_dimension",
    "estimate_effective_dimension",
    "estimate_frobenius",
    "estimate_frobenius_by_layer_pair",
    "frobenius",
    "frobenius_by_layer",
    "frobenius_by_layer_pair",
    "generalized_extremes",
    "generalized_spectrum",
    "lanczos",
    "largest_eigenpairs",
    "mass",
    "quadratic_decrease",
    "smallest_eigenpairs",
    "spectral_density",
    "spectrum",
    "squared_block_norms",
    "squared_block_norms_from_kernels",
    "step_cosine",
    "subspace_overlap",
]
