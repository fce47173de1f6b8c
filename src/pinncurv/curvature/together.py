"""Functions of the blocks at some points, compiled where the passes are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from pinncurv.linearization import DenseRows, JacobianBlock, LinearLayer
from pinncurv.machine import Graphs, form_of


def together(
    graphs: Graphs | None,
    key: tuple[Hashable, ...],
    function: Callable[[], Sequence[Tensor]],
    blocks: Sequence[JacobianBlock | None],
    further: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """Call a function of blocks, or the graph of it if the objective's passes are compiled.

    Args:
        graphs: What is compiled of a linearized objective; None to call the function.
        key: All that the function depends on but blocks and tensors, its name first.
        function: Uses no tensors but those of the blocks and the further ones.
        blocks: The blocks at some points.
        further: Other tensors that the function uses.
    """
    if graphs is None:
        return function()
    tensors: list[Tensor] = list(further)
    forms: list[Hashable] = []
    for block in blocks:
        if isinstance(block, LinearLayer) and block.G is not None:
            tensors += [block.Z, block.G]
            forms.append((block.bias is None, block.value_channels, block.transposed))
        elif isinstance(block, DenseRows):
            tensors.append(block.matrix)
            forms.append((block.shape,))
        elif block is None:
            forms.append(())
        else:
            return function()
    return graphs((*key, tuple(forms), form_of(tensors)), function, tensors)
