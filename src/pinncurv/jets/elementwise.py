"""Rules for elementwise functions: the chain rule to second order (Faà di Bruno)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pinncurv.jets.jet import Jet, in_place_error, register_rule
from pinncurv.jets.layout import Layout
from pinncurv.jets.location import calling_module

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

    y_0 = f(x_0),   y_r = f' x_r,   y_c = f' x_c + f'' Σ_rs Q_rs x_r x_s
    """
    slope = f[1] * data[1:]
    parts = [f[0][None], slope[: layout.R]]
    for collapsed, contraction in zip(slope[layout.R :], layout.contractions, strict=True):
        parts.append((collapsed + f[2] * contraction.quadratic(layout.first(data)))[None])
    return torch.cat(parts)


class _Elementwise(torch.autograd.Function):
    """The same, with one pass over the channels and a hand-written backward.

    g_0 = f' h_0 + f'' Σ_{s>0} x_s h_s + f''' Σ_c q_c h_c,  q_c = Σ_rs Q_rs x_r x_s
    g_r = f' h_r + 2 f'' Σ_c h_c (Q x)_r,                    g_c = f' h_c
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, layout: Layout, make: Callable[..., Any]) -> Tensor:
        f = make(data[0])
        ctx.layout, ctx.make = layout, make
        if layout.S == 1:
            output = f[0][None].clone()
        else:
            output = data * f[1]
            output[0] = f[0]
        first = layout.first(data)
        quadratics = []
        for collapsed, contraction in zip(layout.second(output), layout.contractions, strict=True):
            quadratics.append(contraction.quadratic(first))
            collapsed.addcmul_(f[2], quadratics[-1])
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
            output = propagate(data, ctx.make(data[0]), layout)
            return torch.autograd.grad(output, data, grad, create_graph=True)[0], None, None
        quadratics, f = saved[: layout.C], [None, *saved[layout.C :]]
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


def elementwise_rule(
    derivatives: DerivativesFunction, name: str, piecewise_linear: bool = False
) -> Callable[..., Jet]:
    """Make the rule of an elementwise function from its derivatives."""
    warned = False

    def rule(input: Jet, *args: Any, inplace: bool = False, **kwargs: Any) -> Jet:
        nonlocal warned
        if inplace:
            raise NotImplementedError(in_place_error(name))
        if piecewise_linear and input.layout.C and not warned:
            warned = True
            warnings.warn(
                f"The second derivative of {name} (called in {calling_module()}) is zero almost "
                "everywhere, so a second-order operator sees none of its curvature. Use a smooth "
                "activation such as tanh or GELU.",
                stacklevel=2,
            )

        make = partial(_derivatives, derivatives, name, args, kwargs)
        return input.like(_Elementwise.apply(input.data, input.layout, make))

    return rule


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
    f(x), f'(x), f''(x), ... It is advanced only as far as needed: to f' for first-order
    operators, to f'' for second-order ones, and one order further for their gradients.

        @register_elementwise(torch.sin)
        def sin_derivatives(x):
            sin, cos = torch.sin(x), torch.cos(x)
            yield from (sin, cos, -sin, -cos)

    Args:
        functions: The torch functions that the derivatives are for.
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
