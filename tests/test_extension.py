"""A new PDE, activation, differential operator and curvature, with no edit in the package."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pinncurv.curvature import Jacobian, Objective
from pinncurv.diffops import Derivative, DifferentialOperator, Value, evaluate
from pinncurv.jets import dispatched, register_elementwise
from pinncurv.linops import Damped, SymmetricLinearOperator
from pinncurv.optim import CurvatureOptimizer, QuadraticModel
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.networks import points

# --- a new activation: x -> x exp(-x²) as a function of one's own -------------------------------


@dispatched
def ricker(x: Tensor) -> Tensor:
    """Return x exp(-x²)."""
    return x * torch.exp(-x * x)


@register_elementwise(ricker)
def ricker_derivatives(x: Tensor):
    """Yield f and its derivatives: p_{k+1} = p_k' - 2 x p_k with f^(k) = p_k exp(-x²)."""
    e = torch.exp(-x * x)
    yield x * e
    yield (1 - 2 * x**2) * e
    yield (4 * x**3 - 6 * x) * e
    yield (-8 * x**4 + 24 * x**2 - 6) * e


class Ricker(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ricker(x)


# --- a new differential operator: the wave operator u_tt - c² u_xx ------------------------------


@dataclass(frozen=True)
class Wave(DifferentialOperator):
    """D u = u_tt - c² u_xx."""

    speed: float

    def requests(self, x: Tensor) -> dict[str, Derivative]:
        basis = tuple(torch.eye(2, dtype=x.dtype))
        return {"wave": Derivative(basis, {(0, 0): 1.0, (1, 1): -(self.speed**2)})}

    def read(self, x: Tensor, derivatives) -> Tensor:
        return derivatives["wave"]


# --- a new PDE: the sine-Gordon equation --------------------------------------------------------


def sine_gordon(x: Tensor) -> LossTerm:
    return LossTerm(
        operators={"u": Value(), "wave": Wave(0.7)},
        residual=lambda x, u, wave: wave + torch.sin(u),
        points=Fixed(x),
        name="sine_gordon",
    )


# --- a new curvature: Marquardt's scaling of the Gauss-Newton matrix


class ScaledGaussNewton(SymmetricLinearOperator):
    """JᵀJ + s diag(JᵀJ), with Marquardt's scaling."""

    def __init__(self, matrix: Tensor, shapes) -> None:
        super().__init__(shapes, matrix.device, matrix.dtype)
        self.matrix = matrix

    @classmethod
    def of(cls, linearizations) -> "ScaledGaussNewton":
        jacobian = Jacobian()(linearizations)
        J = jacobian.to_dense()
        matrix = J.T @ J
        return cls(matrix + 0.1 * matrix.diagonal().diag(), jacobian.space.shapes)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = self.matrix @ torch.cat([x.flatten(end_dim=-2) for x in X])
        sizes = [shape.numel() for shape in self.shapes]
        return [y.reshape(x.shape) for y, x in zip(flat.split(sizes), X, strict=True)]

    def inverse(self, damping: float) -> SymmetricLinearOperator:
        identity = torch.eye(len(self.matrix), dtype=self.dtype)
        return type(self)(torch.linalg.inv(self.matrix + damping * identity), self.shapes)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 4), Ricker(), nn.Linear(4, 4), Ricker(), nn.Linear(4, 1)
        ).double()


def test_new_activation_and_operator_are_right():
    model, x = network(), points(4)
    received = evaluate({"wave": Wave(0.7)}, model, x)["wave"]
    u = oracles.at_point(model, oracles.trainable(model))
    for n in range(4):
        H = torch.func.hessian(u)(x[n])[0]
        oracles.assert_close(received[n, 0].detach(), (H[0, 0] - 0.49 * H[1, 1]).detach())


def test_one_step_of_training_with_everything_new():
    model, x = network(), points(20)
    initial = LossTerm(
        {"u": Value()},
        lambda x, u: u - torch.sin(3 * x[:, 1:]),
        Fixed(points(10, seed=5)),
        weight=10.0,
        name="initial",
    )
    objective = Objective(model, [sine_gordon(x), initial], [x, points(10, seed=5)])
    optimizer = CurvatureOptimizer(
        model.parameters(),
        curvature=ScaledGaussNewton.of,
        inverse=Damped(1e-4),
        step_size=QuadraticModel(),
    )
    before = objective.loss().item()
    record = optimizer.step(objective)
    assert record.accepted
    assert record.loss == before or abs(record.loss - before) < 1e-12 * before
    after = objective.loss().item()
    assert after < 0.9 * before
    assert abs(record.new_loss - after) <= 1e-10 * after
    assert set(record.term_losses) == {"sine_gordon", "initial"}
    for _ in range(20):
        record = optimizer.step(objective)
    assert objective.loss().item() < 0.1 * before
