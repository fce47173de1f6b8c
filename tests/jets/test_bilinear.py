"""Products of jets, and products of jets with constants."""

import pytest
import torch
from torch import nn

from pinncurv.jets import Jet, Layout, record
from tests.jets.layouts import CASES, N, channels, check

WEIGHT = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
VECTOR = torch.tensor([0.3, -1.2], dtype=torch.float64)

PRODUCTS = {
    "mul": (lambda a, b: a * b, (2,), (2,)),
    "mul_broadcast": (lambda a, b: a * b, (2,), (1,)),
    "mul_broadcast_back": (torch.mul, (1, 3), (2, 1)),
    "div": (lambda a, b: a / b, (2,), (2,)),
    "true_divide": (torch.true_divide, (2,), (1,)),
    "matmul": (lambda a, b: a @ b, (2, 3), (3, 2)),
    "bmm": (torch.bmm, (2, 3), (3, 1)),
    "einsum_inner": (lambda a, b: torch.einsum("ni,ni->n", a, b), (3,), (3,)),
    "einsum_outer": (lambda a, b: torch.einsum("n i, n j -> n j i", a, b), (3,), (2,)),
    "einsum_constant": (lambda a, b: torch.einsum("ni,oi,no->n", a, WEIGHT, b), (3,), (2,)),
    "einsum_ellipsis": (lambda a, b: torch.einsum("...i,...i->...", a, b), (2, 3), (2, 3)),
    "product_of_all": (lambda a, b: torch.prod(torch.cat([a, b], -1), dim=-1), (2,), (3,)),
}

WITH_CONSTANTS = {
    "mul_number": lambda x: 3 * x * 0.5,
    "mul_vector": lambda x: x * VECTOR,
    "vector_mul": lambda x: VECTOR * x,
    "div_number": lambda x: x / 3,
    "div_vector": lambda x: x / VECTOR,
    "number_div": lambda x: 2.5 / x,
    "vector_div": lambda x: VECTOR / x,
    "matmul": lambda x: x @ WEIGHT,
    "matmul_vector": lambda x: x.matmul(VECTOR),
    "mm": lambda x: torch.mm(x, WEIGHT),
    "mv": lambda x: torch.mv(x, VECTOR),
    "linear": lambda x: nn.functional.linear(x, WEIGHT.T, WEIGHT[0]),
    "constant_on_the_left": lambda x: (WEIGHT.T @ x.unsqueeze(-1)).squeeze(-1),
    "einsum": lambda x: torch.einsum("ni,io->no", x, WEIGHT),
    "einsum_list": lambda x: torch.einsum("io,ni->no", [WEIGHT, x]),
    "prod": lambda x: torch.prod(x, dim=1),
    "prod_keepdim": lambda x: x.prod(-1, keepdim=True),
    "square_itself": lambda x: x * x,
    "cube_itself": lambda x: x * x * x,
}


