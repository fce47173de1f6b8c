"""The shipped problems, for tests that run over all of them."""

from collections.abc import Callable

from pinncurv.problems import (
    Problem,
    anisotropic_fokker_planck,
    anisotropic_log_fokker_planck,
    beltrami,
    biharmonic_plate,
    black_scholes,
    convection,
    fokker_planck,
    heat1d,
    heat4d,
    helmholtz,
    kdv_two_solitons,
    kovasznay,
    log_fokker_planck,
    log_fokker_planck9d,
    nls,
    poisson2d,
    poisson2d_multiscale,
    poisson5d,
    poisson10d,
    poisson100d,
    poisson_disk,
    poisson_l_shape,
    reaction,
    wave1d,
)

SHIPPED: dict[str, Callable[[], Problem]] = {
    "poisson2d": poisson2d,
    "poisson5d": poisson5d,
    "poisson10d": poisson10d,
    "poisson100d": poisson100d,
    "heat1d": heat1d,
    "heat4d": heat4d,
    "log_fokker_planck9d": log_fokker_planck9d,
    "fokker_planck1d": lambda: fokker_planck(1),
    "fokker_planck3d": lambda: fokker_planck(3),
    "log_fokker_planck2d": lambda: log_fokker_planck(2),
    "anisotropic_fokker_planck2d": anisotropic_fokker_planck,
    "anisotropic_log_fokker_planck2d": anisotropic_log_fokker_planck,
    "anisotropic_fokker_planck3d": lambda: anisotropic_fokker_planck(3),
    "anisotropic_log_fokker_planck3d": lambda: anisotropic_log_fokker_planck(3),
}

# What the field measures itself on, beyond the paper's.
GALLERY: dict[str, Callable[[], Problem]] = {
    "kovasznay": kovasznay,
    "beltrami": beltrami,
    "helmholtz": helmholtz,
    "helmholtz_periodic3d": lambda: helmholtz((1, 4, 3), 10, n_boundary=0),
    "wave1d": wave1d,
    "biharmonic_plate": biharmonic_plate,
    "poisson2d_multiscale": poisson2d_multiscale,
    "convection": convection,
    "reaction": reaction,
    "kdv_two_solitons": kdv_two_solitons,
    "nls": nls,
    "black_scholes": black_scholes,
    "poisson_disk": poisson_disk,
    "poisson_l_shape": poisson_l_shape,
}
