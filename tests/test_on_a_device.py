"""What runs on the CPU runs on a device to the same values: no tensor is left behind."""

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
from pinncurv.optim import SSBFGS, CurvatureOptimizer, FirstOrder, GrowingBatch, HeldOut, SSBroyden
from pinncurv.problems import L2, CausalWeights, ResidualBased, Windows
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
# They run the code of others.
ALIKE = [name for name in SHIPPED if name.startswith(("anisotropic_log", "poisson1", "poisson5"))]
ALIKE += ["fokker_planck3d", "log_fokker_planck2d", "anisotropic_fokker_planck3d"]
ALIKE += ["helmholtz_periodic3d", "convection", "heat_coefficient", "no_bias", "mixed"]
ALIKE += ["gelu_tanh", "silu", "softplus", "linear", "levenberg_marquardt", "broyden"]


def over(cases: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test over cases, those that are like others among the slow tests only."""
    given = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in cases]
    return pytest.mark.parametrize("name", given)


@pytest.mark.filterwarnings("ignore::pinncurv.problems.NotPeriodic")
@on_devices
@over(PROBLEMS)
def test_problems(name, device):
    def run(where):
        problem = PROBLEMS[name]()
        model = network(problem.d_in, 3, problem.d_out).to(where)
        for term in problem.terms:
            if isinstance(term.residual, nn.Module):
                term.residual.to(where)
        batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, where)
        objective = Objective(model, problem.terms, batch, check=False)
        linearized = objective.linearize()
        yield from linearized.gradient()
        if objective.is_sum_of_squares:
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
@over(NETWORKS)
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
@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, device):
    def run(where):
        linearized = poisson(network().to(where)).linearize()
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


# --- training -------------------------------------------------------------------------------------

# Those that tests/optim/test_state.py takes to a device are not here.
TRAINERS = {
    "spring": presets.spring,
    "ekfac": presets.ekfac,
    "levenberg_marquardt": presets.levenberg_marquardt,
    "subspace": presets.subspace_gauss_newton,
    "growing": lambda p: CurvatureOptimizer(p, KFAC(), Damped(1e-2), batch=GrowingBatch(8)),
    "adam": lambda p: FirstOrder(torch.optim.Adam(p)),
    "lbfgs": lambda p: FirstOrder(torch.optim.LBFGS(p, max_iter=3)),
    "bfgs": lambda p: FirstOrder(SSBFGS(p)),
    "broyden": lambda p: FirstOrder(SSBroyden(p)),
}


@on_devices
@over(TRAINERS)
def test_steps_on_new_points_with_others_held_out(name, device):
    def run(where):
        model, draws = network().to(where), torch.Generator().manual_seed(1)
        objective = poisson(model)
        optimizer = TRAINERS[name](objective.parameters())
        held_out = HeldOut(objective.resampled(draws), every=1)
        for _ in range(2):
            record = held_out(optimizer.step(objective))
            yield from (record.loss, record.held_out)
            objective = objective.resampled(draws)
        yield flat(model)

    assert_same(run, device, rtol=1e-6)


@on_devices
def test_decay_chunks_and_samples_of_the_points(device):
    def run(where):
        model, problem = network().to(where), problems.poisson2d(14, 8)
        terms, draws = [*problem.terms, L2(0.1)], torch.Generator().manual_seed(0)
        objective = Objective.sample(model, terms, draws, chunk_size=5)
        objective.backward()
        yield from [parameter.grad for parameter in model.parameters()]
        yield from objective.linearize_some(9, draws).gradient()
        for recipe in (KFAC(), MatrixFreeGaussNewton(), DiagonalGaussNewton(), Kernel()):
            yield recipe(objective.linearize().linearizations).to_dense()
        assert str(coverage(model, objective.linearize().linearizations))

    assert_same(run, device)


@on_devices
def test_points_and_weights_that_follow_the_residual(device):
    def run(where):
        heat, draws = problems.heat1d(), torch.Generator().manual_seed(0)
        model, weights = network().to(where), CausalWeights(0.0, 1.0, slabs=4)
        term = replace(heat.terms[0], weight=weights)
        chosen = ResidualBased(term, model, 20, draws=2)
        x = chosen.sample(draws, torch.float64, where)
        weights.update_(term, model, x)
        yield x
        yield from Objective(model, [term], [x]).linearize().gradient()

    assert_same(run, device)


@on_devices
@pytest.mark.filterwarnings("ignore::pinncurv.problems.NotPeriodic")
def test_windows_of_time(device):
    def run(where):
        windows = Windows((0.0, 0.5, 1.0))
        for seed in (1, 2):
            model = windows.scaled(network(seed=seed)).to(where)
            objective = Objective.sample(model, windows.problem(problems.allen_cahn))
            yield from objective.linearize().gradient()
            windows.append(model)
        yield windows(torch.linspace(0, 1, 8, dtype=torch.float64).view(4, 2).to(where))

    assert_same(run, device)


@on_devices
def test_two_operators_are_compared(device):
    def run(where):
        linearized = poisson(network().to(where)).linearize()
        exact, kfac = (recipe(linearized.linearizations) for recipe in (GaussNewton(), KFAC()))
        for limit in (1024, 4):  # exactly, and by probes
            made = comparison.compare(
                kfac, exact, linearized.gradient(), 1e-2, dense_limit=limit, probes=4
            )
            yield from (made.cosine.value, made.condition_number, made.step.cosine)
        yield comparison.frobenius_by_layer(kfac, exact).relative_error

    assert_same(run, device, rtol=1e-6)


@on_devices
def test_verification(device):
    model = network(2, 2, 1).to(device)
    terms = problems.poisson2d(3, 2).terms
    batch = [term.points.sample(torch.Generator(), torch.float64, device) for term in terms]
    verify(model, terms, batch, curvature=KFAC()).raise_if_failed()
