"""The exact Gauss-Newton inverse on the cheaper side, against dense solves with the oracle's J."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from pinncurv.curvature import (
    KFAC,
    CheaperSide,
    GaussNewton,
    MatrixFreeGaussNewton,
    Objective,
)
from pinncurv.curvature.exact_inverse import ParameterInverseLinearOperator
from pinncurv.curvature.woodbury import KernelInverseLinearOperator
from pinncurv.diffops import Value
from pinncurv.linearization import linearize
from pinncurv.linops import (
    CGInverseLinearOperator,
    FactorizationError,
)
from pinncurv.problems import L2, Fixed, LossTerm
from tests import oracles
from tests.conformance import DAMPINGS, check_operator
from tests.networks import build, points
from tests.optim.cases import flat, network, poisson
from tests.terms import TERMS

EPS = torch.finfo(torch.float64).eps
SIDES = {True: KernelInverseLinearOperator, False: ParameterInverseLinearOperator}


class Sines(nn.Module):
    """Eight parameters, so that eight points are as many residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.head(torch.sin(3 * self.first(x))) + self.head(self.first(x) ** 2)


def small(N: int, kind: str = "sines", chunk_size=None, dtype=torch.float64):
    """Return the operator JᵀJ of a nonlinear term at N points, and J of the oracle."""
    if kind == "sines":
        torch.manual_seed(3)
        model = Sines().double()
        nn.init.normal_(model.head.weight, std=0.7)
    else:
        model = build(kind)
    term, x = TERMS["allen_cahn"], points(N, seed=10)
    J = oracles.jacobian(term, model, x)
    model, x = model.to(dtype), x.to(dtype)
    linearized = linearize(term, model, x, chunk_size=chunk_size)
    return MatrixFreeGaussNewton()([linearized]), J


def by_svd(J, damping, v=None, u=None):
    """Return (JᵀJ + λI)⁻¹ v, or of Jᵀ u, without forming JᵀJ."""
    U, s, Vh = torch.linalg.svd(J, full_matrices=True)
    k = min(J.shape)
    if v is None:
        return Vh[:k].T @ (s / (s.square() + damping) * (U[:, :k].T @ u))
    spectrum = torch.cat([s, s.new_zeros(len(Vh) - k)]).square() + damping
    return Vh.T @ ((Vh @ v).movedim(0, -1) / spectrum).movedim(-1, 0)


