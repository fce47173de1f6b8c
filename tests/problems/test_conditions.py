"""Conditions and networks that satisfy them, against torch.func on single points."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, vmap

from pinncurv.curvature import GaussNewton, Objective
from pinncurv.diffops import Partial, Value
from pinncurv.problems import (
    Ansatz,
    Box,
    Disk,
    Fixed,
    LossTerm,
    PeriodicEmbedding,
    SpaceTimeBox,
    dirichlet,
    initial_and_lateral,
    neumann,
    nls,
    periodic,
    point,
    robin,
)
from tests import oracles

BOX = Box((-1.0, 0.0), (1.0, 2.0))


def _network(d_in: int = 2, d_out: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, 5), nn.Tanh(), nn.Linear(5, d_out)).double()


def _values(x: Tensor) -> Tensor:
    return torch.cat([torch.sin(x[:, :1]), x[:, 1:] ** 2], 1)


def _first(x: Tensor) -> Tensor:
    return x[:, :1]


def _slopes(network: nn.Module, x: Tensor) -> Tensor:
    """Return the Jacobian of a network at each point, [N, d_out, d_in]."""
    constants = {k: p.detach() for k, p in network.named_parameters()}
    return vmap(jacfwd(lambda y: functional_call(network, constants, (y[None],))[0]))(x)


@pytest.mark.parametrize("domain", [BOX, Disk((1.0, 0.0), 2.0)])
def test_neumann_and_robin(domain: Box | Disk, generator: torch.Generator) -> None:
    """The derivative along the normal, alone and beside the value."""
    network = _network()
    points = domain.faces(9) if isinstance(domain, Box) else domain.boundary(9)
    x = points.sample(generator, torch.float64, "cpu")
    slope = torch.einsum("nvi,ni->nv", _slopes(network, x), domain.normal(x))
    received = neumann(_values, domain.normal, points).evaluate(network, x)
    torch.testing.assert_close(received, slope - _values(x), rtol=1e-12, atol=1e-14)
    received = robin(_values, 0.3, domain.normal, points).evaluate(network, x)
    expected = slope + 0.3 * network(x) - _values(x)
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-14)


def test_components(generator: torch.Generator) -> None:
    """Only those that are named are prescribed, in that order."""
    network, points = _network(d_out=3), BOX.faces(6)
    x = points.sample(generator, torch.float64, "cpu")
    received = dirichlet(_values, points, components=(2, 0)).evaluate(network, x)
    expected = network(x)[:, [2, 0]] - _values(x)
    torch.testing.assert_close(received, expected)
    corner = x.new_tensor([[0.0, 0.0]])
    term = point(corner.new_tensor([[7.0]]), corner, components=(1,))
    torch.testing.assert_close(term.evaluate(network, corner), network(corner)[:, 1:2] - 7)
    term = point(_values(x), x)
    torch.testing.assert_close(term.evaluate(_network(), x), _network()(x) - _values(x))


class _Flow(nn.Module):
    """Two components u and one p, by name, from a network of three."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        columns = self.network(x)
        return {"u": columns[:, 1:], "p": columns[:, :1]}


@pytest.mark.parametrize("components", [1, (1,), (1, 0)])
def test_components_and_outputs_of_every_condition(components, generator: torch.Generator) -> None:
    """Those of all of u, of which only some columns are taken; an output is found by its name."""
    network, points = _network(d_out=3), BOX.faces(6)
    flow, x = _Flow(network), points.sample(generator, torch.float64, "cpu")
    chosen = [components] if isinstance(components, int) else list(components)
    width = len(chosen)

    def some(x: Tensor) -> Tensor:
        return _values(x)[:, :width]

    def everything(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3, dtype=x.dtype)

    def build(model: nn.Module, values, y: Tensor, **which) -> list[LossTerm]:
        space = SpaceTimeBox(Box.unit(1))
        return [
            dirichlet(values, points, **which),
            neumann(values, BOX.normal, points, **which),
            robin(values, 0.3, BOX.normal, points, **which),
            point(y, x, **which),
            *initial_and_lateral(values, space, 4, 4, **which),
            periodic(model, 0, 2.0, Fixed(x), **which),
        ]

    whole = build(network, everything, everything(x))
    parts = build(flow, some, some(x), components=components, of="u")
    for of_all, part in zip(whole, parts, strict=True):
        columns = [of_all.evaluate(network, x)[:, 1 + i] for i in chosen]
        expected = torch.stack(columns, 1) - some(x)
        if part.name == "periodic":
            r = of_all.evaluate(network, x)
            expected = r[:, [1 + i for i in chosen] + [4 + i for i in chosen]]
        torch.testing.assert_close(part.evaluate(flow, x), expected)


