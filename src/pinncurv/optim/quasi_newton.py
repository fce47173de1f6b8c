"""Self-scaled quasi-Newton methods, as optimizers of torch with a closure, like ``LBFGS``."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from scipy.optimize import line_search
from torch import Tensor
from torch.optim import Optimizer

from pinncurv.machine import check_memory

# What else to do where H is too large.
_INSTEAD = (
    "Take torch.optim.LBFGS or pinncurv.presets.kfac_star, or freeze a part with "
    "requires_grad_(False)."
)

# Where sᵀy is below this part of |s| |y| it is rounding, and the approximation stays as it is.
_LEAST_CURVATURE = 1e-14


class _SelfScaled(Optimizer):
    """Steps along -H g, with a strong-Wolfe search and the dense approximation H of ∇²L⁻¹."""

    def __init__(self, params: Iterable[Any], lr: float = 1.0, max_iter: int = 20) -> None:
        if not lr > 0:
            raise ValueError(f"lr, the first length that is tried, must be positive, got {lr}.")
        if max_iter < 1:
            raise ValueError(f"max_iter must be 1 or more, got {max_iter}.")
        super().__init__(params, {"lr": lr, "max_iter": max_iter})
        self._trained()

    @staticmethod
    def _member(a: float, b: float, h: float, n: int) -> tuple[float, float]:
        """Return θ and τ of the update in dimension n, see ``update_inverse``."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Take up to ``max_iter`` steps on one loss, mostly of one evaluation each.

        Args:
            closure: Computes the loss and the gradients, and returns the loss.

        Returns:
            The loss before the first of the steps.

        Raises:
            ValueError: If groups have different options.
        """
        lr, max_iter = self._options()
        parameters = self._trained()
        state = self.state[self.param_groups[0]["params"][0]]
        sizes = [parameter.numel() for parameter in parameters]
        if state.get("sizes") != sizes:  # at first, and when something was frozen or added
            state.clear()
            state["sizes"] = sizes
        evaluate = torch.enable_grad()(closure)
        first = evaluate()
        loss = float(first)
        if not parameters or not math.isfinite(loss):  # there is nowhere to go, or to come from
            return first
        gradient = _flat_gradient(parameters)
        for _ in range(max_iter):
            if not gradient.any():
                break
            fresh = "inverse" not in state
            direction = -gradient if fresh else -(state["inverse"] @ gradient)
            if fresh:
                trial = lr * min(1.0, 1 / float(gradient.abs().sum()))
            else:  # where a parabola has its minimum that decreases as much as the last step did
                descent = max(-float(direction @ gradient), sys.float_info.min)
                trial = lr * min(1.0, 2.02 * state["decrease"] / descent)
            line = _Line(evaluate, parameters, direction, loss, gradient)
            length = line.search(trial)
            line.move(length)
            if length == 0.0:
                if fresh:
                    break  # the loss does not decrease even along its gradient
                del state["inverse"]
                continue
            new_loss, new_gradient = line.seen[length]
            s, y = direction.mul_(length), new_gradient - gradient
            self._learn(state, s, y, -length * float(s @ gradient))  # as H⁻¹ s = -length g
            state["decrease"], loss, gradient = loss - new_loss, new_loss, new_gradient
        return first

    def _learn(self, state: dict[str, Any], s: Tensor, y: Tensor, along: float) -> None:
        """Update H, which starts from the identity, by the step s and sᵀH⁻¹s."""
        curvature = float(s @ y)
        if curvature <= _LEAST_CURVATURE * float(s.norm() * y.norm()):
            return
        start = "inverse" not in state
        if start:
            state["inverse"] = torch.eye(len(s), dtype=s.dtype, device=s.device)
        update_inverse(state["inverse"], s, y, along / curvature, self._member, start)

    def _options(self) -> tuple[float, int]:
        """Return the options, which all groups share."""
        options = {(group["lr"], group["max_iter"]) for group in self.param_groups}
        if len(options) > 1:
            raise ValueError(
                "All groups must have the same options, as one line search is for all parameters, "
                f"got (lr, max_iter) of {', '.join(map(str, sorted(options)))}."
            )
        return options.pop()

    def _trained(self) -> list[Tensor]:
        """Return the parameters that are not frozen, after checking that H fits."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        n = sum(parameter.numel() for parameter in parameters)
        if parameters and not any("inverse" in state for state in self.state.values()):
            like, what = parameters[0], f"the matrix of {type(self).__name__}, of {n:,} parameters"
            check_memory(what, n**2, like.dtype, like.device, _INSTEAD)
        return parameters


class SSBFGS(_SelfScaled):
    """The self-scaled BFGS method.

    θ = 0,    τ = min(1, 1 / b)

    Args:
        params: The parameters, or groups of them; frozen ones are left alone.
        lr: The length that the line search tries first, one but for experiments.
        max_iter: Steps on one batch, as in ``torch.optim.LBFGS``; the first of them evaluates the
            loss once more.

    Raises:
        ValueError: If a number is out of range.
        NotEnoughMemoryError: If the matrix of all pairs of parameters does not fit.

    Source: Al-Baali, Numerical experience with a class of self-scaling quasi-Newton algorithms,
        1998; Urbán, Stefanou and Pons, arXiv 2405.04230 (the equations of its section 3).
    """

    @staticmethod
    def _member(a: float, b: float, h: float, n: int) -> tuple[float, float]:
        return 0.0, min(1.0, 1 / b)


