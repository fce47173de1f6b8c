"""A spreading Gaussian, and diffusion processes whose density it is.

Points are (t, x) with time first. The variance is s = 2 - exp(-t), so that s' = exp(-t) = 2 - s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pinncurv.problems.diffusion_process import FullDiffusion, IsotropicDiffusion
from pinncurv.problems.problem import TensorOrJet

Field = Callable[[Tensor], Tensor]


def gaussian_log_density(x: TensorOrJet) -> TensorOrJet:
    """The logarithm of the centred Gaussian density with covariance (2 - exp(-t)) I.

    q = -d/2 log(2π s) - |x|² / (2 s)
    """
    variance, space = _variance(x), x[:, 1:]
    squared_norm = (space**2).sum(dim=-1, keepdim=True)
    dim = x.shape[1] - 1
    return -0.5 * dim * torch.log(2 * math.pi * variance) - 0.5 * squared_norm / variance


def gaussian_density(x: TensorOrJet) -> TensorOrJet:
    """The centred Gaussian density with covariance (2 - exp(-t)) I.

    p = exp(-|x|² / (2 s)) / (2π s)^(d/2)
    """
    return torch.exp(gaussian_log_density(x))


def ornstein_uhlenbeck(dim: int) -> IsotropicDiffusion:
    """The process of constant, isotropic diffusivity whose density is `gaussian_density`.

    dX = -X / 2 dt + √2 dW
    """
    return IsotropicDiffusion(
        dim,
        drift=_pull,
        scale=math.sqrt(2),
        drift_divergence=partial(_constant, -0.5 * dim),
    )


def gaussian_preserving(
    dim: int,
    diffusivity: Field,
    diffusion_divergence: Field | None = None,
    diffusion_double_divergence: Field | None = None,
) -> FullDiffusion:
    """A process of any diffusivity whose drift is such that `gaussian_density` is its density.

    μ = s' / (2 s) x + 1/2 (div D + D ∇q),    ∇q = -x / s

    The first part carries the Gaussian along, as p_t + div(s' / (2 s) x p) = 0; the second part
    balances the diffusive flux 1/2 div(D p) = 1/2 p (div D + D ∇q). For D = 2 I the sum is -x / 2.

    Args:
        dim: Dimension d of x, without time.
        diffusivity: The diffusivity S, [N, 1 + d] -> [N, d, r], with D = S Sᵀ.
        diffusion_divergence: div D, see `FullDiffusion`.
        diffusion_double_divergence: div div D, see `FullDiffusion`.
    """
    carried = FullDiffusion(
        dim,
        _carry,
        diffusivity,
        diffusion_divergence=diffusion_divergence,
        diffusion_double_divergence=diffusion_double_divergence,
    )
    balance = _Balance(carried)
    return replace(carried, drift=balance.drift, drift_divergence=balance.drift_divergence)


def waves(dim: int) -> FullDiffusion:
    """A process with a full diffusion matrix in waves, whose density is `gaussian_density`.

    S = √2 I + 1/2 sin(φ) B,    φ = t + Σ_i x_i,    B = lower triangle of ones / √d

    As D = S Sᵀ depends on φ only, div D = D'(φ) 1 and div div D = 1ᵀ D''(φ) 1 in closed form.
    """
    return gaussian_preserving(
        dim, _wave, diffusion_divergence=_wave_divergence, diffusion_double_divergence=_wave_double
    )


@dataclass(frozen=True)
class _Balance:
    """The drift that keeps the Gaussian the density of a process whose drift carries it along."""

    carried: FullDiffusion

    def drift(self, x: Tensor) -> Tensor:
        score = -x[:, 1:] / _variance(x)
        diffused = (self.carried.matrix(x) @ score.unsqueeze(2)).squeeze(2)
        return _carry(x) + 0.5 * (self.carried.row_divergence(x) + diffused)

    def drift_divergence(self, x: Tensor) -> Tensor:
        carried, variance = self.carried, _variance(x)
        score = -x[:, 1:] / variance
        trace = carried.matrix(x).diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
        diffused = (carried.row_divergence(x) * score).sum(dim=1, keepdim=True) - trace / variance
        spread = 0.5 * carried.dim * (2 - variance) / variance
        return spread + 0.5 * (carried.double_divergence(x) + diffused)


# Module-level functions, not closures, so that processes can be pickled.


def _pull(x: Tensor) -> Tensor:
    return -0.5 * x[:, 1:]


def _constant(value: float, x: Tensor) -> Tensor:
    return torch.full_like(x[:, :1], value)


def _carry(x: Tensor) -> Tensor:
    variance = _variance(x)
    return 0.5 * (2 - variance) / variance * x[:, 1:]


def _wave(x: Tensor) -> Tensor:
    dim = x.shape[1] - 1
    wave = torch.sin(_phase(x)) * _triangle(x, dim)
    return math.sqrt(2) * torch.eye(dim, dtype=x.dtype, device=x.device) + 0.5 * wave


def _wave_divergence(x: Tensor) -> Tensor:
    return _wave_derivative(x, x.shape[1] - 1, 1).sum(dim=2)


def _wave_double(x: Tensor) -> Tensor:
    return _wave_derivative(x, x.shape[1] - 1, 2).sum(dim=(1, 2))[:, None]


def _variance(x: TensorOrJet) -> TensorOrJet:
    return 2 - torch.exp(-x[:, :1])


def _phase(x: Tensor) -> Tensor:
    """Return φ = t + Σ_i x_i, [N, 1, 1]."""
    return x.sum(dim=1)[:, None, None]


def _triangle(x: Tensor, dim: int) -> Tensor:
    return torch.ones(dim, dim, dtype=x.dtype, device=x.device).tril() / math.sqrt(dim)


def _wave_derivative(x: Tensor, dim: int, order: int) -> Tensor:
    """Return a derivative of D = 2 I + sin(φ) (B + Bᵀ) / √2 + sin²(φ) B Bᵀ / 4 with respect to φ.

    Each derivative shifts a wave by a quarter; sin²(φ) = (1 - cos(2φ)) / 2.
    """
    phase, triangle, quarter = _phase(x), _triangle(x, dim), 0.5 * math.pi * order
    first = torch.sin(phase + quarter) / math.sqrt(2) * (triangle + triangle.T)
    return first - 2**order / 8 * torch.cos(2 * phase + quarter) * (triangle @ triangle.T)
