"""The derivatives of every shipped elementwise function to order six, on grids with saturation."""

import itertools

import pytest
import torch
from torch.func import grad
from torch.nn import functional

from pinncurv.jets import Contraction, Jet, Layout, functions, supported

ORDERS = 7
MODERATE = [0.3, 0.9, 1.7, 3.0, 12.0]
POSITIVE = [0.01, *MODERATE, 19.9, 20.1, 40.0, 300.0]
EVERYWHERE = [-x for x in POSITIVE] + [0.0, *POSITIVE]
# torch's own higher derivatives of these are NaN far out, ours are not
NEARER = [x for x in EVERYWHERE if abs(x) < 30]
NOT_AT_KINKS = [x for x in EVERYWHERE if x]  # where a higher derivative does not exist

# name of the generator: (torch's function, where)
SMOOTH = {
    "tanh": (torch.tanh, EVERYWHERE),
    "tanhshrink": (functional.tanhshrink, EVERYWHERE),
    "tan": (torch.tan, [0.0, *MODERATE]),
    "sigmoid": (torch.sigmoid, EVERYWHERE),
    "logsigmoid": (functional.logsigmoid, EVERYWHERE),
    "sin": (torch.sin, EVERYWHERE),
    "cos": (torch.cos, EVERYWHERE),
    "sinh": (torch.sinh, EVERYWHERE),
    "cosh": (torch.cosh, EVERYWHERE),
    "atan": (torch.atan, EVERYWHERE),
    "asinh": (torch.asinh, EVERYWHERE),
    "exp": (torch.exp, EVERYWHERE),
    "expm1": (torch.expm1, EVERYWHERE),
    "log": (torch.log, POSITIVE),
    "log1p": (torch.log1p, [-0.5, 0.0, *POSITIVE]),
    "reciprocal": (torch.reciprocal, NOT_AT_KINKS),
    "sqrt": (torch.sqrt, POSITIVE),
    "rsqrt": (torch.rsqrt, POSITIVE),
    "square": (torch.square, EVERYWHERE),
    "gelu": (functional.gelu, NEARER),
    "silu": (functional.silu, EVERYWHERE),
    "mish": (functional.mish, NEARER),
    "softplus": (functional.softplus, EVERYWHERE),
    "elu": (functional.elu, NOT_AT_KINKS),
    "selu": (functional.selu, NOT_AT_KINKS),
    "celu": (functional.celu, NOT_AT_KINKS),
    "softsign": (functional.softsign, NOT_AT_KINKS),
    "erf": (torch.erf, EVERYWHERE),
    "erfc": (torch.erfc, EVERYWHERE),
    "hardswish": (functional.hardswish, EVERYWHERE),
    "asin": (torch.asin, [-0.6, -0.2, 0.1, 0.5]),
    "acos": (torch.acos, [-0.6, -0.2, 0.1, 0.5]),
    "log2": (torch.log2, POSITIVE),
    "log10": (torch.log10, POSITIVE),
    "exp2": (torch.exp2, NEARER),
    "sinc": (torch.sinc, [0.3, 0.7, 1.2]),
}
OPTIONS = {
    "gelu_tanh": ("gelu", {"approximate": "tanh"}),
    "softplus_beta": ("softplus", {"beta": 3.0}),
    "softplus_threshold": ("softplus", {"beta": 0.5, "threshold": 2.0}),
    "elu_alpha": ("elu", {"alpha": 0.7}),
    "celu_alpha": ("celu", {"alpha": 0.5}),  # torch rounds 1 / alpha to single precision
}


def _derivatives(name, x, **options):
    return list(itertools.islice(getattr(functions, name)(x, **options), ORDERS))


@pytest.mark.parametrize("name", [*SMOOTH, *OPTIONS])
def test_derivatives_to_order_six(name):
    """Each is the repeated torch.func.grad of torch's own function, point by point."""
    generator, options = OPTIONS.get(name, (name, {}))
    function, grid = SMOOTH[generator]
    x = torch.tensor(grid, dtype=torch.float64)

    def expected(x):
        return function(x, **options)

    derivatives = _derivatives(generator, x, **options)
    assert len(derivatives) == ORDERS
    for order, received in enumerate(derivatives):
        wanted = expected(x)
        assert wanted.isfinite().all()
        torch.testing.assert_close(
            received, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, k=order: f"order {k}: {m}"
        )
        expected = grad(lambda x, f=expected: f(x).sum())


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 6, 7, -1, -2, 0.5, 2.3])
def test_powers_to_order_six(exponent):
    """At zero, too, where they are finite there."""
    whole = isinstance(exponent, int) and exponent >= 0
    x = torch.tensor(EVERYWHERE if whole else POSITIVE, dtype=torch.float64)
    received = itertools.islice(functions._power_derivatives(x, exponent), ORDERS)
    coefficient, power = 1.0, exponent
    for derivative in received:
        wanted = coefficient * x**power if coefficient else torch.zeros_like(x)
        torch.testing.assert_close(derivative, wanted, rtol=1e-12, atol=0.0)
        coefficient, power = coefficient * power, power - 1


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "mish"])
def test_far_out_where_torch_has_none(name):
    generator, options = OPTIONS.get(name, (name, {}))
    x = torch.tensor([-1e3, -300.0, 300.0, 1e3], dtype=torch.float64)
    value, slope, *higher = _derivatives(generator, x, **options)
    torch.testing.assert_close(value, x.clamp(min=0))
    torch.testing.assert_close(slope, (x > 0).double())
    for derivative in higher:
        torch.testing.assert_close(derivative, torch.zeros_like(x))


@pytest.mark.parametrize("name", [*SMOOTH, *OPTIONS])
def test_single_precision_stays_finite(name):
    generator, options = OPTIONS.get(name, (name, {}))
    grid = [x for x in SMOOTH[generator][1] if abs(x) < 50]
    x = torch.tensor(grid)
    reference = _derivatives(generator, x.double(), **options)
    for order, derivative in enumerate(_derivatives(generator, x, **options)):
        assert derivative.dtype == torch.float32
        assert derivative.isfinite().all(), (order, derivative)
        if order < 3:
            torch.testing.assert_close(derivative.double(), reference[order], rtol=1e-4, atol=1e-4)


def test_every_elementwise_function_is_tested():
    generators = {n for n, f in vars(functions).items() if _is_generator(f)}
    piecewise = {"relu", "leaky_relu", "clamp", "hardtanh", "relu6", "absolute", "hardsigmoid"}
    assert generators == set(SMOOTH) | piecewise
    assert {"asinh", "erfc", "nn.functional.hardsigmoid", "round", "sgn"} <= set(supported())


def _is_generator(function):
    """Whether it is public, of the module itself, and yields derivatives."""
    name = getattr(function, "__name__", "_")
    own = getattr(function, "__module__", "") == functions.__name__
    return own and not name.startswith("_") and name not in ("power", "derivatives")


@pytest.mark.parametrize("name", ["sign", "sgn", "floor", "ceil", "round", "trunc"])
@pytest.mark.filterwarnings("ignore:The second derivative of")
def test_steps_have_no_derivatives(name):
    layout = Layout(torch.eye(2, dtype=torch.float64), (Contraction((0, 1)),))
    data = torch.randn(4, 3, 2, dtype=torch.float64)
    result = getattr(torch, name)(Jet(data, layout))
    torch.testing.assert_close(result.value, getattr(torch, name)(data[0]))
    assert not result.channels[1:].any()
