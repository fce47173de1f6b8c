"""The derivatives of the elementwise functions that torch offers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pinncurv.jets.bilinear import mul
from pinncurv.jets.elementwise import elementwise_rule, register_elementwise
from pinncurv.jets.jet import Jet, register_rule


@register_elementwise(torch.tanh)
def tanh(x: Tensor) -> Iterator[Tensor]:
    """tanh: f' = 1 - f², f'' = -2 f f', f''' = -2 (f'² + f f'')."""
    f = torch.tanh(x)
    yield f
    slope = torch.addcmul(torch.ones((), dtype=x.dtype, device=x.device), f, f, value=-1)
    yield slope
    curvature = (f * slope).mul_(-2)
    yield curvature
    yield torch.addcmul(slope * slope, f, curvature).mul_(-2)
    yield f * slope * (16 - 24 * f * f)


@register_elementwise(torch.sigmoid, torch.special.expit)
def sigmoid(x: Tensor) -> Iterator[Tensor]:
    """Logistic function: f' = f (1 - f)."""
    f = torch.sigmoid(x)
    yield from _sigmoid_derivatives(f)


def _sigmoid_derivatives(f: Tensor) -> Iterator[Tensor]:
    """Derivatives of the logistic function from its value."""
    yield f
    slope = f * (1 - f)
    yield slope
    yield slope * (1 - 2 * f)
    yield slope * (1 - 6 * slope)
    yield slope * (1 - 2 * f) * (1 - 12 * slope)


@register_elementwise(torch.sin)
def sin(x: Tensor) -> Iterator[Tensor]:
    """sin, cos, -sin, -cos, ..."""
    f, slope = torch.sin(x), torch.cos(x)
    yield from (f, slope, -f, -slope, f)


@register_elementwise(torch.cos)
def cos(x: Tensor) -> Iterator[Tensor]:
    """cos, -sin, -cos, sin, ..."""
    f, s = torch.cos(x), torch.sin(x)
    yield from (f, -s, -f, s, f)


@register_elementwise(torch.exp)
def exp(x: Tensor) -> Iterator[Tensor]:
    """exp is its own derivative."""
    f = torch.exp(x)
    while True:
        yield f


@register_elementwise(torch.log)
def log(x: Tensor) -> Iterator[Tensor]:
    """log x, 1/x, -1/x², ..."""
    yield torch.log(x)
    yield from _power_derivatives(x, -1.0)


@register_elementwise(torch.reciprocal)
def reciprocal(x: Tensor) -> Iterator[Tensor]:
    """1/x, -1/x², 2/x³, ..."""
    yield from _power_derivatives(x, -1.0)


@register_elementwise(torch.sqrt)
def sqrt(x: Tensor) -> Iterator[Tensor]:
    """Powers of exponent 1/2, -1/2, ..."""
    yield torch.sqrt(x)
    for derivative in _power_derivatives(x, -0.5):
        yield 0.5 * derivative


@register_elementwise(torch.rsqrt)
def rsqrt(x: Tensor) -> Iterator[Tensor]:
    """Powers of exponent -1/2, -3/2, ..."""
    yield from _power_derivatives(x, -0.5)


def _power_derivatives(x: Tensor, exponent: float) -> Iterator[Tensor]:
    """x^p, p x^(p-1), ...; a vanished coefficient ends in zeros instead of 0 · x^(-1)."""
    coefficient = 1.0
    while coefficient != 0:
        yield coefficient * x**exponent
        coefficient *= exponent
        exponent -= 1
    while True:
        yield torch.zeros_like(x)


@register_elementwise(torch.square)
def square(x: Tensor) -> Iterator[Tensor]:
    """x², 2x, 2, 0, ..."""
    yield from _power_derivatives(x, 2)


@register_elementwise(functional.gelu)
def gelu(x: Tensor, approximate: str = "none") -> Iterator[Tensor]:
    """x Φ(x) with the normal distribution function, or its tanh approximation."""
    yield functional.gelu(x, approximate=approximate)
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        yield 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
        yield (2 - x * x) * density
        yield (x**3 - 4 * x) * density
        yield (-(x**4) + 7 * x * x - 4) * density
        return
    # x s(w(x)), s the logistic function and w(x) = 2 sqrt(2/π) (x + 0.044715 x³)
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    inner = (
        scale * (1 + 3 * cubic * x * x),
        scale * 6 * cubic * x,
        torch.full_like(x, scale * 6 * cubic),
        torch.zeros_like(x),
    )
    outer = list(_sigmoid_derivatives(torch.sigmoid(scale * (x + cubic * x**3))))
    yield from _times_identity(x, _compose(outer, inner))


def _compose(outer: list[Tensor], inner: tuple[Tensor, ...]) -> list[Tensor]:
    """Derivatives of s(w(x)) to order four from those of s at w(x) and w', w'', ... at x."""
    _, s1, s2, s3, s4 = outer
    w1, w2, w3, w4 = inner
    return [
        outer[0],
        s1 * w1,
        s2 * w1**2 + s1 * w2,
        s3 * w1**3 + 3 * s2 * w1 * w2 + s1 * w3,
        s4 * w1**4 + 6 * s3 * w1**2 * w2 + s2 * (3 * w2**2 + 4 * w1 * w3) + s1 * w4,
    ]


def _times_identity(x: Tensor, factor: list[Tensor]) -> Iterator[Tensor]:
    """Derivatives of x s(x) beyond the value: x s^(k) + k s^(k-1)."""
    for order in range(1, len(factor)):
        yield x * factor[order] + order * factor[order - 1]


@register_elementwise(functional.silu)
def silu(x: Tensor) -> Iterator[Tensor]:
    """x s(x) with the logistic function s."""
    yield functional.silu(x)
    yield from _times_identity(x, list(_sigmoid_derivatives(torch.sigmoid(x))))


@register_elementwise(functional.softplus)
def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Iterator[Tensor]:
    """log(1 + exp(β x)) / β; its slope is the logistic function, without torch's threshold."""
    yield functional.softplus(x, beta, threshold)
    for order, derivative in enumerate(_sigmoid_derivatives(torch.sigmoid(beta * x))):
        yield beta**order * derivative


@register_elementwise(functional.elu)
def elu(x: Tensor, alpha: float = 1.0) -> Iterator[Tensor]:
    """x for x > 0, α (exp(x) - 1) otherwise."""
    yield functional.elu(x, alpha)
    negative = alpha * torch.exp(x.clamp(max=0))
    yield torch.where(x > 0, 1.0, negative)
    while True:
        yield torch.where(x > 0, 0.0, negative)


@register_elementwise(torch.erf)
def erf(x: Tensor) -> Iterator[Tensor]:
    """Error function: f' = 2/sqrt(π) exp(-x²)."""
    yield torch.erf(x)
    slope = 2 / math.sqrt(math.pi) * torch.exp(-x * x)
    yield slope
    yield -2 * x * slope
    yield (4 * x * x - 2) * slope
    yield (12 * x - 8 * x**3) * slope


@register_elementwise(functional.relu, torch.relu, piecewise_linear=True)
def relu(x: Tensor) -> Iterator[Tensor]:
    """max(x, 0)."""
    yield torch.relu(x)
    yield from _piecewise_constant((x > 0).to(x.dtype))


@register_elementwise(functional.leaky_relu, piecewise_linear=True)
def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Iterator[Tensor]:
    """max(x, 0) + slope · min(x, 0)."""
    yield functional.leaky_relu(x, negative_slope)
    yield from _piecewise_constant(torch.where(x > 0, torch.ones_like(x), negative_slope))


@register_elementwise(torch.clamp, torch.clip, piecewise_linear=True)
def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Iterator[Tensor]:
    """Cut off outside [min, max]."""
    f = torch.clamp(x, min, max)
    yield f
    yield from _piecewise_constant((f == x).to(x.dtype))


@register_elementwise(functional.hardtanh, piecewise_linear=True)
def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Iterator[Tensor]:
    """Cut off outside [min_val, max_val]."""
    return clamp(x, min_val, max_val)


@register_elementwise(functional.relu6, piecewise_linear=True)
def relu6(x: Tensor) -> Iterator[Tensor]:
    """Cut off outside [0, 6]."""
    return clamp(x, 0.0, 6.0)


@register_elementwise(torch.abs, Tensor.__abs__, piecewise_linear=True)
def absolute(x: Tensor) -> Iterator[Tensor]:
    """Absolute value."""
    yield torch.abs(x)
    yield from _piecewise_constant(torch.sign(x))


def _piecewise_constant(slope: Tensor) -> Iterator[Tensor]:
    """The slope, then zeros."""
    yield slope
    while True:
        yield torch.zeros_like(slope)


_scalar_power = elementwise_rule(_power_derivatives, "pow")


@register_rule(torch.pow, Tensor.__pow__)
def power(input: Jet | Tensor | float, exponent: Jet | Tensor | float) -> Jet:
    """Jet to a scalar power, scalar to the power of a jet, or both jets (base positive)."""
    if isinstance(exponent, Jet):
        logarithm = math.log(input) if isinstance(input, float | int) else input.log()
        return mul(logarithm, exponent).exp()
    if isinstance(exponent, Tensor):
        if exponent.requires_grad:
            raise NotImplementedError(
                "The exponent of a jet must not require a gradient, got a tensor that does. Write "
                "torch.exp(exponent * torch.log(x)) instead."
            )
        if exponent.numel() != 1:
            raise NotImplementedError(
                "The exponent of a jet must be one number or a jet, got a tensor of shape "
                f"{tuple(exponent.shape)}. Write torch.exp(exponent * torch.log(x)) instead."
            )
        exponent = exponent.item()
    return _scalar_power(input, exponent)
