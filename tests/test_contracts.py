"""What is promised about residuals, networks and points is checked, or followed, never assumed."""

import array as arrays
import copy
import functools
import math
import pickle
import time
import types
from collections import deque
from contextvars import ContextVar
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

from pinncurv.curvature import Objective
from pinncurv.diffops import Directional, Laplacian, Partial, SecondOrder, Value
from pinncurv.linearization import bound, linearize
from pinncurv.linearization.watching import circumstances
from pinncurv.presets import kfac_star, levenberg_marquardt
from pinncurv.problems import Box, Fixed, LossTerm, Product, SpaceTimeBox, Union

N = 12


def _points(n=N):
    return torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def _term(residual, n=N, **arguments):
    operators = arguments.pop("operators", {"u": Value(), "lap": Laplacian()})
    return LossTerm(operators, residual, Fixed(_points(n)), **arguments)


# --- residuals and networks that are not pointwise ------------------------------------------------

MIXING = {
    "mean": lambda x, u, lap: u - u.mean(),
    "max": lambda x, u, lap: u - u.max(),
    "median": lambda x, u, lap: lap - lap.median(),
    "roll": lambda x, u, lap: u - u.roll(1, 0),
    "flip": lambda x, u, lap: u - u.flip(0),
    "sort": lambda x, u, lap: u.sort(0).values,
    "cumsum": lambda x, u, lap: lap.cumsum(0),
    "norm": lambda x, u, lap: u / u.norm(),
    "first": lambda x, u, lap: u - u[:1],
    "last": lambda x, u, lap: u - u[-1],
    "diff": lambda x, u, lap: torch.cat([u[1:] - u[:-1], u[-1:]]),
    "standardize": lambda x, u, lap: (u - u.mean(0)) / u.std(0, correction=0),
    "number of points": lambda x, u, lap: u / len(x),
    "integral": lambda x, u, lap: u.sum() * torch.ones_like(u) - 1,
    "gram": lambda x, u, lap: (u @ u.T) @ lap,
    "all pairs": lambda x, u, lap: u - x[:, 0],
}


@pytest.mark.parametrize("n", [2, 3, 4, 5, N])
@pytest.mark.parametrize("residual", MIXING.values(), ids=MIXING)
def test_residual_that_mixes_points(residual, n):
    with pytest.raises(ValueError, match=r"own point only|broadcast|any block of the points"):
        Objective(_network(), [_term(residual, n)], [_points(n)])
    with pytest.raises(ValueError, match="Term 'term'"):
        linearize(_term(residual, n), _network(), _points(n))


def _single(seed):
    """A network in single precision, which rounds otherwise for each number of points."""
    torch.manual_seed(seed)
    layers = [nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*layers), torch.rand(N, 2)


