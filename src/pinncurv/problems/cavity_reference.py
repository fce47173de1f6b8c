"""The steady flow in a square with a moving lid, computed with a spectral Galerkin method."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, gmres
from torch import Tensor

from pinncurv.diffops import Gradient, Laplacian, Partial, evaluate
from pinncurv.problems.problem import TensorOrJet
from pinncurv.problems.reference_cache import Arrays, kept

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CavityReference:
    """The velocity and the pressure of the flow under the lid u = 4x (1 - x).

    ψ = ψ_corners + Σ_ij c_ij φ_i(x) φ_j(y),    u = (ψ_y, -ψ_x),
    ∫ Δψ (Δφ / Re + u · ∇φ) = 0 for all φ = φ_i φ_j,    ∇(p + |u|²/2) = u × ω - curl ω / Re

    with polynomials φ_i that vanish with their derivatives at 0 and 1. What the lid leaves in its
    corners, where the vorticity has no limit and the pressure none, either, is given in closed
    form, see `_corners`. It is computed when it is first called, in seconds, and kept in memory and
    on disk, see `cache_folder`. The pressure is zero at the origin.

    Args:
        reynolds: The Reynolds number; up to a few hundred for Newton's method from rest.
        degree: Number of the polynomials in each direction.

    Source: the basis is that of Shen 1994; the corners are treated as in Botella and Peyret 1998.
    """

    reynolds: float
    degree: int

    def __call__(self, x: Float[Tensor, "N 2"]) -> Float[Tensor, "N 3"]:
        """Evaluate (u, v, p) at points (x, y) of the unit square."""
        flow, head = (table.to(x.device) for table in _tables(self))
        points = x.to(torch.float64)
        values, slopes = _legendre(points, len(flow))
        gradient = evaluate({"gradient": Gradient()}, _corners, points)["gradient"][:, 0]
        u = gradient[:, 1] + torch.einsum("ni,ij,nj->n", values[:, 0], flow, slopes[:, 1])
        v = -gradient[:, 0] - torch.einsum("ni,ij,nj->n", slopes[:, 0], flow, values[:, 1])
        smooth = torch.einsum("ni,ij,nj->n", values[:, 0], head, values[:, 1])
        p = smooth + _logarithms(points)[:, 0] / self.reynolds - (u**2 + v**2) / 2
        return torch.stack([u, v, p], 1).to(x)


def _corners(x: TensorOrJet) -> TensorOrJet:
    """Return a function with the conditions of ψ on all walls, and its limits in the corners.

    ψ = 4 w(x) w(z) S(x, z) + its mirror image in x = 1/2 - 16 x² (1 - x)² y² (y - 1),
    S = (z² (π/2 - θ) - x² θ - x z) / 2,    θ = arctan(z / x),    z = 1 - y,
    w(x) = (1 - x)² (1 + 2x)

    S is the biharmonic function with S = S_x = 0 on x = 0 and S = 0, S_z = -x on z = 0. The
    factors make the opposite walls stand still, and change S in the corner only by terms that are
    r² smaller; the polynomial corrects the lid.
    """
    across, y = x[:, :1], x[:, 1:]
    rest = 16 * across**2 * (1 - across) ** 2 * y**2 * (y - 1)
    return _corner(across, 1 - y) + _corner(1 - across, 1 - y) - rest


def _corner(x: TensorOrJet, z: TensorOrJet) -> TensorOrJet:
    theta = torch.atan2(z + 1e-150, x)  # so that there is a derivative in the corner itself
    singular = (z**2 * (math.pi / 2 - theta) - x**2 * theta - x * z) / 2
    return 4 * (1 - x) ** 2 * (1 + 2 * x) * (1 - z) ** 2 * (1 + 2 * z) * singular


def _logarithms(x: TensorOrJet) -> TensorOrJet:
    """Return the pressure that belongs to S, of viscosity one, up to a constant.

    4 log(x² + z²) - 4 log((1 - x)² + z²)
    """
    across, down = x[:, :1], 1 - x[:, 1:]
    left, right = (side**2 + down**2 + 1e-30 for side in (across, 1 - across))
    return 4 * torch.log(left / right)


def _legendre(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the first n Legendre polynomials on [0, 1] and their derivatives, [N, 2, n]."""
    s = 2 * x - 1
    values, slopes = [torch.ones_like(s), s], [torch.zeros_like(s), torch.ones_like(s)]
    for k in range(1, n - 1):
        values.append(((2 * k + 1) * s * values[k] - k * values[k - 1]) / (k + 1))
        slopes.append(slopes[k - 1] + (2 * k + 1) * values[k])
    return torch.stack(values, -1), 2 * torch.stack(slopes, -1)


