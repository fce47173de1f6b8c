"""The exact Gauss-Newton matrix on sampled gradients, against dense projections of the oracle's."""

import pytest
import torch
from torch import Tensor

from pinncurv.curvature import (
    KFAC,
    Deflated,
    InSubspace,
    JacobianLinearOperator,
    KernelLinearOperator,
    Objective,
    SubspaceGaussNewton,
    pivoted_points,
    uniform_points,
)
from pinncurv.curvature.subspace import sample_points
from pinncurv.diffops import Value
from pinncurv.linearization import Empirical, linearize
from pinncurv.linops import pivoted_cholesky
from pinncurv.optim import CurvatureOptimizer
from pinncurv.problems import Fixed, LossTerm, poisson2d
from tests import oracles
from tests.conformance import check_operator
from tests.networks import KINDS, build, points
from tests.terms import TERMS

TERMS_WITH_VECTOR = [TERMS["vector"], TERMS["poisson"]]
N = (4, 3)
V = 3


def linearizations(kind: str = "gated", **options):
    model = build(kind)
    batch = [points(n, seed=i) for i, n in enumerate(N)]
    made = [
        linearize(t, model, x, **options) for t, x in zip(TERMS_WITH_VECTOR, batch, strict=True)
    ]
    J = torch.cat(
        [oracles.jacobian(t, model, x) for t, x in zip(TERMS_WITH_VECTOR, batch, strict=True)]
    )
    return made, J


def sampled_rows(J: Tensor, count: int, seed: int) -> Tensor:
    """The rows of the sampled points; the first term has V components."""
    first, second = sample_points(N, count, seed)
    rows = [V * n + v for n in first.tolist() for v in range(V)]
    return J[rows + [V * N[0] + n for n in second.tolist()]]


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_projected_oracle(kind):
    made, J = linearizations(kind)
    operator = SubspaceGaussNewton(3, seed=1)(made)
    Q = torch.linalg.qr(sampled_rows(J, 3, 1).mT).Q
    P = Q @ Q.mT
    expected = P @ J.mT @ J @ P
    # the basis comes from a kernel matrix, which squares the condition number of the rows
    atol = 1e-8 * float(expected.abs().max())
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_laws(options):
    made, _ = linearizations(**options)
    operator = SubspaceGaussNewton(3)(made)
    check_operator(operator, dampings=(1e-3, 1.0), tolerance=1e-10)
    assert torch.linalg.matrix_rank(operator.to_dense(), rtol=1e-10) == len(
        operator.singular_values
    )


