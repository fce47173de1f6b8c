"""Recording of the linear maps that a jet passes through, with their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

_ACTIVE: ContextVar[Tape | None] = ContextVar("active_tape", default=None)


@dataclass(frozen=True, eq=False)
class LinearCall:
    """One application of a linear map to a jet: output = weight · input (+ bias).

    Args:
        weight: The parameter ``[d_out, d_in]``.
        bias: The parameter ``[d_out]`` or None.
        input: Channels of the input jet, ``[S, N, ..., d_in]``, detached.
        output: Channels of the output jet, ``[S, N, ..., d_out]``, in the autograd graph.
    """

    weight: Tensor
    bias: Tensor | None
    input: Tensor
    output: Tensor


@dataclass
class Tape:
    """The linear calls of one forward pass, in order.

    While a tape is active, the weights of linear maps are cut from the autograd graph and the
    outputs of the maps become its roots instead. A backward pass then yields the gradients with
    respect to these outputs without forming any gradient of a weight.
    """

    trainable: frozenset[int]
    calls: list[LinearCall] = field(default_factory=list)

    def captures(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether a linear map with these parameters is to be recorded."""
        if weight.requires_grad and id(weight) not in self.trainable:
            return False  # computed from parameters: autograd's graph has to lead to them
        return id(weight) in self.trainable or (bias is not None and id(bias) in self.trainable)

    def append(self, weight: Tensor, bias: Tensor | None, input: Tensor, output: Tensor) -> None:
        """Record one linear call."""
        self.calls.append(LinearCall(weight, bias, input.detach(), output))


def active_tape() -> Tape | None:
    """Return the tape that records now, if any."""
    return _ACTIVE.get()


@contextmanager
def record(parameters: Iterable[Tensor]) -> Iterator[Tape]:
    """Record the linear maps with these parameters that jets pass through inside the block."""
    tape = Tape(frozenset(id(parameter) for parameter in parameters))
    token = _ACTIVE.set(tape)
    try:
        yield tape
    finally:
        _ACTIVE.reset(token)
