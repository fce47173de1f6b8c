"""What a differential operator declares: the derivatives it needs and how to combine them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from pinncurv.diffops.random_directions import RandomDirections
from pinncurv.jets import Derivative


class DifferentialOperator(ABC):
    """A linear differential operator, as a declaration.

    (D u)(x) = read(x, {name: Σ_α c_α ∂_{v_α1} ⋯ ∂_{v_αK} u(x)})

    A subclass says in ``requests`` which derivatives it needs, by names of its own, and in ``read``
    how they combine. What several operators need is propagated once. Attributes that are trainable
    tensors or modules are trained: they enter in ``read``, never in a request.

    Attributes:
        of: Which output of the network it acts on, if that returns a tuple or a dictionary.
        sampling: The random directions that it is an estimate from, if it is one.
    """

    of: int | str | None = None
    sampling: RandomDirections | None = None

    @abstractmethod
    def requests(self, x: Tensor) -> Mapping[str, Derivative]:
        """Return the derivatives needed at points x, ``[N, d]``."""

    @abstractmethod
    def read(self, x: Any, derivatives: Mapping[str, Any]) -> Any:
        """Return the operator's value at the points from what it asked for, each ``[N, ...]``.

        Where something is trained, points and derivatives are jets without derivatives of their
        own, which record what trained tensors do. Torch functions take them as tensors.
        """

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        """Return the operator at a part of the points: cut the coefficients given per point."""
        return self

    def redrawn(self, seed: int) -> DifferentialOperator:
        """Return the operator with new random directions, if it has any.

        Args:
            seed: A random number of at most 63 bits.
        """
        return self

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the attributes that are trained: tensors, and the parameters of modules."""
        for name, given in vars(self).items():
            yield from named_parameters_of(given, name)


def named_parameters_of(given: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in an object that require a gradient."""
    if isinstance(given, Module):
        for inner, parameter in given.named_parameters():
            if parameter.requires_grad:
                yield f"{name}.{inner}", parameter
    elif isinstance(given, Tensor) and given.requires_grad:
        yield name, given
