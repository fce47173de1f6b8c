"""Any trained tensor, derivatives of any order: operators are exact against nested torch.func."""

import inspect
import itertools

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    Hessian,
    Jacobian,
    Kernel,
    MatrixFreeGaussNewton,
    Objective,
    coverage,
)
from pinncurv.diffops import Bilaplacian, Laplacian, Partial, Plan, Value
from pinncurv.linearization import UncapturedParameterError, linearize
from pinncurv.linops import Damped, FactorDamping, flat_positions, trace_norm
from pinncurv.optim import CurvatureOptimizer, FixedStep
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.kinds import KINDS, TERMS, Two, build, system
from tests.networks import points

# torch's own vmap of a weight normalization, in the oracle
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def pairwise() -> list[tuple[str, str, int | None]]:
    """Return cases in which every two of network, term and chunk size meet."""
    kinds, terms, chunks = list(KINDS), list(TERMS), [None, 2, 1]
    cheap = {"normalized", "neumann"}  # piecewise linear, or one order of its own: to order two
    cases = []
    for i, (kind, term) in enumerate(itertools.product(kinds, terms)):
        order = {"kuramoto": 4, "biharmonic": 4, "kdv": 3, "mixed": 3}.get(term, 2)
        if not (kind in cheap and order > 2):
            cases.append((kind, term, chunks[(i // len(terms) + i) % 3]))
    return cases


@pytest.mark.parametrize(("kind", "term", "chunk_size"), pairwise())
@pytest.mark.filterwarnings("ignore:The second derivative of")  # of PReLU
def test_jacobian(kind, term, chunk_size):
    """Residual, Jacobian and gradient; with them follow all operators, see below."""
    model, loss_term, x = build(kind), TERMS[term](), points()
    wanted = oracles.jacobian(loss_term, model, x)
    objective = Objective(model, [loss_term], [x], chunk_size)
    linearized = objective.linearize()
    residual = oracles.scaled_residual(loss_term, model, x, oracles.trainable(model, loss_term))
    oracles.assert_close(linearized.residual[0], residual.detach())
    oracles.assert_close(Jacobian()(linearized).to_dense(), wanted)
    gradient = torch.cat([g.flatten() for g in linearized.gradient()])
    oracles.assert_close(gradient, wanted.T @ residual.detach().flatten())
    by_autograd = torch.autograd.grad(objective.loss(), objective.parameters())
    oracles.assert_close(torch.cat([g.flatten() for g in by_autograd]), gradient)


QUICK = [("slopes", "kdv"), ("fourier", "inverse"), ("tied", "biharmonic"), ("deeponet", "mixed")]


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("kind", "term"), QUICK)
def test_operators(kind, term, chunk_size):
    model, terms, batch = build(kind), [TERMS[term](), TERMS["first"]()], [points(), points(4)]
    linearized = Objective(model, terms, batch, chunk_size).linearize()
    G = oracles.gauss_newton(terms, model, batch)
    J = torch.cat(
        [oracles.jacobian(t, model, x, *terms) for t, x in zip(terms, batch, strict=True)]
    )
    eye = torch.eye(len(G), dtype=torch.float64)
    oracles.assert_close(GaussNewton()(linearized).to_dense(), G)
    oracles.assert_close(MatrixFreeGaussNewton()(linearized) @ eye, G)
    oracles.assert_close(DiagonalGaussNewton()(linearized).diagonal(), G.diagonal())
    oracles.assert_close(Kernel()(linearized).to_dense(), J @ J.T)
    blocks = BlockDiagonalGaussNewton()(linearized).to_dense()
    space = linearized.space
    for position in flat_positions(space.blocks, space.shapes):
        index = position[:, None], position
        oracles.assert_close(blocks[index], G[index])
    b = torch.cat([g.flatten() for g in linearized.gradient()])
    for recipe in (GaussNewton(), MatrixFreeGaussNewton()):
        inverse = Damped(1e-3)(recipe(linearized))
        oracles.assert_close(inverse @ b, torch.linalg.solve(G + 1e-3 * eye, b), rtol=1e-8)


@pytest.mark.parametrize(("kind", "term"), QUICK[:2])
def test_hessian(kind, term):
    model, loss_term, x = build(kind), TERMS[term](), points(2)
    parameters = oracles.trainable(model, loss_term)
    v = {
        n: torch.cos(torch.arange(p.numel()).double()).reshape(p.shape)
        for n, p in parameters.items()
    }

    def gradient(p):
        return torch.func.grad(lambda q: oracles.loss([loss_term], model, [x], q))(p)

    _, wanted = torch.func.jvp(gradient, (parameters,), (v,))
    operator = Hessian()(Objective(model, [loss_term], [x]).linearize())
    received = operator @ list(v.values())
    for a, b in zip(received, wanted.values(), strict=True):
        oracles.assert_close(a, b)


@pytest.mark.parametrize("kind", ["slopes", "fourier", "tied", "deeponet", "factorized"])
def test_kfac_is_exact_where_there_are_no_factors(kind):
    model, terms, batch = build(kind), [TERMS["inverse"](), TERMS["first"]()], [points(), points(4)]
    linearized = Objective(model, terms, batch).linearize()
    G, space = oracles.gauss_newton(terms, model, batch), linearized.space
    kfac = KFAC()(linearized).to_dense()
    for block, position in zip(
        space.blocks, flat_positions(space.blocks, space.shapes), strict=True
    ):
        if not block.kronecker:
            index = position[:, None], position
            oracles.assert_close(kfac[index], G[index])
    inverse = FactorDamping(1e-2, trace_norm)(KFAC()(linearized)).to_dense()
    for block, position in zip(
        space.blocks, flat_positions(space.blocks, space.shapes), strict=True
    ):
        if not block.kronecker:
            index = position[:, None], position
            damped = G[index] + 1e-2 * torch.eye(block.numel, dtype=torch.float64)
            oracles.assert_close(inverse[index], torch.linalg.inv(damped))


@pytest.mark.parametrize(
    "name", sorted(n for n in vars(presets) if inspect.isfunction(getattr(presets, n)))
)
def test_presets_step(name):
    model, terms, batch = build("slopes"), [TERMS["inverse"](), TERMS["first"]()], [points(20)] * 2
    objective = Objective(model, terms, batch)
    optimizer = getattr(presets, name)(objective.parameters())
    before = [p.clone() for p in objective.parameters()]
    records = [optimizer.step(objective) for _ in range(2)]
    assert records[0].accepted, records[0].reason
    assert records[-1].new_loss < records[0].loss
    assert not any(map(torch.equal, before, objective.parameters()))


def test_predicted_decrease_is_that_of_the_exact_model():
    model, terms, x = build("fourier"), [TERMS["inverse"]()], points(5)
    objective = Objective(model, terms, [x])
    G = oracles.gauss_newton(terms, model, [x])
    g = torch.cat([p.flatten() for p in oracles.gradient(terms, model, [x])])
    optimizer = CurvatureOptimizer(objective.parameters(), GaussNewton(), Damped(10.0))
    before = torch.cat([p.detach().flatten().clone() for p in objective.parameters()])
    record = optimizer.step(objective)
    v = torch.cat([p.detach().flatten() for p in objective.parameters()]) - before
    decrease = -(g @ v) - 0.5 * v @ G @ v - 0.5 * 10.0 * v @ v
    assert record.accepted
    assert record.predicted_decrease == pytest.approx(decrease.item(), rel=1e-9)


def test_systems_of_several_networks():
    model, terms, batch = build(Two), system(), [points(), points(2), points(1)]
    linearized = Objective(model, terms, batch).linearize()
    oracles.assert_close(
        GaussNewton()(linearized).to_dense(), oracles.gauss_newton(terms, model, batch)
    )
    names = {name for name, _ in model.named_parameters() if name.startswith("u")}
    assert linearized[1].structure.used == names  # what a term does not use is not held


def test_a_parameter_of_network_and_residual():
    """One tensor that both share, and that two terms share, is one parameter."""

    class Scaled(nn.Module):
        def __init__(self, nu: nn.Parameter) -> None:
            super().__init__()
            self.nu = nu

        def forward(self, x, u):
            return self.nu * u - 1

    model = build("slopes")
    x = points()
    terms = [
        LossTerm({"u": Value()}, Scaled(model.a), Fixed(x), name=name) for name in ("one", "two")
    ]
    linearized = Objective(model, terms, [x, x]).linearize()
    assert [name for name in linearized.space.names if "nu" in name] == []
    rows = torch.cat([term.scaled_residual(model, x)[:, 0] for term in terms])
    parameters = list(model.parameters())
    J = [
        torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True)
        for row in rows
    ]
    wanted = torch.stack([torch.cat([g.flatten() for g in row]) for row in J])
    oracles.assert_close(Jacobian()(linearized).to_dense(), wanted)


# --- the number of channels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operators", "d", "S"),
    [
        ([Laplacian()], 7, 9),
        ([Value(), Partial(0), Partial(1), Partial(1, 1, 1)], 2, 5),
        ([Value(), Partial(0), Partial(1), Partial(1, 1), Partial(1, 1, 1, 1)], 2, 6),
        ([Bilaplacian()], 2, 11),
        ([Bilaplacian()], 3, 20),
        ([Partial(0, 0, 1)], 2, 6),
        ([Bilaplacian(), Laplacian()], 2, 12),
    ],
    ids=["laplacian", "kdv", "kuramoto", "biharmonic", "biharmonic3d", "xxy", "two_sums"],
)
def test_number_of_channels(operators, d, S):
    named = {f"o{i}": operator for i, operator in enumerate(operators)}
    assert Plan.of(named, points(2, d)).layout.S == S


# --- refusals -------------------------------------------------------------------------------------


def test_a_trained_tensor_in_a_closure_is_refused():
    factor = nn.Parameter(torch.ones((), dtype=torch.float64))
    term = LossTerm({"u": Value()}, lambda x, u: factor * u, Fixed(points()), name="closure")
    with pytest.raises(
        UncapturedParameterError, match=r"'closure'.*Make the residual an nn.Module"
    ):
        Objective(build("slopes"), [term], [points()])


def test_large_dense_blocks_are_refused_by_name():
    linearized = Objective(build("slopes"), [TERMS["poisson"]()], [points()]).linearize()
    match = r"dense_limit = 2 rows, but b has 3 entries .* freeze it, raise dense_limit"
    with pytest.raises(ValueError, match=match):
        KFAC(dense_limit=2)(linearized)


def test_unused_parameters_are_refused_by_name():
    model = build("slopes")
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"spare is used by none. Freeze it"):
        Objective(model, [TERMS["first"]()], [points()])


