"""PDEs as data: domains and samplers, loss terms, and the equations with known solutions."""

from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.diffusion_process import DiffusionProcess, FullDiffusion, IsotropicDiffusion
from pinncurv.problems.domains import Box, Faces, Interior, SpaceTimeBox
from pinncurv.problems.fokker_planck import (
    anisotropic_fokker_planck,
    anisotropic_log_fokker_planck,
    density_equation,
    fokker_planck,
    log_density_equation,
    log_fokker_planck,
    log_fokker_planck9d,
)
from pinncurv.problems.gaussian import (
    gaussian_density,
    gaussian_log_density,
    gaussian_preserving,
    ornstein_uhlenbeck,
    waves,
)
from pinncurv.problems.heat import heat, heat1d, heat4d
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.poisson import poisson, poisson2d, poisson5d, poisson10d, poisson100d
from pinncurv.problems.problem import Errors, Problem
from pinncurv.problems.samplers import Fixed, Product, Sampler, Union

__all__ = [
    "Box",
    "DiffusionProcess",
    "Errors",
    "Faces",
    "Fixed",
    "FullDiffusion",
    "Interior",
    "IsotropicDiffusion",
    "LossTerm",
    "Problem",
    "Product",
    "Sampler",
    "SpaceTimeBox",
    "Union",
    "anisotropic_fokker_planck",
    "anisotropic_log_fokker_planck",
    "density_equation",
    "dirichlet",
    "fokker_planck",
    "gaussian_density",
    "gaussian_log_density",
    "gaussian_preserving",
    "heat",
    "heat1d",
    "heat4d",
    "log_density_equation",
    "log_fokker_planck",
    "log_fokker_planck9d",
    "ornstein_uhlenbeck",
    "poisson",
    "poisson2d",
    "poisson5d",
    "poisson10d",
    "poisson100d",
    "waves",
]
