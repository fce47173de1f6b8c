"""Operators that are block diagonal over the layers, in terms of one layer's block."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.blocks import Block, check_blocks, flat_positions, from_joint, to_joint
from pinncurv.linops.operator import SymmetricLinearOperator, check_dense

# joint matrices, of one vector or of K with an axis of their own
Joint = Float[Tensor, "*K d_out d_joint"]


def term_position(terms: Sequence[str], term: int | str) -> int:
    """Return the position of a loss term that is given by its name or position.

    Raises:
        KeyError: If there is no such term.
    """
    if term not in terms and term not in range(len(terms)):
        raise KeyError(f"term must be one of {terms} or a position, got {term!r}.")
    return terms.index(term) if isinstance(term, str) else term


class LayerwiseLinearOperator(SymmetricLinearOperator, ABC):
    """A symmetric operator that is block diagonal over layers.

    C = diag(C_1, …, C_L), C_l acting on joint matrices X_l = [W_l, b_l]

    Subclasses implement the product with one layer's block and its dense form, and may do better
    than to read the diagonal off that.

    Args:
        blocks: The layers, which cover each parameter exactly once.
        shapes: The shapes of all parameters.
        device: Device of the operator.
        dtype: Data type of the vectors that the operator takes and returns.

    Raises:
        ValueError: If the blocks do not partition the parameters.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(shapes, device, dtype)
        self.blocks = tuple(blocks)
        check_blocks(self.blocks, self._in_shape)

    @abstractmethod
    def _apply(self, layer: int, X: Joint) -> Joint:
        """Multiply one layer's block onto joint matrices."""

    @abstractmethod
    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        """Return C_l as a new matrix on the row-major flattened joint matrix."""

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        """Return the diagonal of one layer's block as a joint matrix."""
        return self.block_to_dense(layer).diagonal().reshape(self.blocks[layer].shape)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        # one column, the optimizer's case, is worth plain instead of batched matrix products
        is_vector = X[0].shape[-1] == 1
        joints = to_joint([x.squeeze(-1) for x in X] if is_vector else X, self.blocks)
        products = [self._apply(i, joint).to(self.dtype) for i, joint in enumerate(joints)]
        Y = from_joint(products, self.blocks)
        return [y.unsqueeze(-1) for y in Y] if is_vector else Y

    def to_dense(self) -> Float[Tensor, "D D"]:
        check_dense(self)
        dense = torch.zeros(self.shape, device=self.device, dtype=self.dtype)
        for i, position in enumerate(flat_positions(self.blocks, self._in_shape)):
            block = self.block_to_dense(i).to(self.dtype)
            dense[position.unsqueeze(1), position] = block
        return dense

    def diagonal(self) -> Float[Tensor, " D"]:
        joints = [self._block_diagonal(i) for i in range(len(self.blocks))]
        diagonals = from_joint(joints, self.blocks)
        return torch.cat([d.flatten() for d in diagonals]).to(self.dtype)
