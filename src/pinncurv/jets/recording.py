"""Recording of where trainable tensors meet the points: linear maps, and copies for every point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from pinncurv.jets.jet import Jet

_ACTIVE: ContextVar[Tape | None] = ContextVar("active_tape", default=None)


@dataclass(frozen=True, eq=False)
class LinearCall:
    """One application of a linear map: output = weight · input (+ bias).

    Args:
        weight: ``[d_out, d_in]``, or ``[d_in, d_out]`` if it is transposed.
        bias: ``[d_out]`` or None.
        input: Channels of a jet, ``[S, N, ..., d_in]``, or a tensor without points,
            ``[..., d_in]``; detached.
        output: The same of the output, of which a backward pass yields the gradient.
        transposed: Whether the map was written input @ weight.
        has_points: Whether input and output are channels of jets.
    """

    weight: Tensor
    bias: Tensor | None
    input: Tensor
    output: Tensor
    transposed: bool = False
    has_points: bool = True

    @property
    def root(self) -> Tensor:
        """What a backward pass is to find the gradient of."""
        return self.output

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What may depend on parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """One use of a tensor that does not depend on the points, by a copy for every point.

    Args:
        constant: The tensor, in the autograd graph of the parameters.
        root: The copies, ``[N, *shape]``, of which a backward pass yields the gradients.
        per_point: Whether the first axis of the tensor is that of the points, so that the copies
            are its rows.
    """

    constant: Tensor
    root: Tensor
    per_point: bool

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What may depend on parameters."""
        return (self.constant,)


@dataclass
class Tape:
    """What the trainable tensors of one forward pass did, in order.

    While a tape is active, trainable tensors are cut from the autograd graph where they meet jets;
    the outputs of linear maps, and copies of all other tensors for every point, become its roots. A
    backward pass then yields the gradients of every point with respect to them.
    """

    entries: list[LinearCall | ConstantUse] = field(default_factory=list)

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input: Tensor,
        output: Tensor,
        transposed: bool = False,
        has_points: bool = True,
    ) -> Tensor:
        """Record one linear map and return its output as a root of the graph."""
        if not output.requires_grad:
            output.requires_grad_()
        call = LinearCall(weight, bias, input.detach(), output, transposed, has_points)
        self.entries.append(call)
        return output

    def copies(self, constant: Tensor, N: int, ndim: int) -> Tensor:
        """Record a tensor's use and return its copies, which broadcast as it did.

        Args:
            constant: The tensor.
            N: The number of points.
            ndim: How many axes it is broadcast to, the points' included.
        """
        aligned = constant.ndim == ndim and ndim > 0
        per_point = aligned and constant.shape[0] == N > 1
        if per_point:
            root = constant.detach().clone().requires_grad_()
            self.entries.append(ConstantUse(constant, root, per_point=True))
            return root
        used = constant[0] if aligned and constant.shape[0] == 1 else constant
        root = used.detach().expand(N, *used.shape).requires_grad_()
        self.entries.append(ConstantUse(constant, root, per_point=False))
        return root.reshape(N, *(1,) * (ndim - 1 - used.ndim), *used.shape)


def active_tape() -> Tape | None:
    """Return the tape that records now, if any; nothing is recorded under ``torch.no_grad``."""
    return _ACTIVE.get() if torch.is_grad_enabled() else None


def for_every_point(constant: Any, jet: Jet, ndim: int | None = None) -> Any:
    """Return a tensor that meets a jet, while recording as copies for every point.

    A rule passes every tensor through this that may be trainable and is broadcast with a value.
    Without it, exact rows of the Jacobian cannot be found, and a linearization says so.

    Args:
        constant: The tensor, or a number, which is returned as it is.
        jet: What it meets.
        ndim: How many axes both are broadcast to; by default those of the one that has more.
    """
    tape = active_tape()
    if tape is None or not isinstance(constant, Tensor) or not constant.requires_grad:
        return constant
    return tape.copies(
        constant, jet.shape[0], max(jet.ndim, constant.ndim) if ndim is None else ndim
    )


class PlainLinearMaps(TorchFunctionMode):
    """Records linear layers that are applied to tensors without points, such as a latent code."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record a linear map; let everything else pass."""
        given = dict(kwargs or {})
        tape = active_tape()
        if func is not functional.linear or tape is None or not _is_plain(args, given):
            return func(*args, **given)
        input, weight, bias = _linear_arguments(*args, **given)
        own = [t for t in (weight, bias) if t is not None]
        if not any(t.requires_grad for t in own) or not all(t.is_leaf for t in own):
            return func(input, weight, bias)
        output = func(input, weight.detach(), None if bias is None else bias.detach())
        return tape.linear(weight, bias, input, output, has_points=False)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return all(isinstance(a, Tensor | None) for a in [*args, *kwargs.values()])


@contextmanager
def record(plain: bool = False) -> Iterator[Tape]:
    """Record what trainable tensors do inside the block.

    Args:
        plain: Whether linear layers on tensors without points are recorded, too.
    """
    tape = Tape()
    token = _ACTIVE.set(tape)
    try:
        with PlainLinearMaps() if plain else nullcontext():
            yield tape
    finally:
        _ACTIVE.reset(token)


def is_trained(*tensors: Any) -> bool:
    """Whether one of some tensors requires a gradient."""
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
