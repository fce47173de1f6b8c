"""The passes of a bound term, compiled: points and data in, the parts of a chunk out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pinncurv.compilation import Compiled, NotCompiled, compiled
from pinncurv.linearization.blocks import DenseRows, JacobianBlock, LinearLayer
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.part import TermPart

# Graphs of one pass of one term. More come from numbers that change all the time.
_MOST_GRAPHS = 8
# In how many of its first calls a graph is compared with the pass that it was traced from.
_COMPARED = 2


@dataclass
class _Pass:
    """One compiled pass at parts of one shape."""

    run: Compiled
    template: Any
    compared: set[int] = field(default_factory=set)  # the points, by identity


@dataclass
class CompiledPasses:
    """What is compiled of a term and a network, whatever the points are.

    The first two parts of the points that a graph is called with are also passed as the functions
    are written, and must yield the same to rounding.
    """

    term: str
    known: dict[Any, _Pass] = field(default_factory=dict)
    gives_up: bool = False

    def call(
        self,
        kind: str,
        function: Callable[[TermPart], Any],
        part: TermPart,
        fixed: Sequence[Tensor],
    ) -> Any:
        """Return what a pass returns: a tensor, a tuple of tensors or a chunk.

        Args:
            kind: Which pass it is.
            function: The pass, as it is written.
            part: The points.
            fixed: The parameters.
        """
        if self.gives_up or torch.is_inference_mode_enabled():
            return function(part)
        part = part.traceable
        key = kind, part.form
        try:
            if key not in self.known:
                self.known[key] = self._trace(kind, function, part, fixed)
            found = self.known[key]
            result = _rebuilt(found.template, iter(found.run(part.tensors)))
            if len(found.compared) < _COMPARED and id(part.x) not in found.compared:
                found.compared.add(id(part.x))
                _compare(result, function(part))
        except Exception as error:  # of many types; the pass as it is written is right
            return self._refused(error, function, part)
        return result

    def _trace(
        self,
        kind: str,
        function: Callable[[TermPart], Any],
        part: TermPart,
        fixed: Sequence[Tensor],
    ) -> _Pass:
        if sum(key[0] == kind for key in self.known) >= _MOST_GRAPHS:
            raise RuntimeError(
                f"it would be compiled more than {_MOST_GRAPHS} times, for other numbers in the "
                "functions or other numbers of points each time"
            )
        templates = []

        def traced() -> list[Tensor]:
            result = function(part)
            templates.append(result)
            return _tensors(result)

        run = compiled(traced, part.tensors, fixed)
        return _Pass(run, templates[0])

    def _refused(
        self, error: Exception, function: Callable[[TermPart], Any], part: TermPart
    ) -> Any:
        """Return what the pass as written returns, and say why, unless that fails as well."""
        result = function(part)
        self.gives_up = True
        self.known.clear()
        reason = (str(error).strip().splitlines() or ["no reason is given"])[0]
        warnings.warn(
            f"The passes of term '{self.term}' run as they are written, since they can't be "
            f"compiled ({type(error).__name__}: {reason}). That is as right, and slower.",
            NotCompiled,
            stacklevel=2,
        )
        return result


def _blocks_tensors(block: JacobianBlock) -> list[Tensor]:
    if isinstance(block, LinearLayer):
        return [block.Z, block.gradients]
    if isinstance(block, DenseRows):
        return [block.matrix]
    raise TypeError(f"blocks of type {type(block).__name__} are not known")


def _tensors(result: Any) -> list[Tensor]:
    """Return the tensors of what a pass returns, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple):
        return list(result)
    assert isinstance(result, Chunk)
    if result.slope is not None:
        raise TypeError("an energy has several kinds of rows")
    blocks = [t for block in result.blocks.values() for t in _blocks_tensors(block)]
    return [result.residual, result.unscaled, *blocks, *(result.gradient or {}).values()]


def _rebuilt(template: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the same with other tensors."""
    if isinstance(template, Tensor):
        return next(tensors)
    if isinstance(template, tuple):
        return tuple(tensors)
    residual, unscaled = next(tensors), next(tensors)
    blocks: dict[str, JacobianBlock] = {}
    for name, block in template.blocks.items():
        if isinstance(block, LinearLayer):
            Z, G = next(tensors), next(tensors)
            blocks[name] = LinearLayer(
                block.weight, block.bias, Z, G, block.value_channels, block.d_out, block.transposed
            )
        else:
            blocks[name] = DenseRows(block.name, next(tensors), block.shape)
    gradient = None if template.gradient is None else {n: next(tensors) for n in template.gradient}
    return Chunk(residual, unscaled, blocks, gradient=gradient)


def _compare(result: Any, expected: Any) -> None:
    """Check that a compiled pass returns what the pass as written does.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    for mine, other in zip(_tensors(result), _tensors(expected), strict=True):
        size = other.detach().abs().amax() if other.numel() else 0
        tolerance = torch.finfo(other.dtype).eps ** 0.5 * size
        same = (
            ((mine - other).abs() <= tolerance) | (mine == other) | (mine.isnan() & other.isnan())
        )
        if not bool(same.all()):
            raise RuntimeError("what was compiled returns something else at other points")


class LossWithGradient(torch.autograd.Function):
    """The loss at some points, and its gradient from the same compiled pass.

    L_t, whose derivative in the parameters is known already
    """

    @staticmethod
    def forward(
        ctx: Any, evaluate: Callable[[], tuple[Tensor, ...]], *parameters: Tensor
    ) -> Tensor:
        """Return the loss; keep the gradient."""
        loss, *gradient = evaluate()
        ctx.save_for_backward(*gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return multiples of the gradient."""
        return None, *(grads[0] * part for part in ctx.saved_tensors)
