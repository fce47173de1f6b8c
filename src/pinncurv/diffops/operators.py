"""The differential operators of order up to two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.diffops.coordinates import as_dim, as_dims, standard_basis
from pinncurv.diffops.operator import Channels, DifferentialOperator, Requirement
from pinncurv.jets import Contraction

PointFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Value(DifferentialOperator):
    """The network itself.

    D u = u,  ``[N, d_out]``
    """

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need no derivative."""
        return Requirement()

    def read(self, channels: Channels) -> Tensor:
        """Return the value."""
        return channels.value


@dataclass(frozen=True)
class Gradient(DifferentialOperator):
    """The partial derivatives with respect to some coordinates.

    D u = (∂u/∂x_i)_{i in dims},  ``[N, d_out, len(dims)]``

    Args:
        dims: The coordinates; None for all.
    """

    dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Make the coordinates hashable."""
        object.__setattr__(self, "dims", as_dims(self.dims))

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need one direction per coordinate."""
        return Requirement(standard_basis(x, self.dims))

    def read(self, channels: Channels) -> Tensor:
        """Stack the partial derivatives along a new last axis."""
        return torch.stack(list(channels.first), -1)


@dataclass(frozen=True)
class Partial(DifferentialOperator):
    """One partial derivative.

    D u = ∂u/∂x_dim,  ``[N, d_out]``

    Args:
        dim: The coordinate.
    """

    dim: int

    def __post_init__(self) -> None:
        """Check the coordinate."""
        object.__setattr__(self, "dim", as_dim(self.dim))

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need one direction."""
        return Requirement(standard_basis(x, (self.dim,)))

    def read(self, channels: Channels) -> Tensor:
        """Return the derivative."""
        return channels.first[0]


@dataclass(frozen=True, eq=False)
class Directional(DifferentialOperator):
    """The derivative along a direction.

    D u = v · ∇u,  ``[N, d_out]``

    Args:
        direction: ``[d]``, or one per point: ``[N, d]`` or a function x -> ``[N, d]``.
    """

    direction: Tensor | PointFunction

    @property
    def per_point(self) -> bool:
        """Whether the direction differs from point to point."""
        return not isinstance(self.direction, Tensor) or self.direction.ndim == 2

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        """Return the operator at a part of the points."""
        if isinstance(self.direction, Tensor) and self.direction.ndim == 2:
            return replace(self, direction=self.direction[part])
        return self

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need one direction."""
        return Requirement((_evaluate(self.direction, x, "direction", (x.shape[-1],)),))

    def read(self, channels: Channels) -> Tensor:
        """Return the derivative."""
        return channels.first[0]


@dataclass(frozen=True)
class Laplacian(DifferentialOperator):
    """The sum of unmixed second derivatives with respect to some coordinates.

    D u = Σ_{i in dims} ∂²u/∂x_i²,  ``[N, d_out]``

    Args:
        dims: The coordinates; None for all.
    """

    dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Make the coordinates hashable."""
        object.__setattr__(self, "dims", as_dims(self.dims))

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need one direction per coordinate, and their sum."""
        basis = standard_basis(x, self.dims)
        return Requirement(basis, (Contraction(tuple(range(len(basis)))),))

    def read(self, channels: Channels) -> Tensor:
        """Return the sum."""
        return channels.second[0]


