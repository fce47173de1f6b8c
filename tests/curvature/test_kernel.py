"""The kernel JJᵀ against nested torch.func, and the Gauss-Newton inverse through it."""

import dataclasses
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from pinncurv.curvature import (
    KFAC,
    GaussNewton,
    GaussNewtonLinearOperator,
    Kernel,
    MatrixFreeGaussNewton,
    kernel,
    kernel_blocks,
)
from pinncurv.curvature.kernel import KernelLinearOperator
from pinncurv.curvature.nystroem import Nystroem
from pinncurv.curvature.woodbury import KernelInverseLinearOperator, Woodbury
from pinncurv.diffops import Laplacian, Value
from pinncurv.linearization import Empirical, linearize
from pinncurv.linops import (
    CGInverseLinearOperator,
    Damped,
    DampingBelowResolution,
    FactorizationError,
    FactorizedInverseLinearOperator,
)
from pinncurv.machine import Sizes
from pinncurv.optim import CurvatureOptimizer, FixedStep
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.conformance import check_operator
from tests.devices import DEVICES
from tests.networks import KINDS, build, points
from tests.optim.cases import flat, network, poisson
from tests.terms import PARTS, TERMS

PAIR = [TERMS["allen_cahn"], TERMS["value"]]
TRIPLE = [TERMS["log_fokker_planck"], TERMS["poisson"], TERMS["vector"]]
BATCHES = [points(3, seed=10), points(2, seed=11), points(4, seed=12)]
EPS = torch.finfo(torch.float64).eps


def linearizations(terms, model, batches, **options):
    return [linearize(t, model, x, **options) for t, x in zip(terms, batches, strict=False)]


def jacobian(terms, model, batches) -> Tensor:
    """Return the oracle's Jacobian."""
    return torch.cat([oracles.jacobian(t, model, x) for t, x in zip(terms, batches, strict=False)])


def kernel_matrix(linearized) -> Tensor:
    return Kernel()(linearized).to_dense()


def force(monkeypatch, way: str) -> None:
    """Let all layers take the rows of the Jacobian, or the pairs of channels."""
    cost = {"rows": 1e12, "channels": -1e12}[way]
    monkeypatch.setattr(kernel_blocks, "_ELEMENTWISE_COST", cost)


@pytest.fixture(scope="module")
def triple():
    """Three terms on a gated network: linearizations and the oracle's Jacobian."""
    model = build("gated")
    return linearizations(TRIPLE, model, BATCHES), jacobian(TRIPLE, model, BATCHES)


# --- the kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_kind(kind, monkeypatch):
    model = build(kind)
    J = jacobian(PAIR, model, BATCHES)
    operator = Kernel()(linearizations(PAIR, model, BATCHES))
    oracles.assert_close(operator @ torch.eye(len(J), dtype=J.dtype), J @ J.T)
    for way in ("rows", "channels"):
        force(monkeypatch, way)
        operator = KernelLinearOperator(operator.jacobian)
        oracles.assert_close(operator.to_dense(), J @ J.T)


def test_conformance(triple):
    linearized, J = triple
    operator = Kernel()(linearized)
    assert [tuple(shape) for shape in operator.shapes] == [(3, 1), (2, 1), (4, 3)]
    check_operator(operator, J @ J.T, tolerance=1e-10)


