"""The channel layout of a jet: which derivative each channel carries, and how they multiply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.jets.requests import (
    Coefficient,
    Derivative,
    Multiset,
    lower_derivatives,
    position,
    splits,
)


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

    @classmethod
    def of(cls, terms: Mapping[Multiset, Coefficient], like: Tensor) -> Contraction:
        """Return Σ c_rs ∂_{v_r} ∂_{v_s} for coefficients of r <= s."""
        indices = tuple(sorted({r for pair in terms for r in pair}))
        if any(r != s for r, s in terms):
            k = len(indices)
            shape = next((c.shape for c in terms.values() if isinstance(c, Tensor)), ())
            matrix = like.new_zeros(*shape, k, k)
            for (r, s), c in terms.items():
                i, j = indices.index(r), indices.index(s)
                matrix[..., i, j] += 0.5 * c
                matrix[..., j, i] += 0.5 * c
            return cls(indices, matrix=matrix)
        weights = [terms[r, r] for r in indices]
        if all(isinstance(w, float) and w == 1 for w in weights):
            return cls(indices)
        tensors = [w if isinstance(w, Tensor) else like.new_tensor(w) for w in weights]
        return cls(indices, weights=torch.stack(torch.broadcast_tensors(*tensors)))

    def at(self, points: slice | Tensor) -> Contraction:
        """Return the sum at some of the points."""
        if not self.per_point:
            return self
        if self.weights is not None:
            return replace(self, weights=self.weights[:, points])
        assert self.matrix is not None
        return replace(self, matrix=self.matrix[points])

    @property
    def terms(self) -> dict[Multiset, Coefficient]:
        """The coefficients c_rs of r <= s."""
        k = range(len(self.indices))  # a direction may take part several times
        entries: dict[Multiset, Coefficient] = {}
        for i in k:
            for j in k[i:]:
                if self.matrix is not None:
                    c: Coefficient = (2 - (i == j)) * self.matrix[..., i, j]
                elif i == j:
                    c = 1.0 if self.weights is None else self.weights[i]
                else:
                    continue
                r, s = sorted((self.indices[i], self.indices[j]))
                entries[r, s] = entries[r, s] + c if (r, s) in entries else c
        return entries

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
class Product:
    """One entry of the product rule.

    (ab)_c = a_0 b_c + a_c b_0 + ... + w (a_i b_j + a_j b_i),  for i = j: w a_i b_i

    Args:
        channel: c.
        left: i.
        right: j >= i.
        weight: w, a number or one per point, ``[N]``.
    """

    channel: int
    left: int
    right: int
    weight: Coefficient


@dataclass(frozen=True, eq=False)
class Layout:
    """What the S channels of a jet mean.

    channels = [u,  ∂_{v_1} u, ..., ∂_{v_R} u,  derivatives of orders 2, 3, ..., ascending]

    Channels form a commutative algebra: the product rule multiplies two jets, and a smooth function
    of a jet is its Taylor polynomial in it. A derivative that is a sum of others of the highest
    order is one channel, since there nothing needs its parts. Linear and structural rules act on
    every channel alike and never ask what it means.

    Order two is the fast path: after R first derivatives come C sums of second derivatives, and
    ``higher`` is None. There S = 1 + R + C, and d + 2 for the Laplacian.

    Args:
        directions: ``[R, d]`` or, where they differ from point to point, ``[R, N, d]``.
        contractions: What each sum of second derivatives sums, for order two.
        higher: Orders and product rule of the channels, for any order.
    """

    directions: Tensor
    contractions: tuple[Contraction, ...] = ()
    higher: tuple[tuple[int, ...], tuple[Product, ...]] | None = None

    @property
    def R(self) -> int:
        """Number of directions."""
        return self.directions.shape[0]

    @property
    def C(self) -> int:
        """Number of channels beyond first derivatives."""
        return self.S - 1 - self.R

    @cached_property
    def S(self) -> int:
        """Number of channels."""
        if self.higher is not None:
            return len(self.higher[0])
        return 1 + self.R + len(self.contractions)

    @property
    def orders(self) -> tuple[int, ...]:
        """The order of the derivative in each channel, ascending."""
        if self.higher is not None:
            return self.higher[0]
        return (0, *[1] * self.R, *[2] * len(self.contractions))

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """The entries of the product rule."""
        if self.higher is not None:
            return self.higher[1]
        index: dict[Multiset, int] = {(r,): 1 + r for r in range(self.R)}
        return tuple(
            entry
            for c, contraction in enumerate(self.contractions)
            for entry in _products(1 + self.R + c, contraction.terms, index)
        )

    @cached_property
    def per_point(self) -> bool:
        """Whether a coefficient of a sum differs from point to point."""
        if self.higher is None:
            return any(contraction.per_point for contraction in self.contractions)
        return any(isinstance(p.weight, Tensor) and p.weight.ndim > 0 for p in self.products)

    @property
    def tensors(self) -> list[Tensor]:
        """The directions, and the coefficients of sums that are tensors."""
        given: list[Coefficient | None] = [self.directions]
        for contraction in self.contractions:
            given += [contraction.weights, contraction.matrix]
        given += [product.weight for product in (self.higher or ((), ()))[1]]
        return [tensor for tensor in given if isinstance(tensor, Tensor)]

    def first(self, data: Tensor) -> Tensor:
        """Return the first-derivative channels of stored data."""
        return data[1 : 1 + self.R]

    def second(self, data: Tensor) -> Sequence[Tensor]:
        """Return the channels after the first derivatives, one by one."""
        return data[1 + self.R :].unbind(0)

    def at(self, points: slice | Tensor) -> Layout:
        """Return the layout at some of the points."""
        directions = self.directions[:, points] if self.directions.ndim == 3 else self.directions
        if self.higher is None:
            return Layout(directions, tuple(c.at(points) for c in self.contractions))
        products = [
            replace(p, weight=p.weight[points]) if _is_per_point(p.weight) else p
            for p in self.products
        ]
        return Layout(directions, higher=(self.orders, tuple(products)))

    def extended(self) -> tuple[Layout, list[int], list[int]]:
        """Return the layout that also has the derivative of every channel along a new direction."""
        pairs = [(s, new) for new in (0, 1) for s in range(self.S)]
        pairs.sort(key=lambda pair: self.orders[pair[0]] + pair[1])
        where = {pair: i for i, pair in enumerate(pairs)}
        products = []
        for p in self.products:
            c, i, j = p.channel, p.left, p.right
            products.append(_entry(where[c, 0], where[i, 0], where[j, 0], p.weight))
            products.append(_entry(where[c, 1], where[i, 1], where[j, 0], p.weight))
            if i != j:
                products.append(_entry(where[c, 1], where[i, 0], where[j, 1], p.weight))
        products += [_entry(where[c, 1], where[0, 1], where[c, 0], 1.0) for c in range(1, self.S)]
        orders = tuple(self.orders[s] + new for s, new in pairs)
        layout = Layout(self.directions, higher=(orders, tuple(products)))
        old, new = ([where[s, kind] for s in range(self.S)] for kind in (0, 1))
        return layout, old, new


def _is_per_point(weight: Coefficient) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.ndim > 0


def _entry(channel: int, left: int, right: int, weight: Coefficient) -> Product:
    return Product(channel, min(left, right), max(left, right), weight)


def _products(
    channel: int, terms: Mapping[Multiset, Coefficient], index: Mapping[Multiset, int]
) -> list[Product]:
    """Return Leibniz' rule for a weighted sum of derivatives."""
    totals: dict[tuple[int, int], Coefficient] = {}
    for alpha, coefficient in terms.items():
        for (beta, gamma), count in splits(alpha).items():
            i, j = index[beta], index[gamma]
            if i <= j:
                totals[i, j] = totals.get((i, j), 0.0) + count * coefficient
    return [Product(channel, i, j, weight) for (i, j), weight in totals.items()]