@functools.lru_cache(maxsize=4)
def _tables(reference: CavityReference) -> tuple[Tensor, Tensor]:
    """Return the Legendre coefficients of ψ - ψ_corners, and of the total head without logs."""
    definition = repr(reference).encode()
    arrays = kept("cavity", definition, functools.partial(_solve, reference))
    return torch.from_numpy(arrays["flow"]), torch.from_numpy(arrays["head"])


class _Grid:
    """The nodes of a Gauss quadrature in the square, and the functions there.

    Args:
        degree: Number of the polynomials φ_i = φ_i' = 0 on the walls in each direction.
    """

    def __init__(self, degree: int) -> None:
        nodes, weights = legendre.leggauss(2 * degree + 40)
        self.one, self.weights = weights / 2, np.multiply.outer(weights, weights) / 4
        k = np.arange(degree)
        scale = 1 / np.sqrt(2 * (2 * k + 3) ** 2 * (2 * k + 5))
        self.basis = np.zeros((degree + 4, degree))  # in Legendre polynomials
        self.basis[k, k] = scale
        self.basis[k + 2, k] = -2 * (2 * k + 5) / (2 * k + 7) * scale
        self.basis[k + 4, k] = (2 * k + 3) / (2 * k + 7) * scale
        self.phi = [self._derivative(nodes, self.basis, order) for order in range(4)]
        self.all = [self._derivative(nodes, np.eye(degree + 4), order) for order in range(2)]
        x = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
        self.points = torch.from_numpy(x / 2 + 0.5)

    @staticmethod
    def _derivative(nodes: Array, coefficients: Array, order: int) -> Array:
        """Return derivatives on [0, 1] of functions on [-1, 1], a column for each."""
        return 2**order * legendre.legval(nodes, legendre.legder(coefficients, order)).T

    def matrix(self, values: Tensor) -> Array:
        """Return values at the points as a matrix, x by y."""
        return values.reshape(len(self.one), -1).numpy()

    def partial(self, c: Array, in_x: int, in_y: int) -> Array:
        """Return a partial derivative of Σ_ij c_ij φ_i(x) φ_j(y) at the points."""
        return self.phi[in_x] @ c @ self.phi[in_y].T

    def gram(self, one: Array, other: Array) -> Array:
        """Return the integrals of products of functions of one variable."""
        return one.T @ (self.one[:, None] * other)


def _solve(reference: CavityReference) -> Arrays:
    grid, viscosity = _Grid(reference.degree), 1 / reference.reynolds
    terms = {
        "gradient": Gradient(),
        "laplacian": Laplacian(),
        **{f"d{i}": Partial(*[0] * (3 - i), *[1] * i) for i in range(4)},
    }
    lift = {name: v[:, 0] for name, v in evaluate(terms, _corners, grid.points).items()}
    psi_x, psi_y = (grid.matrix(lift["gradient"][:, i]) for i in range(2))
    laplacian = grid.matrix(lift["laplacian"])
    c = _stream_function(grid, viscosity, psi_x, psi_y, laplacian)
    psi_x, psi_y = psi_x + grid.partial(c, 1, 0), psi_y + grid.partial(c, 0, 1)
    laplacian = laplacian + grid.partial(c, 2, 0) + grid.partial(c, 0, 2)
    # Δu of the smooth part, without the logarithms, whose gradients are as large near the corners
    logs = evaluate({"slopes": Gradient()}, _logarithms, grid.points)["slopes"][:, 0]
    lap_u = grid.matrix(lift["d1"] + lift["d3"] - logs[:, 0])
    lap_u += grid.partial(c, 2, 1) + grid.partial(c, 0, 3)
    lap_v = -grid.matrix(lift["d0"] + lift["d2"] + logs[:, 1])
    lap_v -= grid.partial(c, 3, 0) + grid.partial(c, 1, 2)
    head = _potential(
        grid, laplacian * psi_x + viscosity * lap_u, laplacian * psi_y + viscosity * lap_v
    )
    signs = (-1.0) ** np.arange(len(head))
    at_origin = _logarithms(torch.zeros(1, 2, dtype=torch.float64)).item()
    head[0, 0] -= signs @ head @ signs + viscosity * at_origin
    return {"flow": grid.basis @ c @ grid.basis.T, "head": head}


def _stream_function(
    grid: _Grid, viscosity: float, psi_x: Array, psi_y: Array, laplacian: Array
) -> Array:
    """Return the coefficients c by Newton's method, with the Stokes flow as preconditioner.

    ∫ Δψ (ν Δφ + ψ_y φ_x - ψ_x φ_y) = 0
    """
    phi, shape = grid.phi, (len(grid.basis[0]),) * 2
    mass, cross, bending = (
        grid.gram(phi[0], phi[0]),
        grid.gram(phi[2], phi[0]),
        grid.gram(phi[2], phi[2]),
    )
    mixed = np.kron(cross, cross.T)
    stokes = viscosity * (np.kron(bending, mass) + mixed + mixed.T + np.kron(mass, bending))
    factor = scipy.linalg.cho_factor(stokes)

    def tested(transport_x: Array, transport_y: Array, diffused: Array) -> Array:
        """Return the integrals with φ_x, φ_y and ν Δφ."""
        x, y, d = (grid.weights * f for f in (transport_x, transport_y, viscosity * diffused))
        laplacians = phi[2].T @ d @ phi[0] + phi[0].T @ d @ phi[2]
        return (phi[1].T @ x @ phi[0] + phi[0].T @ y @ phi[1] + laplacians).ravel()

    c = np.zeros(shape)
    for _ in range(12):
        u, minus_v = psi_y + grid.partial(c, 0, 1), psi_x + grid.partial(c, 1, 0)
        total = laplacian + grid.partial(c, 2, 0) + grid.partial(c, 0, 2)

        def product(
            step: Array, u: Array = u, minus_v: Array = minus_v, total: Array = total
        ) -> Array:
            change = step.reshape(shape)
            d_u, d_minus_v = grid.partial(change, 0, 1), grid.partial(change, 1, 0)
            d_total = grid.partial(change, 2, 0) + grid.partial(change, 0, 2)
            transport_x, transport_y = (
                d_total * u + total * d_u,
                d_total * minus_v + total * d_minus_v,
            )
            return scipy.linalg.cho_solve(factor, tested(transport_x, -transport_y, d_total))

        residual = scipy.linalg.cho_solve(factor, tested(total * u, -total * minus_v, total))
        jacobian = LinearOperator((c.size, c.size), product, dtype=np.float64)
        step = gmres(jacobian, residual, rtol=1e-8, restart=100, maxiter=2)[0].reshape(shape)
        c = c - step
        if np.linalg.norm(step) <= 1e-11 * np.linalg.norm(c):
            return c
    raise RuntimeError(
        f"Newton's method must converge from rest, but its last step is {np.linalg.norm(step):.1e} "
        f"at viscosity {viscosity}. Choose a smaller Reynolds number."
    )


def _potential(grid: _Grid, force_x: Array, force_y: Array) -> Array:
    """Return the Legendre coefficients of a function with a given gradient, up to a constant.

    ∫ ∇H · ∇q = ∫ F · ∇q for all polynomials q
    """
    q, q1 = grid.all
    right = q1.T @ (grid.weights * force_x) @ q + q.T @ (grid.weights * force_y) @ q1
    eigenvalues, vectors = scipy.linalg.eigh(grid.gram(q1, q1), grid.gram(q, q))
    sums = eigenvalues[:, None] + eigenvalues
    sums[0, 0] = np.inf  # of the constant
    return vectors @ ((vectors.T @ right @ vectors) / sums) @ vectors.T
