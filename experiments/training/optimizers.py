"""Optimizers by name: a preset is a name for the default values of a family's settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch
from torch.nn import Parameter

from experiments.training.memory import check_dense_curvature
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    Objective,
    expand,
    reduce,
)
from pinncurv.linearization import Empirical, ForwardOnly, Type2
from pinncurv.linops import Damped, FactorDamping, same, trace_norm
from pinncurv.optim import (
    ConstantDamping,
    Curvature,
    CurvatureOptimizer,
    DampingRule,
    ExponentialAverage,
    FirstOrder,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    Intervals,
    Inverse,
    LevenbergMarquardt,
    QuadraticModel,
    StepRecord,
    StepSize,
    from_first,
    from_identity,
    from_zero,
)

STARTS = {"identity": from_identity, "zero": from_zero, "first": from_first}
SHARINGS = {"expand": expand, "reduce": reduce}
FISHERS = {"type-2": Type2, "empirical": Empirical, "forward-only": ForwardOnly}
HEURISTICS = {"same": same, "trace-norm": trace_norm}
FORMS: dict[str, Callable[[], Curvature]] = {
    "full": GaussNewton,
    "per-layer": BlockDiagonalGaussNewton,
    "diagonal": DiagonalGaussNewton,
}
LINE_SEARCHES = {"none": None, "strong-wolfe": "strong_wolfe"}


class Stepper(Protocol):
    """What the loop asks of an optimizer."""

    def step(self, objective: Objective) -> StepRecord:
        """Take one step on one batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state."""
        ...


@dataclass(frozen=True)
class CurvatureSettings(ABC):
    """Settings that all second-order optimizers share."""

    damping: float = 1e-8
    """λ of the first step, a number >= 0."""
    damping_rule: Literal["constant", "levenberg-marquardt"] = "constant"
    """How λ changes from step to step."""
    levenberg_marquardt: LevenbergMarquardt = field(default_factory=LevenbergMarquardt)
    """The settings of this rule."""
    decay: float = 0.0
    """β of the exponential moving average of the curvature, in [0, 1); 0 for no average."""
    start: Literal["identity", "zero", "first"] = "identity"
    """What the moving average starts from."""
    step_size: Literal["quadratic-model", "line-search", "fixed"] = "quadratic-model"
    """The exact quadratic model, the best of a grid 2^k, or 1 (which lr multiplies)."""
    quadratic_momentum: bool = True
    """Whether the quadratic model may take part of the previous update, too."""
    line_search_exponents: tuple[int, int] = (-30, 0)
    """Smallest and largest k of the line search."""
    momentum: float = 0.0
    """Heavy-ball momentum on the direction, in [0, 1)."""
    curvature_every: int = 1
    """Steps between two estimates of the curvature."""
    inverse_every: int = 1
    """Steps between two inversions."""
    max_halvings: int = 30
    """How often an update that raises the loss is halved before it is rejected."""
    lr: float = 1.0
    """Multiplies every update."""

    @abstractmethod
    def curvature(self) -> Curvature:
        """Return what builds the operator."""

    @abstractmethod
    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer."""
        return CurvatureOptimizer(
            parameters,
            curvature=self.curvature(),
            inverse=self.damped_inverse(),
            step_size=self._step_size(),
            average=ExponentialAverage(self.decay, STARTS[self.start]) if self.decay else None,
            momentum=HeavyBall(self.momentum) if self.momentum else None,
            damping=self._damping_rule(),
            intervals=Intervals(self.curvature_every, self.inverse_every),
            max_halvings=self.max_halvings,
            lr=self.lr,
        )

    def _damping_rule(self) -> DampingRule:
        choices = {
            "constant": ConstantDamping(),
            "levenberg-marquardt": self.levenberg_marquardt,
        }
        return choices[self.damping_rule]

    def _step_size(self) -> StepSize:
        choices: dict[str, Callable[[], StepSize]] = {
            "quadratic-model": lambda: QuadraticModel(self.quadratic_momentum),
            "line-search": lambda: GridLineSearch(*self.line_search_exponents),
            "fixed": FixedStep,
        }
        return choices[self.step_size]()


@dataclass(frozen=True)
class KFACSettings(CurvatureSettings):
    """Kronecker-factored approximate curvature."""

    decay: float = 0.95
    """β of the factors' exponential moving average, in [0, 1); 0 for no average."""
    sharing: Literal["expand", "reduce"] = "expand"
    """How the channels of a layer enter the factors."""
    fisher: Literal["type-2", "empirical", "forward-only"] = "type-2"
    """Which output gradients enter the factors."""
    inverse: Literal["factor-damping", "exact"] = "factor-damping"
    """Add λ to every Kronecker factor (as in the paper), or invert C + λI exactly."""
    heuristic: Literal["same", "trace-norm"] = "same"
    """How factor damping distributes λ over the two factors."""
    merge_terms: bool = False
    """Whether factor damping merges the factors of both terms into one pair before inverting."""

    def curvature(self) -> Curvature:
        """Return what builds the operator."""
        return KFAC(SHARINGS[self.sharing], FISHERS[self.fisher]())

    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""
        if self.inverse == "exact":
            return Damped(self.damping)
        groups = ((0, 1),) if self.merge_terms else None  # every problem here has two terms
        return FactorDamping(self.damping, HEURISTICS[self.heuristic], groups)


