"""Similarity as matrices, exact and estimated, against dense sums over masks."""

import pytest
import torch

from pinncurv.comparison import (
    estimate_frobenius,
    estimate_frobenius_by_layer_pair,
    frobenius,
    frobenius_by_layer,
    frobenius_by_layer_pair,
    mass,
    squared_block_norms,
    squared_block_norms_from_kernels,
)
from pinncurv.curvature import JacobianLinearOperator
from pinncurv.linearization import linearize
from pinncurv.linops import DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, kronecker, psd, randn, with_eigenvalues
from tests.linops.cases import layers
from tests.networks import build, points
from tests.terms import TERMS

WIDTHS = [3, 4, 2]
BIAS = [True, False]
FIELDS = ("inner", "squared_norm", "squared_reference_norm", "squared_error")


def owners(blocks, shapes):
    """The layer of each entry of the concatenated parameters."""
    owner = {p: i for i, block in enumerate(blocks) for p in (block.weight, block.bias)}
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return torch.cat([torch.full((size,), owner[p]) for p, size in enumerate(sizes)])


def pairs(first, second, owner):
    """Inner products of all pairs of blocks, by masks."""
    one_hot = torch.nn.functional.one_hot(owner).double()
    return one_hot.mT @ (first.double() * second.double()) @ one_hot


@pytest.fixture(params=["layerwise", "mixed", "dense", "matrix_free", "unsymmetric", "float32"])
def case(request, generator):
    """Two operators, their matrices, and the layers."""
    blocks, shapes = layers(WIDTHS, BIAS)
    D = sum(torch.Size(shape).numel() for shape in shapes)
    dtype = torch.float32 if request.param == "float32" else torch.float64
    structured = [kronecker(WIDTHS, T, generator, BIAS, dtype=dtype) for T in (1, 2)]
    free = [MatrixFree(psd(D, generator), shapes) for _ in range(2)]
    dense = [DenseLinearOperator(operator.matrix, shapes) for operator in free]
    A, B = {
        "layerwise": structured,
        "mixed": (structured[0], free[1]),
        "dense": dense,
        "matrix_free": free,
        "unsymmetric": [MatrixFree(randn(D, D, generator=generator), shapes) for _ in range(2)],
        "float32": structured,
    }[request.param]
    matrices = [op.matrix if hasattr(op, "matrix") else op.to_dense() for op in (A, B)]
    return A, B, *matrices, blocks, owners(blocks, shapes)


def test_exact(case):
    A, B, X, Y, blocks, owner = case
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if X.dtype == torch.float32 else {}
    received = frobenius_by_layer_pair(A, B, blocks)
    for field, (P, Q) in zip(FIELDS, [(X, Y), (X, X), (Y, Y), (X - Y, X - Y)], strict=True):
        expected = pairs(P, Q, owner)
        torch.testing.assert_close(getattr(received, field), expected, **tolerance)
        layerwise = getattr(frobenius_by_layer(A, B, blocks), field)
        torch.testing.assert_close(layerwise, expected.diagonal(), **tolerance)
        torch.testing.assert_close(getattr(frobenius(A, B), field), expected.sum(), **tolerance)
    cosine = torch.nn.functional.cosine_similarity(X.flatten(), Y.flatten(), 0).double()
    torch.testing.assert_close(frobenius(A, B).cosine, cosine, **tolerance)
    error = ((X - Y).norm() / Y.norm()).double()
    torch.testing.assert_close(frobenius(A, B).relative_error, error, **tolerance)


def test_layerwise_operators_are_never_dense(generator, monkeypatch):
    A, B = (kronecker(WIDTHS, T, generator, BIAS) for T in (1, 2))
    expected = frobenius(*(DenseLinearOperator(C.to_dense(), C.shapes) for C in (A, B)))
    monkeypatch.setattr(type(A), "to_dense", MatrixFree.to_dense)
    monkeypatch.setattr(type(A), "_matmat", MatrixFree.to_dense)
    torch.testing.assert_close(frobenius(A, B).inner, expected.inner)
    assert frobenius_by_layer_pair(A, B).squared_norm[0, 1] == 0


def test_invariances(case):
    A, B, *_, blocks, _ = case
    comparison = frobenius(A, B)
    scaled = frobenius(3.0 * A, 0.5 * B)
    torch.testing.assert_close(scaled.cosine, comparison.cosine, rtol=1e-5, atol=0)
    torch.testing.assert_close(frobenius(B, A).cosine, comparison.cosine, rtol=1e-5, atol=0)
    assert frobenius(A, -1.0 * A).cosine.item() == pytest.approx(-1)
    same = frobenius_by_layer_pair(A, A, blocks)
    torch.testing.assert_close(same.cosine, torch.ones(2, 2).double())
    assert not same.relative_error.any()
    nearly = frobenius(1.001 * A, A)
    assert nearly.relative_error.item() == pytest.approx(1e-3, rel=1e-3)
    assert nearly.cosine.item() <= 1


def test_what_a_zero_is_similar_to(generator):
    A = DenseLinearOperator(psd(3, generator), [(3,)])
    zero = 0.0 * A
    assert (frobenius(A, zero).cosine, frobenius(zero, zero).cosine) == (0, 1)
    assert frobenius(zero, A).relative_error == 1
    assert frobenius(A, zero).relative_error == float("inf")
    assert frobenius(zero, zero).relative_error == 0


