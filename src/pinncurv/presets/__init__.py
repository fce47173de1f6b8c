"""The known methods: a few lines each, as a user would compose them."""

from pinncurv.presets.exact import (
    engd,
    engd_diagonal,
    engd_per_layer,
    gauss_newton,
    levenberg_marquardt,
    subspace_gauss_newton,
)
from pinncurv.presets.iterative import gauss_newton_cg, hessian_free
from pinncurv.presets.kernel import engd_w, spring
from pinncurv.presets.kronecker import ekfac, kfac, kfac_star

__all__ = [
    "ekfac",
    "engd",
    "engd_diagonal",
    "engd_per_layer",
    "engd_w",
    "gauss_newton",
    "gauss_newton_cg",
    "hessian_free",
    "kfac",
    "kfac_star",
    "levenberg_marquardt",
    "spring",
    "subspace_gauss_newton",
]