class SSBroyden(_SelfScaled):
    """The self-scaled Broyden method, between and beyond BFGS (θ = 0) and DFP (θ = 1).

    θ = max(θ⁻, min(θ⁺, 1 / b - 1)),    σ = 1 + a θ,
    τ = min(1, 1 / b) min(σ^(-1 / (n - 1)), 1 / θ) if θ > 0,
        min(min(1, 1 / b) σ^(-1 / (n - 1)), σ) otherwise,
    θ⁻ = (ρ - 1) / a,    θ⁺ = 1 / ρ,    ρ = min(1, h (1 - √(a / (1 + a))))

    Arguments and errors are those of ``SSBFGS``.

    Source: Al-Baali, Numerical experience with a class of self-scaling quasi-Newton algorithms,
        1998; Urbán, Stefanou and Pons, arXiv 2405.04230 (the equations of its section 3); Kiyani,
        Shukla, Urbán, Darbon and Karniadakis, arXiv 2501.16371.
    """

    @staticmethod
    def _member(a: float, b: float, h: float, n: int) -> tuple[float, float]:
        # 1 - √(a / (1 + a)), without the cancellation where a is large
        rho = min(1.0, h / ((1 + a) * (1 + math.sqrt(a / (1 + a)))))
        theta = max((rho - 1) / a, min(1 / rho, 1 / b - 1))
        sigma = 1 + a * theta
        scale, volume = min(1.0, 1 / b), sigma ** (-1 / max(1, n - 1))
        if theta > 0:
            return theta, scale * min(volume, 1 / theta)
        return theta, min(scale * volume, sigma)


def update_inverse(
    inverse: Tensor,
    s: Tensor,
    y: Tensor,
    b: float,
    member: Callable[[float, float, float, int], tuple[float, float]],
    start: bool = False,
) -> None:
    """Update H in place so that H y = s, by a member of the self-scaled Broyden family.

    H₊ = (H - H y yᵀH / yᵀH y + φ (yᵀH y) v vᵀ) / τ + s sᵀ / sᵀy,
    v = s / sᵀy - H y / yᵀH y,    φ = (1 - θ) / (1 + a θ),    a = b h - 1,    h = yᵀH y / sᵀy

    Args:
        inverse: H, symmetric and positive definite, [n, n].
        s: The step, [n].
        y: The change of the gradient, with sᵀy > 0, [n].
        b: sᵀH⁻¹s / sᵀy.
        member: θ and τ as a function of a, b, h and n.
        start: Whether H is the identity, whose scale says nothing: τ = h / (1 + a θ) then.
    """
    moved = inverse @ y
    curvature, along = float(s @ y), float(y @ moved)
    h = along / curvature
    a = max(b * h - 1, torch.finfo(s.dtype).eps)  # it is positive but for rounding
    theta, tau = member(a, b, h, len(s))
    sigma = 1 + a * theta
    if start:
        tau = h / sigma
    phi = (1 - theta) / sigma
    v = s / curvature - moved / along
    columns = torch.stack([moved, v, s], dim=1)
    factors = columns.new_tensor([-1 / (along * tau), phi * along / tau, 1 / curvature])
    inverse.addmm_(columns * factors, columns.T, beta=1 / tau)


class _Line:
    """The loss along a direction, φ(α) = L(θ + α d), evaluated once for each α.

    Args:
        evaluate: Computes loss and gradients.
        parameters: The parameters, which are moved.
        direction: d.
        loss: φ(0).
        gradient: ∇L at α = 0.
    """

    def __init__(
        self,
        evaluate: Callable[[], Any],
        parameters: Sequence[Tensor],
        direction: Tensor,
        loss: float,
        gradient: Tensor,
    ) -> None:
        self._evaluate, self._parameters, self._direction = evaluate, parameters, direction
        self._start = [parameter.clone() for parameter in parameters]
        self._at = 0.0
        self.seen = {0.0: (loss, gradient)}

    def move(self, length: float) -> None:
        """Set the parameters to θ + α d."""
        if length == self._at:
            return
        parts = self._direction.split([parameter.numel() for parameter in self._parameters])
        for parameter, start, part in zip(self._parameters, self._start, parts, strict=True):
            torch.add(start, part.view_as(start), alpha=length, out=parameter)
        self._at = length

    def search(self, trial: float) -> float:
        """Return a length that meets the strong Wolfe conditions, tried first at ``trial``.

        Without one, the length of the lowest loss that was seen, which is 0 if none is lower.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what did not converge is handled below
            found = line_search(
                self._loss,
                self._slope,
                0.0,
                trial,
                gfk=self._slope(0.0),
                old_fval=self.seen[0.0][0],
            )[0]
        if found is not None and self.seen[float(found * trial)][0] < self.seen[0.0][0]:
            return float(found * trial)
        return min(self.seen, key=lambda length: (self.seen[length][0], length))

    def _loss(self, length: float) -> float:
        return self._values(float(length))[0]

    def _slope(self, length: float) -> float:
        return float(self._values(float(length))[1] @ self._direction)

    def _values(self, length: float) -> tuple[float, Tensor]:
        if length not in self.seen:
            self.move(length)
            try:
                loss = float(self._evaluate())
            except FloatingPointError:  # the gradient, too far away
                loss = math.inf
            finite = math.isfinite(loss)
            self.seen[length] = (
                loss if finite else math.inf,
                _flat_gradient(self._parameters) if finite else self.seen[0.0][1],
            )
        return self.seen[length]


def _flat_gradient(parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradients as one vector; zeros for what the loss does not depend on."""
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )
