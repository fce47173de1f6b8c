"""The Lanczos process with full reorthogonalization, plain and preconditioned."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.comparison.checks import check_count, check_same_space, describe
from pinncurv.comparison.products import apply
from pinncurv.linops import PyTorchLinearOperator, check_damping


@dataclass(frozen=True)
class LanczosDecomposition:
    """A tridiagonal matrix that has the spectrum of an operator on a Krylov space.

    W (C + λI) U = U T + β u eᵀ,  Uᵀ W⁻¹ U = I   (W = I without a preconditioner)

    Attributes:
        basis: U, one vector per column ``[D, m]``.
        diagonal: Diagonal of T ``[m]``.
        off_diagonal: Off-diagonal of T ``[m - 1]``.
        remainder: β, zero if the Krylov space is invariant.
    """

    basis: Float[Tensor, "D m"]
    diagonal: Float[Tensor, " m"]
    off_diagonal: Float[Tensor, " _"]
    remainder: float

    def ritz(self) -> RitzPairs:
        """Return the eigenpairs of T."""
        T = self.diagonal.diag() + self.off_diagonal.diag(1) + self.off_diagonal.diag(-1)
        values, vectors = torch.linalg.eigh(T)
        values, vectors = values.flip(0), vectors.flip(1)
        return RitzPairs(values, vectors, self.remainder * vectors[-1].abs())


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs of the operator that a Lanczos process ran on.

    T S = S diag(θ)

    Attributes:
        values: θ, descending ``[m]``.
        vectors: S, eigenvectors of the tridiagonal matrix ``[m, m]``; ``basis @ S`` are those of
            the operator.
        errors: Bounds on the distance of each θ to an eigenvalue, β |S_mi| ``[m]``.
    """

    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "m m"]
    errors: Float[Tensor, " m"]


def lanczos(
    operator: PyTorchLinearOperator,
    start: Float[Tensor, " D"],
    steps: int,
    *,
    damping: float = 0.0,
    preconditioner: PyTorchLinearOperator | None = None,
) -> LanczosDecomposition:
    """Run the Lanczos process of W (C + λI), which is symmetric in the W⁻¹ inner product.

    The recursion is that of (C + λI) W in the W inner product, which needs products with C and W
    only, ``steps`` and one more of them, and two vectors of memory per step. ``start`` is float64,
    W the positive definite ``preconditioner``. Every new vector is orthogonalized twice against
    all earlier ones, so that no eigenvalue is found a second time. The process stops early where
    the Krylov space is invariant.
    """
    D = check_same_space(operator, operator if preconditioner is None else preconditioner)
    damping = check_damping(damping)
    steps = min(check_count("steps", steps, 1), D)
    V = torch.empty(D, steps, dtype=torch.float64, device=operator.device)
    U = V if preconditioner is None else torch.empty_like(V)
    alphas: list[float] = []
    betas = [_extend_(V, U, 0, start.to(V), preconditioner)]
    if betas[0] == 0:
        raise ValueError("start must not be zero, got a vector of zeros.")
    rounding = 10 * sqrt(D) * torch.finfo(operator.dtype).eps
    for j in range(steps):
        w = apply(operator, U[:, j], damping)
        alphas.append(torch.dot(U[:, j], w).item())
        for _ in range(2):
            w = w - V[:, : j + 1] @ (U[:, : j + 1].mT @ w)
        betas.append(_extend_(V, U, j + 1, w, preconditioner))
        if betas[-1] <= rounding * max(map(abs, [*alphas, *betas[1:-1]])):
            betas[-1] = 0.0
            break
    m = len(alphas)
    return LanczosDecomposition(U[:, :m], V.new_tensor(alphas), V.new_tensor(betas[1:m]), betas[m])


def _extend_(
    V: Tensor, U: Tensor, j: int, w: Tensor, preconditioner: PyTorchLinearOperator | None
) -> float:
    """Normalize w in the W inner product, write it and Ww to column j, return its norm."""
    z = w if preconditioner is None else apply(preconditioner, w)
    square, scale = torch.dot(w, z).item(), (w.norm() * z.norm()).item()
    if preconditioner is not None and (square < -1e-8 * scale or (j == 0 and square <= 0 < scale)):
        raise ValueError(
            f"The preconditioner must be positive definite, but {describe(preconditioner)} has "
            f"vᵀWv = {square:.1e} < 0 at a v of norm {w.norm().item():.1e}. "
            "Raise the damping of the inverse."
        )
    norm = sqrt(max(square, 0.0))
    if norm > 0 and j < V.shape[1]:
        V[:, j] = w / norm
        U[:, j] = z / norm
    return norm
