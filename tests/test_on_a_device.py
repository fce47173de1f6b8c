"""What runs on the CPU runs on a device to the same values: no tensor is left behind."""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pinncurv import comparison, presets, problems
from pinncurv.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonalGaussNewton,
    ChannelKronecker,
    CheaperSide,
    Deflated,
    DiagonalGaussNewton,
    GaussNewton,
    Hessian,
    InSubspace,
    Kernel,
    MatrixFreeGaussNewton,
    Nystroem,
    Objective,
    OptimalKronecker,
    PartialTraces,
    PreconditionedCG,
    ResidualHessian,
    SubspaceGaussNewton,
    Woodbury,
    coverage,
    pivoted_points,
    reduce,
)
from pinncurv.linearization import linearize
from pinncurv.linops import Damped, FactorDamping
from pinncurv.optim import CurvatureOptimizer, FirstOrder, GrowingBatch, HeldOut, SSBFGS, SSBroyden
from pinncurv.problems import L2, CausalWeights, Problem, ResidualBased, Windows
from pinncurv.verification import verify
from tests import kinds, networks
from tests.devices import DEVICES
from tests.networks import points
from tests.optim.cases import flat, network, poisson
from tests.problems.shipped import GALLERY, SHIPPED
from tests.terms import TERMS

on_devices = pytest.mark.parametrize("device", DEVICES)


def assert_same(
    run: Callable[[str], Iterable[Tensor | float]], device: str, rtol: float = 1e-9
) -> None:
    """Check that a computation gives on a device, and there, what it gives on the CPU."""
    for here, there in zip(run("cpu"), run(device), strict=True):
        if isinstance(there, Tensor):
            assert there.device.type == device
            torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=rtol, atol=rtol)
        else:
            assert there == pytest.approx(here, rel=rtol)


# --- problems and networks ------------------------------------------------------------------------

INVERSE = {
    "heat_coefficient": lambda: problems.heat_coefficient(12, 6),
    "poisson_coefficient": lambda: problems.poisson_coefficient(12, 6),
    "poisson_source": lambda: problems.poisson_source(12, 6),
}
FURTHER = {
    "burgers": problems.burgers,
    "cavity": problems.cavity,
    "allen_cahn": problems.allen_cahn,
    "kuramoto_sivashinsky": problems.kuramoto_sivashinsky,
    "poisson_disk_ritz": problems.poisson_disk_ritz,
}
PROBLEMS = SHIPPED | GALLERY | INVERSE | FURTHER


@pytest.mark.filterwarnings("ignore::pinncurv.problems.NotPeriodic")
@on_devices
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name, device):
    def run(where):
        problem = PROBLEMS[name]()
        model = network(problem.d_in, 3, problem.d_out).to(where)
        for term in problem.terms:
            if isinstance(term.residual, nn.Module):
                term.residual.to(where)
        batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, where)
        objective = Objective(model, problem.terms, batch, check=where != "cpu")
        linearized = objective.linearize()
        yield from linearized.gradient()
        yield from linearized.residual
        if problem.solution is not None:
            yield problem.errors(model, batch[0][:9]).rmse

    assert_same(run, device)


NETWORKS = {name: functools.partial(networks.build, name) for name in networks.KINDS}
NETWORKS |= {
    f"{name}, trained": functools.partial(kinds.build, name)
    for name in (*kinds.KINDS, *kinds.UNUSUAL)
    if name != "pair"
}


@on_devices
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, device):
    def run(where):
        made = linearize(TERMS["vector"], NETWORKS[name]().to(where), points().to(where))
        yield from (made.residual, MatrixFreeGaussNewton()([made]).to_dense())

    assert_same(run, device)


OPERATORS = {name: functools.partial(TERMS.get, name) for name in TERMS}
OPERATORS |= {f"{name}, again": build for name, build in kinds.TERMS.items() if name != "inverse"}


@on_devices
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, device):
    def run(where):
        made = linearize(OPERATORS[name](), networks.build("tanh").to(where), points().to(where))
        yield from (made.residual, MatrixFreeGaussNewton()([made]).to_dense())

    assert_same(run, device)


# --- curvature ------------------------------------------------------------------------------------

RECIPES = {
    "exact": GaussNewton(),
    "blocks": BlockDiagonalGaussNewton(),
    "diagonal": DiagonalGaussNewton(),
    "matrix-free": MatrixFreeGaussNewton(),
    "kernel": Kernel(),
    "hessian": Hessian(),
    "residual hessian": ResidualHessian(),
    "expand": KFAC(),
    "reduce": KFAC(reduce),
    "ekfac": EKFAC(),
    "traces": EKFAC(basis=PartialTraces()),
    "channels": ChannelKronecker(),
    "optimal": OptimalKronecker(),
    "subspace": SubspaceGaussNewton(5),
    "pivoted": SubspaceGaussNewton(4, choice=pivoted_points),
}


@on_devices
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, chunk_size, device):
    def run(where):
        linearized = poisson(network().to(where), chunk_size=chunk_size).linearize()
        operator = RECIPES[name](linearized.linearizations)
        yield operator.to_dense()
        if name not in ("hessian", "residual hessian", "matrix-free"):
            yield Damped(1e-2)(operator).to_dense()

    assert_same(run, device, rtol=1e-7)


EXACT, SOME = MatrixFreeGaussNewton(), SubspaceGaussNewton(5)
INVERSES = {
    "woodbury": (EXACT, Woodbury(1e-3)),
    "nystroem": (EXACT, Nystroem(1e-3, 4)),
    "cheaper": (EXACT, CheaperSide(1e-3)),
    "cg": (EXACT, PreconditionedCG(1e-2, curvature=None)),
    "preconditioned": (EXACT, PreconditionedCG(1e-2)),
    "in subspace": (SOME, InSubspace(1e-3)),
    "deflated": (SOME, Deflated(1e-3)),
    "factors": (KFAC(), FactorDamping(1e-6)),
}


@on_devices
@pytest.mark.parametrize("name", INVERSES)
def test_inverses(name, device):
    recipe, inverse = INVERSES[name]

    def run(where):
        linearized = poisson(network().to(where)).linearize()
        solver = inverse(recipe(linearized.linearizations))
        yield solver @ flat(linearized.gradient())
        if getattr(solver, "solve_residual", None) is not None:
            yield flat(solver.solve_residual(linearized.residual))

    assert_same(run, device, rtol=1e-6)
