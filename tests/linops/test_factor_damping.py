"""Damping of every Kronecker factor, down to numerically singular factors."""

import pytest
import torch

from pinncurv.linops import (
    DiagonalLinearOperator,
    FactorDamping,
    FactorizationError,
    KroneckerFactors,
    SumKroneckerLinearOperator,
    merge,
    same,
    trace_norm,
)
from tests.conformance import check_operator
from tests.linops.cases import STRUCTURES, kronecker, kronecker_oracle, layers, psd


def damp(operator, damping, heuristic):
    """Add the damping to every factor, written down separately from the implementation."""

    def damped(pair):
        dampings = heuristic(pair, damping)
        A = pair.A.double() + dampings.A * torch.eye(len(pair.A), dtype=torch.float64)
        B = pair.B.double() + dampings.B * torch.eye(len(pair.B), dtype=torch.float64)
        return KroneckerFactors(A, B)

    factors = [[damped(pair) for pair in layer] for layer in operator.factors]
    return SumKroneckerLinearOperator(factors, operator.blocks, operator.shapes, operator.terms)


@pytest.mark.parametrize("heuristic", [same, trace_norm])
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_inverts_the_damped_operator(structure, T, heuristic, generator):
    widths, bias = structure
    operator = kronecker(widths, T, generator, bias)
    for damping in (1e-3, 1e-1, 10.0):
        dense = kronecker_oracle(damp(operator, damping, heuristic))
        expected = torch.linalg.inv(dense)
        inverse = FactorDamping(damping, heuristic)(operator)
        tolerance = 1e-13 * torch.linalg.cond(dense).item() + 1e-12
        check_operator(inverse, expected, dampings=(), tolerance=tolerance)


@pytest.mark.parametrize("T", [1, 2])
def test_float32_factors_are_inverted_in_float64(T, generator):
    operator = kronecker([2, 3, 1], T, generator, dtype=torch.float32)
    expected = torch.linalg.inv(kronecker_oracle(damp(operator, 1e-2, same)))
    inverse = FactorDamping(1e-2)(operator)
    check_operator(inverse, expected, dampings=(), tolerance=1e-5)
    assert inverse.scales[0].dtype == torch.float64


def zero(n, generator):
    return torch.zeros(n, n, dtype=torch.float64)


def rank_one(n, generator):
    return psd(n, generator, rank=1)


def steep(n, generator):
    Q, _ = torch.linalg.qr(psd(n, generator))
    return Q * torch.logspace(0, -30, n, dtype=torch.float64) @ Q.mT