@pytest.mark.parametrize("way", ["rows", "channels"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_blocks_and_chunks_change_nothing(chunk_size, way, triple, monkeypatch):
    """The same with the smallest blocks that memory could force."""
    force(monkeypatch, way)
    monkeypatch.setattr("pinncurv.machine.sizes._CPU", Sizes(1, 1, tile=2, panel=1))
    linearized = linearizations(TRIPLE, build("gated"), BATCHES, chunk_size=chunk_size)
    J = triple[1]
    oracles.assert_close(kernel_matrix(linearized), J @ J.T)


def test_the_cheaper_way_is_taken(monkeypatch):
    """Wide layers by pairs of channels, narrow ones by rows."""
    taken = []

    def rows(kernel, i, pairs, add=kernel_blocks._add_through_rows_):
        taken.append(("rows", pairs[0][0].blocks[i].weight))
        add(kernel, i, pairs)

    def channels(part, left, right, add=kernel_blocks._add_through_channels_):
        taken.append(("channels", left.weight))
        add(part, left, right)

    monkeypatch.setattr(kernel_blocks, "_add_through_rows_", rows)
    monkeypatch.setattr(kernel_blocks, "_add_through_channels_", channels)
    model = network(2, 64, 64, 1)
    kernel_matrix(poisson(model).linearize().linearizations[:1])
    assert sorted(taken) == [
        ("channels", "2.weight"),
        ("rows", "0.weight"),
        ("rows", "4.weight"),
    ]


def test_layers_that_one_term_does_not_use():
    class TwoParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = build("tanh"), build("silu")

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"u": self.u(x), "product": self.v(x)}

    linearized = linearizations(PARTS, TwoParts(), [points(3), points(4)])
    operator = Kernel()(linearized)
    J = operator.jacobian.to_dense()
    oracles.assert_close(operator.to_dense(), J @ J.T)
    assert torch.count_nonzero(operator.to_dense()[:3, 3:]) == 0


def test_scale():
    """Weight, batch and terms scale the kernel as they scale the loss."""
    model, x, term = build("gated"), points(), TERMS["poisson"]
    once = kernel_matrix(linearizations([term], model, [x]))
    heavy = dataclasses.replace(term, weight=2 * term.weight)
    torch.testing.assert_close(kernel_matrix(linearizations([heavy], model, [x])), 2 * once)
    twice = kernel_matrix(linearizations([term], model, [torch.cat([x, x])]))
    torch.testing.assert_close(twice, once.repeat(2, 2) / 2)
    twin = dataclasses.replace(term, name="twin")
    pair = kernel_matrix(linearizations([term, twin], model, [x, x]))
    torch.testing.assert_close(pair, once.repeat(2, 2))


@pytest.mark.filterwarnings("ignore:A damping below")
def test_single_precision():
    model = build("gated").float()
    terms = [TERMS["allen_cahn"], TERMS["vector"]]
    linearized = linearizations(terms, model, [x.float() for x in BATCHES])
    operator = Kernel()(linearized)
    check_operator(operator, dampings=[1e-3], tolerance=1e-4)
    exact = GaussNewtonLinearOperator(operator.jacobian)
    check_operator(exact, dampings=[1e-12, 1e-3], tolerance=1e-4)


def test_other_output_gradients_have_no_kernel():
    linearized = linearizations([TERMS["poisson"]], build("no_bias"), [points()])
    oracles.assert_close(kernel_matrix(linearized), kernel_matrix(linearized).T)
    empirical = linearizations([TERMS["poisson"]], build("no_bias"), [points()], fisher=Empirical())
    with pytest.raises(ValueError, match=r"'poisson' was linearized with Empirical"):
        kernel_matrix(empirical)


# --- the inverse through the kernel ---------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 26])
def test_the_smaller_side_is_inverted(N):
    """Fewer residuals than parameters or more: the same inverse, by another factorization."""
    model = build("tanh")
    linearized = linearizations([TERMS["allen_cahn"]], model, [points(N)])
    operator = MatrixFreeGaussNewton()(linearized)
    R, D = operator.jacobian.shape
    assert (R < D) == (N == 2)
    expected = {True: KernelInverseLinearOperator, False: FactorizedInverseLinearOperator}
    assert type(operator.inverse(1e-6)) is expected[R < D]
    assert type(operator.inverse(1e-6, dense_limit=min(R, D))) is expected[R < D]
    assert type(operator.inverse(1e-6, dense_limit=min(R, D) - 1)) is CGInverseLinearOperator
    dense = operator.to_dense()
    for damping in (1e-4, 1e-1):
        exact = torch.linalg.inv(dense + damping * torch.eye(D, dtype=dense.dtype))
        for inverse in (operator.inverse(damping), Woodbury(damping)(operator)):
            oracles.assert_close(inverse.to_dense(), exact)
            if damping == 1e-4:
                check_operator(inverse, exact, dampings=(), tolerance=1e-9)


@pytest.mark.parametrize("damping", [1e-12, 1e-9, 1e-6, 1e-3, 1.0])
def test_accuracy_is_that_of_the_square_root(damping):
    """Errors of ε √(‖K‖ / λ), as from the SVD of J, where the formula alone loses ε ‖K‖ / λ."""
    J, operator, generator = small_problem()
    inverse, plain = (Woodbury(damping, refine)(operator) for refine in (True, False))
    U, s, Vh = torch.linalg.svd(J)
    spectrum = torch.cat([s, s.new_zeros(len(Vh) - len(s))]).square() + damping
    u = torch.randn(len(J), generator=generator, dtype=J.dtype)
    errors = []
    for v in (torch.randn(len(Vh), generator=generator, dtype=J.dtype), J.T @ u):
        expected = Vh.T @ ((Vh @ v) / spectrum)
        scale = v.norm() / damping + (s[0] / damping**0.5) * expected.norm()
        assert (inverse @ v - expected).norm() <= 20 * EPS * scale
        errors.append(((plain @ v - expected).norm() / (EPS * scale)).item())
    expected = Vh[: len(s)].T @ (s / spectrum[: len(s)] * (U.T @ u))
    scale = (u.norm() + s[0] * expected.norm()) / damping**0.5
    pieces = u.split([30, 8])
    residual = [piece[:, None] for piece in pieces]
    assert (flat(inverse.solve_residual(residual)) - expected).norm() <= 20 * EPS * scale
    error = (flat(plain.solve_residual(residual)) - expected).norm()
    errors.append((error / (EPS * scale)).item())
    if damping == 1e-12:  # without refinement the bounds do not hold
        assert min(errors[0], errors[2]) > 20


def small_problem():
    """Return a Jacobian with singular values down to 1e-8, and its Gauss-Newton operator."""
    linearized = poisson(network(2, 16, 16, 1), n=30).linearize()
    operator = MatrixFreeGaussNewton()(linearized.linearizations)
    return operator.jacobian.to_dense(), operator, torch.Generator().manual_seed(0)


def test_residuals_keep_digits_that_the_gradient_loses():
    """(JᵀJ + λI)⁻¹ Jᵀu from u loses ε / √λ, from Jᵀu ε / λ."""
    J, operator, _ = small_problem()
    U, s, Vh = torch.linalg.svd(J, full_matrices=False)
    u, damping = U[:, :3].sum(1), 1e-12
    expected = Vh[:3].T @ (s / (s.square() + damping))[:3]
    inverse = Woodbury(damping)(operator)
    received = flat(inverse.solve_residual([piece[:, None] for piece in u.split([30, 8])]))
    assert (received - expected).norm() < 1e-8 * expected.norm()
    assert (inverse @ (J.T @ u) - expected).norm() > 1e-6 * expected.norm()


@pytest.mark.filterwarnings("ignore:A damping below")
@pytest.mark.parametrize("damping", [1e-15, 1e-18, 1e-30])
def test_dampings_below_rounding_do_no_harm(damping):
    """A refinement that would not improve is left out: finite, positive and no larger."""
    _, operator, generator = small_problem()
    v = torch.randn(operator.shape[0], 3, generator=generator, dtype=torch.float64)
    x = Woodbury(damping)(operator) @ v
    assert bool(x.isfinite().all())
    assert bool(((x * v).sum(0) > 0).all())
    assert bool((x.norm(dim=0) <= 2 * v.norm(dim=0) / damping).all())


def test_more_residuals_than_parameters():
    """The kernel is singular then; damped, it gives the inverse all the same."""
    linearized = linearizations([TERMS["poisson"]], build("tanh"), [points(30)])
    operator = MatrixFreeGaussNewton()(linearized)
    assert operator.jacobian.shape[0] > operator.jacobian.shape[1]
    b = torch.ones(operator.shape[0], dtype=torch.float64)
    dense = operator.to_dense()
    for damping in (1e-6, 1e-3):
        expected = torch.linalg.solve(dense + damping * torch.eye(len(b)).double(), b)
        oracles.assert_close(Woodbury(damping)(operator) @ b, expected, rtol=1e-8)
    with pytest.raises(FactorizationError, match="nonsingular to be inverted without damping"):
        operator.kernel.inverse(0.0)


def test_a_damping_is_needed(triple):
    operator = MatrixFreeGaussNewton()(triple[0])
    for invert in (operator.inverse, lambda damping: Woodbury(damping)(operator)):
        with pytest.raises(FactorizationError, match=r"31 parameters.*17 residuals, got 0"):
            invert(0.0)
        with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
            invert(-1.0)


@pytest.mark.parametrize("recipe", [GaussNewton(), KFAC()])
def test_other_operators_have_no_kernel(recipe, triple):
    operator = recipe(triple[0])
    with pytest.raises(TypeError, match=rf"{type(operator).__name__}\. Pass curvature=MatrixFree"):
        Woodbury(1e-3)(operator)


def test_kernels_that_are_not_finite_are_refused(triple):
    operator = MatrixFreeGaussNewton()(triple[0])
    operator.kernel.matrix[0, 0] = float("nan")
    with pytest.raises(FactorizationError, match="kernel of the residuals must be finite"):
        operator.inverse(1e-3)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_steps_are_those_of_the_dense_matrix(chunk_size):
    model, twin = network(), network()
    settings = {"step_size": FixedStep(0.1)}
    build_operator = MatrixFreeGaussNewton()
    ours = CurvatureOptimizer(model.parameters(), build_operator, Woodbury(1e-3), **settings)
    dense = CurvatureOptimizer(twin.parameters(), GaussNewton(), Damped(1e-3), **settings)
    for _ in range(3):
        record = ours.step(poisson(model, chunk_size=chunk_size))
        assert record.loss == pytest.approx(dense.step(poisson(twin)).loss, rel=1e-9)
        assert [report.method for report in record.solver["reports"]] == ["cholesky"]
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-11)


