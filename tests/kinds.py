"""Networks with trainable tensors anywhere, and residuals and coefficients that are trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from pinncurv.diffops import (
    Bilaplacian,
    Directional,
    Divergence,
    Gradient,
    Hessian,
    Laplacian,
    Partial,
    SecondOrder,
    Value,
)
from pinncurv.jets import derivative
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points

WIDTH = 3


class Slopes(nn.Module):
    """An adaptive slope for a layer, and one for each neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.a, self.b = nn.Parameter(torch.tensor(1.1)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a * self.first(x))
        return self.head(torch.tanh(self.second(h) * self.b))


class Pirate(nn.Module):
    """A residual block with a trained gate (PirateNet), between two gates."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.f = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 3)
        self.alpha, self.head = nn.Parameter(torch.tensor(0.3)), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.tanh(self.u(x)), torch.tanh(self.v(x))
        f = torch.tanh(self.f(u))
        z = f * u + (1 - f) * v
        return self.head(self.alpha * z + (1 - self.alpha) * u)


class Fourier(nn.Module):
    """Trained frequencies, an omega as in SIREN, and layers written as x @ W + b."""

    def __init__(self) -> None:
        super().__init__()
        self.B, self.omega = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.tensor(1.5))
        self.W, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        p = x @ self.B
        h = torch.cat([torch.sin(p), torch.cos(p)], -1)
        return self.head(torch.sin(self.omega * (h @ self.W + self.b)))


class Normalized(nn.Module):
    """LayerNorm, BatchNorm in eval mode, PReLU, weight normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.utils.parametrizations.weight_norm(nn.Linear(2, 4))
        self.layer, self.batch = nn.LayerNorm(4), nn.BatchNorm1d(4)
        self.prelu, self.head = nn.PReLU(4), nn.Linear(4, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.batch(self.lift(x)))
        return self.head(self.layer(torch.sin(h) + 0.1 * self.prelu(h)))


class Factorized(nn.Module):
    """Random weight factorization: W = diag(exp s) V."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.V = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 2))
        self.b, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.exp(self.s)[:, None] * self.V
        return self.head(torch.tanh(functional.linear(x, weight, self.b)))


class DeepONet(nn.Module):
    """A branch on fixed sensors, a trunk on the points, a latent code and a learned constant."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
        self.trunk = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.code, self.constant = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(1))
        self.register_buffer("sensors", torch.tensor([0.3, -0.8]))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([x, self.code.expand(x.shape[0], -1)], -1)
        product = self.trunk(joined) * self.branch(self.sensors)
        return product.sum(-1, keepdim=True) + self.constant


class Tied(nn.Module):
    """One weight with two biases, and transposed; a bias alone; an einsum; frozen halves."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(3, 3), nn.Parameter(torch.randn(3))
        self.lift, self.head = nn.Linear(2, 3), nn.Linear(3, 1)
        self.lift.weight.requires_grad_(False)
        self.head.bias.requires_grad_(False)
        self.mix = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.lift(x))))
        h = torch.tanh(functional.linear(h, self.shared.weight, self.other))
        h = torch.tanh(functional.linear(h, self.shared.weight.t()))
        return self.head(torch.einsum("ni,ij->nj", h, self.mix))


class Experts(nn.Module):
    """A softmax mixture of two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(2, 2), nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.gate(x) / self.temperature, -1)
        return (weights * torch.sin(self.out(x))).sum(-1, keepdim=True)


class Neumann(nn.Module):
    """N(x) - x N_x(1): its derivative vanishes at the wall by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        wall = torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1)
        return self.net(x) - x[:, :1] * self.slope(wall)

    def slope(self, wall: Tensor) -> Tensor:
        if type(wall) is Tensor and torch._C._functorch.maybe_current_level() is not None:
            # the oracle nests torch.func, for which the derivative is written out
            first, _, last = self.net
            slope = 1 - torch.tanh(first(wall)) ** 2
            return functional.linear(slope * first.weight[:, 0], last.weight)
        return derivative(self.net, wall, 0)


class Two(nn.Module):
    """Two networks with an output each."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.p = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"u": self.u(x), "p": self.p(x)}