@pytest.mark.parametrize("heuristic", [same, trace_norm])
@pytest.mark.parametrize("damping", [1e-15, 1e-12, 1e-8])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e4, 1e-8), (1e-8, 1e-8), (1e4, 1e4)])
@pytest.mark.parametrize("factor", [zero, rank_one, steep, psd])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_finite_and_positive_on_singular_factors(T, factor, scales, damping, heuristic, generator):
    state = iter(range(10**6))

    def scaled(n, g):
        return scales[next(state) // 2 % 2] * factor(n, g)

    operator = kronecker([7, 24, 1], T, generator, factor=scaled)
    inverse = FactorDamping(damping, heuristic)(operator)
    X = torch.randn(operator.shape[0], 4, generator=generator, dtype=torch.float64)
    for Y in (X, operator @ X):
        product = inverse @ Y
        assert product.isfinite().all()
        # where C is numerically singular the float64 numbers of the product resolve no more of the
        # quadratic form than this
        resolution = 1e-14 * Y.norm(dim=0) * product.norm(dim=0)
        assert ((Y * product).sum(0) >= -resolution).all()
    assert ((X * (inverse @ X)).sum(0) > 0).all()
    assert all((scale > 0).all() and scale.isfinite().all() for scale in inverse.scales)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_one_zero_factor(which, generator):
    operator = kronecker([3, 4], 2, generator)
    tensors = operator.tensors()
    tensors[which] = torch.zeros_like(tensors[which])
    operator = operator.with_tensors(tensors)
    expected = torch.linalg.inv(kronecker_oracle(damp(operator, 1e-4, same)))
    inverse = FactorDamping(1e-4)(operator)
    torch.testing.assert_close(inverse.to_dense(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [1e-6, 1e-10, 1e-15])
def test_accuracy_of_the_quadratic_form_at_small_damping(damping, generator):
    """On the range of C, gᵀ C⁻¹ g is known: it is gᵀ x for g = C x, up to the damping."""
    operator = kronecker([5, 8], 2, generator, factor=lambda n, g: psd(n, g, rank=n - 1))
    x = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    g = operator @ x
    received = torch.dot(g, FactorDamping(damping)(operator) @ g)
    torch.testing.assert_close(received, torch.dot(g, x), rtol=1e3 * damping + 1e-6, atol=0)


def test_without_damping(generator):
    operator = kronecker([3, 4, 1], 2, generator)
    torch.testing.assert_close(
        FactorDamping(0.0)(operator).to_dense(), operator.inverse(0.0).to_dense()
    )
    for T in (1, 2):
        singular = kronecker([3, 4, 1], T, generator, factor=rank_one)
        with pytest.raises(FactorizationError, match=r"layer net\.0.*Pass damping > 0"):
            FactorDamping(0.0)(singular)


def test_without_damping_a_singular_sum_of_complementary_factors_is_an_error():
    blocks, shapes = layers([2, 2], bias=False)
    one = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    two = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    factors = [[KroneckerFactors(one, one), KroneckerFactors(two, two)]]
    operator = SumKroneckerLinearOperator(factors, blocks, shapes)
    with pytest.raises(FactorizationError, match="must have a nonsingular sum to be inverted"):
        FactorDamping(0.0)(operator)
    assert FactorDamping(1e-15)(operator).to_dense().isfinite().all()


def test_more_terms_are_merged_into_two_groups(generator):
    operator = kronecker([2, 3, 1], 3, generator)
    factors = [[layer[0], merge(layer[1:])] for layer in operator.factors]
    merged = SumKroneckerLinearOperator(factors, operator.blocks, operator.shapes)
    torch.testing.assert_close(merged.trace(), operator.trace())
    expected = FactorDamping(1e-3)(merged).to_dense()
    torch.testing.assert_close(FactorDamping(1e-3)(operator).to_dense(), expected)
    groups = ((0,), (1, 2))
    torch.testing.assert_close(FactorDamping(1e-3, groups=groups)(operator).to_dense(), expected)
    other = FactorDamping(1e-3, groups=((0, 1), (2,)))(operator).to_dense()
    assert (other - expected).abs().max() > 1e-3 * expected.abs().max()
    one = FactorDamping(1e-3, groups=((0, 1, 2),))(operator)
    factors = [[merge(layer)] for layer in operator.factors]
    merged = SumKroneckerLinearOperator(factors, operator.blocks, operator.shapes)
    torch.testing.assert_close(one.to_dense(), FactorDamping(1e-3)(merged).to_dense())


def test_merging_is_exact_if_input_factors_agree(generator):
    A = psd(3, generator)
    pairs = [KroneckerFactors(A, psd(4, generator)) for _ in range(3)]
    merged = merge(pairs)
    torch.testing.assert_close(
        torch.kron(merged.B, merged.A), sum(torch.kron(pair.B, pair.A) for pair in pairs)
    )
    zeros = merge([KroneckerFactors(pair.A, 0 * pair.B) for pair in pairs])
    assert zeros.A.isfinite().all()


@pytest.mark.parametrize("groups", [((0,),), ((0, 1), (1, 2)), ((0,), (1,), (2,)), ((), (0, 1, 2))])
def test_groups_must_be_a_partition(groups, generator):
    with pytest.raises(ValueError, match="groups must be one or two nonempty groups"):
        FactorDamping(1e-3, groups=groups)(kronecker([2, 3], 3, generator))


def test_factors_are_not_written_to(generator):
    for T in (1, 2, 3):
        operator = kronecker([2, 3], T, generator)
        before = [M.clone() for M in operator.tensors()]
        FactorDamping(1e-1)(operator)
        operator.inverse(1e-1)
        assert all(map(torch.equal, operator.tensors(), before))


@pytest.mark.parametrize("damping", [-1e-8, float("nan"), float("inf")])
def test_damping_is_checked(damping):
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, got"):
        FactorDamping(damping)


def test_operator_without_factors():
    with pytest.raises(TypeError, match="must be given a SumKroneckerLinearOperator, got Diag"):
        FactorDamping(1e-3)(DiagonalLinearOperator([torch.ones(3)]))


def test_nonfinite_factor_is_named(generator):
    operator = kronecker([2, 3, 1], 2, generator)
    operator.factors[0][1].B[1, 1] = float("nan")
    with pytest.raises(
        FactorizationError, match=r"layer net\.0, term boundary, factor B must be finite"
    ):
        FactorDamping(1e-3)(operator)


def test_reports_say_what_was_done(generator):
    good = FactorDamping(1e-3)(kronecker([2, 3], 2, generator)).reports
    assert {report.method for report in good} == {"cholesky", "eigh"}
    assert all(report.clipped == 0 for report in good)
    blocks, shapes = layers([2, 3])
    half = KroneckerFactors(psd(3, generator, rank=1), psd(3, generator, rank=1))
    operator = SumKroneckerLinearOperator([[half, half]], blocks, shapes)
    names = [report.name for report in FactorDamping(1e-15)(operator).reports]
    assert any("layer net.0, term 0 and" in name and "factors A" in name for name in names)


def test_dense_form_where_one_factor_falls_back_to_an_eigendecomposition():
    """Cholesky leaves a row-major basis, eigh a column-major one; torch.kron takes no such pair."""
    identity = torch.eye(3, dtype=torch.float64)
    v = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    good, singular = identity + 0.1, v @ v.T * 1e12
    blocks, shapes = layers([2, 3])
    pairs = [KroneckerFactors(good, singular), KroneckerFactors(good + identity, singular)]
    inverse = FactorDamping(1e-12)(SumKroneckerLinearOperator([pairs], blocks, shapes))
    assert {"cholesky", "eigh"} <= {report.method for report in inverse.reports}
    check_operator(inverse, dampings=())
