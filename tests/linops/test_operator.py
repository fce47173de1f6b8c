"""The base class."""

import numpy
import pytest
import torch

from pinncurv.linops import SymmetricLinearOperator, check_damping


class Scaling(SymmetricLinearOperator):
    """An operator that implements no more than it must."""

    def _matmat(self, X):
        return [3 * x for x in X]


@pytest.mark.parametrize("damping", [0, 0.0, 1e-15, 3, numpy.float64(0.5)])
def test_good_damping(damping):
    assert check_damping(damping) == float(damping)


@pytest.mark.parametrize("damping", [-1e-300, float("nan"), float("inf"), -float("inf")])
def test_bad_damping(damping):
    with pytest.raises(ValueError, match=r"damping must be a finite number >= 0, got .*1e-8"):
        check_damping(damping)


def test_generic_methods():
    operator = Scaling([(2, 3), (2,)], torch.device("cpu"), torch.float64)
    assert torch.equal(operator.to_dense(), 3 * torch.eye(8, dtype=torch.float64))
    assert torch.equal(operator.diagonal(), torch.full((8,), 3.0, dtype=torch.float64))
    assert operator.trace() == 24
    assert operator.shapes == [(2, 3), (2,)]
    assert operator.tensors is operator.jacobian is operator.solve_residual is None
    with pytest.raises(
        NotImplementedError, match=r"Scaling has no structured inverse\. Use pinncurv"
    ):
        operator.inverse(0.1)


def test_torch_leaves_the_left_product_to_the_operator():
    operator = Scaling([(2, 3), (2,)], torch.device("cpu"), torch.float64)
    x = torch.arange(8.0, dtype=torch.float64)
    assert torch.Tensor.__matmul__(x, operator) is NotImplemented
    assert torch.equal(x @ operator, 3 * x)
