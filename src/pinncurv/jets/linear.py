"""Rules for linear maps of one jet: every channel alike, constants into the value only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pinncurv.jets.axes import broadcast_together, channel_dims, point_axis_mixed, trailing_view
from pinncurv.jets.jet import Jet, register_rule
from pinncurv.jets.recording import active_tape, for_every_point, is_trained


class _LinearMap(torch.autograd.Function):
    """Y[s] = X[s] Wᵀ + b [s = 0]: one matrix product over all channels."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(data, weight)
        # a product with one column is a matrix-vector product, which is several times faster
        column = weight.shape[0] == 1
        output = data.matmul(weight[0]).unsqueeze(-1) if column else data.matmul(weight.t())
        if bias is not None:
            output[0].add_(bias)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        data, weight = ctx.saved_tensors
        wants_data, wants_weight, wants_bias = ctx.needs_input_grad
        width = grad.shape[-1]
        grad_data = grad.matmul(weight) if wants_data else None
        grad_weight = grad_bias = None
        if wants_weight:
            grad_weight = grad.reshape(-1, width).t() @ data.reshape(-1, data.shape[-1])
        if wants_bias:
            grad_bias = grad[0].reshape(-1, width).sum(0)
        return grad_data, grad_weight, grad_bias


@register_rule(functional.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Jet:
    """Apply a linear layer; a tape that tracks its parameters records it."""
    if not isinstance(input, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
        raise NotImplementedError(
            "A linear layer must have a constant weight and bias, but one of them depends on the "
            "points. Write it as a matmul of jets instead."
        )
    tape = active_tape()
    if tape is None or not is_trained(weight, bias):
        return input.like(_LinearMap.apply(input.channels, weight, bias))
    constant_bias = None if bias is None else bias.detach()
    output = _LinearMap.apply(input.channels, weight.detach(), constant_bias)
    return input.like(tape.linear(weight, bias, input.channels, output))


def linear_from_right(jet: Jet, matrix: Tensor) -> Jet:
    """Return jet @ matrix for a matrix ``[d_in, d_out]``, which is a linear layer, too."""
    tape = active_tape()
    if tape is None or not is_trained(matrix):
        return jet.like(jet.channels.matmul(matrix))
    output = jet.channels.matmul(matrix.detach())
    return jet.like(tape.linear(matrix, None, jet.channels, output, transposed=True))


def add_constant(jet: Jet, constant: Tensor | float, alpha: float = 1) -> Jet:
    """Add a multiple of a constant to the value; the derivatives only broadcast."""
    shape = torch.broadcast_shapes(jet.shape, getattr(constant, "shape", ()))
    data = trailing_view(jet, len(shape)).expand(-1, *shape).clone()
    constant = for_every_point(constant, jet)
    data[0] = data[0] + (constant if alpha == 1 else alpha * constant)
    return jet.like(data)


def scale(jet: Jet, constant: Tensor | float) -> Jet:
    """Multiply every channel by a constant."""
    data = trailing_view(jet, getattr(constant, "ndim", 0))
    return jet.like(data * for_every_point(constant, jet))


@register_rule(torch.add, Tensor.__add__, Tensor.__radd__)
def add(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """Add two jets, or a jet and a constant."""
    if not isinstance(other, Jet):
        return add_constant(input, other, alpha)
    other = other if alpha == 1 else scale(other, alpha)
    if not isinstance(input, Jet):
        return add_constant(other, input)
    first, second = broadcast_together(input, other)
    return input.like(first + second)


@register_rule(torch.sub, torch.subtract, Tensor.__sub__)
def sub(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """Subtract two jets, or a jet and a constant."""
    if isinstance(input, Jet) and isinstance(other, Jet) and alpha == 1:
        first, second = broadcast_together(input, other)
        return input.like(first - second)
    return add(input, other, alpha=-alpha)


@register_rule(torch.neg, torch.negative, Tensor.__neg__)
def neg(input: Jet) -> Jet:
    """Negate every channel."""
    return input.like(-input.channels)


@register_rule(torch.rsub, Tensor.__rsub__)
def rsub(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """Return other - alpha · input."""
    return add(input * -alpha, other)


def _reduction(reduce: Callable[..., Tensor]) -> Callable[..., Jet]:
    """Make the rule of a linear reduction over any axes of the value."""

    def rule(
        input: Jet,
        dim: int | tuple[int, ...] | list[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
        axis: int | tuple[int, ...] | None = None,
    ) -> Jet:
        dim = axis if dim is None else dim
        dims = [dim] if isinstance(dim, int) else list(dim or range(input.ndim))
        shifted = channel_dims(input, dims)
        if 1 in shifted:
            point_axis_mixed(input, reduce.__name__)
        if not shifted:
            return input
        return input.like(reduce(input.channels, dim=shifted, keepdim=keepdim, dtype=dtype))

    return rule


register_rule(torch.sum)(_reduction(torch.sum))
register_rule(torch.mean)(_reduction(torch.mean))