def test_periods_and_coefficients_are_numbers() -> None:
    with pytest.raises(ValueError, match="coordinate of a period must count from 0, got -1"):
        periodic(_network(1, 1), -1, 1.0, Box.unit(1).interior(3))  # would compare u with itself
    for period in (0.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="size of a period must be positive and finite"):
            periodic(_network(), 0, period, BOX.faces(3))
    with pytest.raises(ValueError, match="coefficient of a Robin condition must be finite, got na"):
        robin(_values, torch.nan, BOX.normal, BOX.faces(3))


def test_periodic_pairs(generator: torch.Generator) -> None:
    """Value and slope at both ends; a periodic network satisfies it, any other does not."""
    left = Fixed(torch.tensor([[-1.0, 0.3], [-1.0, 1.7]]).double())
    network, (x,) = _network(), [left.points]
    there = x + x.new_tensor([2.0, 0.0])
    term = periodic(network, 0, 2.0, left)
    slopes = _slopes(network, x)[:, :, 0] - _slopes(network, there)[:, :, 0]
    expected = torch.cat([network(x) - network(there), slopes], 1)
    torch.testing.assert_close(term.evaluate(network, x), expected, rtol=1e-12, atol=1e-14)
    embedded = nn.Sequential(PeriodicEmbedding((2.0, None), modes=2), _network(5))
    residual = periodic(embedded, 0, 2.0, left).evaluate(embedded, x)
    assert residual.abs().max() < 1e-14


