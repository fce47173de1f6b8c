"""Random violations of what networks, residuals, points and optimizers must be: each one raises.

A case draws sizes, networks and operators anew from its seed; a violation is a function of them.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import pinncurv as pc
from pinncurv import presets

SEEDS = range(3)
pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # users have no such checks


@dataclass
class Setting:
    """Sizes and objects that a violation is made of."""

    rng: random.Random
    generator: torch.Generator
    N: int
    d: int
    width: int
    out: int

    @classmethod
    def draw(cls, seed: int) -> "Setting":
        """Return a setting with three or more points, so that mixing them shows."""
        rng = random.Random(seed)
        sizes = rng.randint(3, 40), rng.randint(1, 3), rng.randint(2, 5), rng.randint(1, 2)
        return cls(rng, torch.Generator().manual_seed(seed), *sizes)

    def points(self, N: int | None = None) -> Tensor:
        """Return points."""
        shape = N or self.N, self.d
        return torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def network(
        self, hidden: Callable[[Tensor], Tensor] = torch.tanh, out: int | None = None
    ) -> nn.Module:
        """Return a network with a given function of its hidden layer."""
        lift, head = nn.Linear(self.d, self.width), nn.Linear(self.width, out or self.out)
        for parameter in (*lift.parameters(), *head.parameters()):
            nn.init.normal_(parameter, generator=self.generator)
        return Network(lift, head, hidden).double()

    def operator(self) -> object:
        """Return an operator of order zero to two."""
        i = self.rng.randrange(self.d)
        return self.rng.choice([pc.Value(), pc.Partial(i), pc.Partial(i, i), pc.Laplacian()])

    def term(self, residual: Callable[..., Tensor] = lambda x, u: u - 1, **fields) -> pc.LossTerm:
        """Return a term with a given residual."""
        operator = fields.pop("operator", None) or self.operator()
        sampler = fields.pop("points", None) or pc.Fixed(self.points())
        return pc.LossTerm({"u": operator}, residual, sampler, **fields)

    def use(self, model: nn.Module, term: pc.LossTerm, x: Tensor | None = None) -> None:
        """Make an objective, and use it in one of the ways there are."""
        x = term.points.sample(self.generator, torch.float64, "cpu") if x is None else x
        objective = pc.Objective(model, [term], [x], self.rng.choice([None, 2]))
        chosen = self.rng.randrange(4)
        if chosen < 3:
            [objective.loss, objective.backward, objective.linearize][chosen]()
        else:
            presets.levenberg_marquardt(objective.parameters()).step(objective)


class Network(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, lift: nn.Module, head: nn.Module, hidden: Callable[..., Tensor]) -> None:
        super().__init__()
        self.lift, self.head, self.hidden = lift, head, hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.lift(x)))


def _noise(u: Tensor) -> Tensor:
    return u + torch.rand(u.shape, dtype=torch.float64)


# What makes a row of u depend on the other rows, or on the call.
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda u: u - u.mean(),
    "mean_dim": lambda u: u - u.mean(0, keepdim=True),
    "sum": lambda u: u * u.sum(),
    "sum_no_axes": lambda u: u * torch.sum(u, dim=[]),
    "roll": lambda u: u - u.roll(1, 0),
    "norm": lambda u: u / (1 + u.norm()),
    "cumsum": lambda u: u.cumsum(0),
    "flip": lambda u: u * u.flip(0) + u,
    "sort": lambda u: u - u.sort(0).values,
    "max": lambda u: u - u.max(),
    "softmax": lambda u: u * torch.softmax(u, 0),
    "diff": lambda u: u - u[[*range(1, len(u)), 0]],
    "first": lambda u: u - u[:1],
    "median": lambda u: u - u.median(),
    "std": lambda u: u / (1 + u.std(0)),
    "outer": lambda u: u @ (u.mT @ u),
    "broadcast": lambda u: u[:, :1] - u[:, 0],
    "number": lambda u: u * len(u),
    "random": _noise,
    "batch_norm": lambda u: nn.functional.batch_norm(u, None, None, training=True),
    "dropout": lambda u: nn.functional.dropout(u, 0.5),
    "mask": lambda u: u * (u >= u.max()),
    "standardized": lambda u: (u - u.mean(0)) / (1 + u.var(0)),
}


def residual_mixes(at: Setting, name: str) -> None:
    at.use(at.network(), at.term(lambda x, u: MIXING[name](u)))


def network_mixes(at: Setting, name: str) -> None:
    at.use(at.network(lambda h: MIXING[name](torch.tanh(h))), at.term())


def data_broadcast(at: Setting) -> None:
    y = torch.rand(at.N, dtype=torch.float64, generator=at.generator)
    at.use(at.network(out=1), at.term(lambda x, u, y: u - y, data={"y": y}))


def data_broadcast_where_N_is_V(at: Setting) -> None:
    y = torch.rand(at.N, dtype=torch.float64, generator=at.generator)
    at.use(at.network(out=at.N), at.term(lambda x, u, y: u - y, data={"y": y}))


def data_in_closure(at: Setting) -> None:
    y = torch.rand(at.N, 1, dtype=torch.float64, generator=at.generator)
    at.use(at.network(), at.term(lambda x, u: u - y))


def counter(at: Setting) -> None:
    calls = []

    def residual(x: Tensor, u: Tensor) -> Tensor:
        calls.append(None)
        return u * len(calls)

    at.use(at.network(), at.term(residual))


def in_place_on_points(at: Setting) -> None:
    def residual(x: Tensor, u: Tensor) -> Tensor:
        x.mul_(2)
        return u - x[:, :1]

    at.use(at.network(), at.term(residual))


def in_place_on_values(at: Setting) -> None:
    at.use(at.network(), at.term(lambda x, u: u.sub_(1)))


def in_place_in_network(at: Setting) -> None:
    at.use(at.network(lambda h: h.add_(1)), at.term())


def in_place_on_a_view(at: Setting) -> None:
    def hidden(h: Tensor) -> Tensor:
        part = h[:, :1]
        part *= 3
        return torch.tanh(h)

    at.use(at.network(hidden), at.term())


def assignment_to_a_column(at: Setting) -> None:
    def hidden(h: Tensor) -> Tensor:
        h[:, 0] = 1.0
        return h

    at.use(at.network(hidden), at.term())


def trained_tensor_in_closure(at: Setting) -> None:
    nu = nn.Parameter(torch.rand(1, dtype=torch.float64, generator=at.generator))
    at.use(at.network(), at.term(lambda x, u: nu * u))


def trained_module_in_partial(at: Setting) -> None:
    def residual(x: Tensor, u: Tensor, source: nn.Module) -> Tensor:
        return u - source(x)

    source = at.network(out=1)
    at.use(at.network(), at.term(functools.partial(residual, source=source)))


def trained_tensor_in_network(at: Setting) -> None:
    slope = torch.rand(1, dtype=torch.float64, generator=at.generator, requires_grad=True)
    at.use(at.network(lambda h: torch.tanh(slope * h)), at.term())


def trained_tensor_in_coefficient(at: Setting) -> None:
    v = torch.rand(at.d, dtype=torch.float64, generator=at.generator, requires_grad=True)
    at.use(at.network(), at.term(operator=pc.Directional(lambda x: v * torch.cos(x))))


def trained_weight(at: Setting) -> None:
    weight = torch.rand(at.N, dtype=torch.float64, generator=at.generator, requires_grad=True)
    at.use(at.network(), at.term(weight=weight))


def no_grad(at: Setting) -> None:
    def hidden(h: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(h)
        return torch.tanh(h) * gate

    at.use(at.network(hidden), at.term(operator=pc.Laplacian()))


def isinstance_branch(at: Setting) -> None:
    def hidden(h: Tensor) -> Tensor:
        return torch.tanh(h) if isinstance(h, Tensor) else torch.sin(h)

    at.use(at.network(hidden), at.term())


def is_tensor_branch(at: Setting) -> None:
    at.use(at.network(lambda h: h.sin() if torch.is_tensor(h) else h.cos()), at.term())


class Straight(torch.autograd.Function):
    """A custom function, whose backward pass jets know nothing of."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


