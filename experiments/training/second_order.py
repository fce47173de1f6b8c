"""Settings of the second-order optimizers, one class per family of curvatures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch.nn import Parameter

from experiments.training.errors import UserError
from experiments.training.memory import check_dense_curvature
from pinncurv.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    InSubspace,
    KFACFactors,
    MatrixFreeGaussNewton,
    Nystroem,
    Objective,
    PartialTraces,
    PreconditionedCG,
    SubspaceGaussNewton,
    Woodbury,
    expand,
    reduce,
)
from pinncurv.linearization import Empirical, Fisher, ForwardOnly
from pinncurv.linops import Damped, FactorDamping, RelativeProgress, same, trace_norm
from pinncurv.optim import (
    CGBacktracking,
    ConstantDamping,
    Curvature,
    CurvatureOptimizer,
    DampingRule,
    ExponentialAverage,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    Intervals,
    Inverse,
    LevenbergMarquardt,
    Momentum,
    NormConstrained,
    QuadraticModel,
    ShortStepDamping,
    Spring,
    StepRecord,
    StepSize,
    WarmStart,
    from_first,
    from_identity,
    from_zero,
)

STARTS = {"identity": from_identity, "zero": from_zero, "first": from_first}
SHARINGS = {"expand": expand, "reduce": reduce}
FISHERS: dict[str, Callable[[], Fisher | None]] = {
    "type-2": lambda: None,  # what objectives have
    "empirical": Empirical,
    "forward-only": ForwardOnly,
}
HEURISTICS = {"same": same, "trace-norm": trace_norm}
FORMS: dict[str, Callable[[], Curvature]] = {
    "full": GaussNewton,
    "matrix-free": MatrixFreeGaussNewton,
    "per-layer": BlockDiagonalGaussNewton,
    "diagonal": DiagonalGaussNewton,
}
MOMENTA: dict[str, Callable[[float], Momentum]] = {
    "heavy-ball": HeavyBall,
    "spring": Spring,
    "warm-start": WarmStart,
}


def _with_trace_norm(damping: float) -> FactorDamping:
    return FactorDamping(damping, trace_norm)


PRECONDITIONERS: dict[str, tuple[Curvature | None, Callable[[float], Inverse]]] = {
    "none": (None, _with_trace_norm),
    "kfac": (KFAC(), _with_trace_norm),
    "ekfac": (EKFAC(), Damped),
    "diagonal": (DiagonalGaussNewton(), Damped),
}
StepSizeName = Literal[
    "quadratic-model", "line-search", "fixed", "norm-constrained", "cg-backtracking"
]


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
    damping_rule: Literal["constant", "levenberg-marquardt", "short-steps"] = "constant"
    """How λ changes: not, by the ratio of actual to predicted decrease, or by shortened steps."""
    levenberg_marquardt: LevenbergMarquardt = field(default_factory=LevenbergMarquardt)
    """The settings of this rule."""
    short_steps: ShortStepDamping = field(default_factory=ShortStepDamping)
    """The settings of this rule."""
    decay: float = 0.0
    """β of the exponential moving average of the curvature, in [0, 1); 0 for no average."""
    start: Literal["identity", "zero", "first"] = "identity"
    """What the moving average starts from."""
    step_size: StepSizeName = "quadratic-model"
    """The exact quadratic model, the best of a grid 2^k, 1 (which lr multiplies), at most 1 and at
    most max_norm long, or the best iterate of conjugate gradients (hessian-free only)."""
    max_norm: float = 1.0
    """Length of the longest step of norm-constrained."""
    quadratic_momentum: bool = True
    """Whether the quadratic model may take part of the previous update, too."""
    line_search_exponents: tuple[int, int] = (-30, 0)
    """Smallest and largest k of the line search."""
    momentum: float = 0.0
    """Momentum on the direction, in [0, 1)."""
    momentum_kind: Literal["heavy-ball", "spring", "warm-start"] = "heavy-ball"
    """Add the last direction, or start the solve from it (warm-start for conjugate gradients)."""
    curvature_every: int = 1
    """Steps between two estimates of the curvature."""
    inverse_every: int = 1
    """Steps between two inversions."""
    max_halvings: int | None = None
    """How often an update that raises the loss is halved before it is rejected (30), unless the
    damping rule retries with more damping instead."""
    lr: float = 1.0
    """Multiplies every update."""

    @abstractmethod
    def curvature(self) -> Curvature:
        """Return what builds the operator."""

    @abstractmethod
    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""

    @property
    def has_tensors(self) -> bool:
        """Whether the operator has tensors of its own, which can be averaged and kept."""
        return False

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer.

        Raises:
            UserError: If an operator without tensors of its own is to last more than one step.
        """
        wanted = (self.decay, self.curvature_every, self.inverse_every)
        if not self.has_tensors and wanted != (0, 1, 1):
            raise UserError(
                "decay, curvature-every and inverse-every must be 0, 1 and 1 for an operator "
                "without tensors of its own to average or to keep, got "
                f"{self.decay:g}, {self.curvature_every} and {self.inverse_every}. Leave them out."
            )
        return CurvatureOptimizer(
            parameters,
            curvature=self.curvature(),
            inverse=self.damped_inverse(),
            step_size=self._step_size(),
            average=ExponentialAverage(self.decay, STARTS[self.start]) if self.decay else None,
            momentum=MOMENTA[self.momentum_kind](self.momentum) if self.momentum else None,
            damping_rule=self._damping_rule(),
            intervals=Intervals(self.curvature_every, self.inverse_every),
            max_halvings=self.max_halvings,
            lr=self.lr,
        )

    def _damping_rule(self) -> DampingRule:
        choices: dict[str, DampingRule] = {
            "constant": ConstantDamping(),
            "levenberg-marquardt": self.levenberg_marquardt,
            "short-steps": self.short_steps,
        }
        return choices[self.damping_rule]

    def _step_size(self) -> StepSize:
        choices: dict[str, Callable[[], StepSize]] = {
            "quadratic-model": lambda: QuadraticModel(self.quadratic_momentum),
            "line-search": lambda: GridLineSearch(*self.line_search_exponents),
            "fixed": FixedStep,
            "norm-constrained": lambda: NormConstrained(1.0, self.max_norm),
            "cg-backtracking": CGBacktracking,
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

    @property
    def has_tensors(self) -> bool:
        """Yes, the factors."""
        return True

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

    form: Literal["full", "matrix-free", "per-layer", "diagonal"] = "full"
    """Which part of the matrix; matrix-free inverts by the kernel if that is the smaller one."""

    @property
    def has_tensors(self) -> bool:
        """Whether entries of the matrix are stored."""
        return self.form != "matrix-free"

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
class KernelSettings(CurvatureSettings):
    """The exact Gauss-Newton matrix through the kernel JJᵀ, for many parameters."""

    nystroem_rank: int | None = None
    """Rank of a random sketch of the kernel; None for the kernel itself."""
    nystroem_seed: int = 0
    """Which sketch."""

    def curvature(self) -> Curvature:
        """Return what builds the operator."""
        return MatrixFreeGaussNewton()

    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""
        if self.nystroem_rank is None:
            return Woodbury(self.damping)
        return Nystroem(self.damping, self.nystroem_rank, self.nystroem_seed)


@dataclass(frozen=True)
class IterativeSettings(CurvatureSettings):
    """The exact Gauss-Newton matrix by preconditioned conjugate gradients."""

    preconditioner: Literal["none", "kfac", "ekfac", "diagonal"] = "kfac"
    """Which approximation preconditions; KFAC with factor damping trace-norm."""
    preconditioner_damping: float = 1e-8
    """Smallest damping of the preconditioner; it follows λ upwards."""
    tolerance: float = 1e-6
    """Relative residual at which a solve is done."""
    progress: float = 1e-2
    """A solve ends where the quadratic model falls by less than this part per iteration."""
    max_iterations: int = 50
    """Most products with the matrix per solve."""
    spacing: float | None = None
    """Ratio between the numbers of the iterates to keep for cg-backtracking; None keeps none."""

    def curvature(self) -> Curvature:
        """Return what builds the operator."""
        return MatrixFreeGaussNewton()

    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""
        build, invert = PRECONDITIONERS[self.preconditioner]
        return PreconditionedCG(
            self.damping,
            build,
            invert(self.preconditioner_damping),
            self.tolerance,
            self.max_iterations,
            RelativeProgress(self.progress),
            self.spacing,
        )


@dataclass(frozen=True)
class EKFACSettings(CurvatureSettings):
    """KFAC's eigenbasis with the exact second moments in it."""

    sharing: Literal["expand", "reduce"] = "expand"
    """How the channels of a layer enter the factors."""
    basis: Literal["kfac", "partial-traces"] = "kfac"
    """Whose eigenvectors: KFAC's factors or the exact block's partial traces."""

    @property
    def has_tensors(self) -> bool:
        """Yes, bases and moments, which can be kept."""
        return True

    def build(self, parameters: Iterable[Parameter]) -> Stepper:
        """Return the optimizer.

        Raises:
            UserError: If averages are asked for.
        """
        if self.decay:
            raise UserError(
                "decay must be 0 for EKFAC, whose moments belong to another basis in every step, "
                f"got {self.decay:g}. Leave it out."
            )
        return super().build(parameters)

    def curvature(self) -> Curvature:
        """Return what builds the operator."""
        basis = KFACFactors() if self.basis == "kfac" else PartialTraces()
        return EKFAC(SHARINGS[self.sharing], basis=basis)

    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""
        return Damped(self.damping)


@dataclass(frozen=True)
class SubspaceSettings(CurvatureSettings):
    """The exact Gauss-Newton matrix on the gradients at a few random points."""

    points: int = 200
    """How many points are drawn in every step."""
    seed: int = 0
    """Which points."""

    def curvature(self) -> Curvature:
        """Return what builds the operator."""
        return SubspaceGaussNewton(self.points, self.seed)

    def damped_inverse(self) -> Inverse:
        """Return what inverts it."""
        return InSubspace(self.damping)
