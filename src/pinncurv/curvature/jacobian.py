"""The Jacobian of the scaled residuals of all terms, matrix-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.single import Scaled
from pinncurv.curvature.together import together
from pinncurv.linearization import Chunk, JacobianBlock, Linearization, Type2, run
from pinncurv.linops import PyTorchLinearOperator
from pinncurv.machine import Graphs, check_memory, symmetric_product


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


class _Between(PyTorchLinearOperator):
    """A map between parameters and residuals."""

    space: ParameterSpace

    @property
    def device(self) -> torch.device:
        return self.space.device

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype


class JacobianLinearOperator(_Between):
    """The Jacobian of the scaled residuals.

    J = ∂(r̃_1, ..., r̃_T) / ∂θ,  r̃_t = sqrt(w_n / N_t) r_t(x_n)

    It maps the list of parameters to one tensor ``[N_t, V_t]`` per term.

    Cost: N S V D per column and product, also with the transpose, and no differentiation.

    Args:
        linearizations: One per term, with the exact output gradients.
        space: The parameters; by default those of the terms.
        graphs: What is compiled of the objective, if it is not that of the linearizations.

    Raises:
        ValueError: If a linearization has other output gradients than the exact ones.
    """

    def __init__(
        self,
        linearizations: Sequence[Linearization],
        space: ParameterSpace | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        check_exact(linearizations)
        self.linearizations = linearizations
        self.graphs = graphs or getattr(linearizations, "graphs", None)
        self.space = ParameterSpace.of(linearizations) if space is None else space
        out_shapes = [(len(lin.x), lin.num_components) for lin in linearizations]
        super().__init__([tuple(shape) for shape in self.space.shapes], out_shapes)

    def product(
        self, blocks: Sequence[JacobianBlock | None], X: Sequence[Tensor], chunk: Chunk
    ) -> Float[Tensor, "V n K"]:
        """Return J X at the points of a chunk, for one tensor ``[K, *shape]`` per parameter."""
        used = [(p, b) for p, b in zip(self.space.blocks, blocks, strict=True) if b is not None]
        if not used:
            return chunk.residual.new_zeros(*chunk.residual.mT.shape, len(X[0]))

        def multiply() -> list[Tensor]:
            total = None
            for place, block in used:
                part = block.product([X[position] for position in place.positions])
                total = part if total is None else total.add_(part)
            assert total is not None
            return [total]

        (total,) = together(self.graphs, ("product", self.space.blocks), multiply, blocks, X)
        return total

    def add_adjoint_product_(
        self, totals: Sequence[Tensor], blocks: Sequence[JacobianBlock | None], u: Tensor
    ) -> None:
        """Add Jᵀ u at the points of a chunk to one tensor ``[K, *shape]`` per parameter."""
        used = [(p, b) for p, b in zip(self.space.blocks, blocks, strict=True) if b is not None]

        def multiply() -> list[Tensor]:
            return [part for _, block in used for part in block.adjoint_product(u)]

        parts = together(self.graphs, ("adjoint", self.space.blocks), multiply, blocks, [u])
        positions = [position for place, _ in used for position in place.positions]
        for position, part in zip(positions, parts, strict=True):
            totals[position].add_(part)

    def zeros(self, K: int) -> list[Tensor]:
        """Return one zero tensor ``[K, *shape]`` per parameter."""
        return [self.space.zeros(K, *shape) for shape in self.space.shapes]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        directions = [x.movedim(-1, 0) for x in X]
        K = X[0].shape[-1]
        products = [self.space.zeros(*shape, K) for shape in self._out_shape]
        rows = [0] * len(products)

        def visit(t: int, chunk: Chunk) -> None:
            blocks = self.space.arrange(self.linearizations[t], chunk)
            image = self.product(blocks, directions, chunk)
            n = len(chunk.residual)
            products[t][rows[t] : rows[t] + n] = image.transpose(0, 1)
            rows[t] += n

        run(self.linearizations, visit)
        return products

    def _adjoint(self) -> PyTorchLinearOperator:
        return JacobianAdjointLinearOperator(self)

    def to_dense(self) -> Tensor:
        """Return the Jacobian as a matrix ``[Σ_t N_t V_t, D]``, rows ordered by term, n, v."""
        (R, D), pieces = self.shape, []
        instead = "Use products with it, or fewer points."
        check_memory(f"J of {R:,} x {D:,} numbers", 2 * R * D, self.dtype, self.device, instead)

        def visit(t: int, chunk: Chunk) -> None:
            pieces.append(chunk_rows(self.space, self.linearizations[t], chunk, slice(None)))

        run(self.linearizations, visit)
        return torch.cat(pieces)


class ScaledJacobianLinearOperator(JacobianLinearOperator):
    """The Jacobian in other units of the parameters.

    J S,  S = diag(s)

    Cost: that of J per product; its kernel takes R D numbers and R² D, since S leaves no structure.

    Args:
        jacobian: J.
        scale: s, one tensor per parameter.
        single: Whether the kernel is formed in float32.
    """

    def __init__(
        self, jacobian: JacobianLinearOperator, scale: Sequence[Tensor], single: bool = False
    ) -> None:
        super().__init__(jacobian.linearizations, jacobian.space)
        self.scale = scale
        self.single = single

    @property
    def flat_scale(self) -> Float[Tensor, " D"]:
        """The scale of all parameters."""
        return torch.cat([s.flatten() for s in self.scale])

    def product(
        self, blocks: Sequence[JacobianBlock | None], X: Sequence[Tensor], chunk: Chunk
    ) -> Float[Tensor, "V n K"]:
        return super().product(blocks, [s * x for s, x in zip(self.scale, X, strict=True)], chunk)

    def add_adjoint_product_(
        self, totals: Sequence[Tensor], blocks: Sequence[JacobianBlock | None], u: Tensor
    ) -> None:
        parts = self.zeros(u.shape[-1])
        super().add_adjoint_product_(parts, blocks, u)
        for total, s, part in zip(totals, self.scale, parts, strict=True):
            total.addcmul_(s, part)

    def to_dense(self) -> Tensor:
        return super().to_dense().mul_(self.flat_scale)

    @cached_property
    def kernel(self) -> Float[Tensor, "R R"]:
        """J S² Jᵀ, which is computed once; not to be written to."""
        matrix = self.to_dense()
        return Scaled.of(matrix.mT).gram() if self.single else symmetric_product(matrix.mT)


class JacobianAdjointLinearOperator(_Between):
    """The transpose of the Jacobian.

    Jᵀ: one tensor ``[N_t, V_t]`` per term -> the list of parameters
    """

    def __init__(self, jacobian: JacobianLinearOperator) -> None:
        self.jacobian, self.space = jacobian, jacobian.space
        super().__init__(jacobian._out_shape, jacobian._in_shape)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        J = self.jacobian
        totals = J.zeros(X[0].shape[-1])
        rows = [0] * len(X)

        def visit(t: int, chunk: Chunk) -> None:
            n = len(chunk.residual)
            u = X[t][rows[t] : rows[t] + n].transpose(0, 1)
            rows[t] += n
            blocks = J.space.arrange(J.linearizations[t], chunk)
            J.add_adjoint_product_(totals, blocks, u)

        run(J.linearizations, visit)
        return [total.movedim(0, -1) for total in totals]

    def _adjoint(self) -> PyTorchLinearOperator:
        return self.jacobian


def chunk_rows(
    space: ParameterSpace, linearization: Linearization, chunk: Chunk, points: slice
) -> Float[Tensor, "rows D"]:
    """Return rows of the Jacobian of some of a chunk's points, ordered by point, then component."""
    n, V = chunk.residual[points].shape
    matrix = chunk.residual.new_zeros(n, V, space.dimension)
    columns = matrix.split([shape.numel() for shape in space.shapes], 2)
    for place, block in zip(space.blocks, space.arrange(linearization, chunk), strict=True):
        if block is not None:
            for position, rows in zip(place.positions, block.rows(points), strict=True):
                columns[position].copy_(rows.transpose(0, 1))
    return matrix.flatten(0, 1)


@dataclass(frozen=True)
class Jacobian:
    """Recipe: the Jacobian of the scaled residuals, matrix-free.

    J
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> JacobianLinearOperator:
        return JacobianLinearOperator(linearizations)
