"""The per-layer diagonal blocks of any operator, matrix-free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pinncurv.linops import (
    Block,
    LayerwiseLinearOperator,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
)


class BlockPart(SymmetricLinearOperator):
    """The diagonal blocks of an operator, at one product with it per layer.

    X ↦ Σ_l E_l C E_l X,  E_l the projection on the parameters of layer l

    Args:
        operator: C.
        blocks: The layers.
    """

    def __init__(self, operator: PyTorchLinearOperator, blocks: Sequence[Block]) -> None:
        super().__init__(operator._in_shape, operator.device, operator.dtype)
        self.operator = operator
        self.blocks = tuple(blocks)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        Y = [torch.zeros_like(x) for x in X]
        for block in self.blocks:
            own = {block.weight, block.bias}
            part = [x if i in own else torch.zeros_like(x) for i, x in enumerate(X)]
            for i, image in enumerate(self.operator @ part):
                if i in own:
                    Y[i] = image
        return Y


def block_part(operator: PyTorchLinearOperator, blocks: Sequence[Block]) -> PyTorchLinearOperator:
    """Return the diagonal blocks of an operator, which may be the operator itself."""
    if isinstance(operator, LayerwiseLinearOperator):
        return operator
    return BlockPart(operator, blocks)
