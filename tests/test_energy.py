"""Energies: loss, gradient and every operator against nested torch.func, and what refuses them."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from scipy.special import roots_legendre
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import pinncurv as pc
from pinncurv import curvature as c, optim
from pinncurv.linearization import Empirical
from pinncurv.problems import CausalWeights

D64 = torch.float64


class Wave(nn.Module):
    """A network with a parameter outside of linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 3, bias=False)
        self.slope = nn.Parameter(torch.tensor(1.3))
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.sin(self.slope * self.first(x)))))


def convex(x, u, grad, lap, f):
    """No sum of squares, coupled, with a linear part, and different at every point."""
    area = torch.sqrt(1 + grad.flatten(1).square().sum(1))
    coupled = torch.cosh(0.5 * u[:, 0] + 0.3 * grad[:, 1, 0] - 0.1 * lap[:, 1])
    return (1 + x[:, 0] ** 2) * area + coupled - f[:, 0] * u[:, 0] + 0.2 * u[:, 1]


def linear(x, u, grad, lap, f):
    return f[:, 0] * u[:, 0] - lap.sum(1)


def squares(x, u, grad, lap, f):
    return (0.5 * (u - f) ** 2).sum(1, keepdim=True) + 0.5 * lap[:, :1] ** 2


def half(x, u, grad, lap, f):
    return 0.5 * u[:, 0] ** 2 - f[:, 0] * u[:, 1]


N = 6


def made(density=convex, weight=None, chunk_size=None, others=()):
    torch.manual_seed(0)
    x, f = torch.rand(N, 2, dtype=D64), torch.rand(N, 1, dtype=D64)
    weight = torch.rand(N, dtype=D64) + 0.5 if weight is None else weight
    operators = {"u": pc.Value(), "grad": pc.Gradient(), "lap": pc.Laplacian()}
    term = pc.Energy(operators, pc.Fixed(x), weight, density=density, data={"f": f})
    return pc.Objective.sample(Wave().double(), [term, *others], chunk_size=chunk_size)


def brute_force(objective):
    """Return loss, gradient, Gauss-Newton matrix, and Hessian, with nested torch.func."""
    (term, *_), (x, *_) = objective.terms, objective.points
    names, tensors = zip(*objective.named_parameters(), strict=True)
    sizes = [tensor.numel() for tensor in tensors]
    f, weight = term.data["f"], torch.as_tensor(term.weight).to(x).expand(N)

    def values(theta, point):
        pieces = zip(names, theta.split(sizes), tensors, strict=True)
        own = {name: piece.view_as(t) for name, piece, t in pieces}

        def u(z):
            return functional_call(objective.model, own, (z[None],))[0]

        second = jacfwd(jacfwd(u))(point)
        lap = second.diagonal(dim1=1, dim2=2).sum(1)
        return torch.cat([u(point), jacfwd(u)(point).flatten(), lap])

    def density(y, point, data):
        u, slopes, lap = y[:2], y[2:6].view(2, 2), y[6:]
        return term.density(point[None], u[None], slopes[None], lap[None], data[None]).sum()

    def loss(theta):
        rows = vmap(lambda point, data: density(values(theta, point), point, data))(x, f)
        return (weight * rows).mean()

    theta = torch.cat([tensor.detach().flatten() for tensor in tensors])
    y = vmap(values, (None, 0))(theta, x)
    J = vmap(jacrev(values), (None, 0))(theta, x)
    H = vmap(hessian(density))(y, x, f)
    matrix = torch.einsum("n,npi,npq,nqj->ij", weight / N, J, H, J)
    return loss(theta), grad(loss)(theta), matrix, hessian(loss)(theta)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("density", [convex, linear, half, squares])
def test_loss_and_gradient(density, chunk_size):
    objective = made(density, chunk_size=chunk_size)
    loss, gradient, matrix, _ = brute_force(objective)
    linearized = objective.linearize()
    torch.testing.assert_close(objective.loss(), loss)
    assert linearized.term_losses == pytest.approx({"energy": float(loss)}, rel=1e-12)
    torch.testing.assert_close(flat(linearized.gradient()), gradient, rtol=1e-9, atol=1e-12)
    objective.backward()
    torch.testing.assert_close(flat(p.grad for p in objective.parameters()), gradient)
    matrix_free = pc.MatrixFreeGaussNewton()(linearized)
    torch.testing.assert_close(matrix_free.to_dense(), matrix, rtol=1e-9, atol=1e-12)


