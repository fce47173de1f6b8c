"""Curvature whose products are formed in float32, against the oracle's and that in float64."""

import warnings

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    CheaperSide,
    GaussNewton,
    Kernel,
    MatrixFreeGaussNewton,
    Woodbury,
    reduce,
)
from pinncurv.curvature.single import Scaled
from pinncurv.diffops import Laplacian, Value
from pinncurv.linearization import Empirical, ForwardOnly, linearize
from pinncurv.linops import Damped, DampingBelowResolution, FactorDamping
from pinncurv.optim import CurvatureOptimizer, ExponentialAverage, QuadraticModel
from pinncurv.problems import L2, Fixed, LossTerm
from tests import oracles
from tests.networks import points
from tests.optim.cases import flat, network, poisson

EPS = torch.finfo(torch.float32).eps
RECIPES = {
    "kfac": KFAC,
    "reduce": lambda single=False: KFAC(reduce, single=single),
    "empirical": lambda single=False: KFAC(fisher=Empirical(), single=single),
    "forward_only": lambda single=False: KFAC(fisher=ForwardOnly(), single=single),
    "gauss_newton": GaussNewton,
    "block_diagonal": BlockDiagonalGaussNewton,
    "kernel": Kernel,
}


class Wide(nn.Module):
    """Layers that are wide enough to be rounded, one without bias, one transposed, and slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 20), nn.Linear(20, 17, bias=False)
        self.slopes = nn.Parameter(torch.ones(17))
        self.mix = nn.Parameter(torch.randn(17, 16) / 4)
        self.last = nn.Linear(16, 1)

    def forward(self, x):
        h = torch.tanh(self.slopes * self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(h @ self.mix))


def wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wide().double()


def term(weight: float = 1.0, name: str = "pde") -> LossTerm:
    operators = {"u": Value(), "lap": Laplacian()}
    return LossTerm(operators, lambda x, u, lap: lap + u**2 - 1, Fixed(points()), weight, name)


def linearized(model, *terms, N=9, **options):
    terms = terms or (term(), LossTerm({"u": Value()}, lambda x, u: u, Fixed(points()), 3.0, "bc"))
    # an L2 term has no points
    batch = [
        torch.empty(1, 0).double() if isinstance(t, L2) else points(N + i, seed=i)
        for i, t in enumerate(terms)
    ]
    return [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]


def relative(received: torch.Tensor, expected: torch.Tensor) -> float:
    return float((received - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_within_the_rounding_of_float32(name, chunk_size):
    made = linearized(wide(), chunk_size=chunk_size)
    double, single = (RECIPES[name](single=s)(made) for s in (False, True))
    assert single.dtype == torch.float64
    error = relative(single.to_dense(), double.to_dense())
    assert 1e-10 < error < 1e-5  # it is rounded, and not more than that


def test_the_exact_matrices_of_the_oracle():
    model = wide()
    made = linearized(model)
    J = torch.cat([oracles.jacobian(lin.term, model, lin.x) for lin in made])
    assert relative(GaussNewton(single=True)(made).to_dense(), J.T @ J) < 1e-6
    assert relative(Kernel(single=True)(made).to_dense(), J @ J.T) < 1e-6
    scaled = MatrixFreeGaussNewton(single=True)(made).jacobi
    K = J * scaled.flat_scale.square() @ J.T
    assert 1e-10 < relative(scaled.kernel, K) < 1e-6


def test_the_factors_of_the_oracle():
    model, x = network(2, 18, 17, 1), points(12)
    made = KFAC(single=True)([linearize(term(), model, x)])
    for (pair,), layer in zip(made.factors, oracles.layers(term(), model, x).values(), strict=True):
        A, B = oracles.kfac_expand(layer)
        assert relative(pair.A, A) < 2e-6
        assert relative(pair.B, B) < 2e-6


@pytest.mark.parametrize("name", ["kernel", "block_diagonal", "gauss_newton", "kfac"])
def test_an_l2_term(name):
    """Its rows are multiples of unit vectors, which meet rows that are rounded."""
    made = linearized(wide(), term(), L2(0.3))
    double, single = (RECIPES[name](single=s)(made) for s in (False, True))
    assert 1e-10 < relative(single.to_dense(), double.to_dense()) < 1e-5


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("empirical", "forward_only")])
def test_no_weight_leaves_the_range(name, exponent):
    """2^100 is 1e30: a weight that is a power of four changes no digit of any operator."""
    model, weight = wide(), 2.0**exponent
    one, other = (RECIPES[name](single=True)(linearized(model, term(w))) for w in (1.0, weight))
    torch.testing.assert_close(other.to_dense() / weight, one.to_dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [1e-30, 1e30])
@pytest.mark.parametrize("name", ["kfac", "gauss_newton", "woodbury"])
def test_no_weight_changes_the_direction(name, weight):
    model = wide()

    def direction(w: float) -> torch.Tensor:
        made = linearized(model, term(w))
        gradient = oracles.gradient([term(w)], model, [made[0].x])
        if name == "woodbury":
            return flat(Woodbury(1e-3 * w)(MatrixFreeGaussNewton(single=True)(made)) @ gradient)
        return flat(Damped(1e-2 * w)(RECIPES[name](single=True)(made)) @ gradient)

    assert relative(direction(weight), direction(1.0)) < 1e-4


def test_a_matrix_of_any_size_and_none_that_is_not_finite():
    X = torch.randn(5, 3, dtype=torch.float64)
    for factor in (1e-70, 1.0, 1e70):
        scaled = Scaled.of(factor * X)
        assert 0.5 <= scaled.values.abs().max() < 1
        assert relative(scaled.gram(), factor**2 * X.T @ X) < 1e-6
    assert not Scaled.of(0 * X).gram().any()
    for wrong in (torch.inf, torch.nan):
        X[1, 1] = wrong
        assert not Scaled.of(X).gram().isfinite().any()


def test_products_are_not_rounded():
    made = linearized(wide())
    v = torch.randn(MatrixFreeGaussNewton()(made).shape[1], dtype=torch.float64)
    assert torch.equal(MatrixFreeGaussNewton(True)(made) @ v, MatrixFreeGaussNewton()(made) @ v)


def test_the_kernels_inverse_is_refined():
    """One step with exact products takes the error ε tr K / λ of the solution to its square."""
    model = wide()
    made = linearized(model)
    J = torch.cat([oracles.jacobian(lin.term, model, lin.x) for lin in made])
    damping = 1e3 * EPS * float(J.square().sum())
    u = [torch.ones(len(lin.x), 1, dtype=torch.float64) for lin in made]
    expected = J.T @ torch.linalg.solve(
        J @ J.T + damping * torch.eye(len(J), dtype=J.dtype), torch.cat(u).flatten()
    )
    operator = MatrixFreeGaussNewton(single=True)(made)
    rough, fine = (
        relative(flat(Woodbury(damping, refine)(operator).solve_residual(u)), expected)
        for refine in (False, True)
    )
    assert 1e-8 < rough < 1e-3
    assert fine < 1e-2 * rough


@pytest.mark.parametrize("jacobi", [False, True])
@pytest.mark.parametrize("N", [9, 400])
def test_the_cheaper_side_stays_above_what_float32_resolves(N, jacobi):
    """On both sides, of the kernel and of the matrix."""
    operator = MatrixFreeGaussNewton(single=True)(linearized(network(2, 16, 1), term(), N=N))
    J = operator.jacobi if jacobi else operator.jacobian
    trace = float(J.to_dense().square().sum())
    inverse = CheaperSide(1e-14, jacobi=jacobi)(operator)
    assert inverse.damping == pytest.approx(EPS * trace, rel=1e-3)


INVERSES = {
    "dense": lambda made, single: lambda d: Damped(d)(GaussNewton(single)(made)),
    "blocks": lambda made, single: lambda d: Damped(d)(BlockDiagonalGaussNewton(single)(made)),
    "kernel": lambda made, single: lambda d: Damped(d)(Kernel(single)(made)),
    "damped": lambda made, single: lambda d: Damped(d)(MatrixFreeGaussNewton(single)(made)),
    "woodbury": lambda made, single: lambda d: Woodbury(d)(MatrixFreeGaussNewton(single)(made)),
}


@pytest.mark.parametrize("N", [9, 100])
@pytest.mark.parametrize("name", INVERSES)
def test_a_damping_below_the_resolution_warns(name, N):
    """It names one that is not, and says how the matrix would be known to more digits."""
    made = linearized(network(2, 16, 1), N=N)
    invert = INVERSES[name](made, True)
    with pytest.warns(DampingBelowResolution, match=r"without single=True") as caught:
        invert(1e-9)
    (enough,) = {float(str(w.message).split("damping below ")[1].split()[0]) for w in caught}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        invert(enough)
        INVERSES[name](made, False)(1e-9)


def test_an_average_is_known_in_float32_too():
    made = linearized(network(2, 16, 1))
    for recipe in (GaussNewton, BlockDiagonalGaussNewton):
        operator = recipe(single=True)(made)
        for other in (operator, operator.with_tensors(operator.tensors()), operator.identity()):
            assert other.precision == torch.float32
        assert recipe()(made).precision == torch.float64


@pytest.mark.parametrize(
    "recipe",
    [KFAC, GaussNewton, MatrixFreeGaussNewton, BlockDiagonalGaussNewton, Kernel],
)
@pytest.mark.parametrize("wrong", [torch.float16, torch.float64, "float32", 1])
def test_it_is_yes_or_no(recipe, wrong, shapes_unchecked):
    with pytest.raises(TypeError, match=r"single must be True or False, got .*True forms the prod"):
        recipe(single=wrong)


def test_a_model_in_float32():
    """It is in float32 already."""
    model = network(2, 16, 1, dtype=torch.float32)
    made = [linearize(term(), model, points(20).float())]
    for recipe in (KFAC, GaussNewton, Kernel):
        one, two = recipe()(made), recipe(single=True)(made)
        assert one.dtype == two.dtype == torch.float32
        assert relative(two.to_dense(), one.to_dense()) < 1e-5


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kfac_star", "spring"])
def test_training_reaches_what_it_reaches_in_float64(name, shapes_unchecked):
    """Within a factor, after so many steps that the loss is down by orders of magnitude."""
    losses = []
    for single in (False, True):
        model = network(2, 20, 1)
        objective = poisson(model, n=60)
        first, preset = objective.loss().item(), getattr(presets, name)
        options = {"damping": 1e-4} if name == "spring" else {}
        optimizer = preset(model.parameters(), **options, single=single)
        for _ in range(30):
            optimizer.step(objective)
        losses.append(objective.loss().item())
    assert losses[0] < 0.3 * first
    assert losses[1] < 3 * losses[0]
    assert losses[1] != losses[0]


@pytest.mark.parametrize("name", ["engd_w", "spring"])
def test_default_damping(name):
    optimizer = getattr(presets, name)(network().parameters(), single=True)
    assert optimizer.preconditioner.inverse.damping == 1e-4


def test_with_the_smallest_published_damping():
    """Where rounding outweighs the damping of a factor, it is floored, not divided by."""
    model = network(2, 20, 20, 1)
    objective = poisson(model, n=60)
    first = objective.loss().item()
    optimizer = CurvatureOptimizer(
        model.parameters(),
        KFAC(single=True),
        FactorDamping(1e-15),
        step_size=QuadraticModel(),
        average=ExponentialAverage(0.5),
    )
    for _ in range(30):
        assert optimizer.step(objective).accepted
    assert objective.loss().item() < 0.1 * first
