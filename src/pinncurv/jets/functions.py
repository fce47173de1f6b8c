"""The derivatives of the elementwise functions that torch offers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pinncurv.jets.bilinear import mul
from pinncurv.jets.elementwise import (
    DerivativesFunction,
    elementwise_rule,
    register_elementwise,
)
from pinncurv.jets.jet import Jet, register_rule
from pinncurv.jets.location import calling_module


def _autonomous(f: Tensor, slope: Tensor, q: Sequence[float], start: int) -> Iterator[Tensor]:
    """Derivatives of a solution of f' = q(f), from one order on to order six.

    f^(k) = q(f) R_k(f),  R_1 = 1,  R_{k+1} = (q R_k)'

    Args:
        f: The value.
        slope: f'.
        q: The coefficients of the polynomial q, the constant first.
        start: The first order.
    """
    R = [1.0]
    for order in range(2, 7):
        product = [0.0] * (len(R) + len(q) - 1)
        for a, x in enumerate(R):
            for b, y in enumerate(q):
                product[a + b] += x * y
        R = [k * c for k, c in enumerate(product)][1:]
        if order >= start:
            value = torch.full_like(f, R[-1])
            for c in reversed(R[:-1]):
                value = value * f + c
            yield slope * value


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
    yield from _autonomous(f, slope, (1, 0, -1), 4)


@register_elementwise(functional.tanhshrink)
def tanhshrink(x: Tensor) -> Iterator[Tensor]:
    """x - tanh x."""
    value, slope, *higher = tanh(x)
    yield x - value
    yield 1 - slope
    for derivative in higher:
        yield -derivative


@register_elementwise(torch.tan)
def tan(x: Tensor) -> Iterator[Tensor]:
    """tan: f' = 1 + f²."""
    f = torch.tan(x)
    yield f
    slope = 1 + f * f
    yield slope
    yield from _autonomous(f, slope, (1, 0, 1), 2)


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
    yield from _autonomous(f, slope, (0, 1, -1), 4)


@register_elementwise(functional.logsigmoid)
def logsigmoid(x: Tensor) -> Iterator[Tensor]:
    """log s(x) with the logistic function s: f' = s(-x)."""
    yield functional.logsigmoid(x)
    for order, derivative in enumerate(_sigmoid_derivatives(torch.sigmoid(-x))):
        yield derivative if order % 2 == 0 else -derivative


@register_elementwise(torch.sin)
def sin(x: Tensor) -> Iterator[Tensor]:
    """sin, cos, -sin, -cos, ..."""
    f, slope = torch.sin(x), torch.cos(x)
    yield from cycle((f, slope, -f, -slope))


@register_elementwise(torch.cos)
def cos(x: Tensor) -> Iterator[Tensor]:
    """cos, -sin, -cos, sin, ..."""
    f, s = torch.cos(x), torch.sin(x)
    yield from cycle((f, -s, -f, s))


@register_elementwise(torch.sinh)
def sinh(x: Tensor) -> Iterator[Tensor]:
    """sinh, cosh, ..."""
    yield from cycle((torch.sinh(x), torch.cosh(x)))


@register_elementwise(torch.cosh)
def cosh(x: Tensor) -> Iterator[Tensor]:
    """cosh, sinh, ..."""
    yield from cycle((torch.cosh(x), torch.sinh(x)))


@register_elementwise(torch.atan, torch.arctan)
def atan(x: Tensor) -> Iterator[Tensor]:
    """atan: f' = 1 / (1 + x²)."""
    yield torch.atan(x)
    yield from _power_of_one_plus_square(x, -1.0)


@register_elementwise(torch.asinh, torch.arcsinh)
def asinh(x: Tensor) -> Iterator[Tensor]:
    """asinh: f' = 1 / sqrt(1 + x²)."""
    yield torch.asinh(x)
    yield from _power_of_one_plus_square(x, -0.5)


def _power_of_one_plus_square(x: Tensor, exponent: float) -> Iterator[Tensor]:
    """(1 + x²)^p and its derivatives."""
    inner = (2 * x, torch.full_like(x, 2.0))
    return _compose(_power_derivatives(1 + x * x, exponent), inner)


@register_elementwise(torch.asin, torch.arcsin)
def asin(x: Tensor) -> Iterator[Tensor]:
    """asin: f' = 1 / sqrt(1 - x²)."""
    yield torch.asin(x)
    inner = (-2 * x, torch.full_like(x, -2.0))
    yield from _compose(_power_derivatives(1 - x * x, -0.5), inner)


