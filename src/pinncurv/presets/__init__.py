"""The known methods: a few lines each, as a user would compose them."""

from pinncurv.presets.automatic import auto as auto
from pinncurv.presets.exact import (
    engd as engd,
    engd_diagonal as engd_diagonal,
    engd_per_layer as engd_per_layer,
    gauss_newton as gauss_newton,
    levenberg_marquardt as levenberg_marquardt,
    subspace_gauss_newton as subspace_gauss_newton,
)
from pinncurv.presets.iterative import (
    gauss_newton_cg as gauss_newton_cg,
    hessian_free as hessian_free,
)
from pinncurv.presets.kernel import engd_w as engd_w, spring as spring
from pinncurv.presets.kronecker import ekfac as ekfac, kfac as kfac, kfac_star as kfac_star