def test_the_step_minimizes_the_model_in_the_subspace():
    """Both from the gradient and, with more digits, from the residual."""
    made, J = linearizations()
    u = torch.rand(len(J), dtype=J.dtype, generator=torch.Generator().manual_seed(0))
    rows = sampled_rows(J, 3, 0)
    for damping in (1e-6, 1e-2):
        # min over w of |u - J rows^T w|^2 + damping |rows^T w|^2
        system = torch.cat([J @ rows.mT, damping**0.5 * rows.mT])
        right = torch.cat([u, torch.zeros(J.shape[1], dtype=J.dtype)])
        best = rows.mT @ torch.linalg.lstsq(system, right.unsqueeze(1)).solution[:, 0]
        inverse = InSubspace(damping)(SubspaceGaussNewton(3)(made))
        split = [u[: V * N[0]].view(N[0], V), u[V * N[0] :].view(N[1], 1)]
        step = torch.cat([part.flatten() for part in inverse.solve_residual(split)])
        torch.testing.assert_close(step, best, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(inverse @ (J.mT @ u), best, rtol=1e-6, atol=1e-8)


def test_all_points_give_the_exact_step():
    made, J = linearizations()
    u = torch.rand(len(J), dtype=J.dtype, generator=torch.Generator().manual_seed(0))
    inverse = InSubspace(1e-3)(SubspaceGaussNewton(sum(N))(made))
    exact = torch.linalg.solve(J.mT @ J + 1e-3 * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ u)
    torch.testing.assert_close(inverse @ (J.mT @ u), exact, rtol=1e-8, atol=1e-10)


def test_deflated_against_the_projected_oracle():
    """The inverse in the subspace; outside of it, that of the smallest eigenvalue inside."""
    made, J = linearizations()
    operator = SubspaceGaussNewton(3)(made)
    Q = torch.linalg.qr(sampled_rows(J, 3, 0).mT).Q
    inside = Q.mT @ J.mT @ J @ Q
    smallest = float(torch.linalg.eigvalsh(inside)[0])
    identity = torch.eye(len(inside), dtype=J.dtype)
    for damping in (1e-2, 1.0):
        outside = torch.eye(J.shape[1], dtype=J.dtype) - Q @ Q.mT
        expected = Q @ torch.linalg.inv(inside + damping * identity) @ Q.mT
        expected += outside / (smallest + damping)
        check_operator(Deflated(damping)(operator), expected, dampings=(), tolerance=1e-7)


def test_points_are_drawn_by_the_seed_in_proportion():
    first, second = sample_points([900, 100], 50, seed=3)
    assert (len(first), len(second)) == (45, 5)
    assert len(first.unique()) == 45
    again = sample_points([900, 100], 50, seed=3)
    assert first.equal(again[0])
    assert not first.equal(sample_points([900, 100], 50, seed=4)[0])
    assert [len(part) for part in sample_points([3, 1], 100, 0)] == [3, 1]


# --- points by randomly pivoted Cholesky ----------------------------------------------------------


def pivots(J: Tensor, count: int, seed: int) -> Tensor:
    """The pivots of the oracle's kernel, all points being candidates."""
    return pivoted_cholesky(J @ J.mT, count, torch.Generator().manual_seed(seed)).pivots


@pytest.mark.parametrize("kind", KINDS)
def test_pivots_are_those_of_the_kernel(kind):
    """For components and several terms."""
    made, J = linearizations(kind)
    P, first = pivots(J, 4, 0), V * N[0]
    of_terms = [P[P.lt(first)] // V, P[P.ge(first)] - first]
    batch = [
        points(n, seed=i)[p.unique()] for i, (n, p) in enumerate(zip(N, of_terms, strict=True))
    ]
    samples = pivoted_points(made, 4, 0)
    assert [s.x.tolist() for s in samples] == [x.tolist() for x in batch if len(x)]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_the_subspace_of_pivots_against_the_projected_oracle(options):
    made, J = linearizations(**options)
    of_point = torch.tensor([i // V for i in range(V * N[0])] + [N[0] + i for i in range(N[1])])
    rows = J[torch.isin(of_point, of_point[pivots(J, 2, 1)])]
    Q = torch.linalg.qr(rows.mT).Q
    expected = Q @ Q.mT @ J.mT @ J @ Q @ Q.mT
    operator = SubspaceGaussNewton(2, 1, pivoted_points)(made)
    atol = 1e-8 * float(expected.abs().max())
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-6, atol=atol)


def test_a_term_that_does_not_matter_has_no_pivot():
    """And a kernel of zeros is a matrix of zeros."""
    model, x = build("tanh"), points(4)
    zero = LossTerm({"u": Value()}, lambda x, u: 0 * u + 1, Fixed(x), name="constant")
    made = [linearize(zero, model, x), linearize(TERMS["poisson"], model, x)]
    recipe = SubspaceGaussNewton(3, 0, pivoted_points)
    assert [len(lin.x) for lin in pivoted_points(made, 3, 0)] == [3]
    assert len(recipe(made).singular_values) == 3
    assert not recipe(made[:1]).to_dense().any()


def test_pivots_of_clustered_points_leave_less_of_the_kernel():
    """The trace of what the subspace misses, in the median of seeds."""
    x = torch.rand(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[10:] *= 0.05
    made = [linearize(TERMS["poisson"], build("tanh"), x)]
    total = float(KernelLinearOperator(JacobianLinearOperator(made)).matrix.trace())

    def missed(choice, seed):
        return total - float(
            SubspaceGaussNewton(8, seed, choice)(made).singular_values.square().sum()
        )

    median = {
        choice: sorted(missed(choice, seed) for seed in range(7))[3]
        for choice in (uniform_points, pivoted_points)
    }
    assert 0 < median[pivoted_points] < 0.1 * median[uniform_points]


def test_a_sample_beyond_the_effective_dimension_is_nearly_exact():
    """The decrease of the exact model is at least 0.8 of the best, from a tenth of the points."""
    problem = poisson2d(300, 60)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
    ).double()
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    linearized = Objective(model, problem.terms, batch).linearize()
    J = linearized.jacobian.to_dense()
    r = torch.cat([part.flatten() for part in linearized.residual])
    inverse = InSubspace(1e-6)(SubspaceGaussNewton(36)(linearized.linearizations))
    v = torch.cat([part.flatten() for part in inverse.solve_residual(linearized.residual)])
    exact = J.mT @ torch.linalg.solve(J @ J.mT + 1e-6 * torch.eye(len(r), dtype=r.dtype), r)

    def decrease(v):
        Jv = J @ v
        return (r @ Jv) ** 2 / (Jv @ Jv + 1e-6 * v @ v)

    assert 0.8 < decrease(v) / decrease(exact) <= 1 + 1e-9


def test_training():
    problem = poisson2d(100, 40)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    ).double()
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    objective = Objective(model, problem.terms, batch)
    optimizer = CurvatureOptimizer(model.parameters(), SubspaceGaussNewton(60), InSubspace(1e-4))
    records = [optimizer.step(objective) for _ in range(30)]
    assert records[-1].new_loss < 1e-4 * records[0].loss


def test_an_optimizer_draws_other_points_in_every_step():
    """By the number of the step, so that a resumed run draws the same."""
    seeds = []

    class Spy(SubspaceGaussNewton):
        def __call__(self, linearizations):
            seeds.append(self.seed)
            return super().__call__(linearizations)

    problem = poisson2d(20, 8)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    ).double()
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    objective = Objective(model, problem.terms, batch)
    optimizer = CurvatureOptimizer(model.parameters(), Spy(10, seed=7), InSubspace(1e-2))
    for _ in range(3):
        optimizer.step(objective)
    other = CurvatureOptimizer(model.parameters(), Spy(10, seed=7), InSubspace(1e-2))
    other.load_state_dict(optimizer.state_dict())
    other.step(objective)
    assert seeds == [7, 8, 9, 10]


def test_bad_input():
    made, _ = linearizations()
    with pytest.raises(ValueError, match="sampled points must be at least 1, got 0"):
        SubspaceGaussNewton(0)(made)
    with pytest.raises(ValueError, match="low rank must be positive, got 0"):
        SubspaceGaussNewton(3)(made).inverse(0.0)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, got -1"):
        InSubspace(-1.0)
    with pytest.raises(TypeError, match="SubspaceGaussNewtonLinearOperator, got KFAC"):
        InSubspace(1.0)(KFAC()(made))
    empirical, _ = linearizations(fisher=Empirical())
    with pytest.raises(ValueError, match="needs the exact output gradients"):
        SubspaceGaussNewton()(empirical)


def test_float32_has_an_orthonormal_basis():
    """The part of the sample that products in float32 can't resolve is left out."""
    problem = poisson2d(60, 20)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh()
    )
    model.append(torch.nn.Linear(16, 1))
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float32, "cpu")
    linearized = Objective(model, problem.terms, batch).linearize()
    operator = SubspaceGaussNewton(40)(linearized.linearizations)
    k = len(operator.singular_values)
    Q = torch.cat([part.flatten(end_dim=-2) for part in operator.combine(torch.eye(k).double())])
    deviation = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(k), ord=2)
    assert k > 5
    assert deviation < 0.2
