"""Elementwise functions: every shipped one against nested torch.func."""

import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from pinncurv.jets import (
    Contraction,
    Derivative,
    Jet,
    Layout,
    dispatched,
    merge,
    register_elementwise,
    register_rule,
    seed,
)
from pinncurv.jets.functions import sinc
from tests.jets.layouts import BASIS, CASES, channels, check


def hardsigmoid(x):
    """Torch's own can't be differentiated twice."""
    return functional.hardsigmoid(x) if isinstance(x, Jet) else functional.relu6(x + 3) / 6


SMOOTH = {
    "tanh": torch.tanh,
    "tanh_module": nn.Tanh(),
    "sigmoid": torch.sigmoid,
    "expit": torch.special.expit,
    "sigmoid_module": nn.Sigmoid(),
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "log": torch.log,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "gelu": functional.gelu,
    "gelu_module": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "softplus": functional.softplus,
    "softplus_beta": nn.Softplus(beta=3.0),
    "elu": nn.ELU(alpha=0.7),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "tanhshrink": nn.Tanhshrink(),
    "tan": torch.tan,
    "logsigmoid": nn.LogSigmoid(),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "mish": nn.Mish(),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.5),
    "softsign": nn.Softsign(),
    "hardswish": nn.Hardswish(),
    "asin": lambda x: torch.asin(0.3 * x),
    "acos": lambda x: torch.acos(0.3 * x),
    "log2": torch.log2,
    "log10": torch.log10,
    "exp2": torch.exp2,
    "sinc": lambda x: torch.sinc(0.7 * x),
    "power_0": lambda x: x**0,
    "power_1": lambda x: x**1,
    "power_2": lambda x: x**2,
    "power_3": lambda x: x.pow(3),
    "power_5": lambda x: torch.pow(x, 5.0),
    "power_minus_2": lambda x: x**-2,
    "power_half": lambda x: x**0.5,
    "power_2.3": lambda x: x**2.3,
    "power_tensor": lambda x: x ** torch.tensor(1.5, dtype=torch.float64),
    "float_to_jet": lambda x: 2.5**x,
    "int_to_jet": lambda x: 3**x,
    "tensor_to_jet": lambda x: torch.tensor([1.3, 0.7], dtype=torch.float64) ** x,
    "jet_to_jet": lambda x: x ** (1 + x),
    "method": lambda x: x.sin().exp().tanh(),
}

PIECEWISE_LINEAR = {
    "relu": torch.relu,
    "relu_module": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.2, 0.4),
    "clamp": lambda x: torch.clamp(x, min=-0.1, max=0.35),
    "clip_below": lambda x: x.clip(min=0.1),
    "abs": abs,
    "hardsigmoid": lambda x: hardsigmoid(4 * x),
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": lambda x: x.ceil(),
    "round": lambda x: torch.round(x, decimals=1),
    "trunc": torch.trunc,
}


POSITIVE_ONLY = (
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "power_half",
    "power_2.3",
    "power_tensor",
    "jet_to_jet",
)


@pytest.mark.parametrize(
    ("name", "around"),
    [(n, a) for n in SMOOTH for a in (0.4, -0.8, 2.0) if a > 0 or n not in POSITIVE_ONLY],
)
def test_smooth_functions(name, around):
    """Values, derivatives, their gradients and a second differentiation, on both signs."""
    case = CASES["two_sums"]
    check(case, SMOOTH[name], channels(case, 2, around=around), double=around == 0.4)


def test_sinc_at_zero():
    """Where torch's own derivatives end: Σ (-1)^n (π x)^2n / (2n + 1)!."""
    received = list(itertools.islice(sinc(torch.zeros((), dtype=torch.float64)), 7))
    expected = (1, 0, -(math.pi**2) / 3, 0, math.pi**4 / 5, 0, -(math.pi**6) / 7)
    torch.testing.assert_close(torch.stack(received), torch.tensor(expected).double())


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("name", ["tanh", "gelu", "power_3"])
def test_layouts(layout, name):
    case = CASES[layout]
    check(case, SMOOTH[name], channels(case, 2), double=True)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 4, 2.0])
def test_integer_powers_at_zero(exponent):
    """No 0 * inf: the derivatives at zero are those of the polynomial."""
    case = CASES["two_sums"]
    data = channels(case, 2)
    data[0] = 0
    check(case, lambda x: x**exponent, data, double=True)


