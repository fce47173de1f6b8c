"""The density of all eigenvalues by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.comparison.checks import check_count, check_square
from pinncurv.comparison.estimates import Estimate, rademacher
from pinncurv.comparison.lanczos import lanczos
from pinncurv.linops import PyTorchLinearOperator


@dataclass(frozen=True)
class SpectralDensity:
    """A quadrature rule for the density of the eigenvalues of an operator, one row per probe.

    1/D tr f(C) ≈ 1/K Σ_k Σ_i weights_ki f(nodes_ki)

    Attributes:
        nodes: Ritz values, in units of C ``[K, m]``.
        weights: Shares of the spectrum, >= 0 with sum 1 in each row ``[K, m]``. A probe that
            needed fewer than m nodes has zeros at the end of both.
        dimension: D.
    """

    nodes: Float[Tensor, "K m"]
    weights: Float[Tensor, "K m"]
    dimension: int

    def smoothed(self, grid: Float[Tensor, " n"], width: float) -> Float[Tensor, " n"]:
        """Return the density on a linear axis, smoothed by a Gaussian.

        ρ(x) = 1/K Σ_ki weights_ki N(x; nodes_ki, width²),  ∫ρ dx = 1, x and width in units of C
        """
        return _smooth(self.nodes, self.weights / len(self.nodes), grid, width)

    def smoothed_log(self, grid: Float[Tensor, " n"], width: float) -> Float[Tensor, " n"]:
        """Return the density on a logarithmic axis, smoothed by a Gaussian.

        ρ(x) = 1/K Σ_ki weights_ki N(log₁₀ x; log₁₀ nodes_ki, width²),  ∫ρ dlog₁₀x = 1 − share(0)

        The width is in decades. Nodes that are not positive have no place on the axis and are left
        out; ``share_below`` says how many there are, and how many are below any threshold.
        """
        if not bool((grid > 0).all()):
            raise ValueError(
                f"A logarithmic axis must be positive, got {grid.min().item():.1e}. "
                "Use torch.logspace for the grid."
            )
        positive = self.nodes > 0
        nodes = torch.where(positive, self.nodes, 1.0).log10()
        weights = torch.where(positive, self.weights, 0.0)
        return _smooth(nodes, weights / len(nodes), grid.double().log10(), width)

    def share_below(self, threshold: float) -> float:
        """Return the share of eigenvalues that are at most a threshold, in [0, 1]."""
        return self.weights[self.nodes <= threshold].sum().item() / len(self.nodes)

    def map(self, function: Callable[[Tensor], Tensor]) -> SpectralDensity:
        """Return the density of the eigenvalues of a function of the operator.

        f(C), for example f(μ) = 1/μ − λ to get from (C + λI)⁻¹ to C
        """
        nodes = torch.where(self.weights > 0, function(self.nodes), 0.0)
        return SpectralDensity(nodes, self.weights, self.dimension)

    def trace(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate the trace of a function of the operator.

        tr f(C), for example f(m) = m / (m + λ) for the effective dimension

        The error is that of the probes; the quadrature is exact if f is a polynomial of degree
        < 2 m.
        """
        values = self.map(function).nodes
        return Estimate.from_samples(self.dimension * (self.weights * values).sum(1))


def _smooth(nodes: Tensor, weights: Tensor, grid: Tensor, width: float) -> Tensor:
    """Sum of Gaussians of one width."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}.")
    keep = weights > 0
    distance = (grid.to(nodes).unsqueeze(1) - nodes[keep]) / width
    return torch.exp(-distance.square() / 2) @ weights[keep] / (sqrt(2 * pi) * width)


def spectral_density(
    operator: PyTorchLinearOperator, *, steps: int, vectors: int, generator: Generator
) -> SpectralDensity:
    """Estimate the density of an operator's eigenvalues.

    1/D tr f(C) ≈ 1/K Σ_k e₁ᵀ f(T_k) e₁

    with T_k the tridiagonal matrix of a Lanczos process with full reorthogonalization that starts
    from random signs. Matrix-free: ``steps * vectors`` products, and ``steps`` vectors are held.

    Eigenvalues that are small relative to the largest are blurred: m steps tell those above about
    (largest / m²) apart from zero. What lies below is resolved by the density of a damped inverse,
    ``spectral_density(inverse, ...).map(lambda mu: 1 / mu - damping)``.

    Source: Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019.
    """
    D = check_square(operator)
    steps = min(check_count("steps", steps, 1), D)
    check_count("vectors", vectors, 2)
    nodes = torch.zeros(vectors, steps, dtype=torch.float64, device=operator.device)
    weights = torch.zeros_like(nodes)
    probes = rademacher(D, vectors, generator, operator.device)
    for k, probe in enumerate(probes.unbind(1)):
        ritz = lanczos(operator, probe, steps).ritz()
        nodes[k, : len(ritz.values)] = ritz.values
        weights[k, : len(ritz.values)] = ritz.vectors[0].square()
    return SpectralDensity(nodes, weights, D)
