"""Matrix-free paths at D = 116,097: no tensor of D x D or N x D numbers, nor close to it.

What counts is the largest storage that any torch operation returns, which is the same on every
machine. Workspaces inside of LAPACK are not seen.
"""

import itertools
from math import prod

import pytest
import torch
from torch import nn

from pinncurv import comparison
from pinncurv.curvature import (
    EKFAC,
    KFAC,
    DiagonalGaussNewton,
    GaussNewtonLinearOperator,
    Hessian,
    InSubspace,
    MatrixFreeGaussNewton,
    Nystroem,
    Objective,
    OptimalKronecker,
    PartialTraces,
    PreconditionedCG,
    SubspaceGaussNewton,
    Woodbury,
    reduce,
)
from pinncurv.linops import Damped, FactorDamping
from pinncurv.problems import poisson2d
from tests.meter import Meter

WIDTHS = (2, 256, 256, 128, 128, 1)
D = 116_097
N, N_BOUNDARY = 400, 100
# Largest tensor in units of D, of which the Jacobian has 500 and JᵀJ has D: Z and G of the widest
# layer have 3.5, and five vectors are held at a time.
LARGEST = 5
# A sketch works on blocks of 2^22 numbers, and estimates take 4 entrywise products of 8 columns.
# Conjugate gradients keep their residuals, in blocks of 16 at first.
LARGEST_BLOCK = {"nystroem": 37, "frobenius": 32, "cg": 16}
DAMPING = 1e-6


def objective(n: int, n_boundary: int) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [[nn.Linear(a, b).double(), nn.Tanh()] for a, b in itertools.pairwise(WIDTHS)]
    model = nn.Sequential(*itertools.chain(*layers))[:-1]
    problem = poisson2d(n, n_boundary)
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    return Objective(model, problem.terms, batch)


@pytest.fixture(scope="module")
def linearized():
    made = objective(N, N_BOUNDARY).linearize()
    made.gradient()
    return made


def exact(linearized) -> GaussNewtonLinearOperator:
    return MatrixFreeGaussNewton()(linearized.linearizations)


def flat(linearized) -> torch.Tensor:
    return torch.cat([part.flatten() for part in linearized.gradient()])


def factor_damped(linearized):
    return FactorDamping(DAMPING)(KFAC()(linearized.linearizations))


# A recipe, and what inverts its operator if anything does.
RECIPES = {
    "kfac": (KFAC(), FactorDamping(DAMPING)),
    "kfac-reduce-merged": (KFAC(reduce, merge_terms=True), Damped(DAMPING)),
    "ekfac": (EKFAC(), Damped(DAMPING)),
    "ekfac-partial-traces": (EKFAC(basis=PartialTraces()), Damped(DAMPING)),
    "optimal-kronecker": (OptimalKronecker(iterations=2, tolerance=1.0), Damped(DAMPING)),
    "diagonal": (DiagonalGaussNewton(), Damped(DAMPING)),
    "subspace": (SubspaceGaussNewton(50), InSubspace(DAMPING)),
    "subspace-damped": (SubspaceGaussNewton(50), Damped(DAMPING)),
    "hessian": (Hessian(), None),
    "woodbury": (MatrixFreeGaussNewton(), Woodbury(DAMPING)),
    "nystroem": (MatrixFreeGaussNewton(), Nystroem(DAMPING, 50)),
    "cg": (
        MatrixFreeGaussNewton(),
        PreconditionedCG(DAMPING, max_iterations=5),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_operators_and_inverses(name, linearized):
    recipe, inverse = RECIPES[name]
    with Meter() as meter:
        operator = recipe(linearized.linearizations)
        image = operator @ flat(linearized)
        if inverse is not None:
            image = inverse(operator) @ image
        assert image.shape == (D,)
        assert image.isfinite().all()
    assert D <= meter.largest <= LARGEST_BLOCK.get(name, LARGEST) * D


def decrease(linearized, generator):
    gradient = flat(linearized)
    step = factor_damped(linearized) @ gradient
    return comparison.quadratic_decrease(exact(linearized), DAMPING, gradient, -step).decrease


# What compares; five steps of Lanczos hold five vectors.
COMPARISONS = {
    "frobenius": lambda made, generator: (
        comparison.estimate_frobenius(
            KFAC()(made.linearizations), exact(made), vectors=4, generator=generator, sketch=4
        ).relative_error.value
    ),
    "density": lambda made, generator: (
        comparison.spectral_density(exact(made), steps=5, vectors=2, generator=generator).nodes
    ),
    "extremes": lambda made, generator: (
        comparison.generalized_extremes(
            exact(made), factor_damped(made), DAMPING, steps=5, generator=generator
        ).condition_number
    ),
    "cg": lambda made, generator: (
        comparison.cg_records(
            exact(made), DAMPING, flat(made), {"kfac": factor_damped(made)}, max_iterations=5
        )["kfac"].residual_norm
    ),
    "decrease": decrease,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name, linearized, generator):
    with Meter() as meter:
        result = COMPARISONS[name](linearized, generator)
    assert torch.as_tensor(result).isfinite().all()
    assert D <= meter.largest <= LARGEST_BLOCK.get(name, LARGEST) * D


def test_the_meter_sees_a_jacobian():
    """At a few points, where there is room for it."""
    made = objective(4, 4).linearize()
    with Meter() as meter:
        dense = made.jacobian.to_dense()
    assert meter.largest == dense.numel() == prod(made.jacobian.shape)
    assert prod(exact(made).shape) == D**2