def test_softplus_beyond_its_threshold():
    case = CASES["laplacian"]
    check(case, functional.softplus, channels(case, 2, around=30.0), gradients=False)


@pytest.mark.parametrize("around", [30.0, -30.0])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu", "gelu_tanh", "silu", "softplus"])
def test_saturated_activations_are_finite(name, around):
    case = CASES["laplacian"]
    jet = SMOOTH[name](Jet(channels(case, 2, around=around).requires_grad_(), case.layout))
    assert jet.channels.isfinite().all()
    jet.channels.sum().backward()


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear_functions_at_first_order(name):
    case = CASES["gradient"]
    data = channels(case, 2)
    data[0, 1] *= -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(case, PIECEWISE_LINEAR[name], data)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear_functions_at_second_order(name):
    """The second derivative is that of torch, zero almost everywhere."""
    case = CASES["two_sums"]
    data = channels(case, 2)
    data[0, 1] *= -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(case, PIECEWISE_LINEAR[name], data, double=False)


def test_piecewise_linear_function_warns_exactly_once_on_second_order():
    @register_elementwise(functional.threshold, piecewise_linear=True)
    def threshold(x, threshold, value):
        above = x > threshold
        yield torch.where(above, x, value)
        while True:
            yield above.to(x.dtype)
            above = torch.zeros_like(above)

    case, model = CASES["laplacian"], nn.Sequential(nn.Identity(), nn.Threshold(0.1, 0.0))
    jet = Jet(channels(case, 2), case.layout)
    first_order = CASES["gradient"]
    model(Jet(channels(first_order, 2), first_order.layout))
    with pytest.warns(UserWarning, match=r"second derivative of _?threshold \(called in 1\)"):
        model(jet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(jet)


WARNINGS = """
import warnings

import torch

from pinncurv.diffops import Gradient, Laplacian, evaluate
from torch.nn import functional as F

x = torch.rand(3, 2)
functions = [torch.relu, F.leaky_relu, F.relu6, F.hardtanh, torch.abs, lambda x: x.clamp(min=0.5)]
for function in functions:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate({"g": Gradient()}, function, x)
        first_order = len(caught)
        evaluate({"lap": Laplacian()}, function, x)
        evaluate({"lap": Laplacian()}, function, x)
        messages = [str(w.message) for w in caught]
    assert first_order == 0, messages
    assert len(messages) == 1, (function, messages)
    assert "is zero almost everywhere" in messages[0], messages
"""


def test_relu_family_warns_exactly_once_each():
    """In a process of its own: each warns once per process, whichever test came first."""
    subprocess.run([sys.executable, "-c", WARNINGS], check=True, timeout=120)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.ELU(inplace=True), "elu"),
        (nn.LeakyReLU(inplace=True), "leaky_relu"),
    ],
)
def test_in_place_modules_raise(module, name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Identity(), nn.Identity(), module)

        def forward(self, x):
            return self.net(x)

    jet = seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS))
    with pytest.raises(
        NotImplementedError, match=rf"torch\.{name} works in place \(called in net\.2\).*inplace"
    ):
        Model()(jet)


def test_in_place_functions_raise():
    jet = seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS))
    functions = (torch.sin_, torch.tanh_, torch.relu_, functional.relu_)
    calls = [lambda f=f: f(jet) for f in functions]
    for call in (*calls, jet.sin_, lambda: jet.add_(1), lambda: jet.mul_(2)):
        with pytest.raises(NotImplementedError, match=r"Jets are immutable, but .*works in place"):
            call()


def test_exponent_that_requires_grad_raises():
    """It must not be turned into a constant silently."""
    jet = seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS))
    exponent = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="exponent of a jet must not require a gradient"):
        jet**exponent
    with pytest.raises(NotImplementedError, match="one number or a jet"):
        jet ** torch.ones(3)


def test_derivatives_that_end_too_early_raise():
    @register_elementwise(torch.lgamma)
    def lgamma(x):
        yield torch.lgamma(x)
        yield torch.digamma(x)

    layout = Layout(BASIS, (Contraction((0, 1, 2)),))
    torch.lgamma(seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS)))
    with pytest.raises(NotImplementedError, match=r"lgamma must be registered up to order 2"):
        torch.lgamma(seed(torch.ones(2, 3, dtype=torch.float64), layout))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, trained: functional.elu(x, alpha=trained),
        lambda x, trained: functional.celu(x, alpha=trained),
        lambda x, trained: torch.clamp(x, min=trained),
    ],
    ids=["elu", "celu", "clamp"],
)
def test_arguments_that_require_grad_raise(function):
    trained = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="besides its input must not require a gradient"):
        function(seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS)), trained)


