"""The Poisson equation with a solution on four scales."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from pinncurv.problems.domains import Box
from pinncurv.problems.poisson import poisson
from pinncurv.problems.problem import Problem, TensorOrJet

_FREQUENCIES = (4, 8, 12, 16)


def poisson2d_multiscale(n_interior: int = 4000, n_boundary: int = 500) -> Problem:
    """A sum of products of sines on the unit square.

    -Δu = ½ π² Σ_w w² sin(wπx₁) sin(wπx₂),    u = ¼ Σ_w sin(wπx₁) sin(wπx₂),    w = 4, 8, 12, 16

    The weight of the equation is 1e-8, that of the boundary 1.

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the faces.

    Source: arXiv 2607.02194 (its Poisson problem).
    """
    made = poisson(
        Box.unit(2), _source, _sines, n_interior, n_boundary, _sines, "poisson2d_multiscale"
    )
    interior, boundary = made.terms
    return replace(made, terms=(replace(interior, weight=1e-8), boundary))


def _source(x: Tensor) -> Tensor:
    return sum(0.5 * (math.pi * w) ** 2 * _product(w, x) for w in _FREQUENCIES)


def _sines(x: TensorOrJet) -> TensorOrJet:
    return sum(_product(w, x) for w in _FREQUENCIES) / 4


def _product(w: int, x: TensorOrJet) -> TensorOrJet:
    return torch.sin(w * math.pi * x[:, :1]) * torch.sin(w * math.pi * x[:, 1:])