# --- both sides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "kernel"), [(3, True), (7, True), (8, False), (15, False)])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_against_the_oracle(N, kernel, damping):
    """Fewer residuals than the eight parameters, as many, or more."""
    operator, J = small(N)
    assert J.shape == (N, 8)
    inverse = CheaperSide(damping)(operator)
    assert type(inverse) is SIDES[kernel]
    taken = max(damping, EPS * float(J.square().sum()))
    assert inverse.damping == pytest.approx(taken, rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(J.shape[1], generator=generator, dtype=J.dtype)
    u = torch.randn(len(J), generator=generator, dtype=J.dtype)
    condition = 1 + float(torch.linalg.matrix_norm(J, 2)) ** 2 / taken
    for received, expected in (
        (inverse @ v, by_svd(J, taken, v=v)),
        (flat(inverse.solve_residual([u[:, None]])), by_svd(J, taken, u=u)),
    ):
        error = (received - expected).norm() / expected.norm()
        assert error <= 100 * EPS * condition**0.5 + EPS * condition
    oracles.assert_close(inverse @ v, by_svd(J, taken, v=v), rtol=1e-3)


@pytest.mark.parametrize(("N", "chunk_size"), [(3, None), (15, None), (3, 2), (15, 8)])
def test_conformance(N, chunk_size):
    """All formats of products, on both sides."""
    operator, J = small(N, chunk_size=chunk_size)
    identity = torch.eye(J.shape[1], dtype=J.dtype)
    for damping in (1e-6, 1.0) if chunk_size is None else (1e-2,):
        inverse = CheaperSide(damping)(operator)
        exact = by_svd(J, damping, v=identity)
        check_operator(inverse, exact, dampings=(), tolerance=1e-8)


def test_refinement_pays():
    """Products with J, not with JᵀJ, in the residual: the error of the square root of it."""
    operator, J = small(15)
    damping = 100 * EPS * float(J.square().sum())
    inverse = CheaperSide(damping)(operator)
    u = torch.randn(len(J), generator=torch.Generator().manual_seed(1), dtype=J.dtype)
    expected = by_svd(J, damping, u=u)
    before = (inverse.factorization.solve((J.T @ u)[:, None])[:, 0] - expected).norm()
    after = (flat(inverse.solve_residual([u[:, None]])) - expected).norm()
    assert after < 0.1 * before
    assert after < 1e-7 * expected.norm()


@pytest.mark.parametrize("N", [3, 15])
def test_single_precision(N):
    """What float32 makes of J is inverted as well as float32 resolves it."""
    operator, J = small(N, dtype=torch.float32)
    eps = torch.finfo(torch.float32).eps
    resolved = eps * float(J.square().sum())
    u = torch.randn(len(J), generator=torch.Generator().manual_seed(1), dtype=J.dtype)
    for damping in (1e-12, 1e-3, 1.0):
        inverse = CheaperSide(damping)(operator)
        assert inverse.damping == pytest.approx(max(damping, resolved), rel=1e-4)
        solution = inverse.solve_residual([u[:, None].float()])
        assert all(part.dtype == torch.float32 for part in solution)
        expected = by_svd(J, inverse.damping, u=u)
        tolerance = 1e-5 if damping == 1.0 else 1e-2
        assert (flat(solution).double() - expected).norm() < tolerance * expected.norm()
        assert torch.equal(flat(solution), flat(inverse.solve_residual([u[:, None].float()])))


@pytest.mark.parametrize("floor", [1.0, 1e3])
@pytest.mark.parametrize("N", [3, 15])
def test_the_smallest_damping_is_what_rounding_leaves(N, floor):
    operator, J = small(N)
    smallest = floor * EPS * float(J.square().sum())
    for damping in (0.0, 1e-30, 0.5 * smallest):
        inverse = CheaperSide(damping, floor)(operator)
        assert inverse.damping == pytest.approx(smallest, rel=1e-9)
    assert CheaperSide(2 * smallest, floor)(operator).damping == 2 * smallest


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_no_dependence_on_the_parameters(damping):
    """J = 0 has the inverse I / λ, and an end."""
    model, x = build("tanh"), points(4)
    term = LossTerm({"u": Value()}, lambda x, u: 0 * u + 1, Fixed(x), name="constant")
    inverse = CheaperSide(damping)(MatrixFreeGaussNewton()([linearize(term, model, x)]))
    v = torch.ones(inverse.shape[0], dtype=torch.float64)
    assert inverse.damping == (damping or 1.0)
    torch.testing.assert_close(inverse @ v, v / inverse.damping)


@pytest.mark.parametrize("N", [3, 15])
def test_a_matrix_is_formed_once_for_all_dampings(N, monkeypatch):
    operator, _ = small(N)
    passes = []
    for owner, name in ((type(operator), "to_dense"), (type(operator.kernel), "to_dense")):
        original = getattr(owner, name)

        def spy(self, original=original):
            passes.append(type(self).__name__)
            return original(self)

        monkeypatch.setattr(owner, name, spy)
    dense = [CheaperSide(damping)(operator).factorization.root for damping in (1e-3, 1e-2, 1e-1)]
    assert len(passes) <= 1
    assert not torch.equal(dense[0], dense[1])


def test_a_matrix_that_is_not_resolved_is_damped_more():
    """The damping that was taken is that of the inverse, and of its products."""
    operator, _ = small(15)
    shifted = operator.to_dense() - 1e-2 * torch.eye(8, dtype=torch.float64)
    smallest = float(torch.linalg.eigvalsh(shifted)[0])
    assert smallest < 0
    operator.__dict__["dense"] = shifted
    inverse = CheaperSide(1e-8)(operator)
    assert -smallest < inverse.damping <= -10 * smallest
    assert inverse.reports[0].floor == inverse.damping


def test_terms_of_other_sizes_and_a_decay_of_the_parameters():
    """Systems, weights per point, a tensor beside the layers, and L2 rows."""
    model = build("fourier")
    terms = [TERMS["log_fokker_planck"], TERMS["vector"], L2(0.3)]
    batch = [points(3, seed=1), points(4, seed=2)]
    objective = Objective.sample(model, [*terms[:2], terms[2]])
    batch.append(objective.points[2])
    objective = Objective(model, terms, batch)
    J = torch.cat([oracles.jacobian(t, model, x) for t, x in zip(terms[:2], batch, strict=False)])
    decay = 0.3 * torch.eye(J.shape[1], dtype=J.dtype)
    linearized = objective.linearize()
    for damping in (1e-6, 1e-2):
        inverse = CheaperSide(damping)(MatrixFreeGaussNewton()(linearized))
        exact = torch.linalg.inv(J.T @ J + decay + damping * torch.eye(len(decay)).to(J))
        oracles.assert_close(inverse.to_dense(), exact)
        step = inverse.solve_residual(linearized.residual)
        gradient = torch.cat([g.flatten() for g in linearized.gradient()])
        oracles.assert_close(flat(step), exact @ gradient)


# --- parameters damped by how much they matter ---------------------------------------------------


def jacobi(J):
    """Return D from the oracle's J: its squared columns, floored, of mean one."""
    d = J.square().sum(0)
    floored = torch.maximum(d, 0.1 * d.mean())
    return floored / floored.mean()


@pytest.mark.parametrize("N", [3, 8, 15])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_jacobi_against_the_oracle(N, damping):
    """(JᵀJ + λD)⁻¹ on both sides, refined: as exact as without D."""
    operator, J = small(N)
    D = jacobi(J)
    assert 0.01 < D.min() < 0.1 * D.max()  # there is something to scale, and something floored
    inverse = CheaperSide(damping, jacobi=True)(operator)
    assert type(inverse.scaled) is SIDES[N < 8]
    scaled = J / D.sqrt()
    taken = max(damping, EPS * float(scaled.square().sum()))
    assert inverse.damping == pytest.approx(taken, rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(J.shape[1], generator=generator, dtype=J.dtype)
    u = torch.randn(len(J), generator=generator, dtype=J.dtype)
    condition = 1 + float(torch.linalg.matrix_norm(scaled, 2)) ** 2 / taken
    for received, expected in (
        (inverse @ v, by_svd(scaled, taken, v=v / D.sqrt()) / D.sqrt()),
        (flat(inverse.solve_residual([u[:, None]])), by_svd(scaled, taken, u=u) / D.sqrt()),
    ):
        error = ((received - expected) * D.sqrt()).norm() / (expected * D.sqrt()).norm()
        assert error <= 100 * EPS * condition**0.5 + EPS * condition


@pytest.mark.parametrize(("N", "chunk_size"), [(3, None), (15, None), (3, 2), (15, 8)])
def test_conformance_of_jacobi(N, chunk_size):
    """All formats of products; by the definition, without scaling anything."""
    operator, J = small(N, chunk_size=chunk_size)
    exact = torch.linalg.inv(J.T @ J + 1e-2 * jacobi(J).diag())
    inverse = CheaperSide(1e-2, jacobi=True)(operator)
    check_operator(inverse, exact, dampings=(), tolerance=1e-8)
    assert inverse.linearizations is operator.jacobian.linearizations


@pytest.mark.parametrize("N", [3, 15])
def test_jacobi_by_conjugate_gradients(N):
    operator, J = small(N)
    inverse = CheaperSide(10.0, largest=2, jacobi=True)(operator)
    assert inverse.damping == 10.0
    exact = torch.linalg.inv(J.T @ J + 10.0 * jacobi(J).diag())
    oracles.assert_close(inverse.to_dense(), exact, rtol=1e-6)
    assert inverse.damping == 10.0
    assert CheaperSide(0.0, largest=2, jacobi=True)(operator).damping == EPS


# --- what it is not for ---------------------------------------------------------------------------


@pytest.mark.parametrize("N", [3, 15])
def test_beyond_the_largest_side_it_is_conjugate_gradients(N):
    operator, J = small(N)
    side = min(J.shape)
    assert type(CheaperSide(1e-2, largest=side)(operator)) is SIDES[N == 3]
    inverse = CheaperSide(10.0, largest=side - 1)(operator)
    assert type(inverse) is CGInverseLinearOperator
    v = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=J.dtype)
    oracles.assert_close(inverse @ v, by_svd(J, 10.0, v=v), rtol=1e-6)


@pytest.mark.parametrize("damping", [1e-2, 1e-5])
def test_a_coarse_set_of_points_preconditions(damping):
    """The dense solution, in less than a third of the iterations without or with the diagonal."""
    linearized = poisson(network(2, 12, 12, 1), n=100).linearize()
    operator = MatrixFreeGaussNewton()(linearized)
    inverse = CheaperSide(damping, largest=30)(operator)
    b = flat(linearized.gradient())
    oracles.assert_close(inverse @ b, operator.inverse(damping) @ b, rtol=1e-6)
    diagonal = operator.inverse(damping, dense_limit=30)
    iterations = []
    for solver in (inverse, CGInverseLinearOperator(operator, damping), diagonal):
        solver @ b
        iterations.append(solver.last_records[0].iterations)
        assert solver.last_records[0].converged
    assert 3 * iterations[0] < min(iterations[1:]), iterations


@pytest.mark.parametrize("jacobi", [False, True])
def test_one_term_of_several_by_conjugate_gradients(jacobi):
    """In all parameters, also those that are of another term alone."""
    model, x = build("tanh"), points(6)
    trained = TrainedFactor()
    terms = [TERMS["poisson"], LossTerm({"u": Value()}, trained, Fixed(x), name="trained")]
    operator = MatrixFreeGaussNewton()([linearize(term, model, x) for term in terms])
    alone = operator.term(0)
    b = torch.ones(alone.shape[1], dtype=alone.dtype)
    expected = CheaperSide(1.0, jacobi=jacobi)(alone) @ b
    oracles.assert_close(CheaperSide(1.0, largest=2, jacobi=jacobi)(alone) @ b, expected, rtol=1e-6)


class TrainedFactor(nn.Module):
    """A residual with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x, u):
        return self.factor * u - 1


@pytest.mark.parametrize("recipe", [KFAC(), GaussNewton()])
def test_only_the_exact_matrix_by_products_with_j(recipe):
    linearized = linearize(TERMS["allen_cahn"], build("tanh"), points(3))
    with pytest.raises(TypeError, match=r"CheaperSide needs an operator that knows its Jacobian"):
        CheaperSide(1e-3)(recipe([linearized]))


@pytest.mark.parametrize("N", [3, 15])
def test_entries_that_are_not_finite(N):
    operator, _ = small(N)
    matrix = operator.dense if N == 15 else operator.kernel.matrix
    matrix[0, 0] = torch.nan
    name = "the Gauss-Newton matrix" if N == 15 else "the kernel of the residuals"
    with pytest.raises(FactorizationError, match=rf"entries of {name} must be finite, got 1 of"):
        CheaperSide(1e-3)(operator)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_that_is_none(damping):
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, got"):
        CheaperSide(damping)


@pytest.mark.parametrize("largest", [0, -1])
def test_a_largest_side_that_is_none(largest):
    with pytest.raises(ValueError, match="largest must be at least 1, got"):
        CheaperSide(1e-3, largest=largest)


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_floor_that_is_none(floor):
    with pytest.raises(ValueError, match="The floor must be positive, got"):
        CheaperSide(1e-3, floor)


def test_a_recipe_is_plain_data():
    recipe = CheaperSide(1e-3)
    assert copy.deepcopy(recipe) == recipe
    assert replace(recipe, damping=1e-2) == CheaperSide(1e-2)
