"""The Nyström sketch of the kernel, and the Gauss-Newton inverse by it."""

import copy
import math

import pytest
import torch
from torch import Tensor

from pinncurv.curvature import GaussNewton, MatrixFreeGaussNewton, nystroem
from pinncurv.curvature.nystroem import Nystroem
from pinncurv.curvature.woodbury import Woodbury
from pinncurv.linops import DenseLinearOperator, FactorizationError
from pinncurv.machine import Sizes
from pinncurv.optim import CurvatureOptimizer, FixedStep, LevenbergMarquardt, Spring
from tests import oracles
from tests.conformance import check_operator
from tests.optim.cases import flat, network, poisson, same, values

sketch_of = nystroem.nystroem_sketch


def random_matrix(n: int, k: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64)


def with_spectrum(eigenvalues: Tensor) -> DenseLinearOperator:
    """Return a dense operator with these eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(random_matrix(len(eigenvalues), len(eigenvalues))).Q
    return DenseLinearOperator(Q @ torch.diag(eigenvalues) @ Q.T, [(len(eigenvalues),)])


def problem(dtype=torch.float64, **settings):
    """Return the residual of a small problem, its dense Jacobian and its Gauss-Newton operator."""
    linearized = poisson(network(2, 8, 1, dtype=dtype), **settings).linearize()
    operator = MatrixFreeGaussNewton()(linearized.linearizations)
    return linearized.residual, operator.jacobian.to_dense(), operator


# --- the sketch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_sketches_lie_below_the_matrix(rank):
    operator = with_spectrum(2.0 ** -torch.arange(12, dtype=torch.float64))
    K, sketch = operator.to_dense(), sketch_of(operator, rank, seed=0)
    approximation = sketch.U * sketch.eigenvalues @ sketch.U.T
    identity = torch.eye(rank, dtype=torch.float64)
    oracles.assert_close(sketch.U.T @ sketch.U, identity)
    oracles.assert_close(sketch.E.T @ K @ sketch.E, identity)
    oracles.assert_close(K @ sketch.E, sketch.U * sketch.eigenvalues.sqrt())
    assert torch.linalg.eigvalsh(K - approximation).min() > -1e-14
    assert sketch.eigenvalues.min() > 0
    if rank == 12:
        oracles.assert_close(approximation, K)


@pytest.mark.parametrize("rank", [6, 12, 24])
def test_expected_error(rank):
    """The bound of Frangella, Tropp, Udell 2023, proposition 2.2, on the mean of many sketches."""
    eigenvalues = torch.arange(1, 61, dtype=torch.float64) ** -1.5
    operator = with_spectrum(eigenvalues)
    K = operator.to_dense()
    errors = []
    for seed in range(30):
        sketch = sketch_of(operator, rank, seed)
        approximation = sketch.U * sketch.eigenvalues @ sketch.U.T
        errors.append(torch.linalg.matrix_norm(K - approximation, 2).item())
    bound = min(
        (1 + 2 * (rank - p) / (p - 1)) * eigenvalues[rank - p].item()
        + 2 * math.e**2 * rank / (p**2 - 1) * eigenvalues[rank - p :].sum().item()
        for p in range(2, rank - 1)
    )
    best = eigenvalues[rank].item()
    mean = sum(errors) / len(errors)
    assert best <= min(errors)
    assert mean <= min(bound, 6 * best)  # which is much closer to the best of this rank


def test_sketches_depend_on_the_seed_alone():
    operator = with_spectrum(torch.rand(9, dtype=torch.float64))
    state = torch.get_rng_state()
    first, again, other = (sketch_of(operator, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same([first.U, first.eigenvalues, first.E], [again.U, again.eigenvalues, again.E])
    assert not torch.equal(first.eigenvalues, other.eigenvalues)


def test_singular_matrices():
    """More products than the matrix has rank, or a zero matrix."""
    spectrum = torch.tensor([1.0, 0.5, *[0.0] * 6], dtype=torch.float64)
    operator = with_spectrum(spectrum)
    sketch = sketch_of(operator, 5, seed=0)
    oracles.assert_close(sketch.U * sketch.eigenvalues @ sketch.U.T, operator.to_dense())
    assert sketch.eigenvalues.max() <= 1 + 1e-12
    assert sketch.E.isfinite().all()


# --- the inverse ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 6])
@pytest.mark.parametrize("complement", [False, True])
def test_all_ranks_give_the_exact_inverse(complement, chunk_size):
    residual, J, operator = problem(chunk_size=chunk_size)
    exact = Woodbury(1e-3)(operator)
    inverse = Nystroem(1e-3, 99, complement=complement)(operator)
    step, expected = (flat(i.solve_residual(residual)) for i in (inverse, exact))
    oracles.assert_close(step, expected, rtol=1e-6)  # rounding of K costs √ε
    v = random_matrix(J.shape[1], 2)
    oracles.assert_close(inverse @ v, exact @ v, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_inverse_is_that_of_the_projected_jacobian(rank, monkeypatch):
    """(ĴᵀĴ + λI)⁻¹ with Ĵ = J P, and the steps that it defines, by dense solves."""
    monkeypatch.setattr(
        "pinncurv.machine.sizes._CPU", Sizes(1 << 19, 1, 256, 128)
    )  # one column at a time
    residual, J, operator = problem()
    u, damping = flat(residual), 1e-2
    inverse = Nystroem(damping, rank, seed=5)(operator)
    Q = J.T @ inverse.sketch.E
    oracles.assert_close(Q.T @ Q, torch.eye(rank, dtype=Q.dtype), rtol=1e-8)
    sketched = J @ Q @ Q.T
    identity = torch.eye(len(Q), dtype=Q.dtype)
    dense = torch.linalg.inv(sketched.T @ sketched + damping * identity)
    check_operator(inverse, dense, dampings=(), tolerance=1e-9)
    rows = torch.cat([sketched, math.sqrt(damping) * identity])
    best = torch.linalg.lstsq(rows, torch.cat([u, u.new_zeros(len(Q))])[:, None]).solution[:, 0]
    oracles.assert_close(flat(inverse.solve_residual(residual)), best, rtol=1e-8)
    kernel = sketched @ sketched.T + damping * torch.eye(len(u), dtype=u.dtype)
    published = Nystroem(damping, rank, seed=5, complement=True)(operator)
    expected = J.T @ torch.linalg.solve(kernel, u)
    oracles.assert_close(flat(published.solve_residual(residual)), expected, rtol=1e-8)


def test_steps_improve_with_the_rank():
    """The damped least squares loss of the step falls to the minimum."""
    residual, J, operator = problem(n=30)
    u, damping = flat(residual), 1e-4
    losses = []
    for rank in (2, 6, 12, 33):
        x = flat(Nystroem(damping, rank)(operator).solve_residual(residual))
        losses.append(((u - J @ x).square().sum() + damping * x.square().sum()).item())
    assert losses == sorted(losses, reverse=True)
    exact = flat(Woodbury(damping)(operator).solve_residual(residual))
    minimum = (u - J @ exact).square().sum() + damping * exact.square().sum()
    assert losses[-1] == pytest.approx(minimum.item(), rel=1e-6)
    assert losses[0] > 2 * minimum


def test_single_precision():
    residual, J, operator = problem(torch.float32)
    inverse = Nystroem(1e-2, 8)(operator)
    check_operator(inverse, dampings=(), tolerance=1e-4)
    J = J.double()
    kernel = J @ J.T + torch.eye(len(J)).double()
    exact = J.T @ torch.linalg.solve(kernel, flat(residual).double())
    step = flat(Nystroem(1.0, 99)(operator).solve_residual(residual))
    assert step.dtype == torch.float32
    oracles.assert_close(step.double(), exact, rtol=1e-3)


def test_runs_resume_bit_for_bit():
    def make(model):
        return CurvatureOptimizer(
            model.parameters(),
            MatrixFreeGaussNewton(),
            Nystroem(1e-2, 6, seed=3),
            FixedStep(0.05),
            momentum=Spring(0.5),
            damping_rule=LevenbergMarquardt(),
        )

    model = network()
    optimizer = make(model)
    optimizer.step(poisson(model))
    twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(7)
    resumed = make(twin)
    resumed.load_state_dict(state)
    for seed in range(2):
        optimizer.step(poisson(model, seed))
        resumed.step(poisson(twin, seed))
    assert same(values(model), values(twin))


# --- what is refused ------------------------------------------------------------------------------


def test_errors():
    operator = problem()[2]
    with pytest.raises(ValueError, match="rank of a sketch must be at least 1, got 0"):
        Nystroem(1e-3, 0)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        Nystroem(-1.0, 3)
    with pytest.raises(FactorizationError, match="damping must be positive"):
        Nystroem(0.0, 3)(operator)
    dense = GaussNewton()(operator.jacobian.linearizations)
    with pytest.raises(TypeError, match=r"Nystroem needs .* got DenseLinearOperator"):
        Nystroem(1e-3, 3)(dense)
