"""Steps, decreases, overlaps and iterations, against dense solves."""

import pytest
import torch

from pinncurv.comparison import (
    best_decrease,
    cg_records,
    decrease_fraction,
    quadratic_decrease,
    step_cosine,
    subspace_overlap,
)
from pinncurv.linops import DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, kronecker, psd, randn, with_eigenvalues
from tests.conformance import to_list

DAMPING = 0.1


@pytest.fixture
def quadratic(generator):
    """A dense operator, its damped inverse, and a gradient."""
    C = DenseLinearOperator(psd(8, generator), [(2, 3), (2,)])
    return C, C.inverse(DAMPING), randn(8, generator=generator)


def test_cosine_of_steps(quadratic, generator):
    C, inverse, g = quadratic
    W = psd(8, generator)
    other = DenseLinearOperator(W, C.shapes)
    s = torch.linalg.solve(C.matrix + DAMPING * torch.eye(8), g)
    expected = torch.nn.functional.cosine_similarity(s, W @ g, 0).item()
    assert step_cosine(inverse, other, g) == pytest.approx(expected)
    assert step_cosine(2.0 * inverse, other, to_list(-g, C)) == pytest.approx(expected)
    assert step_cosine(inverse, inverse, g) == pytest.approx(1)
    assert step_cosine(inverse, -1.0 * inverse, g) == pytest.approx(-1)


def test_decrease_is_the_minimum_along_the_direction(quadratic, generator):
    C, _, g = quadratic
    v = randn(8, generator=generator)
    M = C.matrix + DAMPING * torch.eye(8)

    def model(alpha):
        return (alpha * g @ v + alpha**2 / 2 * v @ M @ v).item()

    received = quadratic_decrease(C, DAMPING, g, v)
    assert received.decrease == pytest.approx(-model(received.step_length))
    for factor in (0.99, 1.01):
        assert model(factor * received.step_length) > -received.decrease
    scaled = quadratic_decrease(MatrixFree(C.matrix, C.shapes), DAMPING, to_list(g, C), -5 * v)
    assert scaled.decrease == pytest.approx(received.decrease)
    assert scaled.step_length == pytest.approx(-received.step_length / 5)


def test_the_exact_step_reaches_the_best_decrease(quadratic, generator):
    C, inverse, g = quadratic
    M = C.matrix + DAMPING * torch.eye(8)
    assert best_decrease(inverse, g) == pytest.approx((g @ torch.linalg.solve(M, g) / 2).item())
    exact = quadratic_decrease(C, DAMPING, g, -(inverse @ g))
    assert exact.step_length == pytest.approx(1)
    assert exact.decrease == pytest.approx(best_decrease(inverse, g))
    assert decrease_fraction(C, DAMPING, g, inverse @ g, inverse) == pytest.approx(1)
    for _ in range(5):
        v = randn(8, generator=generator)
        s = inverse @ g
        cosine = (v @ M @ s) / ((v @ M @ v) * (s @ M @ s)).sqrt()
        fraction = decrease_fraction(C, DAMPING, g, v, inverse)
        assert fraction == pytest.approx(cosine.square().item())
        assert 0 <= fraction <= 1


def test_overlap_of_subspaces(generator):
    Q, _ = torch.linalg.qr(randn(9, 9, generator=generator))
    U, V = Q[:, [0, 1, 2, 3]], Q[:, [4, 0, 1, 5]]
    received = subspace_overlap(U, V)
    torch.testing.assert_close(received, torch.tensor([0, 0.5, 2 / 3, 0.5]).double())
    torch.testing.assert_close(subspace_overlap(U, U), torch.ones(4).double())
    R, _ = torch.linalg.qr(randn(4, 4, generator=generator))
    assert subspace_overlap(U, U @ R)[-1].item() == pytest.approx(1)
    W, _ = torch.linalg.qr(randn(9, 4, generator=generator).float())
    expected = [(U[:, :k].mT @ W[:, :k].double()).square().sum() / k for k in range(1, 5)]
    torch.testing.assert_close(
        subspace_overlap(U.float(), W), torch.stack(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iterations_by_preconditioner(dtype, generator):
    P = kronecker([4, 6, 3], 1, generator)
    D = P.shape[0]
    C = P.to_dense() + with_eigenvalues(decaying(D, 5, top=1e-2), generator)
    operator = DenseLinearOperator(C.to(dtype), P.shapes)
    W = DenseLinearOperator(P.inverse(1e-3).to_dense().to(dtype), P.shapes)
    exact = DenseLinearOperator(operator.inverse(1e-3).to_dense().to(dtype), P.shapes)
    g = randn(D, generator=generator).to(dtype)
    received = cg_records(
        operator, 1e-3, g, {"none": None, "kfac": W, "exact": exact}, tolerance=1e-4
    )
    assert list(received) == ["none", "kfac", "exact"]
    assert all(record.converged for record in received.values())
    assert received["exact"].iterations <= 2
    assert received["kfac"].iterations < received["none"].iterations / 2
    short = cg_records(operator, 1e-3, g, {"none": None}, max_iterations=2)["none"]
    assert (short.iterations, short.converged) == (2, False)


def test_errors(quadratic, generator):
    C, inverse, g = quadratic
    other = DenseLinearOperator(psd(7, generator), [(7,)])
    with pytest.raises(ValueError, match=r"gradient must have 8 entries .* got 7"):
        best_decrease(inverse, g[:7])
    with pytest.raises(ValueError, match="gradient must be finite, got 8 of 8"):
        quadratic_decrease(C, DAMPING, g * float("nan"), g)
    with pytest.raises(ValueError, match="direction must have 8 entries"):
        quadratic_decrease(C, DAMPING, g, g[:7])
    with pytest.raises(ValueError, match="curvature along the direction must be positive"):
        quadratic_decrease(C, DAMPING, g, 0 * g)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        quadratic_decrease(C, -DAMPING, g, g)
    with pytest.raises(ValueError, match="must act on the same space"):
        step_cosine(inverse, other, g)
    with pytest.raises(ValueError, match="steps must not be zero"):
        step_cosine(inverse, inverse, 0 * g)
    with pytest.raises(ValueError, match="best decrease must be positive"):
        decrease_fraction(C, DAMPING, 0 * g, g, inverse)
    with pytest.raises(ValueError, match="must act on the same space"):
        cg_records(C, DAMPING, g, {"other": other})
    with pytest.raises(ValueError, match="U must have orthonormal columns"):
        subspace_overlap(C.matrix, C.matrix)