@register_elementwise(torch.acos, torch.arccos)
def acos(x: Tensor) -> Iterator[Tensor]:
    """π/2 - asin x."""
    for order, derivative in enumerate(asin(x)):
        yield torch.acos(x) if order == 0 else -derivative


@register_elementwise(torch.expm1, torch.special.expm1)
def expm1(x: Tensor) -> Iterator[Tensor]:
    """exp x - 1."""
    yield torch.expm1(x)
    yield from exp(x)


@register_elementwise(torch.log1p, torch.special.log1p)
def log1p(x: Tensor) -> Iterator[Tensor]:
    """log(1 + x)."""
    yield torch.log1p(x)
    yield from _power_derivatives(1 + x, -1.0)


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


@register_elementwise(torch.log2)
def log2(x: Tensor) -> Iterator[Tensor]:
    """log x / log 2."""
    yield torch.log2(x)
    for derivative in _power_derivatives(x, -1.0):
        yield derivative / math.log(2)


@register_elementwise(torch.log10)
def log10(x: Tensor) -> Iterator[Tensor]:
    """log x / log 10."""
    yield torch.log10(x)
    for derivative in _power_derivatives(x, -1.0):
        yield derivative / math.log(10)


@register_elementwise(torch.exp2, torch.special.exp2)
def exp2(x: Tensor) -> Iterator[Tensor]:
    """2^x: f' = log 2 f."""
    f = torch.exp2(x)
    for order in count():
        yield f * math.log(2) ** order