def test_periodic_pairs_are_followed_by_curvature(generator: torch.Generator) -> None:
    """Both calls of the network are in the Gauss-Newton matrix; a copy works like the original."""
    left = Fixed(torch.tensor([[-1.0, 0.3], [-1.0, 1.7]]).double())
    network = _network(d_out=1)
    term = periodic(network, 0, 2.0, left)
    data = dirichlet(_first, BOX.faces(3))
    points = [part.points.sample(generator, torch.float64, "cpu") for part in (term, data)]
    objective = Objective(network, [term, data], points)
    J = []
    for part, x in zip((term, data), points, strict=True):
        rows = []
        for r in part.scaled_residual(network, x).flatten():
            gradient = torch.autograd.grad(r, list(network.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradient]))
        J.append(torch.stack(rows))
    expected = sum(j.T @ j for j in J)
    oracles.assert_close(GaussNewton()(objective.linearize()).to_dense(), expected)
    twin, twin_network = copy.deepcopy((term, network))
    assert twin.residual.network is twin_network
    again = pickle.loads(pickle.dumps(twin))
    x = points[0]
    torch.testing.assert_close(again.evaluate(twin_network, x), term.evaluate(network, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_embedding(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Its values by definition, its period, and the count of its values."""
    embedding = PeriodicEmbedding((None, 2.0, 0.7), modes=3)
    x = torch.rand(5, 3, generator=generator, dtype=dtype)
    columns = [x[:, 0]]
    for i, period in ((1, 2.0), (2, 0.7)):
        for function in (torch.cos, torch.sin):
            columns += [function(2 * torch.pi * m / period * x[:, i]) for m in (1, 2, 3)]
    values = embedding(x)
    torch.testing.assert_close(values, torch.stack(columns, 1))
    assert embedding.d_out == values.shape[1] == 13
    shifted = embedding(x + x.new_tensor([0.0, 2.0, 0.7]))
    torch.testing.assert_close(shifted, values, rtol=0, atol=40 * torch.finfo(dtype).eps)
    assert repr(embedding) == "PeriodicEmbedding(periods=(None, 2.0, 0.7), modes=3)"


def test_bad_embeddings() -> None:
    """Periods are positive, and fit the points."""
    with pytest.raises(ValueError, match=r"at least one a number, got \(None, None\)"):
        PeriodicEmbedding((None, None))
    with pytest.raises(ValueError, match=r"positive numbers, .* got \(0.0, 1.0\)"):
        PeriodicEmbedding((0.0, 1.0))
    with pytest.raises(ValueError, match="at least one mode, got modes=0"):
        PeriodicEmbedding((1.0,), modes=0)
    with pytest.raises(ValueError, match=r"must have 2 coordinates, .* got shape \[3, 1\]"):
        PeriodicEmbedding((1.0, None))(torch.zeros(3, 1))


def test_ansatz(generator: torch.Generator) -> None:
    """Where the factor vanishes, values are the offset's; derivatives follow the product rule."""
    network = _network(d_out=1)
    ansatz = Ansatz(network, _first, _square_of_second)
    x = torch.rand(4, 2, generator=generator, dtype=torch.float64)
    wall = x * x.new_tensor([0.0, 1.0])
    assert torch.equal(ansatz(wall), wall[:, 1:] ** 2)
    operators = {"u": Value(), "u_x": Partial(0), "u_y": Partial(1)}
    term = LossTerm(operators, _all, Fixed(x))
    u, slope = network(x), _slopes(network, x)[:, 0]
    expected = [
        x[:, :1] * u + x[:, 1:] ** 2,
        u + x[:, :1] * slope[:, :1],
        x[:, :1] * slope[:, 1:] + 2 * x[:, 1:],
    ]
    torch.testing.assert_close(term.evaluate(ansatz, x), torch.cat(expected, 1))
    again = pickle.loads(pickle.dumps(ansatz))
    assert torch.equal(again(x), ansatz(x))


def _square_of_second(x: Tensor) -> Tensor:
    return x[:, 1:] ** 2


def _all(x: Tensor, u: Tensor, u_x: Tensor, u_y: Tensor) -> Tensor:
    return torch.cat([u, u_x, u_y], 1)


@pytest.mark.parametrize("components", [(), (2,), (-1,), (0, 0), 1.0, True, [0.0], "0"])
def test_components_of_the_unknown(components, shapes_unchecked: None) -> None:
    term = dirichlet(_first, BOX.faces(9), components=components)
    with pytest.raises(ValueError, match=r"in the unknown, from 0 to 1, at least one, got \("):
        Objective.sample(_network(), [term])


def test_a_problem_of_two_components_needs_two_outputs() -> None:
    with pytest.raises(ValueError, match="one column per component"):
        Objective.sample(_network(2, 1), nls(20, 10, 10).terms)


def test_values_of_another_shape(generator: torch.Generator, shapes_unchecked: None) -> None:
    """Nothing is broadcast: a column too few, one too many, none, a number."""
    points, one = BOX.faces(6), _network(d_out=1)
    message = r"shape \[16, 2\], got \[16, 1\].*components="
    with pytest.raises(ValueError, match=message):
        Objective.sample(_network(), [dirichlet(_first, BOX.faces(40))], generator)
    x = points.sample(generator, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"shape \[6, 1\], got \[6, 2\]"):
        robin(_values, 1.0, BOX.normal, points).evaluate(one, x)
    with pytest.raises(ValueError, match=r"shape \[6, 1\], got \[6\]"):
        neumann(lambda x: x[:, 0], BOX.normal, points).evaluate(one, x)
    with pytest.raises(ValueError, match=r"shape \[6, 1\], got \[\]"):
        dirichlet(lambda x: 0.0, points).evaluate(one, x)
    with pytest.raises(ValueError, match=r"shape \[6, 2\], got \[6, 1\]"):
        point(x[:, :1], x).evaluate(_network(), x)
    with pytest.raises(TypeError, match=r"'wall'.*must be a function.*got float"):
        dirichlet(0.0, points, name="wall")
