"""The exact Gauss-Newton matrix at one point, and its step for a damping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from experiments.comparing.block_part import block_part
from experiments.comparing.rows import RowsGaussNewton
from experiments.comparing.settings import Settings
from pinncurv.comparison import estimate_frobenius_by_layer_pair, mass, squared_block_norms
from pinncurv.curvature import (
    BlockDiagonalGaussNewton,
    GaussNewtonLinearOperator,
    Objective,
)
from pinncurv.linops import Block, Damped, DenseLinearOperator, PyTorchLinearOperator
from pinncurv.optim import offers

# Most entries of the Jacobian that are held as a matrix, 1 GiB in float64.
_MOST_ROWS = 1 << 27


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " D"]:
    """Return a list of tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class Probing(TypedDict):
    """The arguments of an estimate."""

    vectors: int
    sketch: int
    generator: Generator


@dataclass(frozen=True, eq=False)
class Limits:
    """Where exact comparisons end.

    Args:
        dense: Most parameters for which D x D matrices are formed.
        block: Most parameters of a layer for which its block is formed.
        probes: Random probes per estimate above that.
    """

    dense: int
    block: int
    probes: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Return the limits that the settings ask for."""
        return cls(settings.dense_limit, settings.block_limit, settings.probes)

    @property
    def probing(self) -> Probing:
        """The arguments of an estimate; the same probes for every operator."""
        generator = Generator().manual_seed(0)
        return {"vectors": self.probes, "sketch": self.probes // 2, "generator": generator}


class Exact:
    """The exact matrix G = JᵀJ, its blocks, and its steps at one point.

    Args:
        objective: The loss there.
        limits: Where exact comparisons end.
    """

    def __init__(self, objective: Objective, limits: Limits) -> None:
        self.objective = objective
        self.linearized = linearized = objective.linearize()
        self.limits = limits
        self.gradient = flat(linearized.gradient())
        self.free = GaussNewtonLinearOperator(linearized.jacobian)
        self._steps: dict[float, Tensor] = {}

    @property
    def dimension(self) -> int:
        """D."""
        return self.free.shape[1]

    @property
    def is_dense(self) -> bool:
        """Whether matrices are compared entry by entry."""
        return self.dimension <= self.limits.dense

    @property
    def layers(self) -> tuple[Block, ...]:
        """The layers."""
        return self.linearized.jacobian.space.blocks

    @cached_property
    def operator(self) -> PyTorchLinearOperator:
        """G, dense below the limit, else from the rows of J if these fit, else matrix-free."""
        if self.is_dense:
            return DenseLinearOperator(self.free.to_dense(), self.free.shapes)
        jacobian = self.free.jacobian
        return RowsGaussNewton(jacobian) if math.prod(jacobian.shape) <= _MOST_ROWS else self.free

    @property
    def has_blocks(self) -> bool:
        """Whether the blocks of layers are compared entry by entry."""
        return max(block.numel for block in self.layers) <= self.limits.block

    @cached_property
    def blocks(self) -> PyTorchLinearOperator:
        """The diagonal blocks of G, formed below the limit."""
        if self.has_blocks:
            return BlockDiagonalGaussNewton()(self.linearized.linearizations)
        return block_part(self.operator, self.layers)

    @cached_property
    def mass(self) -> Float[Tensor, "L L"]:
        """The share of each pair of layers in ‖G‖², exact below the limit."""
        if self.is_dense:
            return mass(squared_block_norms(self.operator, self.layers))
        estimate = estimate_frobenius_by_layer_pair(
            self.operator, self.operator, self.layers, **self.limits.probing
        )
        return mass(estimate.squared_norm.value)

    def step(self, damping: float) -> Float[Tensor, " D"]:
        """Return −(G + λI)⁻¹∇L; above the limit from the kernel if that is small enough."""
        if damping not in self._steps:
            operator = self.operator if self.is_dense else self.free
            self._steps[damping] = self.direction(Damped(damping)(operator))
        return self._steps[damping]

    def direction(self, inverse: PyTorchLinearOperator) -> Float[Tensor, " D"]:
        """Return the step of an inverse, as the optimizer computes it."""
        if offers(inverse, "solve_residual"):
            return -flat(inverse.solve_residual(self.linearized.residual))
        return -(inverse @ self.gradient)
