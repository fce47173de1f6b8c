"""The passes of a bound term, compiled: points and data in, the parts of a chunk out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pinncurv.linearization.blocks import DenseRows, JacobianBlock, LinearLayer
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.part import TermPart
from pinncurv.machine import Graphs, is_tracing


@dataclass
class CompiledPasses:
    """What is compiled of a term and a network, whatever the points are.

    Args:
        graphs: The compiled passes.
        templates: What they return, of any tensors.
    """

    graphs: Graphs
    templates: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, term: str, before: CompiledPasses | None) -> CompiledPasses:
        """Begin anew where what functions use has changed, but do not forget how often it has."""
        graphs = Graphs(f"The passes of term '{term}'")
        if before is not None:
            graphs.traced, graphs.gives_up = before.graphs.traced, before.graphs.gives_up
        return cls(graphs)

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
        if self.graphs.off:  # nothing to rebuild, and a template would keep the tensors alive
            return function(part)
        part = part.traceable
        key, results = (kind, part.form), []

        def flat() -> list[Tensor]:
            results.append(function(part))
            self.templates.setdefault(key, results[-1])
            try:
                return _tensors(results[-1])
            except TypeError:
                if is_tracing():
                    raise
                return []  # nobody asks for them: the pass is called as it is

        tensors = self.graphs(key, flat, part.tensors, fixed)
        if self.graphs.gives_up:  # it was called as it is
            self.templates.clear()
            return results[-1]
        return _rebuilt(self.templates[key], iter(tensors))


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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return multiples of the gradient.

        Raises:
            RuntimeError: If the gradient is to be differentiated, as of a penalty on its norm.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradient of a compiled loss must not be differentiated again, got "
                "create_graph=True. Make an objective with compile=False for that."
            )
        return None, *(grads[0] * part for part in ctx.saved_tensors)