def test_a_path_that_depends_on_the_number_of_points_is_refused():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.u(x) if x.shape[0] == 3 else self.u(x) + self.v(x)

    objective = Objective(Branching().double(), [TERMS["first"]()], [points()])
    with pytest.raises(RuntimeError, match=r"'first' must do the same at any points.*at 3 of them"):
        objective.linearize()


def test_coverage_says_which_is_which():
    model, term, x = build("fourier"), TERMS["inverse"](), points()
    report = str(coverage(model, [linearize(term, model, x)])).splitlines()
    assert report[:4] == [
        "B [2, 2]: weight in inverse (S = 6)",
        "omega []: dense in inverse",
        "W [4, 3]: weight in inverse (S = 6)",
        "b [3]: dense in inverse",
    ]
    assert "inverse.residual.inner.source.0.weight [2, 2]: weight in inverse (S = 1)" in report
    assert "inverse.lap.matrix [2, 2]: dense in inverse" in report


def test_freezing_between_steps_is_followed():
    model, x = build("slopes"), points()
    objective = Objective(model, [TERMS["first"]()], [x])
    assert len(objective.linearize().gradient()) == 8
    model.a.requires_grad_(False)
    linearized = objective.linearize()
    assert "a" not in linearized.space.names
    oracles.assert_close(
        GaussNewton()(linearized).to_dense(),
        oracles.gauss_newton([TERMS["first"]()], model, [x]),
    )
    optimizer = CurvatureOptimizer(objective.parameters(), GaussNewton(), Damped(1.0), FixedStep())
    assert optimizer.step(objective).accepted
