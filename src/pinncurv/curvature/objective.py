"""The loss on one frozen batch, and its linearization: what an optimizer steps on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.products import jacobian_adjoint_product
from pinncurv.linearization import (
    Chunk,
    Linearization,
    TermBlock,
    check_compatible,
    check_finite_parameters,
    trainable_parameters,
)
from pinncurv.problems import LossTerm


@dataclass(frozen=True, eq=False)
class TermSums:
    """What is summed up over the points of one term.

    Args:
        residual: The scaled residual r̃, ``[N, V]``.
        gradient: The gradient of ½‖r̃‖² by the name of the parameter.
    """

    residual: Float[Tensor, "N V"]
    gradient: dict[str, Tensor]


class SummingLinearization(Linearization):
    """A linearization that sums up the gradient while it is iterated over for the first time.

    ∇L_t = J_tᵀ r̃_t

    A curvature built from recomputed chunks and the gradient then cost one pass, not two. Where
    iterations are nested, as for pairs of chunks, the outer one sums.
    """

    _sums: TermSums | None = None
    _is_summing: bool = False

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks."""
        return super().__iter__() if self._sums or self._is_summing else self._sum_up()

    def _sum_up(self) -> Iterator[Chunk]:
        residuals: list[Tensor] = []
        gradient: dict[str, Tensor] = {}
        self._is_summing = True
        try:
            for chunk in super().__iter__():
                residuals.append(chunk.residual)
                _add_gradient(gradient, chunk)
                yield chunk
                del chunk  # or it would live on while the next one is computed
            self._sums = TermSums(torch.cat(residuals), gradient)
        finally:  # also where the iteration is abandoned
            self._is_summing = False

    def sums(self) -> TermSums:
        """Return the sums, from one more pass if there has been none yet."""
        if self._sums is None:
            for _ in self._sum_up():
                pass
        assert self._sums is not None
        return self._sums


def _add_gradient(gradient: dict[str, Tensor], chunk: Chunk) -> None:
    """Add Jᵀ r̃ of one chunk."""
    vector = chunk.residual.t()[..., None]
    for layer in chunk.layers.values():
        weight, bias = jacobian_adjoint_product(layer, vector)
        for name, part in ((layer.weight, weight), (layer.bias, bias)):
            if name is not None and part is not None:
                gradient[name] = gradient[name].add_(part[0]) if name in gradient else part[0]


