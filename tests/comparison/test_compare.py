"""The comparison in one call, against its parts and dense linear algebra."""

import pytest
import torch

from pinncurv.comparison import compare, compare_steps
from pinncurv.linops import Damped, DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, psd, randn, with_eigenvalues
from tests.conformance import to_list

DAMPING = 0.1
SHAPES = [(4, 5), (4,)]


@pytest.fixture
def case(generator):
    """Two positive semidefinite matrices and a gradient."""
    return (
        with_eigenvalues(decaying(24), generator),
        psd(24, generator) / 24,
        randn(24, generator=generator),
    )


def expected(C, P, g):
    """Everything by dense linear algebra, in names of its own."""
    eye = torch.eye(len(g), dtype=g.dtype)
    M, N = C + DAMPING * eye, P + DAMPING * eye
    s, t = -torch.linalg.solve(N, g), -torch.linalg.solve(M, g)
    alpha = -(g @ s) / (s @ M @ s)

    def decrease(v):
        return -(g @ v + v @ M @ v / 2)

    values = torch.linalg.eigvals(torch.linalg.solve(N, M)).real
    return {
        "cosine": (P * C).sum() / (P.norm() * C.norm()),
        "error": (P - C).norm() / C.norm(),
        "fraction": decrease(alpha * s) / decrease(t),
        "length": alpha * s.norm() / t.norm(),
        "step cosine": s @ t / (s.norm() * t.norm()),
        "condition": values.max() / values.min(),
    }


def received(comparison):
    step = comparison.step
    return {
        "cosine": comparison.cosine.value,
        "error": comparison.relative_error.value,
        "fraction": step.decrease_fraction,
        "length": step.length,
        "step cosine": step.cosine,
        "condition": comparison.condition_number,
    }


def test_small_operators_are_compared_exactly(case):
    C, P, g = case
    comparison = compare(DenseLinearOperator(P, SHAPES), DenseLinearOperator(C, SHAPES), g, DAMPING)
    numbers = received(comparison)
    for name, value in expected(C, P, g).items():
        assert float(numbers[name]) == pytest.approx(float(value), rel=1e-8), name
    assert comparison.cosine.standard_error == comparison.relative_error.standard_error == 0
    assert not comparison.condition_is_bound
    assert comparison.cg.converged
    assert comparison.cg.iterations <= 25


def test_large_operators_are_compared_by_probes(case):
    C, P, g = case
    left, right = MatrixFree(P, SHAPES), MatrixFree(C, SHAPES)
    gradient = to_list(g, DenseLinearOperator(C, SHAPES))
    comparison = compare(left, right, gradient, DAMPING, dense_limit=8, probes=16)
    numbers, truth = received(comparison), expected(C, P, g)
    for name in ("fraction", "length", "step cosine"):
        assert float(numbers[name]) == pytest.approx(float(truth[name]), rel=1e-5), name
    for estimate, name in ((comparison.cosine, "cosine"), (comparison.relative_error, "error")):
        assert estimate.standard_error > 0
        assert abs(estimate.value - truth[name]) <= 5 * estimate.standard_error
    assert comparison.condition_is_bound
    assert numbers["condition"] <= truth["condition"] * (1 + 1e-8)
    again = compare(left, right, gradient, DAMPING, dense_limit=8, probes=16)
    assert received(again) == numbers


def test_an_operator_equals_itself_and_its_inverse_can_be_chosen(case):
    C, P, g = case
    operator = DenseLinearOperator(C, SHAPES)
    same = compare(operator, operator, g, DAMPING)
    assert float(same.cosine.value) == pytest.approx(1)
    assert same.step.decrease_fraction == pytest.approx(1)
    assert same.step.length == pytest.approx(1)
    assert same.condition_number == pytest.approx(1)
    assert same.cg.iterations == 1
    other = DenseLinearOperator(P, SHAPES)
    chosen = compare(operator, operator, g, DAMPING, inverse=Damped(1e-3)(other))
    t = torch.linalg.solve(C + DAMPING * torch.eye(24, dtype=g.dtype), g)
    s = torch.linalg.solve(P + 1e-3 * torch.eye(24, dtype=g.dtype), g)
    assert chosen.step.cosine == pytest.approx(torch.cosine_similarity(s, t, 0).item())
    assert float(chosen.relative_error.value) == 0


def test_what_cannot_be_compared_is_refused(case):
    C, P, g = case
    operator, smaller = DenseLinearOperator(C, SHAPES), DenseLinearOperator(P[:8, :8], [(8,)])
    with pytest.raises(ValueError, match="same space"):
        compare(smaller, operator, g, DAMPING)
    with pytest.raises(ValueError, match="there is nothing to decrease"):
        compare(operator, operator, torch.zeros(24), DAMPING)
    with pytest.raises(ValueError, match="exact step must be positive"):
        compare_steps(operator, DAMPING, torch.zeros(24), g, g)
    with pytest.raises(ValueError, match="step"):
        compare_steps(operator, DAMPING, g, g[:3], g)


@pytest.mark.slow
def test_every_option_matters(case):
    C, P, g = case
    left, right = MatrixFree(P, SHAPES), MatrixFree(C, SHAPES)

    def run(**options):
        return compare(left, right, g, 1e-4, **({"dense_limit": 8, "probes": 8} | options))

    assert run(cg_limit=2).cg.iterations == 2
    loose, tight = run(cg_tolerance=0.5).cg, run(cg_tolerance=1e-6).cg
    assert loose.iterations < tight.iterations
    assert run(lanczos_steps=2).condition_number < run(lanczos_steps=24).condition_number
    other = run(generator=torch.Generator().manual_seed(5))
    assert other.cosine.value != run().cosine.value
    assert run(probes=48).cosine.standard_error < run(probes=2).cosine.standard_error
    singular = DenseLinearOperator(torch.diag(torch.arange(24).double()), SHAPES)
    dense = DenseLinearOperator(C, SHAPES)
    assert compare(dense, dense, g, DAMPING, inverse=singular).condition_number == torch.inf


def test_sums_are_inverted_as_matrices_where_they_are_small(case):
    C, P, g = case
    exact = DenseLinearOperator(C, SHAPES)
    total = exact + 0.5 * DenseLinearOperator(P, SHAPES)
    received = compare(total, exact, g, DAMPING)
    expected = compare(DenseLinearOperator(C + 0.5 * P, SHAPES), exact, g, DAMPING)
    assert received.step.decrease_fraction == pytest.approx(expected.step.decrease_fraction)
    assert received.condition_number == pytest.approx(expected.condition_number)


def test_precisions_may_differ(case):
    C, P, g = case
    double = DenseLinearOperator(C, SHAPES), DenseLinearOperator(P, SHAPES)
    single = DenseLinearOperator(C.float(), SHAPES), DenseLinearOperator(P.float(), SHAPES)
    expected = compare(double[1], double[0], g, DAMPING)
    for pair in ((single[1], double[0]), (double[1], single[0]), (single[1], single[0])):
        received = compare(*pair, g, DAMPING)
        assert received.step.cosine == pytest.approx(expected.step.cosine, rel=1e-4)
        assert received.cg.converged