@dataclass(frozen=True)
class GaussNewtonSettings(CurvatureSettings):
    """The exact Gauss-Newton matrix, whole or in part."""

    form: Literal["full", "per-layer", "diagonal"] = "full"
    """Which part of the matrix."""

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer.

        Raises:
            UserError: If the matrix does not fit into memory.
        """
        parameters = list(parameters)
        if self.form == "full":
            check_dense_curvature(parameters)
        return super().build(parameters)

    def curvature(self) -> Curvature:
        """Return what builds the operator."""
        return FORMS[self.form]()

    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""
        return Damped(self.damping)


@dataclass(frozen=True)
class AdamSettings:
    """Adam, from torch."""

    lr: float = 1.7e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Weight decay."""
    amsgrad: bool = False
    """Whether to use the AMSGrad variant."""

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer."""
        optimizer = torch.optim.Adam(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )
        return FirstOrder(optimizer)


@dataclass(frozen=True)
class SGDSettings:
    """Stochastic gradient descent, from torch."""

    lr: float = 1e-2
    """Learning rate."""
    momentum: float = 0.9
    """Momentum."""
    dampening: float = 0.0
    """Dampening of the momentum."""
    weight_decay: float = 0.0
    """Weight decay."""
    nesterov: bool = False
    """Whether to use Nesterov's momentum."""

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer."""
        optimizer = torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
        return FirstOrder(optimizer)


@dataclass(frozen=True)
class LBFGSSettings:
    """L-BFGS, from torch; one step is up to max_iter iterations on one batch."""

    lr: float = 1.0
    """Learning rate."""
    max_iter: int = 20
    """Iterations per step."""
    max_eval: int | None = None
    """Evaluations of the loss per step; None for 1.25 max_iter."""
    tolerance_grad: float = 1e-12
    """A step ends where the gradient is smaller."""
    tolerance_change: float = 1e-16
    """A step ends where the change of loss or parameters is smaller."""
    history_size: int = 100
    """Number of remembered updates."""
    line_search: Literal["none", "strong-wolfe"] = "strong-wolfe"
    """Line search within an iteration."""

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer."""
        optimizer = torch.optim.LBFGS(
            parameters,
            lr=self.lr,
            max_iter=self.max_iter,
            max_eval=self.max_eval,
            tolerance_grad=self.tolerance_grad,
            tolerance_change=self.tolerance_change,
            history_size=self.history_size,
            line_search_fn=LINE_SEARCHES[self.line_search],
        )
        return FirstOrder(optimizer)


OptimizerSettings = CurvatureSettings | AdamSettings | SGDSettings | LBFGSSettings


@dataclass(frozen=True)
class Presets:
    """Every optimizer that can be named, with its settings."""

    kfac_star: KFACSettings = KFACSettings(damping=1.2e-10, decay=0.926)
    """KFAC*: step size and momentum from the exact quadratic model."""
    gauss_newton: GaussNewtonSettings = GaussNewtonSettings(damping=1e-12)
    """Exact Gauss-Newton: step size and momentum from the exact quadratic model."""
    adam: AdamSettings = AdamSettings()
    """Adam."""
    kfac: KFACSettings = KFACSettings(step_size="line-search", momentum=0.75)
    """KFAC: line search and heavy-ball momentum."""
    engd: GaussNewtonSettings = GaussNewtonSettings(
        damping=1e-10, step_size="line-search", start="zero"
    )
    """Energy natural gradient descent: exact Gauss-Newton with a line search."""
    engd_per_layer: GaussNewtonSettings = GaussNewtonSettings(
        damping=1e-10, step_size="line-search", start="zero", form="per-layer"
    )
    """The same with the diagonal blocks of the layers."""
    engd_diagonal: GaussNewtonSettings = GaussNewtonSettings(
        damping=1e-6, step_size="line-search", start="zero", form="diagonal"
    )
    """The same with the diagonal."""
    sgd: SGDSettings = SGDSettings()
    """Stochastic gradient descent with momentum."""
    lbfgs: LBFGSSettings = LBFGSSettings()
    """L-BFGS; one step is up to max_iter iterations."""

    def preset(self, name: str) -> OptimizerSettings:
        """Return the settings of an optimizer by its name."""
        return getattr(self, name.replace("-", "_"))


OptimizerName = Literal[  # type: ignore[valid-type]
    tuple(field.name.replace("_", "-") for field in fields(Presets))
]