def block_diagonal(matrix, linearized):
    """Return a matrix without what couples a weight and its bias to other parameters."""
    space = linearized.space
    numbers = torch.arange(space.dimension).split([shape.numel() for shape in space.shapes])
    kept = torch.zeros_like(matrix)
    for block in space.blocks:
        own = torch.cat([numbers[position] for position in block.positions])
        kept[own[:, None], own] = matrix[own[:, None], own]
    return kept


def test_operators():
    objective = made()
    linearized = objective.linearize()
    _, _, matrix, second = brute_force(objective)
    blocks = block_diagonal(matrix, linearized)
    hidden = c.ResidualHessian()(linearized)
    expected = {
        pc.GaussNewton(): matrix,
        c.BlockDiagonalGaussNewton(): blocks,
        c.DiagonalGaussNewton(): matrix.diagonal().diag(),
        c.Hessian(): second,
        c.ResidualHessian(): second - matrix,
    }
    for recipe, right in expected.items():
        got = recipe(linearized).to_dense()
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11, msg=str(recipe))
    assert hidden.to_dense().norm() > 0.1 * matrix.norm()
    J = linearized.jacobian.to_dense()
    torch.testing.assert_close(J.mT @ J, matrix)
    v = torch.rand(len(matrix), dtype=D64, generator=torch.Generator().manual_seed(0))
    solution = torch.linalg.solve(matrix + 1e-2 * torch.eye(len(matrix)).to(matrix), v)
    exact = pc.MatrixFreeGaussNewton()(linearized)
    for inverse in (exact.inverse(1e-2), c.Woodbury(1e-2)(exact), c.CheaperSide(1e-2)(exact)):
        torch.testing.assert_close(inverse @ v, solution)


