"""Exponential moving averages of curvature operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Start = Callable[[Any], list[Tensor]]  # given an operator that offers ``tensors``


def from_identity(operator: Any) -> list[Tensor]:
    """Start from the identity: for KFAC, from identity factors."""
    return operator.identity().tensors()


def from_zero(operator: Any) -> list[Tensor]:
    """Start from zero."""
    return [torch.zeros_like(tensor) for tensor in operator.tensors()]


def from_first(operator: Any) -> list[Tensor]:
    """Start from the first estimate."""
    return operator.tensors()


@dataclass(frozen=True)
class ExponentialAverage:
    """Average the tensors that define an operator over the steps.

    T̄_k = β T̄_{k-1} + (1 - β) T_k

    For KFAC these are the factors A and B, for dense operators the matrix.

    Args:
        decay: β, in [0, 1).
        start: T̄_0 as a function of the first operator: ``from_identity``, ``from_zero`` or
            ``from_first``.

    Raises:
        ValueError: If the decay is not in [0, 1).
    """

    decay: float
    start: Start = from_zero

    def __post_init__(self) -> None:
        """Check the decay."""
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"The decay of an average must be in [0, 1), got {self.decay}. 0 keeps no history."
            )

    def update(self, operator: Any, average: list[Tensor] | None) -> list[Tensor]:
        """Return the average after one more operator.

        Args:
            operator: The new estimate.
            average: The average so far; None at the start.
        """
        previous = self.start(operator) if average is None else fitted(average, operator)
        return [
            torch.lerp(tensor, old, self.decay)
            for tensor, old in zip(operator.tensors(), previous, strict=True)
        ]


def fitted(saved: Sequence[Tensor], operator: Any) -> list[Tensor]:
    """Return saved tensors in dtype and on the device of those that define an operator.

    Raises:
        ValueError: If their shapes differ.
    """
    tensors = operator.tensors()
    got, expected = ([list(tensor.shape) for tensor in part] for part in (saved, tensors))
    if got != expected:
        raise ValueError(
            f"The curvature that was saved or averaged must have the shapes {expected} of the "
            f"present one, got {got}. It belongs to another network, curvature or choice of "
            "frozen layers: build a new optimizer."
        )
    return [old.to(tensor) for old, tensor in zip(saved, tensors, strict=True)]
