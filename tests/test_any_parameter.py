"""Any trained tensor, derivatives of any order: operators are exact against nested torch.func."""

import functools
import inspect
import itertools

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonalGaussNewton,
    ChannelKronecker,
    DiagonalGaussNewton,
    GaussNewton,
    Hessian,
    Jacobian,
    Kernel,
    MatrixFreeGaussNewton,
    Objective,
    OptimalKronecker,
    coverage,
)
from pinncurv.diffops import Bilaplacian, Laplacian, Partial, Plan, Value
from pinncurv.linearization import UncapturedParameterError, linearize
from pinncurv.linops import Damped, FactorDamping, flat_positions, trace_norm
from pinncurv.optim import CurvatureOptimizer, FixedStep
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.kinds import KINDS, TERMS, UNUSUAL, Two, build, on_outputs, system
from tests.networks import points

# torch's own vmap of a weight normalization, in the oracle
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def pairwise() -> list:
    """Return cases in which every network meets every second term, and each chunk size.

    The others are slow only because they are many.
    """
    kinds, terms, chunks = list(KINDS), list(TERMS), [None, 2, 1]
    room = {"neumann": 3}  # takes one order of its own
    cases = []
    for i, (kind, term) in enumerate(itertools.product(kinds, terms)):
        order = {"kuramoto": 4, "biharmonic": 4, "kdv": 3, "mixed": 3}.get(term, 2)
        if order <= room.get(kind, 4):
            marks = [pytest.mark.slow] if (i // len(terms) + i % len(terms)) % 2 else []
            chunk_size = chunks[(i // len(terms) + i) % 3]
            cases.append(pytest.param(kind, term, chunk_size, marks=marks))
    return cases


@pytest.mark.parametrize(("kind", "term", "chunk_size"), pairwise())
@pytest.mark.filterwarnings("ignore:The second derivative of")  # of PReLU
def test_jacobian(kind, term, chunk_size):
    """Residual, Jacobian and gradient; with them follow all operators, see below."""
    model, loss_term, x = build(kind), TERMS[term](), points()
    if kind == "pair":
        loss_term = on_outputs(loss_term, 0, 1)
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


def rotating() -> list[tuple[str, str, int | None]]:
    """Return two terms for each of the less usual networks, of which one is of order 3 or 4."""
    high, low = (
        itertools.cycle(["kdv", "biharmonic", "mixed"]),
        itertools.cycle(["inverse", "wave"]),
    )
    chunks = itertools.cycle([None, 2, 1])
    return [(kind, next(t), next(chunks)) for kind in UNUSUAL for t in (high, low)]


@pytest.mark.parametrize(("kind", "term", "chunk_size"), rotating())
def test_jacobian_of_less_usual_networks(kind, term, chunk_size):
    test_jacobian(kind, term, chunk_size)


QUICK = [
    ("slopes", "kdv"),
    ("fourier", "inverse"),
    ("tied", "biharmonic"),
    ("deeponet", "mixed"),
    ("layer_norm", "kdv"),
    ("anchored", "inverse"),
]


@functools.cache
def oracle_jacobian(kind, term):
    """Return the rows of the term and of another, in all tensors of both."""
    model, terms, batch = build(kind), [TERMS[term](), TERMS["first"]()], [points(), points(4)]
    pairs = zip(terms, batch, strict=True)
    return torch.cat([oracles.jacobian(t, model, x, *terms) for t, x in pairs])


@pytest.mark.parametrize(("kind", "term"), QUICK)
def test_operators(kind, term):
    model, terms, batch = build(kind), [TERMS[term](), TERMS["first"]()], [points(), points(4)]
    chunk_size = 2 if kind in ("fourier", "deeponet", "layer_norm") else None
    linearized = Objective(model, terms, batch, chunk_size).linearize()
    J = oracle_jacobian(kind, term)
    G = J.T @ J
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


RELATIVES = [EKFAC(), OptimalKronecker(), ChannelKronecker()]


@pytest.mark.parametrize("kind", ["layer_norm", "deeponet"])
@pytest.mark.parametrize("recipe", RELATIVES, ids=lambda recipe: type(recipe).__name__)
def test_relatives_of_kfac_are_exact_where_there_are_no_factors(recipe, kind):
    terms, batch = [TERMS["inverse"](), TERMS["first"]()], [points(), points(4)]
    linearized = Objective(build(kind), terms, batch).linearize()
    J, space = oracle_jacobian(kind, "inverse"), linearized.space
    received = recipe(linearized).to_dense()
    exact = 0
    positions = flat_positions(space.blocks, space.shapes)
    for block, position in zip(space.blocks, positions, strict=True):
        if not block.kronecker:
            index, exact = (position[:, None], position), exact + 1
            oracles.assert_close(received[index], (J.T @ J)[index])
    assert exact >= 3


@pytest.mark.parametrize(
    "name", sorted(n for n in vars(presets) if inspect.isfunction(getattr(presets, n)))
)
def test_presets_step(name):
    terms, batch = [TERMS["inverse"](), TERMS["first"]()], [points(8)] * 2
    model = build("layer_norm")  # with a slope, and a coefficient in the residual
    objective = Objective(model, terms, batch)
    optimizer = getattr(presets, name)(objective.parameters())
    before = [p.clone() for p in objective.parameters()]
    records = [optimizer.step(objective) for _ in range(2)]
    for record in records:
        assert record.accepted, record.reason
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


class Regularizer(nn.Module):
    """A residual of trained tensors alone."""

    def __init__(self, function):
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
        self.layer, self.function = nn.Linear(2, 3).double(), function

    def forward(self, x, u):
        return self.function(self, x)


REGULARIZERS = {
    "number": lambda r, x: r.factors.prod().expand(len(x)),
    "vector": lambda r, x: (r.factors - 1).expand(len(x), 2),
    "layer": lambda r, x: r.layer(r.factors).sin().repeat(len(x), 1),
    "at_the_points": lambda r, x: torch.linspace(0, 1, 3).double()[: len(x), None] * r.factors,
}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_residuals_of_parameters_alone(name, chunk_size):
    regularizer = Regularizer(REGULARIZERS[name])
    if name != "layer":
        regularizer.layer.requires_grad_(False)
    terms = [
        TERMS["first"](),
        LossTerm({"u": Value()}, regularizer, Fixed(points()[:3]), name="reg"),
    ]
    batch, model = [points(), points()[:3]], build("slopes")
    J = torch.cat(
        [oracles.jacobian(t, model, x, *terms) for t, x in zip(terms, batch, strict=True)]
    )
    if name == "at_the_points":  # rows are told apart by their place
        with pytest.raises(ValueError, match=r"'reg': every row .* its own point only"):
            Objective(model, terms, batch, chunk_size)
        return
    objective = Objective(model, terms, batch, chunk_size)
    linearized = objective.linearize()
    oracles.assert_close(GaussNewton()(linearized).to_dense(), J.T @ J)
    wanted = torch.autograd.grad(objective.loss(), objective.parameters())
    for received, expected in zip(linearized.gradient(), wanted, strict=True):
        oracles.assert_close(received, expected)


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


@pytest.mark.parametrize("recipe", RELATIVES[:2], ids=lambda recipe: type(recipe).__name__)
def test_relatives_of_kfac_refuse_large_dense_blocks(recipe):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.head = nn.Linear(2, 4100), nn.Linear(4100, 1)
            self.slopes = nn.Parameter(torch.ones(4100))

        def forward(self, x):
            return self.head(torch.tanh(self.slopes * self.lift(x)))

    linearized = Objective(Wide().double(), [TERMS["first"]()], [points()]).linearize()
    with pytest.raises(ValueError, match=r"slopes has 4100 entries"):
        recipe(linearized)


def test_a_trained_exponent_is_refused():
    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.p = nn.Linear(2, 1), nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return torch.exp(self.net(x)) ** self.p

    with pytest.raises(NotImplementedError, match=r"exponent .* Write torch\.exp"):
        Objective(Power().double(), [TERMS["first"]()], [points()])


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
            return self.u(x) if x.shape[0] == 40 else self.u(x) + self.v(x)

    objective = Objective(Branching().double(), [TERMS["first"]()], [points().repeat(20, 1)[:40]])
    with pytest.raises(RuntimeError, match=r"'first' must do the same at any points.*at 40 of"):
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
