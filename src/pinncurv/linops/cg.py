"""Preconditioned conjugate gradients on any linear operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.operator import PyTorchLinearOperator

# Whether to stop, given φ(x_0), …, φ(x_k) with φ(x) = ½ xᵀ(C + λ I)x − bᵀx.
StoppingRule = Callable[[Sequence[float]], bool]


@dataclass(frozen=True)
class RelativeProgress:
    """Stop once the last iterations have added little to the decrease of the quadratic.

    φ_i < 0  and  φ_{i−k} − φ_i < |φ_i| k ε,  k = max(lag, ⌈fraction · i⌉)

    Attributes:
        epsilon: ε > 0, the relative progress per iteration that is too little.
        lag: Least number of iterations to look back, >= 1.
        fraction: Part of all iterations to look back, in [0, 1).

    Raises:
        ValueError: If a setting is out of range.

    Source: Martens 2010 (Hessian-free), section 4.4.
    """

    epsilon: float = 5e-4
    lag: int = 10
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and self.lag >= 1 and 0 <= self.fraction < 1):
            raise ValueError(
                "Must hold: 0 < epsilon < inf, lag >= 1 and 0 <= fraction < 1, got "
                f"{self.epsilon}, {self.lag}, {self.fraction}."
            )

    def __call__(self, values: Sequence[float]) -> bool:
        last = len(values) - 1
        k = max(self.lag, math.ceil(self.fraction * last))
        if last <= k or not values[-1] < 0:
            return False
        return values[-1 - k] - values[-1] < -values[-1] * k * self.epsilon


@dataclass(frozen=True)
class CGRecord:
    """What one run of conjugate gradients did.

    Attributes:
        iterations: Number of products with the operator, the checks of the residual at a start
            other than zero and at the end excluded.
        residual_norms: Relative residual norms ‖b − C x_k‖ / ‖b‖ as the recursion sees them.
        residual_norm: The true relative residual norm of the solution.
        converged: Whether the true residual norm is at most the tolerance.
        values: φ(x_k) = ½ x_kᵀ(C + λ I)x_k − bᵀx_k as the recursion sees it.
    """

    iterations: int
    residual_norms: tuple[float, ...]
    residual_norm: float
    converged: bool
    values: tuple[float, ...]


@dataclass(frozen=True)
class CGIterate:
    """A solution on the way.

    Attributes:
        iteration: Its number k.
        solution: x_k, ``[D]``.
        value: φ(x_k), where φ(0) = 0.
    """

    iteration: int
    solution: Float[Tensor, " D"]
    value: float


@dataclass(frozen=True)
class CGResult:
    """A solution and how it was found.

    Attributes:
        solution: The solution ``[D]``.
        record: What was done.
        iterates: Those that were to be kept; the last is the solution.
    """

    solution: Float[Tensor, " D"]
    record: CGRecord
    iterates: tuple[CGIterate, ...] = ()


def conjugate_gradients(
    operator: PyTorchLinearOperator,
    b: Float[Tensor, " D"],
    *,
    damping: float = 0.0,
    preconditioner: PyTorchLinearOperator | None = None,
    tolerance: float = policy.TOLERANCE,
    max_iterations: int | None = None,
    stop: StoppingRule | None = None,
    start: Float[Tensor, " D"] | None = None,
    spacing: float | None = None,
) -> CGResult:
    """Solve a symmetric positive definite linear system.

    (C + λ I) x = b  to  ‖b − (C + λ I) x‖ ≤ tolerance ‖b‖

    The residual that the recursion carries drifts away from the true one in badly conditioned
    systems. When it meets the tolerance the true residual is computed, and the iteration restarts
    from there as long as the true residual decreases.

    Each residual is made conjugate anew to those before, up to a number of them (see ``policy``),
    so that rounding, such as of sums over chunks of points, stays rounding in a truncated solve.
    That takes twice as many vectors as iterations, and 8 D k operations in iteration k.

    Args:
        operator: The symmetric positive semidefinite operator C.
        b: The right-hand side.
        damping: The damping λ.
        preconditioner: A symmetric positive definite approximation of (C + λ I)⁻¹.
        tolerance: Relative norm of the residual to reach.
        max_iterations: Most iterations, by default ``10 D``.
        stop: A rule that may end the iteration before the tolerance is met.
        start: Where to start from; zero by default.
        spacing: If given, > 1, the iterates k = ⌈spacing^j⌉, j = 0, 1, …, are kept.

    Raises:
        ValueError: If the spacing is not greater than one.
    """
    if spacing is not None and not spacing > 1:
        raise ValueError(f"spacing must be greater than 1, got {spacing}.")
    limit = 10 * len(b) if max_iterations is None else max_iterations
    scale = torch.linalg.vector_norm(b).item()
    if scale == 0:
        zero = CGIterate(0, torch.zeros_like(b), 0.0)
        return CGResult(zero.solution, CGRecord(0, (0.0,), 0.0, True, (0.0,)), (zero,))

    x = torch.zeros_like(b) if start is None else start
    r = b if start is None else b - (operator @ x + damping * x)
    path = _Path(scale, spacing)
    path.add(x, r, -0.5 * torch.dot(x, b + r))
    last, true_norm, done = path.last, path.norms[0], path.norms[0] <= tolerance
    bound = math.inf  # CG lowers φ in every iteration, not ‖r‖: the first cycle may raise it
    while not done:
        step = _Recursion(operator, damping, preconditioner, path.last, r)
        while path.norms[-1] > tolerance and path.iteration < limit and step.advance():
            path.add(step.x, step.r, step.value)
            done = stop is not None and stop(path.values)
            if done:
                break
        r = b - (operator @ step.x + damping * step.x)
        new_norm = torch.linalg.vector_norm(r).item() / scale
        if not new_norm < bound:
            break
        done = done or new_norm <= tolerance or new_norm > 0.5 * bound or path.iteration >= limit
        last, true_norm, bound, path.norms[-1] = path.last, new_norm, new_norm, new_norm
    return path.result(last, true_norm, tolerance)


class _Path:
    """What is written down in every iteration.

    Args:
        scale: ‖b‖.
        spacing: Which iterates to keep.
    """

    def __init__(self, scale: float, spacing: float | None) -> None:
        self.scale, self.spacing, self.due = scale, spacing, 1.0
        self.norms: list[float] = []
        self.values: list[float] = []
        self.kept: list[CGIterate] = []

    @property
    def iteration(self) -> int:
        return len(self.norms) - 1

    def add(self, x: Tensor, r: Tensor, value: Tensor) -> None:
        norm = torch.linalg.vector_norm(r)
        numbers = torch.stack([norm, value]).tolist()  # one synchronization with the device
        self.norms.append(numbers[0] / self.scale)
        self.values.append(numbers[1])
        self.last = CGIterate(self.iteration, x, numbers[1])
        if self.spacing is not None and self.iteration >= self.due:
            self.kept.append(self.last)
            while self.due <= self.iteration:
                self.due *= self.spacing

    def result(self, last: CGIterate, true_norm: float, tolerance: float) -> CGResult:
        iterates = [kept for kept in self.kept if kept.iteration < last.iteration]
        converged = true_norm <= tolerance
        norms, values = tuple(self.norms), tuple(self.values)
        record = CGRecord(self.iteration, norms, true_norm, converged, values)
        return CGResult(last.solution, record, (*iterates, last))


class _Recursion:
    """The recursion of conjugate gradients for (C + λ I) x = b from an iterate with residual r."""

    def __init__(
        self,
        operator: PyTorchLinearOperator,
        damping: float,
        preconditioner: PyTorchLinearOperator | None,
        start: CGIterate,
        r: Tensor,
    ) -> None:
        self.operator, self.damping, self.preconditioner = operator, damping, preconditioner
        self.x, self.r = start.solution, r
        self.value = r.new_tensor(start.value)
        self.p = self._precondition(r)
        self.rz = torch.dot(r, self.p)
        self._kept = _Conjugates(len(r))
        self._kept.add(r, self.p, self.rz)

    def _precondition(self, r: Tensor) -> Tensor:
        P = self.preconditioner
        return r if P is None else (P @ r.to(P.dtype)).to(r.dtype)

    def advance(self) -> bool:
        """Do one iteration, or return False where the curvature along p is not positive."""
        Cp = self.operator @ self.p + self.damping * self.p
        pCp = torch.dot(self.p, Cp)
        if not (pCp > 0).item():
            return False
        alpha = self.rz / pCp
        self.x = self.x + alpha * self.p
        self.r = self._kept.conjugate(self.r - alpha * Cp)
        self.value = self.value - 0.5 * alpha * self.rz
        z = self._precondition(self.r)
        rz = torch.dot(self.r, z)
        self._kept.add(self.r, z, rz)
        self.p = z + (rz / self.rz) * self.p
        self.rz = rz
        return True


class _Conjugates:
    """Residuals r_i with z_i = P r_i, to which later ones are conjugate: r_jᵀ P r_i = 0.

    Args:
        D: Length of the vectors.
    """

    def __init__(self, D: int) -> None:
        self.limit = min(policy.KEPT_RESIDUALS, policy.KEPT_NUMBERS // (2 * D))
        self.count = 0
        self.R = self.Z = torch.empty(0, D)

    def add(self, r: Tensor, z: Tensor, rz: Tensor) -> None:
        """Keep one more residual, if there is room; R is scaled by rᵀz."""
        if self.count >= self.limit:
            return
        if self.count == len(self.R):  # doubled, so that vectors are copied once on average
            room = r.new_empty(min(self.limit, max(16, 2 * self.count)), len(r))
            room[: self.count], self.R = self.R[: self.count].to(r), room
            room = room.clone()
            room[: self.count], self.Z = self.Z[: self.count].to(r), room
        self.R[self.count], self.Z[self.count] = r / rz, z
        self.count += 1

    def conjugate(self, r: Tensor) -> Tensor:
        """Return r - Σ_i (z_iᵀ r) r_i / (r_iᵀ z_i), twice, since once is not enough."""
        R, Z = self.R[: self.count], self.Z[: self.count]
        for _ in range(2 if self.count else 0):
            r = r - (Z @ r) @ R
        return r