@pytest.mark.parametrize("layout", ["gradient", "laplacian", "two_sums"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_jets(name, layout):
    function, first, second = PRODUCTS[name]
    case = CASES[layout]
    inputs = (channels(case, *first), channels(case, *second, seed=1))
    check(case, function, *inputs, double=layout == "two_sums")


@pytest.mark.parametrize("layout", ["point_weights", "point_matrix", "point_directions", "matrix"])
@pytest.mark.parametrize("name", ["mul_broadcast", "matmul", "einsum_outer", "product_of_all"])
def test_products_with_coefficients_per_point(name, layout):
    function, first, second = PRODUCTS[name]
    case = CASES[layout]
    check(case, function, channels(case, *first), channels(case, *second, seed=1))


@pytest.mark.parametrize("layout", ["value", "two_sums", "point_matrix"])
@pytest.mark.parametrize("name", WITH_CONSTANTS)
def test_products_with_constants(name, layout):
    case = CASES[layout]
    check(case, WITH_CONSTANTS[name], channels(case, 2))


def test_prod_with_zeros():
    """The product rule slice by slice has no division by the value."""
    case = CASES["two_sums"]
    data = channels(case, 3)
    data[0, :, :2] = 0
    check(case, lambda x: torch.prod(x, dim=-1), data, double=True)


def test_prod_of_everything():
    """Without an axis all points are multiplied, which is allowed where nobody relies on them."""
    case = CASES["two_sums"]
    jet = Jet(channels(case, 2), case.layout)
    by_hand = jet[0, 0]
    for n in range(N):
        for i in range(2):
            by_hand = by_hand * jet[n, i] if (n, i) != (0, 0) else by_hand
    torch.testing.assert_close(torch.prod(jet).channels, by_hand.channels)


@pytest.mark.parametrize(
    "combine",
    [
        torch.mul,
        torch.add,
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.stack([a, b], -1),
        lambda a, b: torch.einsum("ni,ni->n", a, b),
        lambda a, b: torch.where(torch.tensor([True, False]), a, b),
    ],
    ids=["mul", "add", "cat", "stack", "einsum", "where"],
)
def test_jets_of_different_passes_do_not_mix(combine):
    """Even with equally many channels."""
    case = CASES["laplacian"]
    other = Layout(case.layout.directions, case.layout.contractions)
    with pytest.raises(ValueError, match="same pass"):
        combine(Jet(channels(case, 2), case.layout), Jet(channels(case, 2), other))


def test_einsum_of_three_jets_raises():
    case = CASES["laplacian"]
    jet = Jet(channels(case, 2), case.layout)
    with pytest.raises(NotImplementedError, match="at most two jets"):
        torch.einsum("ni,ni,ni->n", jet, jet, jet)


def test_matmul_of_two_flat_jets_raises():
    case = CASES["laplacian"]
    jet = Jet(channels(case, 3), case.layout)
    with pytest.raises(ValueError, match=r"unsqueeze, or use torch\.einsum"):
        _ = jet @ jet


def test_linear_with_a_weight_that_is_a_jet_raises():
    case = CASES["laplacian"]
    jet = Jet(channels(case, 3), case.layout)
    with pytest.raises(NotImplementedError, match="constant weight and bias"):
        nn.functional.linear(torch.ones(3, 3, dtype=torch.float64), jet)


@pytest.mark.parametrize("layout", ["laplacian", "point_matrix"])
def test_gradients_of_weight_and_bias(layout):
    """The hand-written backward of the linear rule against the same map spelled as a product."""
    case = CASES[layout]
    layer = nn.Linear(2, 3).double()
    data = channels(case, 4, 2).requires_grad_()
    cotangent = channels(case, 4, 3, seed=2)
    output = layer(Jet(data, case.layout)).channels
    bias = torch.zeros_like(output)
    bias[0] = layer.bias
    spelled = torch.einsum("sni...o,ho->sni...h", data, layer.weight) + bias
    torch.testing.assert_close(output, spelled)
    leaves = [data, layer.weight, layer.bias]
    received = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
    expected = torch.autograd.grad(spelled, leaves, cotangent, create_graph=True)
    torch.testing.assert_close(received, expected)
    again = torch.autograd.grad(received[1].square().sum() + received[0].square().sum(), leaves[:2])
    wanted = torch.autograd.grad(
        expected[1].square().sum() + expected[0].square().sum(), leaves[:2]
    )
    torch.testing.assert_close(again, wanted)


def test_gradient_of_a_constant_factor():
    """A trainable constant that multiplies or is added gets its gradient through every channel."""
    case = CASES["two_sums"]
    data, factor = channels(case, 2), torch.tensor([0.5, 2.0], dtype=torch.float64)
    factor.requires_grad_()
    jet = Jet(data, case.layout) * factor + factor
    (received,) = torch.autograd.grad(jet.channels.sum(), factor)
    torch.testing.assert_close(received, data.sum((0, 1)) + N)


def test_recording_cuts_weights_and_keeps_outputs():
    layer = nn.Linear(2, 3).double()
    case = CASES["laplacian"]
    jet = Jet(channels(case, 2), case.layout)
    with record() as tape:
        output = layer(jet)
        layer(output[:, :2])
    layer(jet)
    assert len(tape.entries) == 2
    assert tape.entries[0].output is output.channels
    assert tape.entries[0].weight is layer.weight
    torch.testing.assert_close(tape.entries[0].input, jet.channels)
    assert output.channels.requires_grad
    assert layer.weight.requires_grad
    output.channels.sum().backward()
    assert layer.weight.grad is None
