"""Optimizers by name: a preset is a name for the default values of a family's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import Parameter

from experiments.training.second_order import (
    CurvatureSettings,
    EKFACSettings,
    GaussNewtonSettings,
    IterativeSettings,
    KernelSettings,
    KFACSettings,
    Stepper,
    SubspaceSettings,
)
from pinncurv.optim import FirstOrder, LevenbergMarquardt, ShortStepDamping

LINE_SEARCHES = {"none": None, "strong-wolfe": "strong_wolfe"}


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
    """Every optimizer that can be named, with its settings.

    A name that ``pinncurv.presets`` has too stands for the same method, which a test compares.
    """

    # tuned, as in the paper, and so unlike the library's preset
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
    levenberg_marquardt: GaussNewtonSettings = GaussNewtonSettings(
        damping=1e-3, damping_rule="levenberg-marquardt", form="matrix-free"
    )
    """Exact Gauss-Newton with Levenberg-Marquardt damping."""
    engd_w: KernelSettings = KernelSettings(damping=1e-10, step_size="line-search")
    """Energy natural gradient descent through the kernel."""
    spring: KernelSettings = KernelSettings(
        damping=1e-8, step_size="norm-constrained", momentum=0.9, momentum_kind="spring"
    )
    """SPRING: momentum through the kernel solve."""
    gauss_newton_cg: IterativeSettings = IterativeSettings()
    """Exact Gauss-Newton by conjugate gradients, preconditioned by KFAC."""
    hessian_free: IterativeSettings = IterativeSettings(
        damping=1e-3,
        damping_rule="levenberg-marquardt",
        levenberg_marquardt=LevenbergMarquardt(shrink=1.5, grow=1.5, reject=1.5, minimum=1e-12),
        step_size="cg-backtracking",
        momentum=0.95,
        momentum_kind="warm-start",
        preconditioner="none",
        tolerance=1e-10,
        progress=5e-4,
        max_iterations=250,
        spacing=1.3,
    )
    """Hessian-free: adaptive damping, warm starts, backtracking over the iterates."""
    ekfac: EKFACSettings = EKFACSettings(damping=1e-6)
    """EKFAC with the quadratic model."""
    subspace: SubspaceSettings = SubspaceSettings(
        damping_rule="short-steps",
        short_steps=ShortStepDamping(short=2.0**-4, long=0.5, minimum=1e-10),
    )
    """Exact Gauss-Newton on the gradients at a few random points."""
    sgd: SGDSettings = SGDSettings()
    """Stochastic gradient descent with momentum."""
    lbfgs: LBFGSSettings = LBFGSSettings()
    """L-BFGS; one step is up to max_iter iterations."""

    def preset(self, name: str) -> OptimizerSettings:
        """Return the settings of an optimizer by its name."""
        return getattr(self, name.replace("-", "_"))
