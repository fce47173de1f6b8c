"""The Jacobian of the scaled residuals of all terms, matrix-free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from torch import Tensor

from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.products import jacobian_adjoint_product, jacobian_product, jacobian_rows
from pinncurv.linearization import LayerLinearization, Linearization, Type2
from pinncurv.linops import LayerBlock


def check_exact(linearizations: Sequence[Linearization]) -> None:
    """Check that linearizations have the exact output gradients.

    Raises:
        ValueError: If one has not; names its term.
    """
    for linearization in linearizations:
        if linearization.fisher != Type2():
            raise ValueError(
                f"The Jacobian needs the exact output gradients, but term "
                f"'{linearization.term.name}' was linearized with {linearization.fisher}. "
                "Linearize with fisher=Type2(), the default."
            )


class JacobianLinearOperator(PyTorchLinearOperator):
    """The Jacobian of the scaled residuals.

    J = ∂(r̃_1, ..., r̃_T) / ∂θ,  r̃_t = sqrt(w_n / N_t) r_t(x_n)

    It maps the list of parameters to one tensor ``[N_t, V_t]`` per term.

    Cost: N S V D per column and product, also with the transpose, and no differentiation.

    Args:
        linearizations: One per term.
        space: The parameters.

    Raises:
        ValueError: If a linearization has other output gradients than the exact ones.
    """

    def __init__(self, linearizations: Sequence[Linearization], space: ParameterSpace) -> None:
        check_exact(linearizations)
        self.linearizations = tuple(linearizations)
        self.space = space
        out_shapes = [(len(lin.x), lin.num_components) for lin in self.linearizations]
        super().__init__([tuple(shape) for shape in space.shapes], out_shapes)

    @classmethod
    def from_linearizations(cls, linearizations: Sequence[Linearization]) -> JacobianLinearOperator:
        """Build the operator.

        Args:
            linearizations: One per term, with the exact output gradients.
        """
        return cls(linearizations, ParameterSpace.from_linearizations(linearizations))

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.space.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self.space.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        directions = [
            (
                self.space.weight_name(block),
                X[block.weight].movedim(-1, 0),
                None if block.bias is None else X[block.bias].movedim(-1, 0),
            )
            for block in self.space.blocks
        ]
        products = []
        for linearization in self.linearizations:
            parts = []
            for chunk in linearization:
                total = None
                for name, weight, bias in directions:
                    if name in chunk.layers:
                        part = jacobian_product(chunk.layers[name], weight, bias)
                        total = part if total is None else total.add_(part)
                if total is None:
                    total = chunk.residual.new_zeros(*chunk.residual.mT.shape, X[0].shape[-1])
                parts.append(total.transpose(0, 1))
            products.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return products

    def _adjoint(self) -> PyTorchLinearOperator:
        return JacobianAdjointLinearOperator(self)

    def to_dense(self) -> Tensor:
        """Return the Jacobian as a matrix ``[Σ_t N_t V_t, D]``, rows ordered by term, n, v."""
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        row = 0
        for linearization in self.linearizations:
            for chunk in linearization:
                rows = matrix[row : row + chunk.residual.numel()]
                fill_jacobian_rows(rows, chunk.layers, self.space, slice(None))
                row += len(rows)
        return matrix


class JacobianAdjointLinearOperator(PyTorchLinearOperator):
    """The transpose of the Jacobian.

    Jᵀ: one tensor ``[N_t, V_t]`` per term -> the list of parameters

    Args:
        jacobian: The Jacobian.
    """

    def __init__(self, jacobian: JacobianLinearOperator) -> None:
        self.jacobian = jacobian
        super().__init__(jacobian._out_shape, jacobian._in_shape)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.jacobian.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self.jacobian.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        space, K = self.jacobian.space, X[0].shape[-1]
        totals = [
            torch.zeros(K, *shape, dtype=self.dtype, device=self.device) for shape in space.shapes
        ]
        for linearization, vectors in zip(self.jacobian.linearizations, X, strict=True):
            row = 0
            for chunk in linearization:
                n = len(chunk.residual)
                part = vectors[row : row + n].transpose(0, 1)
                row += n
                for block in space.blocks:
                    add_adjoint_product_(totals, chunk.layers, block, space, part)
        return [total.movedim(0, -1) for total in totals]

    def _adjoint(self) -> PyTorchLinearOperator:
        return self.jacobian


def add_adjoint_product_(
    totals: list[Tensor],
    layers: dict[str, LayerLinearization],
    block: LayerBlock,
    space: ParameterSpace,
    vectors: Tensor,
) -> None:
    """Add one layer's Jᵀu to the totals of its parameters; nothing if the term does not use it."""
    layer = layers.get(space.weight_name(block))
    if layer is None:
        return
    weight, bias = jacobian_adjoint_product(layer, vectors)
    totals[block.weight] += weight
    if block.bias is not None and bias is not None:
        totals[block.bias] += bias


def fill_jacobian_rows(
    rows: Tensor, layers: dict[str, LayerLinearization], space: ParameterSpace, points: slice
) -> None:
    """Write the Jacobian's rows of some points, ordered by point, then component.

    Args:
        rows: What to fill, ``[n V, D]``.
        layers: The linearized layers of one chunk.
        space: The parameters.
        points: Which of the chunk's points.
    """
    columns = rows.split([shape.numel() for shape in space.shapes], 1)
    for block in space.blocks:
        layer = layers.get(space.weight_name(block))
        if layer is None:
            for position in (block.weight, block.bias):
                if position is not None:
                    columns[position].zero_()
            continue
        weight, bias = jacobian_rows(layer, points)
        n, V = weight.shape[1], weight.shape[0]
        columns[block.weight].unflatten(0, (n, V)).copy_(weight.flatten(2).transpose(0, 1))
        if block.bias is not None and bias is not None:
            columns[block.bias].unflatten(0, (n, V)).copy_(bias.transpose(0, 1))