def test_other_dampings_take_the_same_kernel(triple, monkeypatch):
    filled = []

    def add(matrix, pairs):
        filled.extend((left.row, right.row) for left, right in pairs)
        return kernel_blocks.add_inner_products_(matrix, pairs)

    monkeypatch.setattr(kernel, "add_inner_products_", add)
    operator = MatrixFreeGaussNewton()(triple[0])
    for damping in (1e-3, 1e-2):
        operator.inverse(damping)
        Woodbury(damping)(operator)
    assert filled == [(0, 0), (3, 0), (3, 3), (5, 0), (5, 3), (5, 5)]


@pytest.mark.parametrize("elsewhere", DEVICES)
@pytest.mark.parametrize("inverse", [Woodbury(1e-6), Nystroem(1e-3, 8)])
def test_results_on_a_device_are_those_on_the_cpu(inverse, elsewhere):
    steps = []
    for device in ("cpu", elsewhere):
        linearized = poisson(network().to(device)).linearize()
        operator = MatrixFreeGaussNewton()(linearized.linearizations)
        solution = inverse(operator).solve_residual(linearized.residual)
        steps.append([flat(solution), flat(inverse(operator) @ linearized.gradient())])
    for received, expected in zip(steps[1], steps[0], strict=True):
        assert received.device.type == elsewhere
        oracles.assert_close(received.cpu(), expected, rtol=1e-6)


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import itertools, torch
from torch import nn
from pinncurv.curvature import MatrixFreeGaussNewton, Objective
from pinncurv.problems import poisson2d

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
torch.manual_seed(0)
widths = (2, 256, 256, 128, 128, 1)
layers = [[nn.Linear(a, b).double(), nn.Tanh()] for a, b in itertools.pairwise(widths)]
model = nn.Sequential(*itertools.chain(*layers))[:-1]
problem = poisson2d(900, 120)
batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
before = peak()
linearized = Objective(model, problem.terms, batch).linearize()
operator = MatrixFreeGaussNewton()(linearized.linearizations)
inverse = operator.inverse(1e-8)
step = inverse.solve_residual(linearized.residual)
step = inverse @ linearized.gradient()
assert type(inverse).__name__ == "KernelInverseLinearOperator" and operator.shape[0] == 116097
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory():
    """The Jacobian has 950 MB, JᵀJ has 108 GB; the kernel 8 MB, Z and G 25 MB."""
    output = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    ).stdout
    assert float(output) < 300


