"""The channel layout of a second-order jet: which derivative each channel carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Contraction:
    """A weighted sum of second derivatives that one collapsed channel carries.

    Σ_rs Q_rs ∂_{v_r} ∂_{v_s}

    over the layout's directions v_r. Q is symmetric; a diagonal Q is stored by its diagonal, since
    this is the case (Laplacian) that needs no product with Q at all.

    Args:
        indices: The k directions that take part.
        weights: None for Q = I; ``[k]`` or ``[k, N]`` for a diagonal Q (constant or per point).
        matrix: ``[k, k]`` or ``[N, k, k]`` for a full Q. At most one of both is given.
    """

    indices: tuple[int, ...]
    weights: Tensor | None = None
    matrix: Tensor | None = None
    _selection: slice | tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Turn contiguous indices into a slice, which selects without a copy."""
        start, k = (self.indices[0] if self.indices else 0), len(self.indices)
        contiguous = self.indices == tuple(range(start, start + k))
        selection = slice(start, start + k) if contiguous else self.indices
        object.__setattr__(self, "_selection", selection)

    @property
    def per_point(self) -> bool:
        """Whether Q differs from point to point."""
        weights, matrix = self.weights, self.matrix
        return (weights is not None and weights.ndim == 2) or (
            matrix is not None and matrix.ndim == 3
        )

    def select(self, first: Float[Tensor, " R *value"]) -> Float[Tensor, " k *value"]:
        """Return the channels of the directions that take part."""
        selection = self._selection
        return first[selection] if isinstance(selection, slice) else first[list(selection)]

    def multiply(self, first: Float[Tensor, " R *value"]) -> Float[Tensor, " k *value"]:
        """Return Q times the selected first-derivative channels."""
        selected = self.select(first)
        if self.matrix is not None:
            if self.matrix.ndim == 2:
                return torch.tensordot(self.matrix, selected, dims=1)
            return torch.einsum("nrs,sn...->rn...", self.matrix, selected)
        if self.weights is not None:
            trailing = (1,) * (selected.ndim - self.weights.ndim)
            return selected * self.weights.reshape(*self.weights.shape, *trailing)
        return selected

    def add_product_(
        self,
        total: Float[Tensor, " R *value"],
        first: Float[Tensor, " R *value"],
        factor: Float[Tensor, "*value"],
        scale: float,
    ) -> None:
        """Add scale · factor · (Q x)_r to every channel r of ``total`` that takes part."""
        multiplied = self.multiply(first)
        if isinstance(self._selection, slice):
            total[self._selection].addcmul_(multiplied, factor, value=scale)
            return
        for r, qx in zip(self.indices, multiplied, strict=True):
            total[r].addcmul_(qx, factor, value=scale)

    def quadratic(self, first: Float[Tensor, " R *value"]) -> Float[Tensor, "*value"]:
        """Return Σ_rs Q_rs x_r x_s, elementwise in the value's axes."""
        selected = self.select(first)
        if len(self.indices) == 0:
            return first.new_zeros(first.shape[1:])
        multiplied = self.multiply(first)
        if torch.is_grad_enabled():
            return (selected * multiplied).sum(0)
        total = selected[0] * multiplied[0]
        for x, qx in zip(selected[1:], multiplied[1:], strict=True):
            total.addcmul_(x, qx)
        return total


@dataclass(frozen=True, eq=False)
class Layout:
    """What the S = 1 + R + C channels of a jet mean.

    channels = [u,  ∂_{v_1} u, ..., ∂_{v_R} u,  (Σ_rs Q^c_rs ∂_{v_r} ∂_{v_s} u)_{c = 1, ..., C}]

    Channel 0 is the value, then R first derivatives along the directions, then C collapsed sums
    of second derivatives. Linear and structural rules act on every channel alike and never ask
    what it means; only the elementwise and bilinear rules do. A layout of higher order therefore
    needs these two kinds of rules and nothing else.

    Args:
        directions: ``[R, d]`` or, where they differ from point to point, ``[R, N, d]``.
        contractions: What each collapsed channel sums.
    """

    directions: Tensor
    contractions: tuple[Contraction, ...] = ()

    @property
    def R(self) -> int:
        """Number of directions."""
        return self.directions.shape[0]

    @property
    def C(self) -> int:
        """Number of collapsed channels."""
        return len(self.contractions)

    @property
    def S(self) -> int:
        """Number of channels."""
        return 1 + self.R + self.C

    @property
    def per_point(self) -> bool:
        """Whether a coefficient of a collapsed channel differs from point to point."""
        return any(contraction.per_point for contraction in self.contractions)

    def first(self, data: Tensor) -> Tensor:
        """Return the first-derivative channels of stored data."""
        return data[1 : 1 + self.R]

    def second(self, data: Tensor) -> Sequence[Tensor]:
        """Return the collapsed channels of stored data, one by one."""
        return data[1 + self.R :].unbind(0)
