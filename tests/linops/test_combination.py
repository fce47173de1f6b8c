"""Sums, differences and multiples of operators."""

import curvlinops
import pytest
import torch
from torch import nn

from pinncurv.linops import (
    CGInverseLinearOperator,
    Damped,
    DenseLinearOperator,
    DiagonalLinearOperator,
    FactorizationError,
    KroneckerEigenLinearOperator,
    LayerwiseCombination,
    LinearCombination,
)
from tests.conformance import check_inverse, check_operator
from tests.linops.cases import kronecker, layers, psd

WIDTHS = [2, 3, 1]


def operators(generator, dtype=torch.float64):
    _, shapes = layers(WIDTHS)
    one, two = (kronecker(WIDTHS, T, generator, dtype=dtype) for T in (1, 2))
    dense = DenseLinearOperator(psd(13, generator).to(dtype), shapes)
    ones = DiagonalLinearOperator([torch.ones(shape, dtype=dtype) for shape in shapes])
    return one, two, dense, ones


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers_stay_layers(dtype, generator):
    one, two, _, _ = operators(generator, dtype)
    total = one + 2 * two + one.inverse(0.5) * 3
    assert type(total) is LayerwiseCombination
    assert len(total.parts) == 3
    expected = one.to_dense() + 2 * two.to_dense() + 3 * one.inverse(0.5).to_dense()
    check_operator(total, expected)


def test_other_structures_are_added_too(generator):
    one, two, dense, ones = operators(generator)
    total = one + dense - 0.5 * ones + two
    assert type(total) is LinearCombination
    matrix = one.to_dense() + dense.matrix - 0.5 * ones.to_dense() + two.to_dense()
    check_operator(total, matrix, dampings=())
    check_operator(one + dense, one.to_dense() + dense.matrix)


@pytest.mark.parametrize("factor", [0.25, 3])
def test_multiples_keep_the_inverse(factor, generator):
    one, *_ = operators(generator)
    scaled = 0.5 * (2 * factor * one)
    check_operator(scaled, factor * one.to_dense())
    ((_, inverse),) = scaled.inverse(0.1).parts
    assert type(inverse) is KroneckerEigenLinearOperator


def test_signs(generator):
    one, two, dense, _ = operators(generator)
    for operator in (one, dense):
        assert torch.equal((-operator).to_dense(), -operator.to_dense())
    check_operator(-one - two, -one.to_dense() - two.to_dense(), dampings=())
    check_operator(two - two, torch.zeros(13, 13).double(), dampings=(1e-3, 1.0))
    torch.testing.assert_close((0 * one).inverse(0.5).to_dense(), 2 * torch.eye(13).double())


@pytest.mark.parametrize("layerwise", [True, False])
def test_differences_must_be_definite_with_the_damping(layerwise, generator):
    one, two, dense, _ = operators(generator)
    other = two if layerwise else dense
    difference = one - other
    matrix = one.to_dense() - other.to_dense()
    lowest = torch.linalg.eigvalsh(matrix)[0].item()
    assert lowest < 0
    with pytest.raises(FactorizationError, match=r"positive definite with the damping.*Pass more"):
        difference.inverse(-0.9 * lowest)
    damping = -2 * lowest
    expected = torch.linalg.inv(matrix + damping * torch.eye(13))
    torch.testing.assert_close(difference.inverse(damping).to_dense(), expected)


@pytest.mark.parametrize("layerwise", [True, False])
def test_large_sums_are_solved_by_conjugate_gradients(layerwise, generator, monkeypatch):
    one, two, dense, _ = operators(generator)
    total = one + (two if layerwise else dense)
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_DENSE", 3)
    assert isinstance(total.inverse(0.3), CGInverseLinearOperator)
    check_inverse(total, total.to_dense(), 0.3)


def test_operators_of_curvlinops(generator):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    data = [(x, torch.ones(4, 1, dtype=torch.float64))]
    ggn = curvlinops.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    one, _, _, _ = operators(generator)
    v = torch.randn(13, generator=generator, dtype=torch.float64)
    for sign, total in ((1, one + ggn), (1, ggn + one), (-1, one - ggn)):
        torch.testing.assert_close(total @ v, one @ v + sign * (ggn @ v))
    solution = Damped(0.3)(one + ggn) @ v
    torch.testing.assert_close((one + ggn) @ solution + 0.3 * solution, v)


def test_refusals(generator):
    one, *_ = operators(generator)
    with pytest.raises(ValueError, match=r"same \(shapes, device, dtype\) to be added, got"):
        one + kronecker([3, 2], 1, generator)
    with pytest.raises(ValueError, match=r"to be added, got .*float64.*float32"):
        one + kronecker(WIDTHS, 1, generator, dtype=torch.float32)
    with pytest.raises(TypeError):
        one * one
    with pytest.raises(TypeError):
        "2" * one