# --- less usual ones, of which each meets some of the terms only ---------------------------------


class LayerNormed(nn.Module):
    """LayerNorm between layers, and a slope."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.norm, self.head = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.slope = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.slope * self.norm(torch.tanh(self.lift(x)))))


class BatchNormed(nn.Module):
    """BatchNorm in eval mode, with statistics that are not 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.norm, self.head = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
        self.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.3]))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.lift(x))))


class WeightNormed(nn.Module):
    """Weight normalization of every layer."""

    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.lift, self.head = normed(nn.Linear(2, 3)), normed(nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lift(x)))


class Anchored(nn.Module):
    """N(x) - N(0): every layer acts on jets and on something that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False))
        self.register_buffer("origin", torch.zeros(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.net(self.origin)


class TwoRoles(nn.Module):
    """A weight of a linear layer that also enters by its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lift(x))) / (1 + self.lift.weight.square().sum())


class Sliced(nn.Module):
    """One tensor of which parts are weights, and one entry a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.W[:2]) + torch.sin(torch.cos(x) @ self.W[2:4])
        return self.head(h) + self.W[4, 0]


class Splines(nn.Module):
    """A Kolmogorov-Arnold network: trained sums of fixed functions on every edge."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 3, 3))
        self.second = nn.Parameter(torch.randn(3, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        for c in (self.first, self.second):
            basis = torch.stack([torch.sin(x), torch.tanh(x), x], -1)
            x = torch.einsum("nik,iok->no", basis, c)
        return x


class Centres(nn.Module):
    """Radial functions around trained centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.width = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        r = (x[:, None, :] - self.centres).square().sum(-1)
        return self.head(torch.exp(-r * self.width.exp()))


class Attending(nn.Module):
    """Attention over the coordinates, with a trained temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(1, 2), nn.Linear(1, 2), nn.Linear(1, 3)
        self.temperature, self.head = nn.Parameter(torch.tensor(0.9)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x[..., None]
        scores = self.q(z) @ self.k(z).transpose(-1, -2) * self.temperature
        return self.head((torch.softmax(scores, -1) @ self.v(z)).sum(1))


class Tokens(nn.Module):
    """A layer on two tokens of every point, each with gates of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.token, self.head = nn.Linear(2, 4), nn.Linear(2, 3), nn.Linear(3, 1)
        self.gates = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.lift(x)).reshape(-1, 2, 2)
        return self.head((torch.tanh(self.token(tokens)) * self.gates).mean(1))


class Hyper(nn.Module):
    """A weight that another layer makes of a latent code."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.code = nn.Linear(3, 6), nn.Parameter(torch.randn(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.branch(self.code).reshape(2, 3)))


class Steps(nn.Module):
    """One layer used three times, with a trained step length; a frozen weight, a trained bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.step, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.lift.weight.requires_grad_(False)
        self.length = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        for _ in range(3):
            h = h + self.length * torch.tanh(self.step(h))
        return self.head(h)


class Pair(nn.Module):
    """A tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.scale = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.net(x)
        return self.scale * u, u * x[:, :1]


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": LayerNormed,
    "batch_norm": BatchNormed,
    "weight_norm": WeightNormed,
    "anchored": Anchored,
    "two_roles": TwoRoles,
    "sliced": Sliced,
    "splines": Splines,
    "centres": Centres,
    "attention": Attending,
    "tokens": Tokens,
    "hyper": Hyper,
    "steps": Steps,
    "pair": Pair,
}

KINDS: dict[str, Callable[[], nn.Module]] = {
    "slopes": Slopes,
    "pirate": Pirate,
    "fourier": Fourier,
    "normalized": Normalized,
    "factorized": Factorized,
    "deeponet": DeepONet,
    "tied": Tied,
    "experts": Experts,
    "neumann": Neumann,
}


def build(kind: str | Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a network of a kind in float64, with parameters of order one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ((KINDS | UNUSUAL)[kind] if isinstance(kind, str) else kind)().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
    return model


class Coefficient(nn.Module):
    """An unknown coefficient, and a network for an unknown source."""

    def __init__(self) -> None:
        super().__init__()
        self.nu = nn.Parameter(torch.tensor(0.3))
        self.source = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))

    def forward(self, x: Tensor, u: Tensor, lap: Tensor) -> Tensor:
        return lap * self.nu + u**3 - self.source(x)


def _term(name: str, operators: dict, residual, weight=1.0) -> LossTerm:
    return LossTerm(operators, residual, Fixed(points()), weight, name)


def trained_term(seed: int = 3) -> LossTerm:
    """Return a term with trained tensors in its residual, a matrix, and functions of x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        matrix = nn.Parameter(torch.randn(2, 2).double())
        flow = nn.Linear(2, 2).double()
        residual = Coefficient().double()
    operators = {"u": Value(), "lap": SecondOrder(matrix), "flow": Directional(flow)}

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = residual

        def forward(self, x: Tensor, u: Tensor, lap: Tensor, flow: Tensor) -> Tensor:
            return torch.cat([self.inner(x, u, lap), flow * self.inner.nu], 1)

    return _term("inverse", operators, Joint(), (1.0, 0.3))


TERMS: dict[str, Callable[[], LossTerm]] = {
    "first": lambda: _term(
        "first", {"u": Value(), "g": Gradient()}, lambda x, u, g: u * g[:, 0] - g[:, :, 1].sin()
    ),
    "poisson": lambda: _term("poisson", {"lap": Laplacian()}, lambda x, lap: lap - x[:, :1], 2.5),
    "wave": lambda: _term(
        "wave", {"tt": Partial(0, 0), "H": Hessian()}, lambda x, tt, H: tt * H[..., 0, 1] - tt
    ),
    "kdv": lambda: _term(
        "kdv",
        {"u": Value(), "t": Partial(0), "x1": Partial(1), "x3": Partial(1, 1, 1)},
        lambda x, u, t, x1, x3: t + 6 * u * x1 + x3,
    ),
    "mixed": lambda: _term(
        "mixed",
        {"xxy": Partial(0, 0, 1), "n": Directional(torch.cos, order=3)},
        lambda x, xxy, n: torch.cat([xxy, n * xxy], 1),
    ),
    "kuramoto": lambda: _term(
        "kuramoto",
        {
            "u": Value(),
            "t": Partial(0),
            "g": Partial(1),
            "d": Partial(1, 1),
            "h": Partial(*[1] * 4),
        },
        lambda x, u, t, g, d, h: t + u * g + d + 0.1 * h,
    ),
    "biharmonic": lambda: _term(
        "biharmonic",
        {"b": Bilaplacian(), "lap": Laplacian()},
        lambda x, b, lap: 0.1 * b * lap - x[:, 1:],
    ),
    "inverse": trained_term,
}


def on_outputs(term: LossTerm, *outputs: int) -> LossTerm:
    """Return the term with operators that act on these outputs in turn."""
    operators = {}
    for operator, of, name in zip(
        term.operators.values(), itertools.cycle(outputs), term.operators, strict=False
    ):
        operators[name] = copy.copy(operator)
        object.__setattr__(operators[name], "of", of)  # replace() has no way to some of them
    return replace(term, operators=operators)


def system() -> list[LossTerm]:
    """Return a system with two outputs of the network."""
    momentum = _term(
        "momentum",
        {
            "u": Value(of="u"),
            "g": Gradient(of="u"),
            "lap": Laplacian(of="u"),
            "p": Gradient(of="p"),
        },
        lambda x, u, g, lap, p: torch.einsum("nj,nij->ni", u, g) + p[:, 0] - 0.1 * lap,
    )
    mass = _term("mass", {"div": Divergence(of="u")}, lambda x, div: div)
    gauge = _term("gauge", {"p": Value(of="p")}, lambda x, p: p)
    return [momentum, mass, replace(gauge, weight=0.1)]
