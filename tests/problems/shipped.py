"""The shipped problems, for tests that run over all of them."""

from collections.abc import Callable

from pinncurv.problems import (
    Problem,
    anisotropic_fokker_planck,
    anisotropic_log_fokker_planck,
    beltrami,
    fokker_planck,
    heat1d,
    heat4d,
    kovasznay,
    log_fokker_planck,
    log_fokker_planck9d,
    poisson2d,
    poisson5d,
    poisson10d,
    poisson100d,
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
}
