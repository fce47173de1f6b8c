"""A computed solution of a periodic equation as a function of points (t, x)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import scipy.fft
import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.problems.periodic_equation import PeriodicEquation, Values
from pinncurv.problems.reference_cache import Arrays, kept

_NODES = 10  # of the polynomials, of degree one less
_FINER = 4  # grid in space on which they are local


@dataclass(frozen=True)
class PeriodicReference:
    """The solution of a periodic equation on [0, end], by interpolation of a computed one.

    u(t, x) ≈ Σ_ij ℓ_i(t) ℓ_j(x) u_ij

    with polynomials of degree nine through the ten nearest times and points, where the points come
    from trigonometric interpolation. It is computed when it is first called, in seconds, and kept
    in memory and on disk, see `cache_folder`.

    Args:
        name: What its file is called.
        equation: The equation.
        initial: The initial values, a function of points (t, x).
        end: The final time.
        n: Number of points in space.
        steps: Number of steps in time.
        snapshots: Number of times that are kept.
    """

    name: str
    equation: PeriodicEquation
    initial: Callable[[Tensor], Tensor]
    end: float
    n: int
    steps: int
    snapshots: int

    def __call__(self, x: Float[Tensor, "N 2"]) -> Float[Tensor, "N 1"]:
        """Evaluate the solution at points (t, x); it is NaN at times outside of [0, end]."""
        table = _table(self).to(x.device)
        points = x.to(torch.float64)
        period = self.equation.upper - self.equation.lower
        in_time = points[:, 0] * (self.snapshots / self.end)
        in_space = (points[:, 1] - self.equation.lower) * (table.shape[1] / period)
        rows, row_weights = _nearest(in_time, table.shape[0] - _NODES)
        columns, column_weights = _nearest(in_space, None)
        values = table[rows[:, :, None], columns[:, None, :] % table.shape[1]]
        u = torch.einsum("nij,ni,nj->n", values, row_weights, column_weights)
        known = (points[:, 0] >= 0) & (points[:, 0] <= self.end)  # polynomials run away beyond
        return torch.where(known, u, torch.nan)[:, None].to(x)


def _nearest(position: Tensor, last: int | None) -> tuple[Tensor, Tensor]:
    """Return the nodes around positions and the Lagrange polynomials there, both [N, nodes].

    Args:
        position: In units of the distance of two nodes.
        last: The last node to begin with; None if they go on for ever.
    """
    first = position.detach().floor().long() - (_NODES // 2 - 1)
    if last is not None:
        first = first.clamp(0, last)
    nodes = torch.arange(_NODES, device=position.device)
    distance = (position - first)[:, None] - nodes
    spacing = nodes[:, None] - nodes
    others = ~torch.eye(_NODES, dtype=torch.bool, device=position.device)
    factors = distance[:, None, :] / torch.where(others, spacing, 1)
    weights = torch.where(others, factors, 1.0).prod(-1)
    return first[:, None] + nodes, weights


@functools.lru_cache(maxsize=8)
def _table(reference: PeriodicReference) -> Tensor:
    """Return the solution on the grid of times and of more points in space."""
    coarse = kept(reference.name, _definition(reference), functools.partial(_solve, reference))["u"]
    finer = scipy.fft.irfft(scipy.fft.rfft(coarse), _FINER * reference.n) * _FINER
    return torch.from_numpy(finer)


def _solve(reference: PeriodicReference) -> Arrays:
    r = reference
    return {"u": r.equation.solve(_initial_values(r), r.end, r.n, r.steps, r.snapshots)}


def _definition(reference: PeriodicReference) -> bytes:
    """Return all that the values depend on, the initial ones as such."""
    r = reference
    numbers = (r.equation, r.end, r.n, r.steps, r.snapshots)
    return repr(numbers).encode() + _initial_values(r).tobytes()


def _initial_values(reference: PeriodicReference) -> Values:
    """Return the initial values on a grid that resolves those with a kink, too."""
    count, equation = 64 * reference.n, reference.equation
    x = torch.linspace(equation.lower, equation.upper, count + 1, dtype=torch.float64)[:-1]
    values: Values = reference.initial(torch.stack([torch.zeros_like(x), x], 1))[:, 0].numpy()
    return values
