"""Rules for bilinear functions of two jets: the product rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from pinncurv.jets.axes import (
    broadcast_together,
    channel_dim,
    check_same_pass,
    point_axis_mixed,
    trailing_view,
)
from pinncurv.jets.elementwise import weight_for
from pinncurv.jets.jet import Jet, register_rule
from pinncurv.jets.linear import linear_from_right, scale
from pinncurv.jets.recording import active_tape, for_every_point, is_trained


def product_rule(
    bilinear: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, jet: Jet
) -> Jet:
    """Push two jets through a bilinear function.

    (ab)' = a b' + a' b,    Σ Q_rs ∂_r∂_s(ab) = a b_c + a_c b + 2 Σ_rs Q_rs a_r b_s

    and so on: ``layout.products`` has the mixed terms of any order.

    Args:
        bilinear: The function, for arguments with a leading channel axis that it broadcasts.
        first: Channels of a, ``[S, ...]``.
        second: Channels of b, ``[S, ...]``.
        jet: A jet with the layout of both.
    """
    layout = jet.layout
    value = bilinear(first[:1], second[:1])
    derivatives = bilinear(first[:1], second[1:]) + bilinear(first[1:], second[:1])
    if layout.higher is not None:
        channels = [value, *derivatives.split(1)]
        for p in layout.products:
            mixed = bilinear(first[p.left][None], second[p.right][None])
            if p.left != p.right:
                mixed = mixed + bilinear(first[p.right][None], second[p.left][None])
            weight = weight_for(p.weight, mixed[0]) if isinstance(p.weight, Tensor) else p.weight
            channels[p.channel] = channels[p.channel] + weight * mixed
        return jet.like(torch.cat(channels))
    parts = [value, derivatives[: layout.R]]
    a, b = layout.first(first), layout.first(second)
    for collapsed, contraction in zip(derivatives[layout.R :], layout.contractions, strict=True):
        mixed = bilinear(contraction.select(a), contraction.multiply(b)).sum(0)
        parts.append((collapsed + 2 * mixed)[None])
    return jet.like(torch.cat(parts))


@register_rule(torch.mul, torch.multiply, Tensor.__mul__, Tensor.__rmul__)
def mul(input: Any, other: Any) -> Jet:
    """Multiply two jets elementwise, or a jet by a constant."""
    if not isinstance(other, Jet):
        return scale(input, other)
    if not isinstance(input, Jet):
        return scale(other, input)
    return product_rule(torch.mul, *broadcast_together(input, other), jet=input)


@register_rule(torch.div, torch.divide, torch.true_divide, Tensor.__truediv__)
def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Jet:
    """Divide two jets elementwise, or a jet and a constant."""
    if rounding_mode is not None:
        quotient = div(input, other)
        return quotient.floor() if rounding_mode == "floor" else quotient.trunc()
    if isinstance(other, Jet):
        return mul(input, other.reciprocal())
    data = trailing_view(input, getattr(other, "ndim", 0))
    return input.like(data / for_every_point(other, input))


@register_rule(Tensor.__rtruediv__, Tensor.__rdiv__)
def rdiv(input: Jet, other: Any) -> Jet:
    """Return other / input."""
    return mul(input.reciprocal(), other)


@register_rule(torch.matmul, torch.bmm, Tensor.__matmul__)
def matmul(input: Any, other: Any) -> Jet:
    """Multiply matrices: two jets, or a jet and a constant on either side."""
    if isinstance(input, Jet) and isinstance(other, Jet):
        if min(input.ndim, other.ndim) < 3:
            raise ValueError(
                "A matmul of two jets must act on the axes after the points, [N, ..., m, k] times "
                f"[N, ..., k, n], got shapes {tuple(input.shape)} and {tuple(other.shape)}. "
                "Insert an axis with unsqueeze, or use torch.einsum."
            )
        return product_rule(torch.matmul, *broadcast_together(input, other), jet=input)
    if isinstance(input, Jet):
        if input.ndim == 1:
            point_axis_mixed(input, "matmul")
        if other.ndim == 2:
            return linear_from_right(input, other)
        if other.ndim == 1:
            return squeeze_last(linear_from_right(input, other.unsqueeze(-1)))
        return input.like(trailing_view(input, other.ndim).matmul(for_every_point(other, input)))
    if other.ndim <= 2:
        point_axis_mixed(other, "matmul")
        if other.ndim == 1:
            return other.like(other.channels.matmul(input.mT if input.ndim > 1 else input))
    return other.like(torch.matmul(for_every_point(input, other), trailing_view(other, input.ndim)))


def squeeze_last(jet: Jet) -> Jet:
    """Drop the last axis, of size one."""
    return jet.like(jet.channels.squeeze(-1))


@register_rule(torch.mm, torch.mv)
def mm(input: Any, other: Any) -> Jet:
    """Multiply a jet and a constant as matrices."""
    return matmul(input, other)


@register_rule(torch.prod)
def prod(input: Jet, dim: int | None = None, keepdim: bool = False) -> Jet:
    """Multiply along one axis, slice by slice, or along all."""
    if dim is None:
        point_axis_mixed(input, "prod")
        return prod(input.like(input.channels.flatten(1)), 0)
    axis = channel_dim(input, dim)
    if axis == 1:
        point_axis_mixed(input, "prod")
    slices = [input.like(part) for part in input.channels.split(1, axis)]
    total = slices[0]
    for part in slices[1:]:
        total = mul(total, part)
    return total if keepdim else total.like(total.channels.squeeze(axis))


@register_rule(torch.einsum)
def einsum(equation: str, *operands: Any) -> Jet:
    """Contract constants and at most two jets.

    Raises:
        NotImplementedError: With more than two jets.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    positions = [i for i, operand in enumerate(operands) if isinstance(operand, Jet)]
    if len(positions) > 2:
        raise NotImplementedError(
            f"torch.einsum on jets takes at most two jets, got {equation!r} with {len(positions)}. "
            "Contract pairwise."
        )
    equation = _without_ellipsis(equation.replace(" ", ""), operands)
    if "->" not in equation:  # then the output has what appears once, in alphabetical order
        letters = sorted(c for c in set(equation) if c.isalpha() and equation.count(c) == 1)
        equation = f"{equation}->{''.join(letters)}"
    channel = next(c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQ" if c not in equation)
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    for i in positions:
        first = terms[i][:1]
        if not first or not output.startswith(first) or terms[i].count(first) > 1:
            point_axis_mixed(operands[i], "einsum")
    point = terms[positions[0]][:1]
    filled: list[Any] = [
        operand
        if k in positions
        else _for_every_point(operand, operands[positions[0]], point, k, terms)
        for k, operand in enumerate(operands)
    ]
    for i in positions:
        terms[i] = channel + terms[i]
    with_channels = f"{','.join(terms)}->{channel}{output}"

    def contract(*channels: Tensor) -> Tensor:
        for i, data in zip(positions, channels, strict=True):
            filled[i] = data
        return torch.einsum(with_channels, *filled)

    jets = [operands[i] for i in positions]
    check_same_pass(*jets)
    if len(jets) == 1:
        return jets[0].like(contract(jets[0].channels))
    return product_rule(contract, jets[0].channels, jets[1].channels, jet=jets[0])


def _without_ellipsis(equation: str, operands: Sequence[Any]) -> str:
    """Name the axes that an ellipsis stands for, which align from the right."""
    if "..." not in equation:
        return equation
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    counts = [
        operand.ndim - len(term) + 3 if "..." in term else 0
        for term, operand in zip(terms, operands, strict=True)
    ]
    names = "".join([c for c in ascii_letters if c not in equation][: max(counts)])
    terms = [
        term.replace("...", names[len(names) - count :])
        for term, count in zip(terms, counts, strict=True)
    ]
    if not arrow:
        single = [c for c in sorted(set(inputs) - set(".,")) if inputs.count(c) == 1]
        output = "..." + "".join(single)
    return f"{','.join(terms)}->{output.replace('...', names)}"


def _for_every_point(operand: Any, jet: Jet, point: str, k: int, terms: list[str]) -> Any:
    """Copy a trained operand of an einsum for every point, and let its indices say so."""
    if not is_trained(operand) or active_tape() is None:
        return operand
    if point in terms[k]:
        operand = operand.movedim(terms[k].index(point), 0)
        terms[k] = point + terms[k].replace(point, "")
        return for_every_point(operand, jet, operand.ndim)
    terms[k] = point + terms[k]
    return for_every_point(operand, jet, operand.ndim + 1)