@pytest.mark.parametrize("name", [n for n in SMOOTH if n != "tensor_to_jet"])
def test_float32_stays_float32(name):
    case = CASES["two_sums"]
    single = Layout(
        case.layout.directions.float(),
        tuple(
            Contraction(
                c.indices,
                None if c.weights is None else c.weights.float(),
                None if c.matrix is None else c.matrix.float(),
            )
            for c in case.layout.contractions
        ),
    )
    data = channels(case, 2)
    expected = SMOOTH[name](Jet(data, case.layout)).channels
    leaf = data.float().requires_grad_()
    received = SMOOTH[name](Jet(leaf, single)).channels
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.double(), expected, rtol=1e-4, atol=1e-4)
    received.sum().backward()
    assert leaf.grad.dtype == torch.float32
    assert leaf.grad.isfinite().all()


def test_tanh_by_hand():
    """An anchor without the oracle: y = tanh(x1 x2 direction) at one point."""
    layout = Layout(BASIS[:1], (Contraction((0,)),))
    x = torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tanh(seed(x, layout)).channels[:, 0, 0]
    t = math.tanh(0.5)
    torch.testing.assert_close(
        y, torch.tensor([t, 1 - t * t, -2 * t * (1 - t * t)], dtype=torch.float64)
    )


KINKS = {
    "relu": (functional.relu, [0.0]),
    "leaky_relu": (functional.leaky_relu, [0.0]),
    "relu6": (functional.relu6, [0.0, 6.0]),
    "hardtanh": (functional.hardtanh, [-1.0, 1.0]),
    "clamp": (lambda x: x.clamp(-1, 1), [-1.0, 1.0]),
    "hardsigmoid": (functional.hardsigmoid, [-3.0, 3.0]),
    "hardswish": (functional.hardswish, [-3.0, 3.0]),
    "elu": (lambda x: functional.elu(x, 2.0), [0.0]),
    "celu": (lambda x: functional.celu(x, 2.0), [0.0]),
    "selu": (functional.selu, [0.0]),
    "abs": (torch.abs, [0.0]),
    "softsign": (functional.softsign, [0.0]),
}


@pytest.mark.parametrize("name", KINKS)
def test_slopes_at_kinks_are_those_of_torch(name):
    """Zero biases and points on a grid meet them."""
    function, places = KINKS[name]
    x = torch.tensor(places, dtype=torch.float64)[:, None].requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    x = x.detach()
    layout, (channel,) = merge([Derivative.along(torch.ones_like(x[0]))], x)
    torch.testing.assert_close(function(seed(x, layout)).channels[channel], expected)


# --- functions of one's own -----------------------------------------------------------------------


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_an_autograd_function_with_derivatives_of_its_own():
    squared = dispatched(Squared.apply)

    @register_elementwise(squared)
    def derivatives(x):
        yield from (x * x, 2 * x, torch.full_like(x, 2), torch.zeros_like(x))

    x = torch.randn(3, 3, dtype=torch.float64)
    jet = seed(x, Layout(BASIS, (Contraction((0, 1, 2)),)))
    torch.testing.assert_close(squared(jet).channels, torch.square(jet).channels)
    torch.testing.assert_close(squared(x), x * x)


def test_a_rule_of_a_function_of_two_jets_and_of_a_list():
    @dispatched
    def product(parts):
        return parts[0] * parts[1]

    register_rule(product)(lambda parts: 2 * parts[0] * parts[1])
    jet = seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS))
    torch.testing.assert_close(product([jet, jet]).channels, (2 * jet * jet).channels)
    torch.testing.assert_close(product([jet.value, jet.value]), jet.value)


def plain(x):
    return torch.tanh(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (plain, r"plain is none of torch's .* Decorate it with @pinncurv\.jets\.dispatched"),
        (Squared.apply, "apply is none of torch's"),
        (nn.Tanhshrink, "got the class or module Tanhshrink"),
        (nn.Tanh(), r"got the class or module Tanh\(\)"),
        ("tanh", "'tanh' is none of torch's"),
    ],
)
@pytest.mark.parametrize("register", [register_elementwise, register_rule])
def test_what_would_never_ask_for_its_rule_is_refused(register, function, words):
    with pytest.raises(TypeError, match=words):
        register(function)(lambda x: iter(()))
