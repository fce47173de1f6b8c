"""Derivatives up to order four against closed forms, every activation, channels and KFAC's factors.

The closed forms use neither networks nor nested autodiff, so they also check the oracles.
"""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev

from pinncurv.curvature import KFAC, expand, reduce
from pinncurv.diffops import (
    Bilaplacian,
    Directional,
    Divergence,
    Gradient,
    Hessian,
    Laplacian,
    Partial,
    Plan,
    SecondOrder,
    Value,
    evaluate,
)
from pinncurv.linearization import linearize
from pinncurv.problems import Fixed, LossTerm
from tests import kinds, networks, oracles
from tests.networks import points

D = 3
A = torch.tensor([[0.7, -1.1, 0.4], [1.3, 0.2, -0.6], [-0.5, 0.9, 0.8]], dtype=torch.float64)
B = torch.tensor([[1.2, 0.5, -0.9], [-0.4, 1.4, 0.3], [0.6, -0.7, 1.1]], dtype=torch.float64)
V = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
C = torch.tensor([[1.0, 0.5, -0.2], [0.1, 2.0, 0.7], [0.0, 0.3, -1.0]], dtype=torch.float64)


def waves(x):
    """u_k = exp(a_k · x) + sin(b_k · x), of which every derivative is known."""
    return torch.exp(x @ A.T) + torch.sin(x @ B.T)


def along(x, *directions):
    """∂_v1 ... ∂_vK u_k = Π (a_k · v) exp(a_k · x) + Π (b_k · v) sin(b_k · x + K π/2), [N, 3]."""
    a, b = torch.ones(len(x), 3).double(), torch.ones(len(x), 3).double()
    for direction in directions:
        v = direction.expand(len(x), D)
        a, b = a * (v @ A.T), b * (v @ B.T)
    return a * torch.exp(x @ A.T) + b * torch.sin(x @ B.T + len(directions) * math.pi / 2)


def partial(x, *dims):
    return along(x, *torch.eye(D, dtype=torch.float64)[list(dims)])


def pairs(dims):
    return itertools.product(dims, dims)


FIELD = torch.cos(points(4, D, seed=5))
CLOSED = {
    "value": (Value(), along),
    "gradient": (Gradient([2, 0]), lambda x: torch.stack([partial(x, 2), partial(x, 0)], -1)),
    "u_y": (Partial(1), lambda x: partial(x, 1)),
    "u_tt": (Partial(0, 0), lambda x: partial(x, 0, 0)),
    "u_xt": (Partial(1, 0), lambda x: partial(x, 0, 1)),
    "u_xxx": (Partial(1, 1, 1), lambda x: partial(x, 1, 1, 1)),
    "u_xxy": (Partial(1, 1, 2), lambda x: partial(x, 1, 1, 2)),
    "u_xyz": (Partial(0, 2, 1), lambda x: partial(x, 0, 1, 2)),
    "u_xxxx": (Partial(-1, -1, -1, -1), lambda x: partial(x, 2, 2, 2, 2)),
    "u_xxyy": (Partial(0, 1, 0, 1), lambda x: partial(x, 0, 0, 1, 1)),
    "u_xxyz": (Partial(0, 1, 2, 0), lambda x: partial(x, 0, 0, 1, 2)),
    "u_xxxy": (Partial(2, 2, 2, 0), lambda x: partial(x, 2, 2, 2, 0)),
    **{
        f"directional{k}": (Directional(V, order=k), lambda x, k=k: along(x, *[V] * k))
        for k in (1, 2, 3, 4)
    },
    **{
        f"tensor_field{k}": (Directional(FIELD, order=k), lambda x, k=k: along(x, *[FIELD] * k))
        for k in (1, 2, 3, 4)
    },
    "function": (Directional(torch.cos, order=4), lambda x: along(x, *[torch.cos(x)] * 4)),
    "laplacian": (Laplacian([0, 2]), lambda x: partial(x, 0, 0) + partial(x, 2, 2)),
    "matrix": (
        SecondOrder(C),
        lambda x: sum(C[i, j] * partial(x, i, j) for i, j in pairs(range(D))),
    ),
    "bilaplacian": (
        Bilaplacian(),
        lambda x: sum(partial(x, i, i, j, j) for i, j in pairs(range(D))),
    ),
    "bilaplacian_dims": (
        Bilaplacian([2, -3]),
        lambda x: sum(partial(x, i, i, j, j) for i, j in pairs((0, 2))),
    ),
    "hessian": (
        Hessian([2, 1]),
        lambda x: torch.stack(
            [torch.stack([partial(x, i, j) for j in (2, 1)], -1) for i in (2, 1)], -2
        ),
    ),
    "divergence": (
        Divergence(),
        lambda x: sum(partial(x, i)[:, i : i + 1] for i in range(D)),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form(name):
    """Alone; the oracle, too."""
    operator, wanted = CLOSED[name]
    x = points(4, D)
    oracles.assert_close(evaluate({"o": operator}, waves, x)["o"], wanted(x), rtol=1e-12)

    def u(point):
        return waves(point[None])[0]

    by_oracle = [oracles.operator_values({"o": operator}, u, x[n], n)["o"] for n in range(4)]
    oracles.assert_close(torch.stack(by_oracle), wanted(x), rtol=1e-12)


@pytest.mark.parametrize("form", ["plain", "dict", "tuple"])
def test_closed_forms_in_one_pass(form):
    """All at once, so that every channel is shared, on a plain or a named output."""

    def network(x):
        u = waves(x)
        return {"plain": u, "dict": {"p": x.sin(), "u": u}, "tuple": (x, u)}[form]

    of = {"plain": None, "dict": "u", "tuple": 1}[form]
    closed = dict(list(CLOSED.items())[:: 1 if of is None else 4])
    operators = {}
    for name, (operator, _) in closed.items():
        term = LossTerm({"o": operator}, lambda x, o: o, Fixed(points(4, D)))
        operators[name] = operator if of is None else kinds.on_outputs(term, of).operators["o"]
    x = points(4, D)
    received = evaluate(operators, network, x)
    for name, (_, wanted) in closed.items():
        oracles.assert_close(received[name], wanted(x), rtol=1e-12)


def test_float32():
    x = points(4, D)
    operators = {n: CLOSED[n][0] for n in ("gradient", "u_xxy", "u_xxyz", "bilaplacian", "hessian")}
    received = evaluate(
        operators,
        lambda p: torch.exp(p @ A.float().T) + torch.sin(p @ B.float().T),
        x.float(),
    )
    for name in operators:
        assert received[name].dtype == torch.float32
        oracles.assert_close(received[name].double(), CLOSED[name][1](x), rtol=1e-5)


# --- every activation, with the gradient in the parameters ----------------------------------------

HIGH = {
    "u_tt": Partial(0, 0),
    "u_xxy": Partial(0, 0, 1),
    "normal": Directional(torch.cos, order=3),
    "u_xxxx": Partial(1, 1, 1, 1),
    "bilaplacian": Bilaplacian(),
    "hessian": Hessian(),
}


@pytest.mark.parametrize("kind", networks.KINDS)
def test_networks_to_order_four(kind):
    """Values, and the derivative of a sum of their squares, which is one order more."""
    model, x = networks.build(kind), points(2)
    received = evaluate(HIGH, model, x)
    sum(value.square().sum() for value in received.values()).backward()

    def total(p):
        u = oracles.at_point(model, p)
        rows = [oracles.operator_values(HIGH, u, x[n], n) for n in range(len(x))]
        values = {name: torch.stack([row[name] for row in rows]) for name in HIGH}
        return sum(value.square().sum() for value in values.values()), values

    wanted, values = jacrev(total, has_aux=True)(oracles.trainable(model))
    for name in HIGH:
        oracles.assert_close(received[name].detach(), values[name].detach())
    for name, parameter in model.named_parameters():
        oracles.assert_close(parameter.grad, wanted[name])


ELEMENTARY = {
    "asin": torch.asin,
    "acos": torch.acos,
    "log2": lambda h: torch.log2(2 + h),
    "log10": lambda h: torch.log10(2 + h),
    "exp2": torch.exp2,
    "sinc": lambda h: torch.sinc(2 * h),
    "hypot": lambda h: torch.hypot(h, h.flip(1) + 2),
    "atan2": lambda h: torch.atan2(h, h.flip(1)),
    "cumprod": lambda h: torch.cumprod(h, 1),
    "tensordot": lambda h: torch.tensordot(h.sin(), A[:2], 1),
    "roll": lambda h: h.roll(1, 1) * h,
    "tile": lambda h: h.tile(2) ** 2,
}


@pytest.mark.parametrize("name", ELEMENTARY)
def test_functions_to_order_four(name):
    """Of one variable after another, by nested torch.autograd of each entry."""
    x = points(3, 2)

    def network(x):
        return ELEMENTARY[name](torch.tanh(x @ A[:2, :2]))

    received = evaluate(HIGH, network, x)
    rows = [
        oracles.operator_values(HIGH, lambda p: network(p[None])[0], p, n) for n, p in enumerate(x)
    ]
    for operator in HIGH:
        oracles.assert_close(received[operator], torch.stack([row[operator] for row in rows]))


def test_nested_derivatives_of_layer_norm():
    """Why the oracle writes LayerNorm out: torch's own disagrees with itself. Here we agree."""
    model, x = kinds.build("layer_norm"), points(1)
    received = evaluate({"o": Partial(0, 0, 0)}, model, x)["o"].item()
    u = oracles.at_point(model, oracles.trainable(model))
    step = 1e-5

    def second(t):  # reverse mode twice is right in torch, too
        point = torch.stack([x[0, 0] + t, x[0, 1]])
        return jacrev(jacrev(lambda p: model(p[None])[0, 0]))(point)[0, 0].item()

    differences = (second(step) - second(-step)) / (2 * step)
    assert received == pytest.approx(differences, rel=1e-6)
    for nested in itertools.product([jacrev, jacfwd], repeat=3):
        function = u
        for derivative in nested:
            function = derivative(function)
        assert received == pytest.approx(function(x[0])[0, 0, 0, 0].item(), rel=1e-9)


# --- channels, and the factors of KFAC that follow from them --------------------------------------

EQUATIONS = {
    "value": ([Value()], 1, 1),
    "gradient": ([Gradient()], 4, 5),
    "laplacian": ([Laplacian()], 7, 9),
    "heat": ([Partial(0), Laplacian([1, 2, 3])], 4, 6),
    "wave": ([Partial(0, 0), Laplacian([1])], 2, 5),
    "hessian": ([Hessian()], 2, 6),
    "kdv": ([Value(), Partial(0), Partial(1), Partial(1, 1, 1)], 2, 5),
    "u_xxy": ([Partial(0, 0, 1)], 2, 6),
    "kuramoto_sivashinsky": (
        [Partial(0), Value(), Partial(1), Partial(1, 1), Partial(1, 1, 1, 1)],
        2,
        6,
    ),
    "biharmonic2d": ([Bilaplacian()], 2, 11),
    "biharmonic3d": ([Bilaplacian()], 3, 20),  # all of order <= 3 but u_xyz, and the sum
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_number_of_channels(name):
    """As few as a composition of functions needs: those below what is named, and the sums."""
    operators, d, S = EQUATIONS[name]
    named = {f"o{i}": operator for i, operator in enumerate(operators)}
    assert len(oracles.channels_of(named, d)) == S
    assert Plan.of(named, points(2, d)).layout.S == S


SHARINGS = {"expand": (expand, oracles.kfac_expand), "reduce": (reduce, oracles.kfac_reduce)}
FACTORS = [
    ("tanh", "kdv"),
    ("gated", "kuramoto"),
    ("slopes", "kdv"),
    ("layer_norm", "biharmonic2d"),
    ("slopes", "u_xxy"),
    ("steps", "u_xxy"),
    ("pirate", "wave"),
]


def pointwise(x, **values):
    """A residual of two components that is not linear in any of the values."""
    total = sum(value.sin() for value in values.values())
    return torch.cat([total, total * next(iter(values.values()))], 1)


@pytest.mark.parametrize(("kind", "equation"), FACTORS)
def test_factors_of_kfac_are_those_of_the_definition(kind, equation):
    """With channels of order three and four, next to parameters outside of linear layers."""
    operators, _, _ = EQUATIONS[{"kuramoto": "kuramoto_sivashinsky"}.get(equation, equation)]
    named = {f"o{i}": operator for i, operator in enumerate(operators)}
    term = LossTerm(named, pointwise, Fixed(points()), 0.7, "term")
    model = (networks if kind in networks.KINDS else kinds).build(kind)
    x = points(1 if "biharmonic" in equation else 2)
    wanted = oracles.layers_of_any_order(term, model, x)
    for rule, oracle in SHARINGS.values():
        operator = KFAC(rule)([linearize(term, model, x)])
        factors = {
            block.name: pair
            for block, pair in zip(operator.blocks, operator.factors, strict=True)
            if block.kronecker
        }
        trained = {n for n in wanted if model.get_submodule(n).weight.requires_grad}
        assert set(factors) == trained
        for name in trained:
            (pair,), (first, second) = factors[name], oracle(wanted[name])
            oracles.assert_close(pair.A, first)
            oracles.assert_close(pair.B, second)


@pytest.mark.parametrize("kind", ["tanh", "gated", "repeated"])
def test_both_oracles_of_layers_agree(kind):
    """The one for any order, and the older one to order two."""
    operators = {"u": Value(), "t": Partial(0), "lap": Laplacian()}
    term = LossTerm(operators, pointwise, Fixed(points()), 0.7)
    model, x = networks.build(kind), points(2)
    first, second = oracles.layers(term, model, x), oracles.layers_of_any_order(term, model, x)
    for name, layer in first.items():
        for oracle in (oracles.kfac_expand, oracles.kfac_reduce):
            for a, b in zip(oracle(layer), oracle(second[name]), strict=True):
                oracles.assert_close(a, b)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: Partial(0, 0, 0, 0, 0), lambda: Directional(V, order=5)],
    ids=["partial", "directional"],
)
def test_an_order_above_four_is_refused(make):
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)four|4"):
        evaluate({"o": make()}, waves, points(2, D))


def test_outputs_that_are_not_there_are_refused():
    x = points(2, D)
    with pytest.raises((KeyError, ValueError, TypeError), match="'q'"):
        evaluate({"o": Value(of="q")}, lambda x: {"u": x}, x)
    with pytest.raises((KeyError, ValueError, TypeError), match="of="):
        evaluate({"o": Value()}, lambda x: {"u": x}, x)
    with pytest.raises((KeyError, ValueError, TypeError), match="'u'"):
        evaluate({"o": Value(of="u")}, waves, x)


def test_a_divergence_of_another_number_of_outputs_is_refused():
    with pytest.raises((ValueError, IndexError), match=r"got"):
        evaluate({"o": Divergence()}, nn.Linear(3, 2).double(), points(2, D))
