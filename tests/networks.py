"""One small network of every kind that the package promises to differentiate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 3


class Residual(nn.Module):
    """x + f(x) blocks."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.lift = nn.Linear(d_in, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, d_out)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.lift(x))
        h = h + self.outer(torch.tanh(self.inner(h)))
        return self.head(h)


class Gated(nn.Module):
    """Multiplicative gates: h * u + (1 - h) * v."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.u, self.v = nn.Linear(d_in, WIDTH), nn.Linear(d_in, WIDTH)
        self.h = nn.Linear(d_in, WIDTH)
        self.head = nn.Linear(WIDTH, d_out)

    def forward(self, x: Tensor) -> Tensor:
        u, v, h = torch.tanh(self.u(x)), torch.sigmoid(self.v(x)), torch.tanh(self.h(x))
        return self.head(h * u + (1 - h) * v)


class TwoParts(nn.Module):
    """Two outputs, u and u v: a term may leave v out."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = build("tanh"), build("silu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        u = self.u(x)
        return {"u": u, "product": u * self.v(x)}


class FourierFeatures(nn.Module):
    """[sin(x B), cos(x B)] with a fixed random matrix, then a perceptron."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(d_in, 2))
        self.net = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, d_out))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * 0.3 * (x @ self.frequencies)
        return self.net(torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1))


class Periodic(nn.Module):
    """The first coordinate on a circle, the others as they are."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d_in + 1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, d_out))

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x[:, 0]
        circle = torch.stack([angle.sin(), angle.cos()], -1)
        return self.net(torch.cat([circle, x[..., 1:]], -1))


class HardBoundary(nn.Module):
    """The output times a function that vanishes on the boundary."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d_in, WIDTH), nn.Tanh(), nn.Linear(WIDTH, d_out))

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.prod(x * (1 - x), dim=-1, keepdim=True)
        return 1 + distance * self.net(x)


class Repeated(nn.Module):
    """One layer used twice."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.lift, self.shared = nn.Linear(d_in, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, d_out)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.lift(x))
        for _ in range(2):
            h = torch.tanh(self.shared(h))
        return self.head(h)


class PointAxes(nn.Module):
    """A layer that is applied to further axes: two tokens per point, sharing their weight."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.lift, self.token = nn.Linear(d_in, 4), nn.Linear(2, WIDTH)
        self.head = nn.Linear(WIDTH, d_out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.lift(x)).reshape(-1, 2, 2)
        return self.head(torch.tanh(self.token(tokens)).mean(1))


def _mlp(*activations: Callable[[], nn.Module], bias: bool = True) -> Callable[..., nn.Module]:
    def build(d_in: int, d_out: int) -> nn.Module:
        widths = [d_in, *[WIDTH] * len(activations), d_out]
        modules: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            modules.append(nn.Linear(a, b, bias=bias))
            if i < len(activations):
                modules.append(activations[i]())
        return nn.Sequential(*modules)

    return build


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "tanh": _mlp(nn.Tanh, nn.Tanh),
    "residual": Residual,
    "gated": Gated,
    "fourier": FourierFeatures,
    "periodic": Periodic,
    "hard_boundary": HardBoundary,
    "no_bias": _mlp(nn.Tanh, nn.Tanh, bias=False),
    "repeated": Repeated,
    "mixed": _mlp(nn.Sigmoid, nn.SiLU),
    "gelu": _mlp(nn.GELU),
    "gelu_tanh": _mlp(lambda: nn.GELU(approximate="tanh")),
    "silu": _mlp(nn.SiLU),
    "softplus": _mlp(lambda: nn.Softplus(beta=2.0)),
    "linear": _mlp(nn.Identity, nn.Identity),
    "tokens": PointAxes,
}


def build(kind: str, d_in: int = 2, d_out: int = 1, seed: int = 0) -> nn.Module:
    """Return a network of a kind, in float64, with parameters of order one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind](d_in, d_out).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def points(N: int = 3, d: int = 2, seed: int = 1) -> Tensor:
    """Return points of the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, d, generator=generator, dtype=torch.float64)