@pytest.mark.parametrize("recipe", [pc.KFAC(), pc.KFAC(sharing=c.reduce), pc.EKFAC()])
def test_kronecker_factors_are_those_of_the_equivalent_residual(recipe):
    """Those of ½‖r‖² as a density are those of r: rotations of the root of ∂²ℓ cancel."""

    def residual(x, u, grad, lap, f):
        return torch.cat([u - f, lap[:, :1]], 1)

    objective = made(squares)
    (term,) = objective.terms
    twin = pc.LossTerm(term.operators, residual, term.points, term.weight, data=term.data)
    other = pc.Objective(objective.model, [twin], objective.points)
    got, expected = (recipe(o.linearize()).to_dense() for o in (objective, other))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_kfac_is_exact_for_one_point_of_a_linear_layer():
    """N = S = 1: the block is the Kronecker product of ∂²ℓ and z zᵀ."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.rand(1, 3, dtype=D64)

    def density(x, u):
        return torch.logsumexp(u, 1) + u[:, 0] ** 4

    term = pc.Energy({"u": pc.Value()}, pc.Fixed(x), 2.0, density=density)
    matrix = pc.KFAC()(pc.Objective.sample(model, [term]).linearize()).to_dense()
    H = hessian(lambda u: density(x, u[None])[0])(model(x)[0].detach())
    expected = torch.einsum("ij,k,l->ikjl", 2 * H, x[0], x[0]).reshape(6, 6)
    torch.testing.assert_close(matrix, expected)


def test_empirical_fisher_has_the_gradients_of_the_points():
    objective = made(chunk_size=4)
    empirical = pc.KFAC(fisher=Empirical())(objective.linearize()).to_dense()

    def residual(x, u, grad, lap, f):
        return torch.sqrt(2 * convex(x, u, grad, lap, f) + 20)

    (term,) = objective.terms
    twin = pc.LossTerm(term.operators, residual, term.points, term.weight, data=term.data)
    other = pc.Objective(objective.model, [twin], objective.points, chunk_size=4)
    expected = pc.KFAC(fisher=Empirical())(other.linearize()).to_dense()
    torch.testing.assert_close(empirical, expected)


def test_adds_to_other_terms():
    value = pc.LossTerm({"u": pc.Value()}, lambda x, u: u - x, pc.Box.unit(2).interior(5))
    together, decay = made(others=[value, pc.L2(0.1)]), made(others=[pc.L2(0.1)])
    rest = pc.Objective(together.model, together.terms[1:], together.points[1:])
    alone = made()
    assert together.linearize().residual is None
    assert rest.linearize().residual is not None
    for of in (
        lambda o: flat(o.linearize().gradient()),
        lambda o: pc.GaussNewton()(o.linearize()).to_dense(),
        lambda o: o.linearize().jacobian.to_dense().square().sum(),
    ):
        torch.testing.assert_close(of(together), of(alone) + of(rest))
    assert list(decay.linearize().term_losses) == ["energy", "l2"]


def test_scale():
    single, double = made(weight=0.7), made(weight=1.4)
    one, two = (pc.GaussNewton()(o.linearize()).to_dense() for o in (single, double))
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(double.loss(), 2 * single.loss())


@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_float32_and_copies(dtype):
    objective = pickle.loads(pickle.dumps(copy.deepcopy(made(squares, 1.0))))
    (term,), (x,) = objective.terms, objective.points
    model = objective.model.to(dtype)
    again = pc.Objective(model, [replace(term, name="again")], [x.to(dtype)])
    matrix = pc.GaussNewton()(again.linearize()).to_dense()
    assert matrix.dtype == dtype
    expected = brute_force(made(squares, 1.0))[2]
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=1e-5)


def ritz():
    """Return ∫ ½u'² - f u with u(0) = u(1) = 0 built in, by Gauss' rule; u = sin(πt)."""
    nodes, weights = roots_legendre(40)

    def density(x, u, grad):
        return 0.5 * grad[:, 0] ** 2 - torch.pi**2 * torch.sin(torch.pi * x) * u

    operators = {"u": pc.Value(), "grad": pc.Gradient()}
    x, weight = torch.from_numpy(nodes + 1)[:, None] / 2, torch.from_numpy(weights) * 20
    term = pc.Energy(operators, pc.Fixed(x), weight, density=density)
    torch.manual_seed(1)
    return pc.Objective.sample(Hard().double(), [term])


class Hard(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return x * (1 - x) * self.inner(x)


PRESETS = {
    "gauss_newton": {"damping": 1e-8},
    "engd": {"damping": 1e-8},
    "engd_w": {"damping": 1e-6},
    "spring": {"damping": 1e-6},
    "levenberg_marquardt": {},
    "hessian_free": {},
    "subspace_gauss_newton": {},
    "kfac_star": {"damping": 1e-4},
    "auto": {},
}


@pytest.mark.parametrize(("preset", "settings"), PRESETS.items(), ids=PRESETS)
def test_trains(preset, settings):
    """The minimum is -π²/4, and energies fall below zero on the way."""
    objective = ritz()
    optimizer = getattr(pc.presets, preset)(objective.parameters(), **settings)
    records = [optimizer.step(objective) for _ in range(25)]
    energies = [record.new_loss for record in records]
    assert all(new <= record.loss for new, record in zip(energies, records, strict=True))
    assert energies[-1] == pytest.approx(-(torch.pi**2) / 4, rel=2e-2)
    assert not any(record.predicted_decrease < -1e-12 for record in records)  # NaN without a model


def test_converges_to_the_solution():
    objective = ritz()
    report = str(pc.coverage(objective.model, objective.linearize()))
    assert "inner.0.weight" in report
    optimizer = pc.presets.auto(objective.parameters())
    for _ in range(70):
        record = optimizer.step(objective)
    assert record.damping < 1  # which is not raised for what is below the rounding of the loss
    assert record.loss == pytest.approx(-(torch.pi**2) / 4, rel=1e-12)
    x = torch.linspace(0, 1, 101, dtype=D64)[:, None]
    error = objective.model(x) - torch.sin(torch.pi * x)
    assert error.abs().max() < 1e-7


def test_momentum_through_the_solve():
    """-(C + λ)⁻¹(∇L + C v), where ∇L is not in the range of C."""
    objective = made(half)
    linearized = objective.linearize()
    _, gradient, matrix, _ = brute_force(objective)
    reached = matrix @ (torch.linalg.pinv(matrix, hermitian=True) @ gradient)
    assert (gradient - reached).norm() > 0.1 * gradient.norm()
    exact = pc.MatrixFreeGaussNewton()(linearized)
    inverse = c.Woodbury(1e-2)(exact)
    v = [torch.rand_like(p) for p in linearized.parameters]
    at = optim.Situation(linearized, linearized.gradient(), inverse, 1e-2)
    damped = matrix + 1e-2 * torch.eye(len(matrix)).to(matrix)
    torch.testing.assert_close(flat(at.step()), -torch.linalg.solve(damped, gradient))
    right = gradient + matrix @ flat(v)
    torch.testing.assert_close(flat(at.step(v)), -torch.linalg.solve(damped, right))


def test_first_order():
    objective = made()
    before = [p.detach().clone() for p in objective.parameters()]
    gradient = brute_force(objective)[1]
    pc.FirstOrder(torch.optim.SGD(objective.parameters(), lr=0.5)).step(objective)
    change = flat(p.detach() - old for p, old in zip(objective.parameters(), before, strict=True))
    torch.testing.assert_close(change, -0.5 * gradient)


def test_verifies_what_is_not_the_matrix():
    objective = made()
    report = pc.verify(objective.model, objective.terms, objective.points, pc.GaussNewton())
    report.raise_if_failed()
    assert "is an energy" in str(report)
    exact = pc.verification.gauss_newton
    wrong = pc.verify(objective.model, objective.terms, objective.points, pc.KFAC(), exact=exact)
    assert "term 'energy', which is an Energy" in str(wrong)


def test_refuses_what_needs_a_residual():
    objective = made()
    linearized, (term,), (x,) = objective.linearize(), objective.terms, objective.points
    message = r"needs a residual.*got term 'energy', which is an Energy\. Use its loss, gradient"
    for ask in (
        lambda: linearized[0].residual,
        linearized.residual_now,
        lambda: term.scaled_residual(objective.model, x),
        lambda: CausalWeights(0.0, 1.0).update_(term, objective.model, x),
        lambda: pc.problems.ResidualBased(term, objective.model, 3),
    ):
        with pytest.raises(TypeError, match=message):
            ask()


def test_refuses_a_density_that_is_not_convex():
    objective = made(lambda x, u, grad, lap, f: u[:, 0] ** 3 - 9 * u[:, 0] ** 2)
    with pytest.raises(ValueError, match=r"must be convex.*got the eigenvalue -1\d.*at 6 of 6"):
        objective.linearize()


def test_refuses_a_density_with_infinite_second_derivatives():
    objective = made(lambda x, u, grad, lap, f: (u[:, 0] - u[:, 0].detach()).abs() ** 1.5)
    with pytest.raises(FloatingPointError, match=r"must have finite second.* at 6 of 6 points"):
        objective.linearize()


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.nu = nn.Parameter(torch.tensor(1.0, dtype=D64))

    def forward(self, x, u, grad, lap, f):
        return self.nu * u[:, 0] ** 2


def test_refuses_what_is_trained_along():
    with pytest.raises(ValueError, match=r"nothing but the network.*got energy\.residual\.nu"):
        made(Trained())
    frozen = Trained().requires_grad_(False)
    assert made(frozen).loss() > 0


def test_refuses_components():
    with pytest.raises(ValueError, match=r"one number per point.*got 2\. Return their sum"):
        made(lambda x, u, grad, lap, f: u**2)
    with pytest.raises(ValueError, match=r"one component and so one weight, got 2"):
        made(weight=(1.0, 2.0))


def test_names_where_the_gradient_is_not_finite():
    objective = made(lambda x, u, grad, lap, f: ((u[:, 0] - u[:, 0]) ** 2).sqrt())
    with pytest.raises(FloatingPointError, match=r"term 'energy' is not at 6 of 6 points"):
        objective.linearize().gradient()
