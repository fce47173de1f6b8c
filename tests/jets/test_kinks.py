"""At kinks, where derivatives are a convention: that of torch's nested reverse mode, or not finite.

Value and derivatives to order four, and the gradient of each, from layouts of several orders.
"""

import warnings

import pytest
import torch
from torch.nn import functional

from pinncurv.jets import Derivative, merge, seed


def pair(x):
    """A vector that vanishes with x, and others that differ from it in size."""
    return torch.stack([x, 2 * x], -1)


def apart(x):
    return torch.stack([x, 2 * x + 1], -1)


def three(x):
    return torch.stack([x, x * x, x**3], -1)


pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # which takes longer than what is tested

NAMES = "abs sign floor ceil round trunc relu sqrt rsqrt reciprocal log square"
ACTIVATIONS = "elu selu celu softsign relu leaky_relu relu6 hardtanh hardswish softplus"
CASES = {
    **{name: (getattr(torch, name), (0.0, 1.0, 2.5)) for name in NAMES.split()},
    **{name: (getattr(functional, name), (0.0, 1.0, -1.0)) for name in ACTIVATIONS.split()},
    "relu6_above": (functional.relu6, (6.0,)),
    "hardswish_ends": (functional.hardswish, (3.0, -3.0)),
    "hardtanh_other": (lambda x: functional.hardtanh(x, 0.0, 2.0), (0.0, 2.0)),
    "elu_alpha": (lambda x: functional.elu(x, 0.7), (0.0,)),
    "celu_alpha": (lambda x: functional.celu(x, 0.5), (0.0,)),
    "softplus_threshold": (lambda x: functional.softplus(x, 2.0, 4.0), (2.0,)),
    "prelu": (lambda x: functional.prelu(x, x.new_full((1,), 0.25)), (0.0,)),
    "clamp": (lambda x: x.clamp(-1, 1), (-1.0, 1.0)),
    "clamp_below": (lambda x: x.clamp(min=0), (0.0,)),
    "clamp_to_one_number": (lambda x: x.clamp(1, 1), (1.0,)),
    "remainder": (lambda x: x % 1.0, (0.0, 1.0)),
    "fmod": (lambda x: torch.fmod(x, 1.0), (0.0, 1.0)),
    "maximum": (lambda x: torch.maximum(x, x * x), (0.0, 1.0)),
    "maximum_zero": (lambda x: torch.maximum(x, torch.zeros_like(x)), (0.0,)),
    "minimum": (lambda x: torch.minimum(x, x**3), (0.0, 1.0)),
    "amax": (lambda x: torch.amax(three(x), -1), (0.0, 1.0)),
    "amin": (lambda x: torch.amin(three(x), -1), (0.0, 1.0)),
    "max": (lambda x: torch.max(three(x), -1)[0], (0.0, 1.0)),
    "min": (lambda x: torch.min(three(x), -1)[0], (0.0, 1.0)),
    "prod": (lambda x: torch.prod(apart(x), -1), (0.0, -0.5)),
    "std": (lambda x: torch.std(pair(x), -1), (0.0,)),
    "std_apart": (lambda x: torch.std(apart(x), -1), (-1.0, 0.0)),
    "linalg.norm": (lambda x: torch.linalg.norm(pair(x), dim=-1), (0.0,)),
    "power_of_norm": (lambda x: torch.norm(pair(x), dim=-1) ** 2, (0.0,)),
    **{f"power_{p}": (lambda x, p=p: x**p, (0.0,)) for p in (-1, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)},
    **{
        f"norm_{p}_{vector.__name__}": (lambda x, p=p, v=vector: torch.norm(v(x), p, -1), (0.0,))
        for p in (0.5, 1, 1.5, 2, 3, 4, float("inf"))
        for vector in (pair, apart)
    },
}


def by_reverse_mode(function, x):
    """Value and five derivatives."""
    x = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    found = [function(x)]
    for _ in range(5):
        y = found[-1]
        options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        zero = torch.zeros_like(x)
        found.append(torch.autograd.grad(y.sum(), x, **options)[0] if y.requires_grad else zero)
    return torch.cat(found).detach()


def by_jets(function, x, order):
    """Value and derivatives to an order, and the derivative of each by the backward pass."""
    x, along = torch.tensor([[x]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    layout, where = merge([Derivative.along(*[along] * k) for k in range(order + 1)], x)
    jet = seed(x, layout)
    jet.channels.requires_grad_()
    result = function(jet[:, 0]).channels[where]
    slopes = [torch.autograd.grad(r.sum(), jet.channels, retain_graph=True)[0][0] for r in result]
    return result.detach().flatten(), torch.cat(slopes).flatten()


@pytest.mark.parametrize("name", CASES)
def test_as_nested_reverse_mode(name):
    function, kinks = CASES[name]
    for x in kinks:
        expected = by_reverse_mode(function, x)
        for order in (0, 1, 2, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, slopes = by_jets(function, x, order)
            # what is not finite is noticed; infinities may meet on the way to it
            wanted = expected[: order + 1]
            finite = wanted.isfinite()
            assert torch.equal(found.isfinite(), finite), (x, order, found, wanted)
            torch.testing.assert_close(found[finite], wanted[finite], rtol=1e-12, atol=1e-12)
            both = slopes.isfinite()
            next_ones = expected[1 : order + 2]
            torch.testing.assert_close(slopes[both], next_ones[both], rtol=1e-12, atol=1e-12)
            assert both.all() or not expected.isfinite().all()


@pytest.mark.parametrize("norm", [torch.norm, torch.linalg.vector_norm, torch.std])
def test_value_alone_has_a_gradient_at_zero(norm):
    """The subgradient zero, where nothing of higher order is asked for."""
    found, slopes = by_jets(lambda x: norm(pair(x), dim=-1), 0.0, 0)
    assert found.tolist() == slopes.tolist() == [0.0]


def test_hardsigmoid_at_its_ends():
    """Torch's own can't be differentiated twice."""
    for x, slope in ((-3.0, 0.0), (3.0, 0.0), (0.0, 1 / 6)):
        given = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        functional.hardsigmoid(given).backward()
        assert given.grad.item() == pytest.approx(slope)  # rounded to single precision
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, slopes = by_jets(functional.hardsigmoid, x, 4)
        assert found[1:].tolist() == slopes[:-1].tolist() == [slope, 0, 0, 0]