def autograd_function(at: Setting) -> None:
    at.use(at.network(Straight.apply), at.term())


def no_rule(at: Setting) -> None:
    at.use(at.network(at.rng.choice([torch.erfinv, torch.lgamma, torch.fft.fft])), at.term())


def data_with_a_sampler(at: Setting) -> None:
    sampler = pc.Box.unit(at.d).interior(at.N)
    y = torch.rand(at.N, 1, dtype=torch.float64, generator=at.generator)
    at.use(at.network(), at.term(lambda x, u, y: u - y, points=sampler, data={"y": y}))


def weights_with_a_sampler(at: Setting) -> None:
    sampler = pc.Box.unit(at.d).interior(at.N)
    weight = torch.rand(at.N, dtype=torch.float64, generator=at.generator)
    at.use(at.network(), at.term(points=sampler, weight=weight))


def directions_with_a_sampler(at: Setting) -> None:
    sampler = pc.Box.unit(at.d).interior(at.N)
    at.use(at.network(), at.term(points=sampler, operator=pc.Directional(at.points())))


def rows_of_data(at: Setting) -> None:
    y = torch.rand(at.N + at.rng.choice([-1, 1]), 1, dtype=torch.float64)
    at.use(at.network(), at.term(lambda x, u, y: u - y, data={"y": y}))


def rows_of_weights(at: Setting) -> None:
    at.use(at.network(), at.term(weight=torch.ones(at.N + 1, dtype=torch.float64)))


def number_of_weights(at: Setting) -> None:
    at.use(at.network(), at.term(weight=(1.0,) * (at.out + 2)))


def dtype_of_points(at: Setting) -> None:
    at.use(at.network(), at.term(), at.points().float())


def dtype_of_network(at: Setting) -> None:
    at.use(at.network().float(), at.term())


def dtype_of_residual(at: Setting) -> None:
    at.use(at.network(), at.term(lambda x, u: u.float()))


def dimension_of_points(at: Setting) -> None:
    at.use(at.network(), at.term(), torch.rand(at.N, at.d + 1, dtype=torch.float64))