def merge(requests: Iterable[Derivative], x: Float[Tensor, "N d"]) -> tuple[Layout, list[int]]:
    """Return a layout for several derivatives, each different one once, and where each stands.

    Derivatives of order two and less only: the sums in the order in which they are requested.
    Otherwise all lower derivatives that the product rule needs are channels of their own.

    Args:
        requests: The derivatives.
        x: The points.

    Raises:
        ValueError: If a direction or coefficient requires a gradient or does not fit the points.
    """
    directions: list[Tensor] = []
    renumbered = [_renumbered(request, directions, x) for request in requests]
    stacked = _stack(directions, x)
    if max((_order(terms) for terms in renumbered), default=0) <= 2:
        contractions: list[Contraction] = []
        where = []
        for terms in renumbered:
            if _order(terms) < 2:
                where.append(1 + next(iter(terms))[0] if _order(terms) else 0)
                continue
            new = Contraction.of(terms, x)
            known = [c for c, old in enumerate(contractions) if _same(old.terms, new.terms)]
            where.append(1 + len(directions) + (known[0] if known else len(contractions)))
            contractions += [] if known else [new]
        return Layout(stacked, tuple(contractions)), where
    return _merge_higher(renumbered, stacked)


def _merge_higher(
    requests: Sequence[Mapping[Multiset, Coefficient]], directions: Tensor
) -> tuple[Layout, list[int]]:
    """Lay out derivatives of any order."""
    singles = [next(iter(t)) for t in requests if _is_single(t) and _order(t) > 1]
    lower = lower_derivatives([alpha for terms in requests for alpha in terms])
    channels: list[Mapping[Multiset, Coefficient]] = [{(): 1.0}]
    channels += [{(r,): 1.0} for r in range(len(directions))]
    channels += [{alpha: 1.0} for alpha in dict.fromkeys([*lower, *singles])]
    for terms in requests:
        if not any(_same(terms, known) for known in channels):
            channels.append(terms)
    channels.sort(key=_order)
    index = {next(iter(c)): i for i, c in enumerate(channels) if _is_single(c)}
    products = [
        entry for i, c in enumerate(channels) if _order(c) > 1 for entry in _products(i, c, index)
    ]
    where = [
        next(i for i, known in enumerate(channels) if _same(terms, known)) for terms in requests
    ]
    orders = tuple(_order(c) for c in channels)
    return Layout(directions, higher=(orders, tuple(products))), where


