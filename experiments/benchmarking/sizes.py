"""The problems and networks that are measured, and their residuals by nested reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pinncurv.problems import (
    Box,
    LossTerm,
    Problem,
    SpaceTimeBox,
    dirichlet,
    heat4d,
    poisson2d,
    poisson5d,
    poisson100d,
)

DTYPE = torch.float64


def kdv(n_interior: int, n_boundary: int) -> Problem:
    """Return u_t + 6 u u_x + u_xxx = 0 with a soliton at the start."""
    # orders above two are not in every commit that this file is run against
    from pinncurv.diffops import Partial, Value  # noqa: PLC0415 - see above

    def soliton(x: Tensor) -> Tensor:
        return 2 / torch.cosh(x[:, 1:] - 4 * x[:, :1]) ** 2

    domain = SpaceTimeBox.unit(1)
    pde = LossTerm(
        {"u": Value(), "t": Partial(0), "x1": Partial(1), "x3": Partial(1, 1, 1)},
        lambda x, u, t, x1, x3: t + 6 * u * x1 + x3,
        domain.interior(n_interior),
    )
    start = dirichlet(soliton, domain.initial(n_boundary))
    return Problem("kdv", (pde, start), 2, domain.interior(n_interior), solution=soliton)


def biharmonic(n_interior: int, n_boundary: int) -> Problem:
    """Return Δ²u = 4π⁴ sin πx sin πy with u = 0 on the boundary."""
    from pinncurv.diffops import Bilaplacian  # noqa: PLC0415 - see kdv

    def product(x: Tensor) -> Tensor:
        return torch.sin(torch.pi * x).prod(1, keepdim=True)

    domain = Box.unit(2)
    pde = LossTerm(
        {"b": Bilaplacian()},
        lambda x, b: b - 4 * torch.pi**4 * product(x),
        domain.interior(n_interior),
    )
    edge = dirichlet(product, domain.faces(n_boundary))
    return Problem("biharmonic", (pde, edge), 2, domain.interior(n_interior), solution=product)


def _gradient(u: Tensor, x: Tensor) -> Tensor:
    """Return all ∂u/∂x_i, to be differentiated further."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def _trace(gradient: Tensor, x: Tensor, dims: Iterable[int]) -> Tensor:
    rows = [_gradient(gradient[:, i], x)[:, i : i + 1] for i in dims]
    return torch.stack(rows).sum(0)


def _nested_poisson(u: Tensor, x: Tensor) -> Tensor:
    return -_trace(_gradient(u, x), x, range(x.shape[1]))


def _nested_biharmonic(u: Tensor, x: Tensor) -> Tensor:
    return _nested_poisson(_nested_poisson(u, x), x)


def _nested_heat(u: Tensor, x: Tensor) -> Tensor:
    gradient = _gradient(u, x)
    return gradient[:, :1] - 0.25 * _trace(gradient, x, range(1, x.shape[1]))


def _nested_kdv(u: Tensor, x: Tensor) -> Tensor:
    gradient = _gradient(u, x)
    u_xx = _gradient(gradient[:, 1], x)[:, 1]
    return gradient[:, :1] + 6 * u * gradient[:, 1:] + _gradient(u_xx, x)[:, 1:]


@dataclass(frozen=True)
class Size:
    """One problem and network.

    Args:
        widths: Widths of the network.
        problem: Makes the problem, of an interior and a boundary term of one component each.
        nested: The differential operator, of u and x, by nested reverse mode.
        channels: S of the interior; the boundary has the value alone.
        n_interior: Number of interior points.
        n_boundary: Number of boundary points.
        iterations: How many evaluations a turn is.
    """

    widths: tuple[int, ...]
    problem: Callable[..., Problem]
    nested: Callable[[Tensor, Tensor], Tensor]
    channels: int
    n_interior: int = 900
    n_boundary: int = 120
    iterations: int = 1

    @property
    def terms(self) -> tuple[tuple[int, int], ...]:
        """N and S of each term."""
        return (self.n_interior, self.channels), (self.n_boundary, 1)

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """d_in and d_out of each layer."""
        return tuple(pairwise(self.widths))

    @property
    def parameters(self) -> int:
        """D."""
        return sum((d_in + 1) * d_out for d_in, d_out in self.layers)

    @property
    def residuals(self) -> int:
        """R."""
        return self.n_interior + self.n_boundary

    def sample(self, device: str = "cpu") -> tuple[Problem, tuple[Tensor, ...]]:
        """Return the problem, and points of seed 0 for each of its terms."""
        problem = self.problem(self.n_interior, self.n_boundary)
        return problem, problem.sample(torch.Generator().manual_seed(0), DTYPE, device)


_M = (2, 64, 64, 48, 48, 1)
_B = (256, 256, 128, 128, 1)
_K = (5, 64, 64, 48, 48, 1)
SIZES = {
    "s": Size((2, 64, 1), poisson2d, _nested_poisson, 4, iterations=20),
    "m": Size(_M, poisson2d, _nested_poisson, 4, iterations=6),
    "b": Size((2, *_B), poisson2d, _nested_poisson, 4, iterations=2),
    "h": Size((5, *_B), heat4d, _nested_heat, 7, 3000, 500),
    "extra": Size(_M, poisson2d, _nested_poisson, 4, iterations=6),
    "kdv": Size(_M, kdv, _nested_kdv, 5, iterations=4),
    "biharmonic": Size(_M, biharmonic, _nested_biharmonic, 11),
    "laplace100": Size((100, *_B), poisson100d, _nested_poisson, 102, 100, 50),
    "k1200": Size(_K, poisson5d, _nested_poisson, 7, 1000, 200),
    "k3500": Size(_K, poisson5d, _nested_poisson, 7, 3000, 500),
    "tiny": Size((2, 8, 1), poisson2d, _nested_poisson, 4, 30, 10, iterations=2),
}


class Slopes(nn.Module):
    """tanh(a x) with a trained slope a for each neuron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(width, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return torch.tanh(self.a * x)


def build_network(widths: tuple[int, ...], slopes: int = 0) -> nn.Sequential:
    """Return a tanh network with torch's initialization of seed 1, trained slopes in the last."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for layer, (d_in, d_out) in enumerate(pairwise(widths)):
        sloped = layer >= len(widths) - 2 - slopes
        layers += [nn.Linear(d_in, d_out, dtype=DTYPE), Slopes(d_out) if sloped else nn.Tanh()]
    return nn.Sequential(*layers[:-1])