def nan_in_points(at: Setting) -> None:
    x = at.points()
    x[at.rng.randrange(at.N), 0] = at.rng.choice([torch.nan, torch.inf])
    at.use(at.network(), at.term(), x)


def nan_in_parameters(at: Setting) -> None:
    model = at.network()
    with torch.no_grad():
        at.rng.choice(list(model.parameters())).view(-1)[0] = torch.nan
    at.use(model, at.term())


def nan_in_weight(at: Setting) -> None:
    at.use(at.network(), at.term(weight=at.rng.choice([torch.nan, -1.0, torch.inf])))


def nan_in_the_loss(at: Setting) -> None:
    model, term = at.network(), at.term(lambda x, u: (u - 1e3).sqrt())
    x = term.points.sample(at.generator, torch.float64, "cpu")
    objective = pc.Objective(model, [term], [x])
    presets.levenberg_marquardt(objective.parameters()).step(objective)


def infinite_gradient(at: Setting) -> None:
    model = at.network()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    term = at.term(lambda x, u: (u * u).sqrt() + x[:, :1], operator=pc.Value())
    objective = pc.Objective(
        model, [term], [term.points.sample(at.generator, torch.float64, "cpu")]
    )
    presets.levenberg_marquardt(objective.parameters()).step(objective)


def _optimizer(at: Setting, preset: str = "", **group: object) -> torch.optim.Optimizer:
    """Return an optimizer after one step; of the network that the setting draws next."""
    model, term = at.network(), at.term()
    x = term.points.sample(at.generator, torch.float64, "cpu")
    objective = pc.Objective(model, [term], [x])
    make = getattr(presets, preset or at.rng.choice(["kfac_star", "levenberg_marquardt"]))
    parameters = [{"params": objective.parameters(), **group}] if group else objective.parameters()
    optimizer = make(parameters)
    optimizer.step(objective)
    return optimizer


def unknown_group_key(at: Setting) -> None:
    key, value = at.rng.choice([("weight_decay", 0.1), ("betas", (0.9, 0.99)), ("Lr", 0.1)])
    _optimizer(at, **{key: value})


def nan_learning_rate(at: Setting) -> None:
    _optimizer(at, lr=torch.nan)


def state_of_another_network(at: Setting) -> None:
    state = _optimizer(at, "kfac_star").state_dict()
    at.width += 1
    _optimizer(at, "kfac_star").load_state_dict(state)


def state_of_another_preset(at: Setting) -> None:
    state = _optimizer(at, "kfac_star").state_dict()
    _optimizer(at, "spring").load_state_dict(state)


def nan_in_state(at: Setting) -> None:
    optimizer = _optimizer(at, "kfac_star")
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = torch.nan
    optimizer.load_state_dict(state)


def parameters_of_another_network(at: Setting) -> None:
    term = at.term()
    x = term.points.sample(at.generator, torch.float64, "cpu")
    one, other = (pc.Objective(at.network(), [term], [x]) for _ in range(2))
    presets.kfac_star(one.parameters()).step(other)


VIOLATIONS = [
    data_broadcast,
    data_broadcast_where_N_is_V,
    data_in_closure,
    counter,
    in_place_on_points,
    in_place_on_values,
    in_place_in_network,
    in_place_on_a_view,
    assignment_to_a_column,
    trained_tensor_in_closure,
    trained_module_in_partial,
    trained_tensor_in_network,
    trained_tensor_in_coefficient,
    trained_weight,
    no_grad,
    isinstance_branch,
    is_tensor_branch,
    autograd_function,
    no_rule,
    data_with_a_sampler,
    weights_with_a_sampler,
    directions_with_a_sampler,
    rows_of_data,
    rows_of_weights,
    number_of_weights,
    dtype_of_points,
    dtype_of_network,
    dtype_of_residual,
    dimension_of_points,
    nan_in_points,
    nan_in_parameters,
    nan_in_weight,
    nan_in_the_loss,
    infinite_gradient,
    unknown_group_key,
    nan_learning_rate,
    state_of_another_network,
    state_of_another_preset,
    nan_in_state,
    parameters_of_another_network,
]
REFUSALS = (ValueError, TypeError, RuntimeError, FloatingPointError, NotImplementedError)


def _cases():
    for name in MIXING:
        for violation in (residual_mixes, network_mixes):
            yield f"{violation.__name__}-{name}", functools.partial(violation, name=name)
    for violation in VIOLATIONS:
        yield violation.__name__, violation


def _params():
    for name, violation in _cases():
        for seed in SEEDS:
            yield pytest.param(violation, seed, id=f"{name}-{seed}")


@pytest.mark.parametrize(("violation", "seed"), list(_params()))
def test_is_refused(violation, seed):
    with pytest.raises(
        REFUSALS, match=r"must|No jet rule|immutable|broadcast|Dropout|cannot be multiplied"
    ):
        violation(Setting.draw(seed))


@pytest.mark.parametrize("seed", range(20))
def test_what_violates_nothing_is_accepted(seed):
    at = Setting.draw(seed)
    at.use(at.network(), at.term())
