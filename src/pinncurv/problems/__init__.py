"""PDEs as data: domains and samplers, loss terms, and the equations with known solutions."""

from pinncurv.problems.ansatz import Ansatz as Ansatz
from pinncurv.problems.black_scholes import black_scholes as black_scholes
from pinncurv.problems.burgers import burgers as burgers
from pinncurv.problems.causal import CausalWeights as CausalWeights
from pinncurv.problems.cavity import cavity as cavity
from pinncurv.problems.conditions import (
    dirichlet as dirichlet,
    initial_and_lateral as initial_and_lateral,
    neumann as neumann,
    periodic as periodic,
    point as point,
    robin as robin,
)
from pinncurv.problems.convection import convection as convection
from pinncurv.problems.diffusion_process import (
    DiffusionProcess as DiffusionProcess,
    FullDiffusion as FullDiffusion,
    IsotropicDiffusion as IsotropicDiffusion,
)
from pinncurv.problems.disk import Disk as Disk
from pinncurv.problems.domains import (
    Box as Box,
    Faces as Faces,
    Interior as Interior,
    SpaceTimeBox as SpaceTimeBox,
)
from pinncurv.problems.energy import Energy as Energy
from pinncurv.problems.fokker_planck import (
    anisotropic_fokker_planck as anisotropic_fokker_planck,
    anisotropic_log_fokker_planck as anisotropic_log_fokker_planck,
    density_equation as density_equation,
    fokker_planck as fokker_planck,
    log_density_equation as log_density_equation,
    log_fokker_planck as log_fokker_planck,
    log_fokker_planck9d as log_fokker_planck9d,
)
from pinncurv.problems.gaussian import (
    gaussian_density as gaussian_density,
    gaussian_log_density as gaussian_log_density,
    gaussian_preserving as gaussian_preserving,
    ornstein_uhlenbeck as ornstein_uhlenbeck,
    waves as waves,
)
from pinncurv.problems.heat import heat as heat, heat1d as heat1d, heat4d as heat4d
from pinncurv.problems.helmholtz import helmholtz as helmholtz
from pinncurv.problems.inverse import (
    UnknownSource as UnknownSource,
    heat_coefficient as heat_coefficient,
    poisson_coefficient as poisson_coefficient,
    poisson_source as poisson_source,
)
from pinncurv.problems.l2 import L2 as L2
from pinncurv.problems.loss_term import LossTerm as LossTerm
from pinncurv.problems.multiscale import poisson2d_multiscale as poisson2d_multiscale
from pinncurv.problems.navier_stokes import (
    beltrami as beltrami,
    kovasznay as kovasznay,
    navier_stokes as navier_stokes,
)
from pinncurv.problems.periodic_embedding import PeriodicEmbedding as PeriodicEmbedding
from pinncurv.problems.periodic_problems import (
    allen_cahn as allen_cahn,
    kdv as kdv,
    kuramoto_sivashinsky as kuramoto_sivashinsky,
)
from pinncurv.problems.periodicity import (
    NotPeriodic as NotPeriodic,
    warn_unless_periodic as warn_unless_periodic,
)
from pinncurv.problems.plate import biharmonic_plate as biharmonic_plate
from pinncurv.problems.poisson import (
    poisson as poisson,
    poisson2d as poisson2d,
    poisson5d as poisson5d,
    poisson10d as poisson10d,
    poisson100d as poisson100d,
)
from pinncurv.problems.poisson_planar import (
    poisson_disk as poisson_disk,
    poisson_disk_ritz as poisson_disk_ritz,
    poisson_l_shape as poisson_l_shape,
)
from pinncurv.problems.polygon import Polygon as Polygon
from pinncurv.problems.problem import Errors as Errors, Problem as Problem
from pinncurv.problems.reaction import reaction as reaction
from pinncurv.problems.resampling import ResidualBased as ResidualBased
from pinncurv.problems.samplers import (
    Drawn as Drawn,
    Fixed as Fixed,
    Product as Product,
    Sampler as Sampler,
    Union as Union,
)
from pinncurv.problems.schroedinger import nls as nls
from pinncurv.problems.solitons import kdv_two_solitons as kdv_two_solitons
from pinncurv.problems.wave import wave1d as wave1d
from pinncurv.problems.windows import Windows as Windows
