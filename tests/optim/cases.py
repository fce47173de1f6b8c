"""Small networks, objectives and fakes that the tests of the optimizer share."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pinncurv import presets
from pinncurv.curvature import KFAC, GaussNewton, Objective, reduce
from pinncurv.linops import Damped, FactorDamping, PyTorchLinearOperator, trace_norm
from pinncurv.optim import (
    CurvatureOptimizer,
    ExponentialAverage,
    FixedStep,
    GeodesicFlow,
    GridLineSearch,
    HeavyBall,
    Intervals,
    LevenbergMarquardt,
    StepRecord,
    from_first,
    from_identity,
)
from pinncurv.problems import poisson2d

# The grid of the presets takes 31 evaluations, of which the tests need no more than these.
SHORT = GridLineSearch(first=-4)


def _with_short_grid(optimizer: CurvatureOptimizer) -> CurvatureOptimizer:
    optimizer.step_size = SHORT
    return optimizer


OPTIMIZERS: dict[str, Callable[[Iterable[Any]], CurvatureOptimizer]] = {
    "kfac": lambda p: _with_short_grid(presets.kfac(p, damping=1e-3, momentum=0.5)),
    "kfac_star": lambda p: presets.kfac_star(p, damping=1e-3),
    "kfac_star_reduce": lambda p: presets.kfac_star(
        p, damping=1e-3, decay=0.5, start=from_first, sharing=reduce, heuristic=trace_norm
    ),
    "engd": lambda p: presets.engd(
        p, damping=1e-3, decay=0.3, start=from_identity, step_size=SHORT
    ),
    "engd_per_layer": lambda p: presets.engd_per_layer(p, damping=1e-3, decay=0.3, step_size=SHORT),
    "engd_diagonal": lambda p: presets.engd_diagonal(p, 1e-3, decay=0.3, step_size=SHORT),
    "gauss_newton": lambda p: presets.gauss_newton(p, 1e-1),
    "gauss_newton_cg": lambda p: presets.gauss_newton_cg(p, 1e-2),
    "hessian_free": lambda p: presets.hessian_free(p, 1e-1, curvature=KFAC()),
    "engd_w": lambda p: presets.engd_w(p, 1e-2, SHORT),
    "adaptive": lambda p: presets.gauss_newton(p, 1e-1, damping_rule=LevenbergMarquardt()),
    "kfac_intervals": lambda p: CurvatureOptimizer(
        p,
        KFAC(),
        FactorDamping(1e-3),
        average=ExponentialAverage(0.9, from_identity),
        momentum=HeavyBall(0.3),
        intervals=Intervals(curvature=2, inverse=3),
    ),
    "adaptive_intervals": lambda p: CurvatureOptimizer(
        p,
        GaussNewton(),
        Damped(1e-1),
        damping_rule=LevenbergMarquardt(),
        intervals=Intervals(curvature=3, inverse=2),
    ),
    "auto": lambda p: presets.auto(p, rows=10),
    "flow": lambda p: CurvatureOptimizer(
        p, KFAC(), FactorDamping(1e-3), step_size=GeodesicFlow(), max_halvings=0
    ),
}


def taken(damping: float, ratio: float, scale: float = 1.0) -> StepRecord:
    """Return the record of a step that lowered the loss by some part of what was predicted."""
    return StepRecord(1.0, {}, 1 - ratio / 2, damping=damping, predicted_decrease=0.5, scale=scale)


def network(
    *widths: int, seed: int = 1, dtype: torch.dtype = torch.float64, linear: bool = False
) -> nn.Sequential:
    """Return a tanh network, by default 2-4-1, or a deep linear one."""
    widths = widths or (2, 4, 1)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for d_in, d_out in itertools.pairwise(widths):
            layers += [nn.Linear(d_in, d_out, dtype=dtype), nn.Identity() if linear else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def poisson(
    model: nn.Module, seed: int = 0, chunk_size: int | None = None, n: int = 14
) -> Objective:
    """Return the loss of poisson2d at a few points of the network's dtype and device."""
    problem, parameter = poisson2d(n, 8), next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    batch = problem.sample(generator, parameter.dtype, "cpu")
    return Objective(model, problem.terms, [x.to(parameter.device) for x in batch], chunk_size)


