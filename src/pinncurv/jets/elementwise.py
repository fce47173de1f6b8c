"""Rules for elementwise functions: the chain rule (Faà di Bruno)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pinncurv.jets.jet import Jet, in_place_error, register_rule
from pinncurv.jets.layout import Layout, Product
from pinncurv.jets.location import calling_module
from pinncurv.machine import is_tracing

# Yields f(x), f'(x), f''(x), ... as they are asked for.
DerivativesFunction = Callable[..., Iterator[Tensor]]


class Derivatives:
    """The derivatives of an elementwise function at one input, computed when first asked for."""

    def __init__(self, generator: Iterator[Tensor], name: str) -> None:
        self._generator = generator
        self._known: list[Tensor] = []
        self._name = name

    def __getitem__(self, order: int) -> Tensor:
        """Return the derivative of the given order.

        Raises:
            NotImplementedError: If the function's generator ends before.
        """
        while len(self._known) <= order:
            try:
                self._known.append(next(self._generator))
            except StopIteration:
                raise NotImplementedError(
                    f"The derivatives of {self._name} must be registered up to order {order}, got "
                    f"{len(self._known) - 1}. Yield one more in its @register_elementwise function."
                ) from None
        return self._known[order]


def propagate(data: Tensor, f: Derivatives, layout: Layout) -> Tensor:
    """Push channels through an elementwise function, by operations that autograd follows.

    y = f(x_0) + Σ_k f^(k)(x_0) δ^k / k!,  δ = x - x_0 in the algebra of the channels
    """
    channels = [f[0], *(f[1] * data[1:])]
    for k, powers in enumerate(divided_powers(data, layout), 2):
        for c, power in powers.items():
            channels[c] = channels[c] + f[k] * power
    return torch.stack(channels)


def divided_powers(data: Tensor, layout: Layout) -> list[dict[int, Tensor]]:
    """Return δ^k / k! for k = 2, 3, ..., each by channel; it has channels of order k and more.

    For the Laplacian, δ² / 2 is ½ Σ_r 2 x_r² / 1 = Σ_r x_r² in the collapsed channel.
    """
    powers = [{c: data[c] for c in range(1, layout.S)}]
    for k in range(2, layout.orders[-1] + 1):
        lower = powers[-1]
        higher: dict[int, Tensor] = {}
        for p in layout.products:
            # unordered pairs: those of two equal factors have both orders at once
            if k == 2:
                scale = 0.5 if p.left == p.right else 1.0
                _add_product(higher, p, data[p.left], data[p.right], scale)
                continue
            for i, j in {(p.left, p.right), (p.right, p.left)}:
                if j in lower:
                    _add_product(higher, p, data[i], lower[j], 1 / k)
        powers.append(higher)
    return powers[1:]


def _add_product(
    totals: dict[int, Tensor], p: Product, left: Tensor, right: Tensor, scale: float
) -> None:
    """Add w · scale · left · right to the total of a channel."""
    total = totals.get(p.channel)
    if isinstance(p.weight, Tensor):
        term = weight_for(p.weight, left) * scale * left * right
        totals[p.channel] = term if total is None else total + term
    elif total is None:
        product = left * right
        totals[p.channel] = product if p.weight * scale == 1 else product * (p.weight * scale)
    else:
        totals[p.channel] = torch.addcmul(total, left, right, value=p.weight * scale)


def weight_for(weight: Tensor, channel: Tensor) -> Tensor:
    """View a weight, one number or one per point, such that it multiplies a channel."""
    return weight.reshape(*weight.shape, *(1,) * (channel.ndim - weight.ndim))


class _Elementwise(torch.autograd.Function):
    """The chain rule for any order, with a hand-written backward.

    The derivative of y = f(x) in the algebra of the channels is the product with f'(x), so its
    adjoint is g_j = Σ_c h_c ∂(f'(x) η)_c / ∂η_j.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, layout: Layout, make: Callable[..., Any]) -> Tensor:
        f = make(data[0])
        ctx.layout, ctx.make = layout, make
        output = data * f[1]
        output[0] = f[0]
        powers = divided_powers(data, layout)
        for k, known in enumerate(powers, 2):
            for c, power in known.items():
                output[c].addcmul_(f[k], power)
        if ctx.needs_input_grad[0]:
            ctx.keys = [list(known) for known in powers]
            slopes = [f[k] for k in range(1, len(powers) + 3)]
            ctx.save_for_backward(data, *slopes, *(P for known in powers for P in known.values()))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        layout: Layout = ctx.layout
        data, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the backward itself is differentiated
            return _differentiable_backward(ctx, data, grad), None, None
        slopes, flat = saved[: len(ctx.keys) + 2], iter(saved[len(ctx.keys) + 2 :])
        derivative = data * slopes[1]  # the channels of f'(x) but the value
        for k, keys in enumerate(ctx.keys, 2):
            for c in keys:
                derivative[c].addcmul_(slopes[k], next(flat))
        result = grad * slopes[0]
        result[0].add_((derivative[1:] * grad[1:]).sum(0))
        for p in layout.products:
            h, value = grad[p.channel], p.weight
            if isinstance(value, Tensor):
                h, value = h * weight_for(value, h), 1.0
            result[p.left].addcmul_(derivative[p.right], h, value=value)
            if p.left != p.right:
                result[p.right].addcmul_(derivative[p.left], h, value=value)
        return result, None, None


def _differentiable_backward(ctx: Any, data: Tensor, grad: Tensor) -> Tensor:
    output = propagate(data, ctx.make(data[0]), ctx.layout)
    return torch.autograd.grad(output, data, grad, create_graph=True)[0]


class _SecondOrder(torch.autograd.Function):
    """The same for order two, with one pass over the channels.

    y_0 = f(x_0),   y_r = f' x_r,   y_c = f' x_c + f'' q_c,  q_c = Σ_rs Q_rs x_r x_s

    g_0 = f' h_0 + f'' Σ_{s>0} x_s h_s + f''' Σ_c q_c h_c
    g_r = f' h_r + 2 f'' Σ_c h_c (Q x)_r,                    g_c = f' h_c
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, layout: Layout, make: Callable[..., Any]) -> Tensor:
        f = make(data[0])
        ctx.layout, ctx.make = layout, make
        first = layout.first(data)
        quadratics = [contraction.quadratic(first) for contraction in layout.contractions]
        if is_tracing():
            output = _channel_by_channel(data, f, layout, quadratics)
        elif layout.S == 1:
            output = f[0][None].clone()
        else:
            output = data * f[1]
            output[0] = f[0]
            for collapsed, quadratic in zip(layout.second(output), quadratics, strict=True):
                collapsed.addcmul_(f[2], quadratic)
        if ctx.needs_input_grad[0]:
            # one order beyond what the output needs; saved tensors are freed by the backward
            order = 1 if layout.S == 1 else (3 if layout.C else 2)
            known = [f[k] for k in range(1, order + 1)]
            ctx.save_for_backward(data, *quadratics, *known)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        layout: Layout = ctx.layout
        data, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the backward itself is differentiated
            return _differentiable_backward(ctx, data, grad), None, None
        quadratics, f = saved[: layout.C], [None, *saved[layout.C :]]
        if is_tracing():
            return _pulled_channel_by_channel(grad, data, f, layout, quadratics), None, None
        result = grad * f[1]
        if layout.S == 1:
            return result, None, None
        curved = data[1] * grad[1]
        for x, h in zip(data[2:], grad[2:], strict=True):
            curved.addcmul_(x, h)
        value = result[0].addcmul_(f[2], curved)
        first, first_result = layout.first(data), layout.first(result)
        for h, contraction, quadratic in zip(
            layout.second(grad), layout.contractions, quadratics, strict=True
        ):
            contraction.add_product_(first_result, first, torch.mul(f[2], h), 2.0)
            value.addcmul_(f[3], torch.mul(h, quadratic, out=curved))
        return result, None, None


def _channel_by_channel(
    data: Tensor, f: Derivatives, layout: Layout, quadratics: Sequence[Tensor]
) -> Tensor:
    """Write y, nothing twice: a compiler makes one loop of it."""
    channels = [f[0], *(f[1] * x for x in data[1:].unbind())]
    for c, quadratic in enumerate(quadratics, 1 + layout.R):
        channels[c] = channels[c] + f[2] * quadratic
    return torch.stack(channels)


def _pulled_channel_by_channel(
    grad: Tensor,
    data: Tensor,
    f: Sequence[Any],
    layout: Layout,
    quadratics: Sequence[Tensor],
) -> Tensor:
    """Write g in the same way."""
    channels = [f[1] * h for h in grad.unbind()]
    if layout.S > 1:
        pairs = zip(data[1:].unbind(), grad[1:].unbind(), strict=True)
        channels[0] = channels[0] + f[2] * sum(x * h for x, h in pairs)
    first = layout.first(data)
    for h, contraction, quadratic in zip(
        layout.second(grad), layout.contractions, quadratics, strict=True
    ):
        channels[0] = channels[0] + f[3] * h * quadratic
        factor = 2 * f[2] * h
        for r, x in zip(contraction.indices, contraction.multiply(first).unbind(), strict=True):
            channels[1 + r] = channels[1 + r] + factor * x
    return torch.stack(channels)


def elementwise_rule(
    derivatives: DerivativesFunction, name: str, piecewise_linear: bool = False
) -> Callable[..., Jet]:
    """Make the rule of an elementwise function from its derivatives."""
    warned = False

    def rule(input: Jet, *args: Any, inplace: bool = False, **kwargs: Any) -> Jet:
        nonlocal warned
        if inplace:
            raise NotImplementedError(in_place_error(name))
        _check_arguments(name, input, [*args, *kwargs.values()])
        if piecewise_linear and input.layout.C and not warned:
            warned = True
            warnings.warn(
                f"The second derivative of {name} (called in {calling_module()}) is zero almost "
                "everywhere, so a second-order operator sees none of its curvature. Use a smooth "
                "activation such as tanh or GELU.",
                stacklevel=2,
            )

        make = partial(_derivatives, derivatives, name, args, kwargs)
        chain_rule = _SecondOrder if input.layout.higher is None else _Elementwise
        return input.like(chain_rule.apply(input.channels, input.layout, make))

    return rule


def _check_arguments(name: str, input: Any, arguments: Sequence[Any]) -> None:
    """Refuse arguments whose derivatives would be dropped."""
    if not isinstance(input, Jet) or any(isinstance(a, Jet) for a in arguments):
        raise NotImplementedError(
            f"torch.{name} must have one jet, its first argument, got one elsewhere (called in "
            f"{calling_module()}). Write the function as products and sums, or by torch.where, "
            "torch.maximum and torch.minimum."
        )
    if any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise NotImplementedError(
            f"The arguments of torch.{name} besides its input must not require a gradient, got one "
            f"that does (called in {calling_module()}). Write the function as products and sums, "
            "or freeze it."
        )


def _derivatives(
    function: DerivativesFunction,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    x: Tensor,
) -> Derivatives:
    return Derivatives(function(x, *args, **kwargs), name)


def register_elementwise(
    *functions: Callable[..., Any], piecewise_linear: bool = False
) -> Callable[[DerivativesFunction], DerivativesFunction]:
    """Register an elementwise function by its derivatives.

    The decorated generator receives the value and the function's other arguments and yields
    f(x), f'(x), f''(x), ... It is advanced only as far as needed: to the order of the differential
    operators, and one order further for their gradients.

        @register_elementwise(torch.sin)
        def sin_derivatives(x):
            sin, cos = torch.sin(x), torch.cos(x)
            yield from (sin, cos, -sin, -cos)

    Args:
        functions: The functions that the derivatives are for, as ``register_rule`` takes them.
        piecewise_linear: The second derivative is zero almost everywhere: a second-order
            operator on such a function warns once.

    Returns:
        A decorator that registers the derivatives and returns them unchanged.
    """

    def register(derivatives: DerivativesFunction) -> DerivativesFunction:
        name = getattr(functions[0], "__name__", str(functions[0]))
        register_rule(*functions)(elementwise_rule(derivatives, name, piecewise_linear))
        return derivatives

    return register
