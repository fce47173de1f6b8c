"""The shipped differential operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops.coordinates import as_dim, as_dims, embed, present, standard_basis
from pinncurv.diffops.operator import DifferentialOperator
from pinncurv.diffops.random_directions import RandomDirections
from pinncurv.jets import Derivative
from pinncurv.jets.requests import HIGHEST_ORDER, Coefficient, Multiset

PointFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Operator(DifferentialOperator):
    """The base of all, with the output that it acts on as an argument."""

    of: int | str | None = field(default=None, kw_only=True)

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        return derivatives["u"]


@dataclass(frozen=True)
class _InCoordinates(_Operator):
    """An operator in the coordinates ``dims``; None for all."""

    dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", as_dims(self.dims))


@dataclass(frozen=True, eq=False)
class _Sampled(_Operator):
    """A sum of second derivatives, or an estimate of it along random directions."""

    sampling: RandomDirections | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, RandomDirections | None):
            raise TypeError(
                "sampling must be None, for the exact operator, or random directions, got "
                f"{self.sampling!r}. Write e.g. sampling=RandomCoordinates(16)."
            )

    def redrawn(self, seed: int) -> DifferentialOperator:
        if self.sampling is None:
            return self
        return replace(self, sampling=self.sampling.redrawn(seed))


@dataclass(frozen=True)
class Value(_Operator):
    """The network itself.

    D u = u,  ``[N, d_out]``
    """

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        return {"u": Derivative.value()}


@dataclass(frozen=True, init=False)
class Partial(_Operator):
    """One partial derivative, of order one to four.

    D u = ∂^K u / ∂x_i ∂x_j ⋯,  ``[N, d_out]``

    Args:
        dims: The coordinates i, j, ..., from 0; repeat one for a higher order.
    """

    dims: tuple[int, ...]

    def __init__(self, *dims: int, of: int | str | None = None) -> None:
        object.__setattr__(self, "dims", tuple(as_dim(dim) for dim in dims))
        object.__setattr__(self, "of", of)
        _check_order("Partial", len(dims))

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        vectors = [standard_basis(x, (dim,))[0] for dim in self.dims]
        return {"u": Derivative.along(*vectors)}


@dataclass(frozen=True)
class Gradient(_InCoordinates):
    """The partial derivatives with respect to some coordinates.

    D u = (∂u/∂x_i)_{i in dims},  ``[N, d_out, len(dims)]``
    """

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        basis = standard_basis(x, self.dims)
        return {str(i): Derivative.along(e) for i, e in enumerate(basis)}

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        return torch.stack(list(derivatives.values()), -1)


@dataclass(frozen=True)
class Divergence(Gradient):
    """The divergence of a network with one output per coordinate.

    D u = Σ_{i in dims} ∂u_i/∂x_i,  ``[N, 1]``
    """

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        parts = list(derivatives.values())
        if parts[0].ndim != 2 or parts[0].shape[1] != len(parts):
            raise ValueError(
                f"A divergence in {len(parts)} coordinates must act on as many outputs, "
                f"[N, {len(parts)}], got {list(parts[0].shape)}. Choose coordinates with dims= or "
                "an output of the network with of=."
            )
        total = parts[0][:, :1]
        for i, part in enumerate(parts[1:], 1):
            total = total + part[:, i : i + 1]
        return total


@dataclass(frozen=True)
class Laplacian(_Sampled, _InCoordinates):
    """The sum of unmixed second derivatives with respect to some coordinates.

    D u = Σ_{i in dims} ∂²u/∂x_i²,  ``[N, d_out]``

    Args:
        dims: The coordinates; None for all.
        sampling: Random directions for an unbiased estimate with fewer channels, of which
            `RandomDirections` says what it costs; None for the exact operator.
    """

    def __post_init__(self) -> None:
        _Sampled.__post_init__(self)
        _InCoordinates.__post_init__(self)

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        if self.sampling is not None:
            dims = present(x, self.dims)
            return {"u": self.sampling.estimate(x, len(dims), partial(embed, x=x, dims=dims))}
        basis = standard_basis(x, self.dims)
        return {"u": Derivative(basis, {(i, i): 1.0 for i in range(len(basis))})}


@dataclass(frozen=True)
class Bilaplacian(_InCoordinates):
    """The Laplacian of the Laplacian with respect to some coordinates.

    D u = Σ_{i, j in dims} ∂⁴u/∂x_i²∂x_j²,  ``[N, d_out]``
    """

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        basis = standard_basis(x, self.dims)
        pairs = combinations_with_replacement(range(len(basis)), 2)
        return {"u": Derivative(basis, {(i, i, j, j): 1.0 if i == j else 2.0 for i, j in pairs})}


@dataclass(frozen=True)
class Hessian(_InCoordinates):
    """The matrix of second derivatives with respect to some coordinates.

    D u = (∂²u/∂x_i∂x_j)_{i, j in dims},  ``[N, d_out, len(dims), len(dims)]``
    """

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        return _all_derivatives(standard_basis(x, self.dims), 2)

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        k = max(int(name.split(",")[0]) for name in derivatives) + 1
        rows = [torch.stack([derivatives[_name((i, j))] for j in range(k)], -1) for i in range(k)]
        return torch.stack(rows, -2)


@dataclass(frozen=True, eq=False)
class Directional(_Operator):
    """The derivative along a direction, such as a normal.

    D u = (v · ∇)^order u,  v constant along itself,  ``[N, d_out]``

    Args:
        direction: v, ``[d]``, or one per point: ``[N, d]``, a function x -> ``[N, d]`` or a module.
            It is trained if it requires a gradient or is a module with parameters.
        order: One to four; one or two for a direction that is trained.
    """

    direction: Tensor | PointFunction
    order: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _check_order("Directional", self.order)
        if self.order > 2 and _is_trained(self.direction):
            raise NotImplementedError(
                f"A trained direction must have an order of at most 2, got {self.order}. Use "
                "Partial derivatives and multiply by the components in the residual."
            )

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        return replace(self, direction=_cut(self.direction, 2, part))

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        if _is_trained(self.direction):
            return _all_derivatives(standard_basis(x, None), self.order)
        v = _evaluate(self.direction, x, "direction", (x.shape[-1],))
        return {"u": Derivative.along(*[v] * self.order)}

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        if "u" in derivatives:
            return derivatives["u"]
        v = _at_points(self.direction, x)
        return _combine(derivatives, lambda *ij: len(set(ij)) * prod(v[..., i] for i in ij))


@dataclass(frozen=True, eq=False)
class SecondOrder(_Sampled):
    """A weighted sum of second derivatives.

    D u = Σ_ij c_ij ∂²u/∂x_i∂x_j,  ``[N, d_out]``

    Directions are the standard basis, so that the channels (and with them KFAC) do not depend on
    a choice of eigenvectors; only the symmetric part of c matters. For c = F Fᵀ of low rank,
    ``SecondOrder.from_factors(F)`` propagates the columns of F instead: fewer channels. A matrix
    that is trained needs all second derivatives as channels.

    Args:
        matrix: c, ``[k, k]``, or one per point: ``[N, k, k]``, a function x -> ``[N, k, k]`` or a
            module. It is trained if it requires a gradient or is a module with parameters.
        dims: The k coordinates that c refers to; None for all d.
        sampling: Random directions for an unbiased estimate with fewer channels, see
            `RandomDirections`; None for the exact operator.
    """

    matrix: Tensor | PointFunction
    dims: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dims", as_dims(self.dims))

    @staticmethod
    def from_factors(
        factors: Tensor | PointFunction,
        of: int | str | None = None,
        sampling: RandomDirections | None = None,
    ) -> DifferentialOperator:
        """Return the operator with c = F Fᵀ, F ``[d, r]``, ``[N, d, r]`` or x -> ``[N, d, r]``."""
        return FactoredSecondOrder(factors, of=of, sampling=sampling)

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        return replace(self, matrix=_cut(self.matrix, 3, part))

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        dims = present(x, self.dims)
        k = len(dims)
        if _is_trained(self.matrix):
            _check_not_sampled(self.sampling)
            return _all_derivatives(standard_basis(x, dims), 2)
        c = _evaluate(self.matrix, x, "matrix", (k, k))
        c = (c + c.mT) / 2
        if self.sampling is not None:
            return {"u": self.sampling.estimate(x, k, partial(embed, x=x, dims=dims), c)}
        basis = standard_basis(x, dims)
        if c.ndim == 3:  # where it happens to vanish must not change the channels
            full = not torch.equal(c, torch.diag_embed(c.diagonal(dim1=1, dim2=2)))
            pairs = [(i, j) for i in range(k) for j in range(i, k) if i == j or full]
        else:
            pairs = [(i, j) for i in range(k) for j in range(i, k) if c[i, j] != 0] or [(0, 0)]
        entries = {(i, j): (1 if i == j else 2) * c[..., i, j] for i, j in pairs}
        terms: dict[Multiset, Coefficient] = {
            pair: entry if entry.ndim else float(entry) for pair, entry in entries.items()
        }
        return {"u": Derivative(basis, terms)}

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        if "u" in derivatives:
            return derivatives["u"]
        c = _at_points(self.matrix, x)
        return _combine(
            derivatives, lambda i, j: c[..., i, j] if i == j else c[..., i, j] + c[..., j, i]
        )


@dataclass(frozen=True, eq=False)
class FactoredSecondOrder(_Sampled):
    """A weighted sum of second derivatives with a low-rank coefficient matrix.

    D u = Σ_r ∂²u/∂f_r² = Σ_ij (F Fᵀ)_ij ∂²u/∂x_i∂x_j,  f_r the columns of F

    Args:
        factors: F, ``[d, r]``, or one per point: ``[N, d, r]`` or a function x -> ``[N, d, r]``.
        sampling: Random combinations of the columns for an unbiased estimate, see
            `RandomDirections`; None for all columns.
    """

    factors: Tensor | PointFunction

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        return replace(self, factors=_cut(self.factors, 3, part))

    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        if _is_trained(self.factors):
            _check_not_sampled(self.sampling)
            return _all_derivatives(standard_basis(x, None), 2)
        F = _evaluate(self.factors, x, "factors", (x.shape[-1], None))
        if self.sampling is not None:
            return {"u": self.sampling.estimate(x, F.shape[-1], partial(_combined, F))}
        columns = F.unbind(-1)
        return {"u": Derivative(columns, {(r, r): 1.0 for r in range(len(columns))})}

    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        if "u" in derivatives:
            return derivatives["u"]
        F = _at_points(self.factors, x)
        return _combine(
            derivatives, lambda i, j: (2 - (i == j)) * (F[..., i, :] * F[..., j, :]).sum(-1)
        )


def _combined(F: Tensor, z: Tensor) -> Tensor:
    """Return F z, ``[m, N, d]``, for z ``[m, N, r]``."""
    return z @ F.mT if F.ndim == 2 else torch.einsum("ndr,mnr->mnd", F, z)


def _check_not_sampled(sampling: RandomDirections | None) -> None:
    if sampling is not None:
        raise NotImplementedError(
            "An operator whose coefficients are trained must be exact, since it needs every second "
            f"derivative, got {sampling}. Leave sampling out, or use a sampled Laplacian and "
            "multiply by what is trained in the residual."
        )


def _check_order(name: str, order: int) -> None:
    if not 1 <= order <= HIGHEST_ORDER:
        raise ValueError(
            f"{name} must have an order from 1 to {HIGHEST_ORDER}, got {order}. Write a higher "
            "derivative as a system of lower ones, with one output of the network for each."
        )


def _cut(
    coefficient: Tensor | PointFunction, ndim: int, part: slice | Tensor
) -> Tensor | PointFunction:
    """Cut a coefficient to a part of the points, if it is a tensor with one per point."""
    if isinstance(coefficient, Tensor) and coefficient.ndim == ndim:
        return coefficient[part]
    return coefficient


def _is_trained(coefficient: Tensor | PointFunction) -> bool:
    """Whether a coefficient is trained, and so enters when derivatives are read."""
    if isinstance(coefficient, Module):
        return any(parameter.requires_grad for parameter in coefficient.parameters())
    return isinstance(coefficient, Tensor) and coefficient.requires_grad


def _name(indices: Sequence[int]) -> str:
    return ",".join(str(i) for i in sorted(indices, reverse=True))


def _all_derivatives(basis: Sequence[Tensor], order: int) -> dict[str, Derivative]:
    """Request all derivatives of an order, each by the name of its indices."""
    multisets = combinations_with_replacement(range(len(basis)), order)
    return {_name(alpha): Derivative.along(*(basis[i] for i in alpha)) for alpha in multisets}


def _combine(derivatives: Mapping[str, Any], coefficient: Callable[..., Any]) -> Any:
    """Return Σ_α c_α ∂^α u over sorted α, for coefficients that are numbers or one per point."""
    total: Any = None
    for name, u in derivatives.items():
        c = coefficient(*sorted(int(i) for i in name.split(",")))
        part = u * (c.unsqueeze(-1) if c.ndim else c)
        total = part if total is None else total + part
    return total


def _at_points(coefficient: Tensor | PointFunction, x: Any) -> Any:
    """Return a trained coefficient, a constant or one per point."""
    return coefficient if isinstance(coefficient, Tensor) else coefficient(x)


def _evaluate(
    coefficient: Tensor | PointFunction, x: Tensor, name: str, shape: tuple[int | None, ...]
) -> Tensor:
    """Evaluate a coefficient, by any name, and check its shape at one point (None for any size)."""
    constant = isinstance(coefficient, Tensor)
    if not constant and not callable(coefficient):
        raise TypeError(
            f"The {name} of a differential operator must be a tensor or a function of the points, "
            f"got {type(coefficient).__name__}. Use torch.tensor(...)."
        )
    tensor = _at_points(coefficient, x)
    if tensor.requires_grad:
        raise ValueError(
            f"The {name} of a differential operator must not depend on trained tensors unless it "
            "is one, or a torch.nn.Module that owns them, got a function whose result requires a "
            "gradient. Make the function an nn.Module, or detach what is not to be trained."
        )
    tensor = tensor.to(dtype=x.dtype, device=x.device)
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