@dataclass(frozen=True, eq=False)
class SecondOrder(DifferentialOperator):
    """A weighted sum of second derivatives.

    D u = Σ_ij c_ij ∂²u/∂x_i∂x_j,  ``[N, d_out]``

    Directions are the standard basis, so that the channels (and with them KFAC) do not depend on
    a choice of eigenvectors; only the symmetric part of c matters. For c = F Fᵀ of low rank,
    ``SecondOrder.from_factors(F)`` propagates the columns of F instead: fewer channels.

    Args:
        matrix: c, ``[k, k]``, or one per point: ``[N, k, k]`` or a function x -> ``[N, k, k]``.
        dims: The k coordinates that c refers to; None for all d.
    """

    matrix: Tensor | PointFunction
    dims: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Make the coordinates hashable."""
        object.__setattr__(self, "dims", as_dims(self.dims))

    @staticmethod
    def from_factors(factors: Tensor | PointFunction) -> DifferentialOperator:
        """Return the operator with c = F Fᵀ, F ``[d, r]``, ``[N, d, r]`` or x -> ``[N, d, r]``."""
        return FactoredSecondOrder(factors)

    @property
    def per_point(self) -> bool:
        """Whether the matrix differs from point to point."""
        return not isinstance(self.matrix, Tensor) or self.matrix.ndim == 3

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        """Return the operator at a part of the points."""
        if isinstance(self.matrix, Tensor) and self.matrix.ndim == 3:
            return replace(self, matrix=self.matrix[part])
        return self

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need one direction per coordinate (with a nonzero row of a constant c), and the sum."""
        dims = range(x.shape[-1]) if self.dims is None else self.dims
        matrix = _evaluate(self.matrix, x, "matrix", (len(dims), len(dims)))
        matrix = (matrix + matrix.mT) / 2
        # which rows of a function of the points vanish may differ from chunk to chunk of points
        nonzero = matrix.ne(0).any(0) if matrix.ndim == 2 else torch.ones(len(dims))
        used = nonzero.nonzero().flatten().tolist()
        matrix = matrix[..., used, :][..., used]
        basis = standard_basis(x, [dims[i] for i in used])
        indices = tuple(range(len(used)))
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        if torch.equal(matrix, torch.diag_embed(diagonal)):
            return Requirement(
                basis, (Contraction(indices, weights=diagonal.movedim(-1, 0).contiguous()),)
            )
        return Requirement(basis, (Contraction(indices, matrix=matrix),))

    def read(self, channels: Channels) -> Tensor:
        """Return the weighted sum."""
        return channels.second[0]


@dataclass(frozen=True, eq=False)
class FactoredSecondOrder(DifferentialOperator):
    """A weighted sum of second derivatives with a low-rank coefficient matrix.

    D u = Σ_r ∂²u/∂f_r² = Σ_ij (F Fᵀ)_ij ∂²u/∂x_i∂x_j,  f_r the columns of F

    Args:
        factors: F, ``[d, r]``, or one per point: ``[N, d, r]`` or a function x -> ``[N, d, r]``.
    """

    factors: Tensor | PointFunction

    @property
    def per_point(self) -> bool:
        """Whether the factors differ from point to point."""
        return not isinstance(self.factors, Tensor) or self.factors.ndim == 3

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        """Return the operator at a part of the points."""
        if isinstance(self.factors, Tensor) and self.factors.ndim == 3:
            return replace(self, factors=self.factors[part])
        return self

    def require(self, x: Float[Tensor, "N d"]) -> Requirement:
        """Need one direction per column, and the sum of their second derivatives."""
        factors = _evaluate(self.factors, x, "factors", (x.shape[-1], None))
        columns = factors.unbind(-1)
        return Requirement(columns, (Contraction(tuple(range(len(columns)))),))

    def read(self, channels: Channels) -> Tensor:
        """Return the sum."""
        return channels.second[0]


def _evaluate(
    coefficient: Tensor | PointFunction, x: Tensor, name: str, shape: tuple[int | None, ...]
) -> Tensor:
    """Evaluate a coefficient at the points and check its shape.

    Args:
        coefficient: A constant, one value per point, or a function of the points.
        x: The points, ``[N, d]``.
        name: What the error message calls it.
        shape: The shape of one coefficient; None where any size will do.

    Raises:
        ValueError: If the shape, dtype or device does not fit the points.
    """
    constant = isinstance(coefficient, Tensor)
    tensor = coefficient if isinstance(coefficient, Tensor) else coefficient(x)
    tensor = tensor.to(dtype=x.dtype, device=x.device).detach()
    trailing = tensor.shape[-len(shape) :]
    fits = len(trailing) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, trailing, strict=True)
    )
    leading = tuple(tensor.shape[: -len(shape)])
    if not fits or leading not in ((x.shape[0],), ()) or (not constant and not leading):
        expected = "[" + ", ".join("r" if size is None else str(size) for size in shape) + "]"
        raise ValueError(
            f"The {name} of a differential operator must have shape {expected} or, per point, "
            f"[{x.shape[0]}, {expected[1:]} at points of shape {tuple(x.shape)}, "
            f"got {list(tensor.shape)}. A function of the points must return one per point."
        )
    return tensor