def values(parameters: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """Return copies of parameters."""
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    return [parameter.detach().clone() for parameter in parameters]


def flat(tensors: nn.Module | Iterable[Tensor]) -> Tensor:
    """Return a copy of tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in values(tensors)])


def set_flat(model: nn.Module, vector: Tensor) -> None:
    """Set the parameters of a network."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector, model.parameters())


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Calls(nn.Module):
    """A network that is counted how often it is called, from outside: a counter changes it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls = ctypes.c_long(0)  # cannot be looked into
        self.register_forward_pre_hook(lambda *_: setattr(self, "count", self.count + 1))

    @property
    def count(self) -> int:
        return self.calls.value

    @count.setter
    def count(self, value: int) -> None:
        self.calls.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# --- an objective of one's own: no network, no PDE, no `evaluate` ---------------------------------


class MatrixOperator(PyTorchLinearOperator):
    """A matrix from a list of tensors to a vector or to such a list, for curvlinops."""

    def __init__(self, matrix: Tensor, shapes: Sequence[Any], out_shapes: Sequence[Any]) -> None:
        super().__init__(list(shapes), list(out_shapes))
        self.matrix = matrix

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        Y = self.matrix @ torch.cat([x.flatten(end_dim=-2) for x in X])
        parts = Y.split([torch.Size(shape).numel() for shape in self._out_shape])
        return [
            part.reshape(*shape, X[0].shape[-1])
            for part, shape in zip(parts, self._out_shape, strict=True)
        ]

    def _adjoint(self) -> MatrixOperator:
        return MatrixOperator(self.matrix.T, self._out_shape, self._in_shape)


@dataclass(frozen=True, eq=False)
class PlainLinearized:
    """The residual of one term and its Jacobian, computed at once."""

    parameters: list[Tensor]
    vector: Tensor
    rows: Tensor

    @property
    def linearizations(self) -> list[PlainLinearized]:
        return [self]

    @property
    def residual(self) -> list[Tensor]:
        return [self.vector]

    @property
    def term_losses(self) -> dict[str, float]:
        return {"fit": 0.5 * float(self.vector @ self.vector)}

    @property
    def jacobian(self) -> MatrixOperator:
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        return MatrixOperator(self.rows, shapes, [(len(self.vector),)])

    def gradient(self) -> list[Tensor]:
        parts = (self.rows.T @ self.vector).split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


class LeastSquaresFit:
    """½‖r(θ)‖² for a function of a list of tensors."""

    def __init__(
        self, parameters: Iterable[Tensor], residual: Callable[[list[Tensor]], Tensor]
    ) -> None:
        self.parameters, self.residual = list(parameters), residual

    def loss(self) -> Tensor:
        return 0.5 * self.residual(self.parameters).square().sum()

    def linearize(self) -> PlainLinearized:
        residual = self.residual(self.parameters)  # builds a graph: step must not forbid it
        rows = [
            torch.cat(
                [
                    part.flatten()
                    for part in torch.autograd.grad(r, self.parameters, retain_graph=True)
                ]
            )
            for r in residual
        ]
        return PlainLinearized(self.parameters, residual.detach(), torch.stack(rows))


def gram(linearizations: Sequence[PlainLinearized]) -> MatrixOperator:
    """Build JᵀJ, an operator that has no inverse of its own."""
    (linearized,) = linearizations
    shapes = [tuple(parameter.shape) for parameter in linearized.parameters]
    return MatrixOperator(linearized.rows.T @ linearized.rows, shapes, shapes)


def linear_fit(*start: float) -> LeastSquaresFit:
    """Return r(θ) = θ of a few numbers, with the minimum at zero."""
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    return LeastSquaresFit([parameter], lambda p: p[0])


class Obstacle:
    """An objective whose loss is another one away from where it was made.

    Args:
        objective: The objective.
        elsewhere: Maps loss and distance from the start to the loss that is reported.
    """

    def __init__(self, objective: Any, elsewhere: Callable[[float, float], float]) -> None:
        self.objective, self.elsewhere = objective, elsewhere
        self.parameters = objective.linearize().parameters
        self.start = flat(self.parameters)
        self.evaluated: list[float] = []

    def linearize(self) -> Any:
        return self.objective.linearize()

    def loss(self) -> Tensor:
        distance = float(torch.linalg.vector_norm(flat(self.parameters) - self.start))
        loss = self.objective.loss().detach()
        if distance == 0:
            return loss
        self.evaluated.append(distance)
        return torch.as_tensor(self.elsewhere(float(loss), distance), dtype=loss.dtype)


def fixed(parameters: Iterable[Any], step: float = 1.0, **settings: Any) -> CurvatureOptimizer:
    """Return damped Gauss-Newton with a fixed step."""
    settings = {"curvature": GaussNewton(), "inverse": Damped(1e-2)} | settings
    return CurvatureOptimizer(parameters, step_size=FixedStep(step), **settings)
