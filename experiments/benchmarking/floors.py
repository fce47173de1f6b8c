"""The floor of a figure by counting: what it needs, at the rates of the machine.

A step can't be faster than the matrix products that it needs, at the best rate of a product of its
shape on this machine, and the eigendecompositions that it needs, at the best time of
torch.linalg.eigh for matrices of their sizes. Elementwise operations, the start of operations and
Python are not in the floor.

What is needed is counted from the widths d_in × d_out, N points and S channels of each term, in
floating-point operations, two for a multiplication. A symmetric product is half of a product.
Jets start with constant derivatives of the coordinates; that no use is made of that in the first
layer is the one thing in which the count is no lower bound: 18 % of a pass at laplace100, 3 % or
less elsewhere but at s, where passes are little of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from experiments.benchmarking.clock import best_seconds
from experiments.benchmarking.sizes import DTYPE, Size


@dataclass(frozen=True)
class Work:
    """What one evaluation needs.

    Args:
        flops: Floating-point operations of matrix products, by what they are for.
        eigen: How many eigendecompositions, by the size of the matrix.
    """

    flops: dict[str, float]
    eigen: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All floating-point operations of matrix products."""
        return sum(self.flops.values())

    def seconds(self, flops_per_second: float, eigen: dict[int, float]) -> float:
        """Return the floor.

        Args:
            flops_per_second: The rate of matrix products.
            eigen: Seconds of an eigendecomposition, by the size of the matrix.
        """
        return self.total / flops_per_second + sum(k * eigen[n] for n, k in self.eigen.items())


def forward(size: Size) -> float:
    """Return F, the products of one forward pass: 2 Σ_t N_t S_t Σ_l d_in d_out."""
    rows = sum(N * S for N, S in size.terms)
    return 2 * rows * sum(d_in * d_out for d_in, d_out in size.layers)


def _backward(size: Size) -> float:
    """Return those of a backward pass, which ends at the outputs of the first layer."""
    d_in, d_out = size.layers[0]
    return forward(size) - 2 * sum(N * S for N, S in size.terms) * d_in * d_out


def _passes(size: Size) -> dict[str, float]:
    """Return what loss and gradient need."""
    F = forward(size)
    return {"forward": F, "backward": _backward(size), "gradient": F}


def _gradient(size: Size) -> Work:
    return Work(_passes(size))


def _kfac_star(size: Size) -> Work:
    """Count a step with the quadratic model.

    For each layer A and B of each term, N S (d_in² + d_out²) as symmetric products. For each factor
    of n rows the simultaneous diagonalization: Cholesky n³/3, the whitening of a symmetric matrix
    n³ and the basis n³, and an eigendecomposition. Four products to apply it.
    """
    rows = sum(N * S for N, S in size.terms)
    factors = sum(rows * (d_in**2 + d_out**2) for d_in, d_out in size.layers)
    joint = [(d_in + 1, d_out) for d_in, d_out in size.layers]
    eigen = Counter(n for pair in joint for n in pair if n > 1)
    return Work(
        {
            **_passes(size),
            "quadratic model": 2 * forward(size),
            "factors": factors,
            "inverses": sum(k * (7 / 3) * n**3 for n, k in eigen.items()),
            "direction": sum(4 * a * b * (a + b) for a, b in joint),
        },
        dict(eigen),
    )


def _kfac_star_chunked(size: Size) -> Work:
    """Count the same where nothing is kept: passes again for the quadratic model."""
    work = _kfac_star(size)
    again = {"passes again": forward(size) + _backward(size)}
    return Work({**work.flops, **again}, work.eigen)


def _gauss_newton(size: Size) -> Work:
    """Count a step with the quadratic model and the dense matrix on the cheaper side."""
    R, D, F = size.residuals, size.parameters, forward(size)
    n = min(R, D)
    return Work(
        {
            **_passes(size),
            "quadratic model": 2 * F,
            "Jacobian": F,
            "JᵀJ or JJᵀ": float(R * D * n),
            "Cholesky": n**3 / 3,
            "solve": 2 * n**2,
        }
    )


def kernel(size: Size) -> float:
    """Return the products of the dense kernel J Jᵀ.

    For each layer and pair of points through rows of J or through pairs of channels, whichever is
    less: min(d_out d_in, S S' (d_out + d_in)), with the bias counted as an input. By symmetry each
    pair once.
    """
    total = 0.0
    for i, (N, S) in enumerate(size.terms):
        for j, (M, S_other) in enumerate(size.terms[: i + 1]):
            pairs = N * M / 2 if i == j else N * M
            for d_in, d_out in size.layers:
                joint = d_in + 1
                total += 2 * pairs * min(d_out * joint, S * S_other * (d_out + joint))
    return total


def _spring(size: Size) -> Work:
    """Count a step: kernel, Cholesky, one solve, and a product with J and one with Jᵀ."""
    R, F = size.residuals, forward(size)
    return Work(
        {
            **_passes(size),
            "kernel": kernel(size),
            "Cholesky": R**3 / 3,
            "solve": 2 * R**2,
            "momentum and direction": 2 * F,
        }
    )


_NEEDED: dict[str, Callable[[Size], Work]] = {
    "gradient": _gradient,
    "kfac_star": _kfac_star,
    "kfac_star_chunked": _kfac_star_chunked,
    "gauss_newton": _gauss_newton,
    "spring": _spring,
}


def needed(figure: str, size: Size) -> Work | None:
    """Return what one evaluation of a figure needs; None for a baseline."""
    count = _NEEDED.get(figure)
    return None if count is None else count(size)


# --- the machine ----------------------------------------------------------------------------------


def product_shape(size: Size, of_kernel: bool) -> tuple[int, int, int]:
    """Return m, k, n of a product such as most of a step are: of a kernel, or of a layer."""
    if of_kernel:
        return 1024, 2048, 1024
    width = max(size.widths[1:])
    return max(N * S for N, S in size.terms), width, width


def measure_product(shape: tuple[int, int, int], device: str) -> float:
    """Return the rate of a matrix product in floating-point operations per second."""
    m, k, n = shape
    left = torch.randn(m, k, dtype=DTYPE, device=device)
    right, out = left.new_ones(k, n), left.new_empty(m, n)
    return 2 * m * k * n / best_seconds(lambda: torch.mm(left, right, out=out), device)


def measure_eigen(n: int, device: str) -> float:
    """Return the seconds of an eigendecomposition of a positive definite matrix of n rows."""
    root = torch.randn(n, n, dtype=DTYPE, device=device)
    matrix = root @ root.mT
    return best_seconds(lambda: torch.linalg.eigh(matrix), device)