class LinearizedObjective:
    """All terms of an objective, linearized at the current parameters.

    L(θ + v) ≈ ½‖r̃ + J v‖²,  ∇L = Jᵀ r̃

    Args:
        linearizations: One per term.
    """

    def __init__(self, linearizations: Sequence[SummingLinearization]) -> None:
        self.linearizations = tuple(linearizations)

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable parameters, in the network's order."""
        return list(self.linearizations[0].parameters.values())

    @cached_property
    def jacobian(self) -> JacobianLinearOperator:
        """J, from the list of parameters to one tensor ``[N_t, V_t]`` per term."""
        return JacobianLinearOperator.from_linearizations(self.linearizations)

    @property
    def residual(self) -> list[Float[Tensor, "N V"]]:
        """The scaled residuals r̃_t, one per term."""
        return [linearization.sums().residual for linearization in self.linearizations]

    @cached_property
    def term_losses(self) -> dict[str, float]:
        """The losses L_t by the name of the term."""
        return {
            linearization.term.name: 0.5 * linearization.sums().residual.square().sum().item()
            for linearization in self.linearizations
        }

    def gradient(self) -> list[Tensor]:
        """Return ∇L = Jᵀ r̃, one tensor per parameter."""
        totals = []
        for name, parameter in self.linearizations[0].parameters.items():
            gradients = [lin.sums().gradient for lin in self.linearizations]
            parts = [gradient[name] for gradient in gradients if name in gradient]
            totals.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(parameter))
        return totals


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An objective, evaluated at the parameters of that moment.

    Args:
        loss: L.
        linearize: Returns the linearization at these parameters, which must not have changed.
        objective: The objective.
        fingerprint: What the objective depended on.
    """

    loss: float
    linearize: Callable[[], LinearizedObjective]
    objective: Objective
    fingerprint: tuple[object, ...]

    def is_current(self) -> bool:
        """Whether parameters, buffers, points and data are those that were evaluated."""
        return self.fingerprint == self.objective.fingerprint()


class Objective:
    """A loss on one frozen batch.

    L(θ) = Σ_t w_t / (2 N_t) Σ_n ‖r_t(x_n; θ)‖²

    Args:
        model: The network.
        terms: The loss terms.
        points: The points of each term, ``[N_t, d]``.
        chunk_size: How many points to process at a time; None for all. It changes the memory that
            is needed, not the results.

    Raises:
        ValueError: If terms and points do not match, points are empty, not finite or of another
            dtype or device than the network, names of terms repeat, or a parameter of the network
            is not finite.
    """

    def __init__(
        self,
        model: Module,
        terms: Sequence[LossTerm],
        points: Sequence[Tensor],
        chunk_size: int | None = None,
    ) -> None:
        self.model = model
        self.terms = tuple(terms)
        self.points = tuple(points)
        self.chunk_size = chunk_size
        names = [term.name for term in self.terms]
        if not names or len(names) != len(self.points):
            raise ValueError(
                "There must be one or more terms and one tensor of points for each, got "
                f"{len(names)} terms and {len(self.points)} tensors."
            )
        if len(set(names)) != len(names):
            raise ValueError(f"The names of the terms must differ, got {names}. Rename them.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
        for term, x in zip(self.terms, self.points, strict=True):
            check_compatible(term, model, x)
        self.terms = tuple(term.to(x) for term, x in zip(self.terms, self.points, strict=True))
        check_finite_parameters(model)
        parameters = trainable_parameters(model)
        self._blocks = {
            term.name: list(TermBlock.of_all(term, x).cut(parameters, chunk_size))
            for term, x in zip(self.terms, self.points, strict=True)
        }

    def term_losses(self) -> dict[str, Tensor]:
        """Return L_t by the name of the term, with a graph unless torch.no_grad is on."""
        losses = {}
        for name, blocks in self._blocks.items():
            parts = [block.loss(self.model) for block in blocks]
            losses[name] = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
        return losses

    def loss(self) -> Tensor:
        """Return L, with a graph unless torch.no_grad is on."""
        losses = list(self.term_losses().values())
        total = losses[0]
        for part in losses[1:]:
            total = total + part
        return total

    def backward(self) -> dict[str, Tensor]:
        """Add the gradient to the parameters' ``.grad``, chunk by chunk.

        Returns:
            L_t by the name of the term, detached.
        """
        losses: dict[str, Tensor] = {}
        for name, blocks in self._blocks.items():
            parts = []
            for block in blocks:
                part = block.loss(self.model)
                part.backward()
                parts.append(part.detach())
            losses[name] = torch.stack(parts).sum()
        return losses

    def linearize(self) -> LinearizedObjective:
        """Linearize all terms at the current parameters."""
        return LinearizedObjective(
            [
                SummingLinearization(term, self.model, x, chunk_size=self.chunk_size)
                for term, x in zip(self.terms, self.points, strict=True)
            ]
        )

    def evaluate(self) -> Evaluation:
        """Evaluate L together with what the next linearization at these parameters needs.

        The linearization is made and kept, unless a chunk size asks to save memory.
        """
        if self.chunk_size is not None:
            with torch.no_grad():
                return Evaluation(float(self.loss()), self.linearize, self, self.fingerprint())
        linearized = self.linearize()
        loss = sum(linearized.term_losses.values())
        return Evaluation(loss, lambda: linearized, self, self.fingerprint())

    def fingerprint(self) -> tuple[object, ...]:
        """Return what changes when a tensor that the loss depends on is replaced or written to.

        Writes through ``tensor.data`` and plain attributes of modules leave no trace.
        """
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.points]
        for term in self.terms:
            tensors += [*term.data.values()]
            tensors += [term.weight] if isinstance(term.weight, Tensor) else []
        state = [(id(tensor), tensor._version, tensor.requires_grad) for tensor in tensors]
        return (self.model.training, *state)