AMPLIFIED = {
    "value": lambda x, u, lap: torch.sin(1e5 * u),
    "laplacian": lambda x, u, lap: torch.sin(1e4 * lap) + u,
    "product": lambda x, u, lap: torch.sin(1e5 * (x @ torch.full((2, 1), 0.7).to(x))) * u + lap,
    "difference": lambda x, u, lap: 1e6 * (u - u.detach()),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("residual", AMPLIFIED.values(), ids=AMPLIFIED)
def test_rounding_that_a_residual_amplifies_is_no_mixing(residual, seed):
    model, x = _single(seed)
    operators = {"u": Value(), "lap": Laplacian(), "u_v": Directional(torch.rand(N, 2))}
    term = _term(
        lambda x, u, lap, u_v, y: residual(x, u, lap) + u_v * y,
        operators=operators,
        data={"y": torch.rand(N, 1)},
    )
    Objective(model, [term], [x])


@pytest.mark.parametrize("mixing", [*MIXING, "a little", "inside"])
@pytest.mark.parametrize("seed", range(2))
def test_mixing_shows_among_amplified_rounding(mixing, seed):
    model, x = _single(seed)
    mixes = {
        **MIXING,
        "a little": lambda x, u, lap: 0.03 * u.sum(),
        "inside": lambda x, u, lap: torch.sin(1e5 * (u - u.mean())),
    }[mixing]
    for residual in (
        lambda x, u, lap: torch.sin(1e5 * u) + mixes(x, u, lap),
        lambda x, u, lap: torch.sin(1e5 * (x @ torch.ones(2, 1))) + mixes(x, u, lap),
    ):
        with pytest.raises(ValueError, match=r"own point only|broadcast|any block of the points"):
            Objective(model, [_term(residual)], [x])


class Amplifying(nn.Module):
    """A network that amplifies its own rounding, and may mix points."""

    def __init__(self, net, scale=0.0):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        shift = self.scale * (x[:, :1] > 0.5).to(x.dtype).sum()
        return torch.sin(5e4 * self.net(x)) + shift


@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_a_network_amplifies_is_no_mixing(seed):
    model, x = _single(seed)
    term = _term(lambda x, u: u, operators={"u": Value()})
    Objective(Amplifying(model), [term], [x])
    with pytest.raises(ValueError, match="already the values of 'u' at points"):
        Objective(Amplifying(model, 0.01), [term], [x])


def test_rows_that_mix_are_named():
    term = _term(lambda x, u, lap: torch.where(x[:, :1] > 0.9 * x[:, :1].max(), u.mean(), u))
    with pytest.raises(
        ValueError, match=r"its rows at points \[\d+.*README, 'Integral conditions'"
    ):
        Objective(_network(), [term], [_points()])


class Wrapped(nn.Module):
    """A network whose output goes through a function of it and the input."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change, self.calls = _network(), change, 0

    def forward(self, x):
        self.calls += 1
        return self.change(self, self.net(x), x)


NETWORKS = {
    "statistics of a mask": lambda s, u, x: u * (x[:, :1] > 0.3).double().mean(),
    "number of points": lambda s, u, x: u / x.shape[0],
    "mask of all pairs": lambda s, u, x: u * (x[:, 0] > 0.5),
    "counter": lambda s, u, x: u * s.calls,
    "random": lambda s, u, x: u + torch.rand(1, dtype=torch.float64),
    "noise": lambda s, u, x: u + torch.randn(x.shape[0], 1, dtype=torch.float64),
    "dropout": lambda s, u, x: nn.functional.dropout(u, 0.5),
    "type": lambda s, u, x: 3 * u if isinstance(x, torch.Tensor) else u,
    "module type": lambda s, u, x: u if type(u).__name__ == "Jet" else 2 * u,
}


@pytest.mark.parametrize("change", NETWORKS.values(), ids=NETWORKS)
def test_network_that_mixes_or_mistakes(change):
    with pytest.raises((ValueError, NotImplementedError, TypeError, RuntimeError)):
        Objective(Wrapped(change), [_term(lambda x, u, lap: u + lap)], [_points()])


@pytest.mark.parametrize(
    "residual",
    [
        lambda x, u, lap: u - torch.rand_like(u),
        lambda x, u, lap: nn.functional.dropout(u, 0.5),
    ],
    ids=["rand", "dropout"],
)
def test_random_residual(residual):
    with pytest.raises(ValueError, match="other numbers when they are called a second time"):
        Objective(_network(), [_term(residual)], [_points()])


@pytest.mark.parametrize(
    ("residual", "name"),
    [
        (lambda x, u, lap: u.sub_(1), "u"),
        (lambda x, u, lap: u - x.mul_(2)[:, :1], "x"),
        (lambda x, u, lap, y: u - y.add_(1), "y"),
    ],
    ids=["u", "x", "y"],
)
def test_residual_that_writes_to_its_arguments(residual, name):
    data = {"y": torch.ones(N, 1)} if name == "y" else {}
    with pytest.raises(ValueError, match=f"writes to .*{name}.* in place"):
        Objective(_network(), [_term(residual, data=data)], [_points()])


def test_good_residuals_pass():
    for residual in (
        lambda x, u, lap: (u + lap).squeeze(1),
        lambda x, u, lap: torch.where(x[:, :1] > 0.5, u, lap),
        lambda x, u, lap: torch.cat([u, lap * 1e8], 1),
        lambda x, u, lap: torch.full_like(u, math.nan) * u,
    ):
        Objective(_network(), [_term(residual)], [_points()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 9, 13])
def test_large_derivatives_that_cancel_are_no_mixing(n, dtype):
    """Their rounding depends on the number of points."""
    torch.manual_seed(0)
    layers = nn.Linear(2, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 1)
    model, x = nn.Sequential(*layers).to(dtype), _points(n).to(dtype)
    with torch.no_grad():
        model[-1].weight.mul_(1e6)
    operators = {"lap": Laplacian(), "xx": Partial(0, 0), "yy": Partial(1, 1)}
    term = LossTerm(operators, lambda x, lap, xx, yy: lap - xx - yy, Fixed(x))
    Objective(model, [term], [x])


def test_outputs_without_derivatives():
    """A mask among the outputs of a network is no reason to refuse it."""

    class WithMask(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _network()

        def forward(self, x):
            return {"u": self.net(x), "inside": x[:, :1] > 0.5}

    term = _term(lambda x, lap: lap - 1, operators={"lap": Laplacian(of="u")})
    Objective(WithMask(), [term], [_points()]).linearize()


def test_arguments_of_a_module_as_residual():
    class Residual(nn.Module):
        def forward(self, x, v):
            return v

    with pytest.raises(ValueError, match=r"residual\(x, u, lap\), which its signature \(x, v\)"):
        _term(Residual())


def test_integral_as_one_point():
    """All nodes are one point, through a network that takes several."""

    class OverNodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _network()

        def forward(self, x):
            return self.net(x.unflatten(-1, (-1, 2))).squeeze(-1)

    model, nodes, weights = OverNodes(), _points(7), torch.rand(7, dtype=torch.float64)
    integral = LossTerm(
        {"u": Value()},
        lambda x, u: (u * weights).sum(1) - 1,
        Fixed(nodes.reshape(1, -1)),
        name="integral",
    )
    objective = Objective(
        model, [_term(lambda x, u, lap: u + lap), integral], [_points(), nodes.reshape(1, -1)]
    )
    loss = objective.term_losses()["integral"]
    torch.testing.assert_close(loss, 0.5 * ((model.net(nodes)[:, 0] * weights).sum() - 1) ** 2)
    expected = torch.autograd.grad(objective.loss(), objective.parameters())
    for ours, theirs in zip(objective.linearize().gradient(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    objective.linearize().jacobian  # noqa: B018 - it exists
    step = kfac_star(objective.parameters(), damping=1e-6).step(objective)
    assert step.new_loss < step.loss


# --- what jets and torch do differently -----------------------------------------------------------


class Detached(nn.Module):
    """A wrong way to write a jet's rule: a function that torch differentiates otherwise."""

    class _Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    def __init__(self):
        super().__init__()
        self.net = _network()

    def forward(self, x):
        return self._Cut.apply(self.net(x))


def test_derivatives_are_compared_with_reverse_mode_once(monkeypatch):
    """Also after resampling; check=False turns it off."""
    calls = []
    original = bound.check_derivatives
    monkeypatch.setattr(
        bound, "check_derivatives", lambda *args: (calls.append(1), original(*args))
    )
    term = LossTerm({"lap": Laplacian()}, lambda x, lap: lap, Box.unit(2).interior(9))
    generator = torch.Generator().manual_seed(0)
    model = _network()
    objective = Objective.sample(model, [term], generator)
    objective.resampled(generator).resampled(generator).linearize()
    assert len(calls) == 1
    Objective.sample(model, [term], generator, check=False)
    Objective.sample(_network(), [term], generator, check=False)
    assert len(calls) == 1
    other = _network()
    for _ in range(3):
        for network in (model, other):
            Objective.sample(network, [term], generator)
            network.eval()
            Objective.sample(network, [term], generator)
            network.train()
    assert len(calls) == 4  # per network and mode


def test_function_that_torch_differentiates_otherwise():
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        Objective(Detached(), [_term(lambda x, u, lap: u + lap)], [_points()])


# --- what changes between steps -------------------------------------------------------------------


class Settings:
    """A user's own object."""

    def __init__(self):
        self.factor, self.nested = 1.0, {"deep": [1.0]}


class Numbers(list):
    """A container of one's own."""


def _closures():
    """Return residuals with a function that changes what they depend on."""
    number, box, array = [1.0], types.SimpleNamespace(factor=1.0), np.ones(1)
    many = dict.fromkeys(range(100), np.float64(1.0))
    last, packed = deque([3.0, 1.0]), arrays.array("d", [1.0] * 100)
    context, exact, own = ContextVar("factor", default=1.0), types.SimpleNamespace(), Numbers([1.0])
    exact.factor, own.factor, item = Decimal(1), 1.0, number.__getitem__
    settings, tensor, module = Settings(), torch.ones(1, dtype=torch.float64), nn.Module()
    module.factor = 1.0
    module.forward = lambda x, u, lap: module.factor * u + lap
    factor = 1.0

    def rebind(value):
        nonlocal factor
        factor = value

    def inner(u):
        return factor * u

    return {
        "number": (lambda x, u, lap: factor * u + lap, lambda: rebind(2.0)),
        "function in between": (lambda x, u, lap: inner(u) + lap, lambda: rebind(2.0)),
        "list": (lambda x, u, lap: number[0] * u + lap, lambda: number.__setitem__(0, 2.0)),
        "large dictionary": (
            lambda x, u, lap: many[7] * u + lap,
            lambda: many.__setitem__(7, 2.0),
        ),
        "namespace": (
            lambda x, u, lap: box.factor * u + lap,
            lambda: setattr(box, "factor", 2.0),
        ),
        "array": (lambda x, u, lap: float(array[0]) * u + lap, lambda: array.fill(2)),
        "object": (
            lambda x, u, lap: settings.nested["deep"][0] * u + lap,
            lambda: settings.nested["deep"].__setitem__(0, 2.0),
        ),
        "deque": (lambda x, u, lap: last[-1] * u + lap, lambda: last.append(2.0)),
        "packed": (lambda x, u, lap: packed[9] * u + lap, lambda: packed.__setitem__(9, 2.0)),
        "context": (lambda x, u, lap: context.get() * u + lap, lambda: context.set(2.0)),
        "decimal": (
            lambda x, u, lap: float(exact.factor) * u + lap,
            lambda: setattr(exact, "factor", Decimal(2)),
        ),
        "list with attributes": (
            lambda x, u, lap: own.factor * u + lap,
            lambda: setattr(own, "factor", 2.0),
        ),
        "method of a list": (lambda x, u, lap: item(0) * u + lap, lambda: number.insert(0, 2.0)),
        "tensor": (lambda x, u, lap: tensor * u + lap, lambda: tensor.mul_(2)),
        "module": (
            lambda x, u, lap: module.factor * u + lap,
            lambda: setattr(module, "factor", 2.0),
        ),
    }


GLOBAL = 1.0


class Inherited(nn.Module):
    """A network that says what it does in a class of which another one is derived."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.net = _network()

    def forward(self, x):
        return GLOBAL * Inherited.factor * self.net(x)


class Derived(Inherited):
    """It has no attributes of its own."""


def _out_of_sight(monkeypatch):
    """Return networks, fields of a term, and functions that change what the loss depends on."""
    torch.manual_seed(5)
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    deep = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), a, nn.Tanh(), b, nn.Tanh(), a, nn.Tanh())
    deep = deep.append(nn.Linear(4, 1)).double()
    teacher = nn.Linear(2, 1).double().requires_grad_(False)
    outside = nn.Parameter(torch.ones(1, dtype=torch.float64))
    box = types.SimpleNamespace(w=torch.ones(1, dtype=torch.float64))
    model, hooked = _network(), _network()

    def scale():
        with torch.no_grad():
            outside.mul_(3)

    def replace_twice():  # the second tensor may get the identity of the one before the first
        box.w = box.w * 0.5
        box.w = box.w * 0.5

    def residual(x, u, lap):
        return u + lap - 1

    ones, plain = torch.ones(N, dtype=torch.float64), {"residual": residual}
    along = Directional(lambda x: model(x).detach() * x)
    return {
        "forward hook": (
            hooked,
            plain,
            lambda: hooked[1].register_forward_hook(lambda module, args, out: 2 * out),
        ),
        "shared layers": (deep, plain, lambda: deep.__setitem__(6, b)),
        "inherited attribute": (
            Derived(),
            plain,
            lambda: monkeypatch.setattr(Inherited, "factor", 2.0),
        ),
        "inherited forward": (
            Derived(),
            plain,
            lambda: monkeypatch.setitem(globals(), "GLOBAL", 3.0),
        ),
        "weight trained elsewhere": (
            _network(),
            {**plain, "weight": lambda x: outside.detach() * ones},
            scale,
        ),
        "number trained elsewhere": (
            _network(),
            {"residual": lambda x, u, lap: u + lap - outside.detach()},
            scale,
        ),
        "frozen network in the residual": (
            _network(),
            {"residual": lambda x, u, lap: u + lap - teacher(x)},
            lambda: teacher.weight.mul_(3),
        ),
        "frozen network in the weight": (
            _network(),
            {**plain, "weight": lambda x: teacher(x)[:, 0] ** 2},
            lambda: teacher.weight.mul_(3),
        ),
        "network in the weight": (
            model,
            {**plain, "weight": lambda x: torch.exp(model(x).detach()[:, 0])},
            lambda: None,
        ),
        "network in a coefficient": (
            model,
            {"residual": lambda x, d: d - 1, "operators": {"d": along}},
            lambda: None,
        ),
        "tensor replaced twice": (
            _network(),
            {"residual": lambda x, u, lap: u + lap - box.w},
            replace_twice,
        ),
    }


@pytest.mark.parametrize("kind", _out_of_sight(None))
def test_what_a_reader_found(kind, monkeypatch):
    """The loss and the loss of a step are those of a new objective."""
    model, fields, change = _out_of_sight(monkeypatch)[kind]
    objective = Objective(model, [_term(**fields)], [_points()])
    optimizer = levenberg_marquardt(objective.parameters())
    optimizer.step(objective)
    change()
    expected = float(Objective(model, objective.terms, objective.points).loss().detach())
    assert float(objective.loss().detach()) == pytest.approx(expected, rel=1e-12)
    assert optimizer.step(objective).loss == pytest.approx(expected, rel=1e-12)


def test_no_object_takes_the_place_of_one_that_is_gone():
    """Identities are used again by Python."""
    for _ in range(50):
        box = [torch.ones(5000)]
        before = circumstances(box)
        for _ in range(2):
            box[0] = box[0] * 0.5
        assert circumstances(box) != before


def test_points_that_require_a_gradient():
    """They get none, and are followed."""
    x = _points().requires_grad_()
    objective = Objective(_network(), [_term(lambda x, u, lap: u + lap - 1)], [x])
    before = sum(objective.backward().values())
    assert x.grad is None
    objective.linearize()
    with torch.no_grad():
        x.mul_(0.5)
    assert objective.loss() != before


def test_a_network_of_another_dtype():
    objective = Objective(_network(), [_term(lambda x, u, lap: u + lap)], [_points()])
    objective.model.float()
    with pytest.raises(ValueError, match="Points and network must agree in dtype and device"):
        objective.loss()


def test_data_with_another_number_of_components():
    model, data = _network(), {"y": torch.ones(N, 1)}
    term = _term(lambda x, u, lap, y: u * y, data=data)
    objective = Objective(model, [term], [_points()])
    term.data["y"] = torch.ones(N, 3)
    for made in (objective, Objective(model, [term], [_points()])):
        assert made.linearize()[0].num_components == 3


def test_a_change_that_is_noticed_in_inference_mode():
    """It is looked at as outside of it, since passes that are differentiated follow."""
    weight, factor = torch.ones(N), [1.0]
    term = _term(lambda x, u, lap: factor[0] * u, weight=weight)
    objective = Objective(_network(), [term], [_points()])
    before = float(objective.loss().detach())
    weight.mul_(2)
    factor[0] = 2.0
    with torch.inference_mode():
        assert float(objective.loss()) == pytest.approx(8 * before)
    objective.linearize()


def test_objectives_are_copied():
    term = LossTerm({"u": Value()}, _minus_one, Fixed(_points()))
    objective = Objective(_network(), [term], [_points()])
    expected = objective.linearize().gradient()
    for copied in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        for ours, theirs in zip(copied.linearize().gradient(), expected, strict=True):
            assert torch.equal(ours, theirs)


def _minus_one(x, u):
    return u - 1


@pytest.mark.parametrize("kind", _closures())
def test_residual_whose_surroundings_change(kind):
    """A step is judged by the loss of its own circumstances."""
    residual, change = _closures()[kind]
    objective = Objective(_network(), [_term(residual)], [_points()])
    optimizer = levenberg_marquardt(objective.parameters())
    optimizer.step(objective)
    change()
    before = float(objective.loss().detach())
    record = optimizer.step(objective)
    assert record.loss == pytest.approx(before, rel=1e-12)
    assert record.new_loss == pytest.approx(float(objective.loss().detach()), rel=1e-12)
    assert record.new_loss < before


def test_global_number_changes(monkeypatch):
    objective = Objective(_network(), [_term(lambda x, u, lap: GLOBAL * u + lap - 1)], [_points()])
    optimizer = levenberg_marquardt(objective.parameters())
    optimizer.step(objective)
    monkeypatch.setitem(globals(), "GLOBAL", 3.0)
    assert optimizer.step(objective).loss < optimizer.step(objective).loss * 1e9
    fresh = float(objective.loss().detach())
    monkeypatch.setitem(globals(), "GLOBAL", 5.0)
    before = float(objective.loss().detach())
    assert before != fresh
    assert optimizer.step(objective).loss == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("what", ["weight", "direction", "matrix", "network"])
def test_functions_with_numbers_are_followed(what):
    """Weights and coefficients that are functions, and attributes of the network."""
    scale = [1.0]
    term = _term(lambda x, u, lap: u + lap)
    model: nn.Module = _network()
    if what == "weight":
        term = _term(lambda x, u, lap: u + lap, weight=lambda x: scale[0] * torch.ones(len(x)))
    elif what == "direction":
        along = Directional(lambda x: scale[0] * x)
        term = _term(lambda x, d: d, operators={"d": along})
    elif what == "matrix":
        second = SecondOrder(lambda x: scale[0] * torch.diag_embed(x))
        term = _term(lambda x, d: d, operators={"d": second})
    else:
        model = Wrapped(lambda s, u, x: scale[0] * u)
    objective = Objective(model, [term], [_points()])
    one = float(objective.loss().detach())
    scale[0] = 2.0
    fresh = Objective(model, [term], [_points()])
    expected = float(fresh.loss().detach())
    assert expected == pytest.approx(one * (2 if what == "weight" else 4), rel=1e-12)
    assert float(objective.loss().detach()) == expected
    assert sum(objective.linearize().term_losses.values()) == pytest.approx(expected, rel=1e-12)
    for p in objective.parameters():
        p.grad = None
    assert float(sum(objective.backward().values())) == pytest.approx(expected, rel=1e-12)


def test_parameters_moved_behind_the_version_counter():
    """A step after ``.data`` and ``vector_to_parameters`` starts where the parameters are."""
    objective = Objective(_network(), [_term(lambda x, u, lap: u + lap)], [_points()])
    optimizer = kfac_star(objective.parameters(), damping=1e-6)
    optimizer.step(objective)
    parameters = objective.parameters()
    vector = nn.utils.parameters_to_vector(parameters).detach().clone()
    for change in (
        lambda: parameters[0].data.mul_(2),
        lambda: nn.utils.vector_to_parameters(vector.clone(), parameters),
    ):
        change()
        before = float(objective.loss().detach())
        assert optimizer.step(objective).loss == pytest.approx(before, rel=1e-12)


def test_layers_that_change_places():
    """The same parameters in another order are another network."""
    torch.manual_seed(1)
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    model = nn.Sequential(nn.Linear(2, 4).double(), nn.Tanh(), a, nn.Tanh(), b, nn.Tanh())
    model.append(nn.Linear(4, 1).double())
    objective = Objective(model, [_term(lambda x, u, lap: u + lap)], [_points()])
    objective.linearize()
    model[2], model[4] = b, a
    linearized = objective.linearize()
    expected = torch.autograd.grad(objective.loss(), linearized.parameters)
    for ours, theirs in zip(linearized.gradient(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class UsesGlobal(nn.Module):
    """A network that depends on a global number and an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.net, self._factor = _network(), 1.0

    def forward(self, x):
        return GLOBAL * self._factor * self.net(x)


def test_numbers_that_a_network_uses(monkeypatch):
    objective = Objective(UsesGlobal(), [_term(lambda x, u, lap: u + lap - 1)], [_points()])
    optimizer = levenberg_marquardt(objective.parameters())
    optimizer.step(objective)
    for change in (
        lambda: monkeypatch.setitem(globals(), "GLOBAL", 3.0),
        lambda: setattr(objective.model, "_factor", 2.0),
    ):
        change()
        before = float(objective.loss().detach())
        assert optimizer.step(objective).loss == pytest.approx(before, rel=1e-12)


class Deep:
    """Objects in objects, with cycles, long lists and what makes new objects when it is asked."""

    def __init__(self, depth=8):
        self.inner = Deep(depth - 1) if depth else None
        self.me, self.many, self.array = self, list(range(1000)), np.arange(1000)
        self.few = [{"a": i, "b": [i]} for i in range(200)]

    def method(self, x):
        return torch.ones(len(x))


def test_circumstances_are_the_same_while_nothing_changes():
    """Else every step would start anew; and looking for them takes no longer than a step."""
    deep = Deep()
    residual = functools.partial(lambda x, u, lap, k: k.method(x)[:, None] * u + lap, k=deep)
    term = _term(residual, weight=deep.method)
    objective = Objective(_network(), [term], [_points()])
    first = objective.fingerprint()
    bound = objective._bound[0]
    parts = bound.parts
    for _ in range(3):
        assert objective.fingerprint() == first
        bound.follow()
        assert bound.parts is parts
    start = time.perf_counter()
    objective.fingerprint()
    assert time.perf_counter() - start < 0.2


class Training(nn.Module):
    """A network, its residual and its training in one object, as many write it."""

    def __init__(self):
        super().__init__()
        self.net, self.history, self.epoch = _network(), [], 0
        self.direct = self._helped = 1.0
        self.plain = Plain()

    def forward(self, x):
        return self.direct * self.net(x)

    def residual(self, x, u, lap):
        return self._help() * u + self.plain[0] * lap + self.plain.read

    def _help(self):
        return self._helped

    def train_on(self, objective):
        self.epoch += 1
        self.history.append(levenberg_marquardt(objective.parameters()).step(objective).loss)


class Plain:
    """An object that is used by an operator and a property."""

    def __init__(self):
        self._item = self._read = 1.0

    def __getitem__(self, index):
        return self._item

    @property
    def read(self):
        return self._read


def test_attributes_matter_that_code_uses():
    """Others, such as a history of losses, don't make every step look at everything again."""
    training = Training()
    objective = Objective(training, [_term(training.residual)], [_points()])
    before = objective.fingerprint()[-1]
    training.train_on(objective)
    assert objective.fingerprint()[-1] == before
    for owner, name in (
        (training, "direct"),
        (training, "_helped"),
        (training.plain, "_item"),
        (training.plain, "_read"),
    ):
        before = objective.fingerprint()[-1]
        setattr(owner, name, 2.0)
        assert objective.fingerprint()[-1] != before


# --- tensors per point ----------------------------------------------------------------------------

DRAWING = {
    "interior": Box.unit(2).interior(N),
    "faces": Box.unit(2).faces(N),
    "product": SpaceTimeBox.unit(1).initial(N),
    "union": Union((Fixed(_points()), Box.unit(2).interior(N))),
}
PER_POINT = {
    "data": {"data": {"y": torch.ones(N, 1)}},
    "weight": {"weight": torch.ones(N)},
    "weight per component": {"weight": torch.ones(N, 1)},
    "direction": {"operators": {"u": Directional(torch.ones(N, 2))}},
    "matrix": {"operators": {"u": SecondOrder(torch.ones(N, 2, 2))}},
    "factors": {"operators": {"u": SecondOrder.from_factors(torch.ones(N, 2, 1))}},
}


@pytest.mark.parametrize("sampler", DRAWING.values(), ids=DRAWING)
@pytest.mark.parametrize("given", PER_POINT.values(), ids=PER_POINT)
def test_tensors_per_point_need_points_that_stay(given, sampler):
    with pytest.raises(ValueError, match=r"would meet new points .* Use points=Fixed\(x\)"):
        LossTerm(
            **{
                "operators": {"u": Value()},
                "residual": lambda x, u, y=0: u - y,
                "points": sampler,
                **given,
            }
        )


def test_points_that_stay():
    halves = Product((Fixed(_points()[:, :1]), Fixed(_points()[:, 1:])))
    for sampler in (Fixed(_points()), halves, Union((Fixed(_points()),))):
        LossTerm({"u": Value()}, lambda x, u, y: u - y, sampler, data={"y": torch.ones(N, 1)})


# --- found by a hostile user ----------------------------------------------------------------------


def test_what_was_checked_at_one_point_is_checked_again_at_more():
    model, term = _network(), _term(lambda x, u, lap: u - u.mean(0, keepdim=True) + 1)
    Objective(model, [term], [_points(1)])
    with pytest.raises(ValueError, match="own point only"):
        Objective(model, [term], [_points()])


def test_a_residual_that_starts_to_mix_points():
    """By a switch between two steps, on the same objective and after resampling."""
    switch = {"on": False}
    term = LossTerm(
        {"u": Value()},
        lambda x, u: u - u.mean() if switch["on"] else u - 1,
        Box.unit(2).interior(N),
    )
    objective = Objective.sample(_network(), [term])
    objective.linearize()
    switch["on"] = True
    for changed in (
        objective.loss,
        objective.linearize,
        lambda: objective.resampled(torch.Generator()),
    ):
        with pytest.raises(ValueError, match="own point only"):
            changed()


class Staged(nn.Module):
    """A network whose weights are computed from other parameters in a second stage."""

    def __init__(self):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.full((6,), 1.3))
        self.out, self.stage = nn.Linear(6, 1), 1

    def forward(self, x):
        W = self.v / self.v.norm(dim=0)
        first = W if self.stage == 1 else self.g * W
        return {k: self.out(torch.tanh(x @ w)) for k, w in (("u", first), ("v", self.g * W))}


def test_structure_follows_a_stage_of_the_network():
    torch.manual_seed(0)
    model, points = Staged().double(), Fixed(_points())
    terms = [LossTerm({"y": Value(of=k)}, lambda x, y: y - 1, points, name=k) for k in "uv"]
    objective = Objective.sample(model, terms)
    objective.linearize()
    model.stage = 2
    for made in (objective, Objective.sample(model, terms)):
        expected = torch.autograd.grad(made.loss(), made.parameters())
        for ours, theirs in zip(made.linearize().gradient(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Configuration:
    """Numbers of a class."""

    factor = 1.0


class Slotted:
    """An object without a dictionary, that is called."""

    __slots__ = ("factor",)

    def __call__(self, x):
        return self.factor * Configuration.factor * torch.ones(len(x))


@pytest.mark.parametrize("kind", ["class", "slots", "attribute of a function", "long list"])
def test_other_places_of_numbers(kind, monkeypatch):
    def weight(x):
        return weight.factor * Configuration.factor * torch.ones(len(x))

    weight.factor, slotted, numbers = 1.0, Slotted(), [1.0] * 1000
    slotted.factor = 1.0
    given = {"slots": slotted, "long list": lambda x: numbers[7] * torch.ones(len(x))}
    term = _term(lambda x, u, lap: u + lap, weight=given.get(kind, weight))
    objective = Objective(_network(), [term], [_points()])
    before = float(objective.loss().detach())
    if kind == "class":
        monkeypatch.setattr(Configuration, "factor", 4.0)
    elif kind == "slots":
        slotted.factor = 4.0
    elif kind == "long list":
        numbers[7] = 4.0
    else:
        weight.factor = 4.0
    assert float(objective.loss().detach()) == pytest.approx(4 * before, rel=1e-12)


def test_points_that_share_memory_with_numpy():
    """Jets and the residual see the same points, the old ones."""
    array = np.random.default_rng(0).random((N, 2))
    points = torch.from_numpy(array)
    term = LossTerm({"u": Value()}, lambda x, u: u - x[:, :1], Fixed(points))
    objective = Objective(_network(), [term], [points])
    before = float(objective.loss().detach())
    array *= 0.5
    assert float(objective.loss().detach()) == before


def test_ties_of_maximum_as_torch():
    class Largest(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()

        def forward(self, x):
            return self.net(torch.maximum(x[:, :1], x[:, 1:]) - x.amin(1, keepdim=True) ** 2)

    x, model = torch.tensor([[0.1, 0.3], [0.5, 0.5], [0.7, 0.7]]).double(), Largest()
    term = LossTerm({"d": Directional(torch.tensor([1.0, 0.0]))}, lambda x, d: d - 1, Fixed(x))
    objective = Objective(model, [term], [x])
    inputs = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    expected = 0.5 * (slope[:, 0] - 1).square().mean()
    torch.testing.assert_close(objective.loss(), expected, rtol=1e-10, atol=0)


def test_points_on_kinks_are_no_reason_to_refuse():
    model = nn.Sequential(nn.Linear(2, 8), nn.ELU(), nn.Linear(8, 1)).double()
    nn.init.zeros_(model[0].bias)
    grid = torch.linspace(0, 1, 4).double()
    x = torch.cartesian_prod(grid, grid)
    Objective(model, [_term(lambda x, u, lap: u + lap)], [x])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_squeeze_is_accepted(n):
    Objective(_network(), [_term(lambda x, u, lap: u.squeeze() - 1, n)], [_points(n)])


def test_chunks_that_are_recomputed_notice_another_number():
    factor = [1.0]
    box = Box.unit(2)
    term = LossTerm({"u": Value()}, lambda x, u: factor[0] * u, box.interior(6))
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    linearized = Objective.sample(model, [term], chunk_size=2).linearize()
    gradient = linearized.gradient()
    factor[0] = 2.0
    vector = torch.cat([g.flatten() for g in gradient])
    with pytest.raises(RuntimeError, match="numbers that functions use"):
        linearized.jacobian @ vector
