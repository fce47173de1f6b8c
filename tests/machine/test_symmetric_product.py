"""XᵀX at half the price against the plain product."""

import importlib
import inspect

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from pinncurv.machine import add_lower_product_, mirror_, symmetric_product

aten = torch.ops.aten


def matrix(n: int, d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("d", [1, 2, 127, 128, 131, 300, 1100])
@pytest.mark.parametrize("n", [1, 40])
def test_it_is_the_product_and_symmetric(n, d):
    for X in (matrix(n, d), matrix(d, n).mT, matrix(n, d + 3)[:, 1:-2]):
        product = symmetric_product(X)
        torch.testing.assert_close(product, X.mT @ X, rtol=1e-13, atol=1e-13)
        assert torch.equal(product, product.mT)


def test_single_precision():
    X = matrix(50, 200, torch.float32)
    product = symmetric_product(X)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, X.mT @ X, rtol=1e-5, atol=1e-5)
    assert torch.equal(product, product.mT)


def test_no_rows():
    assert torch.equal(symmetric_product(matrix(0, 200)), torch.zeros(200, 200).double())
    assert symmetric_product(matrix(3, 0)).shape == (0, 0)


def test_nan_is_seen_on_both_sides():
    X = matrix(5, 150)
    X[2, 140] = torch.nan
    product = symmetric_product(X)
    assert product[140].isnan().all()
    assert product[:, 140].isnan().all()


def test_sums_are_mirrored_at_the_end():
    """Into a part of a larger matrix, which is left alone."""
    X, Y = matrix(20, 150), matrix(30, 150)
    whole = torch.ones(152, 152).double()
    total = whole[1:-1, 1:-1]
    for part in (X, Y):
        add_lower_product_(total, part)
    assert mirror_(total) is total
    torch.testing.assert_close(total, 1 + X.mT @ X + Y.mT @ Y, rtol=1e-13, atol=1e-13)
    assert torch.equal(whole[0], torch.ones(152).double())


def test_it_takes_about_half_of_the_multiplications():
    def flops(total, left, right, **options):  # torch does not count it in place
        return mm_flop(left, right)

    X = matrix(10, 1280)
    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: flops}) as half:
        symmetric_product(X)
    with FlopCounterMode(display=False) as full:
        X.mT @ X
    assert half.get_total_flops() == pytest.approx(0.55 * full.get_total_flops())


def test_it_is_traced(monkeypatch):
    X, other = matrix(20, 150), matrix(20, 151)[:, 1:]
    traced = make_fx(symmetric_product)(X)
    assert torch.equal(traced(other), symmetric_product(other))
    # without what checks shapes in the first calls, which is no part of the library
    module = importlib.import_module("pinncurv.machine.symmetric_product")
    for name, function in list(vars(module).items()):
        if inspect.isfunction(function):
            monkeypatch.setattr(module, name, inspect.unwrap(function))
    compiled = torch.compile(module.symmetric_product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(other), symmetric_product(other))