@pytest.mark.parametrize("sketch", [0, 4])
def test_estimates_are_within_their_errors(sketch, generator):
    blocks, shapes = layers([4, 5, 3])
    m = decaying(43, 2)
    X = with_eigenvalues(m, generator)
    Y = X + 0.3 * randn(43, 43, generator=generator)
    A, B = MatrixFree(X, shapes), MatrixFree(Y, shapes)
    whole, blockwise = frobenius(A, B), frobenius_by_layer_pair(A, B, blocks)
    scores = {field: [] for field in (*FIELDS, "cosine", "relative_error")}
    errors = []
    for seed in range(12):
        draws = torch.Generator().manual_seed(seed)
        total = estimate_frobenius(A, B, vectors=50, generator=draws, sketch=sketch)
        parts = estimate_frobenius_by_layer_pair(
            A, B, blocks, vectors=50, generator=draws, sketch=sketch
        )
        errors.append(total.cosine.standard_error)
        for estimate, exact in ((total, whole), (parts, blockwise)):
            for field, known in scores.items():
                received = getattr(estimate, field)
                difference = received.value - getattr(exact, field)
                known.append((difference / received.standard_error).flatten())
    for field, all_scores in scores.items():
        flat = torch.cat(all_scores)
        assert flat.abs().max() < 4.5, field
        assert 0.6 < flat.square().mean() < 1.7, field
    many = estimate_frobenius(A, B, vectors=800, generator=generator, sketch=sketch)
    ratio = many.cosine.standard_error / torch.stack(errors).mean()
    assert 0.25 / 1.5 < ratio < 0.25 * 1.5  # 1 / sqrt(800 / 50)


def test_a_sketch_removes_what_dominates(generator):
    X = with_eigenvalues(decaying(100, 10), generator)
    A, B = MatrixFree(X), MatrixFree(X + 1e-3 * psd(100, generator))
    plain = estimate_frobenius(A, B, vectors=20, generator=generator)
    sketched = estimate_frobenius(A, B, vectors=10, generator=generator, sketch=20)
    for field in ("inner", "squared_norm"):
        errors = [getattr(estimate, field).standard_error for estimate in (plain, sketched)]
        assert errors[1] < 0.1 * errors[0], field
    full = estimate_frobenius(A, B, vectors=2, generator=generator, sketch=100)
    torch.testing.assert_close(full.relative_error.value, frobenius(A, B).relative_error)


def test_the_estimate_of_an_operator_with_itself(generator):
    A = MatrixFree(psd(10, generator))
    estimate = estimate_frobenius(A, A, vectors=3, generator=generator)
    assert estimate.cosine.value.item() == pytest.approx(1)
    assert estimate.cosine.standard_error < 1e-12
    assert (estimate.relative_error.value, estimate.relative_error.standard_error) == (0, 0)
    assert A.products == 3


def test_mass_from_operators_and_from_kernels():
    linearizations = [linearize(TERMS["vector"], build("repeated"), points(4))]
    J = JacobianLinearOperator(linearizations)
    dense, space = J.to_dense(), J.space
    owner = owners(space.blocks, space.shapes)
    kernels = [dense[:, owner == i] @ dense[:, owner == i].mT for i in range(len(space.blocks))]
    G = dense.mT @ dense
    expected = pairs(G, G, owner)
    torch.testing.assert_close(squared_block_norms_from_kernels(kernels), expected)
    operator = MatrixFree(G, space.shapes)
    torch.testing.assert_close(squared_block_norms(operator, space.blocks), expected)
    assert operator.products == len(G)
    shares = mass(expected)
    assert shares.sum().item() == pytest.approx(1)
    torch.testing.assert_close(shares, expected / G.square().sum())


def test_errors(generator):
    A, B = (DenseLinearOperator(psd(n, generator), [(n,)]) for n in (3, 4))
    with pytest.raises(ValueError, match=r"same space, got DenseLinearOperator \(3, 3\) and"):
        frobenius(A, B)
    with pytest.raises(ValueError, match=r"have none\. Pass blocks="):
        frobenius_by_layer(A, A)
    with pytest.raises(
        ValueError, match=r"Parameter 0 of layer net\.0 must have shape \(1, 1\), got \(3,\)"
    ):
        frobenius_by_layer(A, A, layers([1, 1])[0])
    jacobian = JacobianLinearOperator([linearize(TERMS["value"], build("tanh"), points())])
    with pytest.raises(ValueError, match=r"must be square.*such as JᵀJ instead of J"):
        frobenius(jacobian, jacobian)
    broken = kronecker(WIDTHS, 1, generator)
    broken.factors[1][0].A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer net\.2 must be finite"):
        frobenius(broken, broken)
    with pytest.raises(ValueError, match=r"product with SumKroneckerLinearOperator .* finite"):
        estimate_frobenius(broken, broken, vectors=2, generator=generator)
    with pytest.raises(ValueError, match="vectors must be an integer >= 2, got 1"):
        estimate_frobenius(A, A, vectors=1, generator=generator)
    with pytest.raises(ValueError, match="kernels of one size"):
        squared_block_norms_from_kernels([A.matrix, B.matrix])
    with pytest.raises(ValueError, match="kernels of one size"):
        squared_block_norms_from_kernels([])
    for bad in (torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="squared_norms must be >= 0 and not all zero"):
            mass(bad)