def _order(terms: Mapping[Multiset, Coefficient]) -> int:
    return len(next(iter(terms)))


def _is_single(terms: Mapping[Multiset, Coefficient]) -> bool:
    (first, *others) = terms.values()
    return not others and isinstance(first, float) and first == 1


def _same(first: Mapping[Multiset, Coefficient], second: Mapping[Multiset, Coefficient]) -> bool:
    """Whether two sums are the same derivative."""

    def equal(a: Coefficient, b: Coefficient) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b

    return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)


def _renumbered(
    request: Derivative, directions: list[Tensor], x: Tensor
) -> dict[Multiset, Coefficient]:
    """Count the directions of all requests together, and bring coefficients to the points."""
    terms = {alpha: _checked(c, x, "coefficient") for alpha, c in request.terms.items()}
    vectors = [_checked(v, x, "direction") for v in request.directions]
    if request.order == 1 and not _is_single(terms):  # a sum of first derivatives is one of them
        parts = [_column(c) * vectors[i] for (i,), c in terms.items()]
        return {(position(directions, sum(parts[1:], parts[0]), torch.equal),): 1.0}
    used = sorted({i for alpha in terms for i in alpha})
    where = {i: position(directions, vectors[i], torch.equal) for i in used}
    merged: dict[Multiset, Coefficient] = {}
    for alpha, c in terms.items():
        beta = tuple(sorted(where[i] for i in alpha))
        merged[beta] = merged[beta] + c if beta in merged else c
    return merged


def _column(coefficient: Coefficient) -> Coefficient:
    return coefficient[:, None] if _is_per_point(coefficient) else coefficient


def _checked(given: Coefficient, x: Tensor, what: str) -> Any:
    """Bring a direction or coefficient to the points' dtype and device.

    Raises:
        ValueError: If it requires a gradient, or has another shape than it may have.
    """
    if not isinstance(given, Tensor):
        return float(given)
    if given.requires_grad:
        raise ValueError(
            f"The {what} of a requested derivative must not require a gradient, which channels do "
            "not carry, got one that does. Request the derivatives one by one, and multiply by "
            "what is trained in read()."
        )
    shapes = ((), x.shape[:1]) if what == "coefficient" else (x.shape[1:], x.shape)
    if given.shape not in shapes:
        raise ValueError(
            f"The {what} of a requested derivative must have one of the shapes "
            f"{[list(shape) for shape in shapes]} at points {list(x.shape)}, got "
            f"{list(given.shape)}."
        )
    return given.to(dtype=x.dtype, device=x.device)


def _stack(directions: Sequence[Tensor], x: Tensor) -> Tensor:
    """Stack directions, per point if one of them is."""
    if not directions:
        return x.new_zeros(0, x.shape[-1])
    if any(direction.ndim == 2 for direction in directions):
        return torch.stack([direction.expand_as(x) for direction in directions])
    return torch.stack(list(directions))