@register_elementwise(torch.sinc, torch.special.sinc)
def sinc(x: Tensor) -> Iterator[Tensor]:
    """sin(πx) / (πx): x f^(k) + k f^(k-1) = (sin(πx) / π)^(k), near zero by its power series."""
    f = torch.sinc(x)
    yield f
    near = x.abs() < 1
    far = torch.where(near, 1.0, x)
    inner = torch.where(near, x, 0.0)
    sine, cosine = torch.sin(math.pi * far), torch.cos(math.pi * far)
    for order, numerator in enumerate(cycle((cosine, -sine, -cosine, sine)), 1):
        f = (math.pi ** (order - 1) * numerator - order * f) / far
        series = torch.zeros_like(x)
        for n in range(20, (order + 1) // 2 - 1, -1):  # Horner's rule, in x²
            c = (-1) ** n * math.pi ** (2 * n) / math.factorial(2 * n + 1) * math.perm(2 * n, order)
            series = series * inner * inner + c
        yield torch.where(near, series * inner ** (order % 2), f)


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


def _root_derivatives(x: Tensor, order: float, flat: bool) -> Iterator[Tensor]:
    """x^(1/p), with torch's subgradient 0 at 0; all derivatives are 0 there if it is flat."""
    for k, derivative in enumerate(_power_derivatives(x, 1 / order)):
        at_zero = k == 1 or (flat and k > 1)
        yield torch.where(x == 0, 0.0, derivative) if at_zero else derivative


root = elementwise_rule(_root_derivatives, "norm")


@register_elementwise(torch.square)
def square(x: Tensor) -> Iterator[Tensor]:
    """x², 2x, 2, 0, ..."""
    yield from _power_derivatives(x, 2)


@register_elementwise(functional.gelu)
def gelu(x: Tensor, approximate: str = "none") -> Iterator[Tensor]:
    """x Φ(x) with the normal distribution function, or its tanh approximation."""
    yield functional.gelu(x, approximate=approximate)
    if approximate == "none":
        distribution = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        yield from _times_identity(x, chain([distribution], _hermite_functions(x, density)))
        return
    # x s(w(x)), s the logistic function and w(x) = 2 sqrt(2/π) (x + 0.044715 x³)
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    inner = (
        scale * (1 + 3 * cubic * x * x),
        scale * 6 * cubic * x,
        torch.full_like(x, scale * 6 * cubic),
    )
    outer = _sigmoid_derivatives(torch.sigmoid(scale * (x + cubic * x**3)))
    yield from _times_identity(x, _compose(outer, inner))


def _hermite_functions(x: Tensor, density: Tensor) -> Iterator[Tensor]:
    """The derivatives of exp(-x²/2), times a constant: φ^(k+1) = -x φ^(k) - k φ^(k-1)."""
    yield density
    before, now = density, -x * density
    for k in range(1, 7):
        yield now
        before, now = now, -x * now - k * before


def _compose(outer: Iterable[Tensor], inner: Sequence[Tensor]) -> Iterator[Tensor]:
    """Derivatives of s(w(x)) from those of s at w(x) and w', w'', ... at x (Faà di Bruno).

    Args:
        outer: s, s', ... at w(x).
        inner: w', w'', ...; those that are left out are zero.
    """
    known: list[Tensor] = []
    bell: dict[tuple[int, int], Tensor] = {}  # Bell's polynomials B_nk(w', w'', ...)
    for n, derivative in enumerate(outer):
        known.append(derivative)
        for k in range(1, n + 1):
            terms = [inner[n - 1]] if k == 1 and n <= len(inner) else []
            for i in range(1, min(n - k + 1, len(inner)) + 1) if k > 1 else ():
                if (n - i, k - 1) in bell:
                    terms.append(math.comb(n - 1, i - 1) * inner[i - 1] * bell[n - i, k - 1])
            if terms:
                bell[n, k] = sum(terms[1:], terms[0])
        parts = [known[k] * bell[n, k] for k in range(1, n + 1) if (n, k) in bell]
        yield sum(parts[1:], parts[0]) if parts else derivative


def _times_identity(x: Tensor, factor: Iterable[Tensor]) -> Iterator[Tensor]:
    """Derivatives of x s(x) beyond the value: x s^(k) + k s^(k-1)."""
    before = x
    for order, derivative in enumerate(factor):
        if order:
            yield x * derivative + order * before
        before = derivative


@register_elementwise(functional.silu)
def silu(x: Tensor) -> Iterator[Tensor]:
    """x s(x) with the logistic function s."""
    yield functional.silu(x)
    yield from _times_identity(x, _sigmoid_derivatives(torch.sigmoid(x)))


@register_elementwise(functional.mish)
def mish(x: Tensor) -> Iterator[Tensor]:
    """x tanh(log(1 + exp x))."""
    yield functional.mish(x)
    plus = functional.softplus(x)
    inner = list(_sigmoid_derivatives(torch.sigmoid(x)))
    yield from _times_identity(x, _compose(tanh(plus), inner))


@register_elementwise(functional.softplus)
def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Iterator[Tensor]:
    """log(1 + exp(β x)) / β; its slope is the logistic function, and linear above a threshold."""
    yield functional.softplus(x, beta, threshold)
    scaled = beta * x
    for order, derivative in enumerate(_sigmoid_derivatives(torch.sigmoid(scaled))):
        linear = scaled >= threshold if order else scaled > threshold  # as torch does
        yield torch.where(linear, float(order == 0), beta**order * derivative)


@register_elementwise(functional.elu)
def elu(x: Tensor, alpha: float = 1.0) -> Iterator[Tensor]:
    """x for x > 0, α (exp(x) - 1) otherwise."""
    yield functional.elu(x, alpha)
    yield from _exponential_below_zero(x, alpha)


def _exponential_below_zero(
    x: Tensor, factor: float, rate: float = 1.0, slope: float = 1.0
) -> Iterator[Tensor]:
    """Derivatives of factor exp(rate x) for x <= 0, of slope x above; higher ones 0 at 0."""
    negative = rate * factor * torch.exp(rate * x.clamp(max=0))
    yield torch.where(x > 0, slope, negative)
    while True:
        negative = rate * negative
        yield torch.where(x < 0, negative, 0.0)


@register_elementwise(torch.selu, functional.selu)
def selu(x: Tensor) -> Iterator[Tensor]:
    """Scaled ELU, with the constants of Klambauer et al. 2017."""
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    yield torch.selu(x)
    yield from _exponential_below_zero(x, alpha * scale, slope=scale)


@register_elementwise(torch.celu, functional.celu)
def celu(x: Tensor, alpha: float = 1.0) -> Iterator[Tensor]:
    """x for x > 0, α (exp(x / α) - 1) otherwise."""
    yield functional.celu(x, alpha)
    yield from _exponential_below_zero(x, alpha, 1 / alpha)


@register_elementwise(functional.softsign)
def softsign(x: Tensor) -> Iterator[Tensor]:
    """x / (1 + |x|): f^(k) = k! (-sign x)^(k-1) / (1 + |x|)^(k+1)."""
    yield functional.softsign(x)
    inverse = 1 / (1 + x.abs())
    derivative = inverse * inverse
    for k in count(2):
        yield derivative
        derivative = -k * torch.sign(x) * inverse * derivative


@register_elementwise(torch.erf, torch.special.erf)
def erf(x: Tensor) -> Iterator[Tensor]:
    """Error function: f' = 2/sqrt(π) exp(-x²)."""
    yield torch.erf(x)
    root = math.sqrt(2)
    slope = 2 / math.sqrt(math.pi) * torch.exp(-x * x)
    for order, derivative in enumerate(_hermite_functions(root * x, slope)):
        yield root**order * derivative


@register_elementwise(torch.erfc, torch.special.erfc)
def erfc(x: Tensor) -> Iterator[Tensor]:
    """1 - erf x."""
    for order, derivative in enumerate(erf(x)):
        yield torch.erfc(x) if order == 0 else -derivative


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


@functools.cache
def _slope_at_bounds() -> float:
    """Return torch's slope of clamp at its bounds: 1 up to torch 2.13, 0 from 2.14 on."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        zero = torch.zeros((), requires_grad=True)
        return float(torch.autograd.grad(zero.clamp(0, 1), zero)[0])


@register_elementwise(torch.clamp, torch.clip, piecewise_linear=True)
def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Iterator[Tensor]:
    """Cut off outside [min, max]."""
    f = torch.clamp(x, min, max)
    yield f
    slope = (f == x).to(x.dtype)
    for bound in (min, max):
        if bound is not None:
            slope = slope.where(x != bound, _slope_at_bounds())
    yield from _piecewise_constant(slope)


@register_elementwise(functional.hardtanh, piecewise_linear=True)
def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Iterator[Tensor]:
    """Cut off outside [min_val, max_val]; unlike that of clamp, the slope is 0 at the edges."""
    yield torch.clamp(x, min_val, max_val)
    yield from _piecewise_constant(((x > min_val) & (x < max_val)).to(x.dtype))


@register_elementwise(functional.relu6, piecewise_linear=True)
def relu6(x: Tensor) -> Iterator[Tensor]:
    """Cut off outside [0, 6]."""
    return hardtanh(x, 0.0, 6.0)


@register_elementwise(torch.abs, Tensor.__abs__, piecewise_linear=True)
def absolute(x: Tensor) -> Iterator[Tensor]:
    """Absolute value."""
    yield torch.abs(x)
    yield from _piecewise_constant(torch.sign(x))


@register_elementwise(functional.hardsigmoid, piecewise_linear=True)
def hardsigmoid(x: Tensor) -> Iterator[Tensor]:
    """x/6 + 1/2, cut off outside [0, 1]."""
    yield functional.hardsigmoid(x)
    yield from _piecewise_constant((x.abs() < 3).to(x.dtype) / 6)


@register_elementwise(functional.hardswish)
def hardswish(x: Tensor) -> Iterator[Tensor]:
    """x times the above."""
    yield functional.hardswish(x)
    between = x.abs() < 3
    yield torch.where(between, x / 3 + 0.5, (x > 0).to(x.dtype))
    yield from _piecewise_constant(between.to(x.dtype) / 3)


def _steps(function: Callable[..., Tensor], slope: float) -> DerivativesFunction:
    """Make the derivatives of a function that has the same slope almost everywhere."""

    def derivatives(x: Tensor, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        f = function(x, *args, **kwargs)
        yield f
        yield from _piecewise_constant(torch.full_like(f, slope))

    return derivatives


for _function in (torch.sign, torch.sgn, torch.floor, torch.ceil, torch.round, torch.trunc):
    register_elementwise(_function, piecewise_linear=True)(_steps(_function, 0.0))
register_elementwise(torch.floor_divide, piecewise_linear=True)(_steps(torch.floor_divide, 0.0))
register_elementwise(torch.remainder, piecewise_linear=True)(_steps(torch.remainder, 1.0))
register_elementwise(torch.fmod, piecewise_linear=True)(_steps(torch.fmod, 1.0))


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
        if isinstance(input, float | int):
            if input <= 0:
                raise ValueError(
                    f"The base of a power whose exponent is a jet must be positive, got {input} "
                    f"(in {calling_module()}). Write the function by torch.where and powers of "
                    "positive numbers."
                )
            return mul(math.log(input), exponent).exp()
        return mul(input.log(), exponent).exp()
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