def heavy(seed):
    """A float32 loss of weight 100 of a small network: ‖JᵀJ‖ is some hundreds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        x = torch.rand(6, 2)
    operators = {"u": Value(), "lap": Laplacian()}
    term = LossTerm(operators, lambda x, u, lap: u + lap, Fixed(x), weight=100.0)
    return MatrixFreeGaussNewton()([linearize(term, model, x)])


@pytest.mark.filterwarnings("ignore:A damping below")
def test_positive_or_an_error_that_names_a_damping_that_is():
    """With less damping than float32 resolves; that of the message always is enough."""
    named, generator = 0, torch.Generator().manual_seed(0)
    for seed in range(8):
        C = heavy(seed)
        for damping in (1e-6, 1e-8, 1e-10):
            v = C @ torch.randn(C.shape[1], generator=generator)  # where it is smallest
            try:
                assert v @ (Woodbury(damping)(C) @ v) > 0
            except FactorizationError as error:
                enough = float(re.search(r"Pass damping >= (\S+), which does", str(error))[1])
                named += 1
                for w in (v, C @ v, torch.randn(C.shape[1], generator=generator)):
                    assert w @ (Woodbury(enough)(C) @ w) > 0
    assert named >= 3


def test_a_damping_below_the_resolution_warns():
    C = heavy(0)
    with pytest.warns(DampingBelowResolution, match=r"A damping below 1e-04 is less than round"):
        Woodbury(1e-7)(C)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Woodbury(1e-4)(C)
