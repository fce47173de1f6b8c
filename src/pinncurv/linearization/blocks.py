"""The blocks of the Jacobian: what one linear layer, or one other parameter, contributes to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization.fisher import Fisher, ForwardOnly
from pinncurv.machine import add_lower_product_, mirror_, sizes_of


class JacobianBlock(ABC):
    """The columns of the Jacobian of the scaled residual that belong to a group of parameters.

    J_l ∈ ℝ^(V N × numel)
    """

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the parameters; the first is the name of the block."""

    @property
    @abstractmethod
    def num_rows(self) -> tuple[int, int]:
        """V and N."""

    @abstractmethod
    def product(self, vectors: Sequence[Float[Tensor, "K ..."]]) -> Float[Tensor, "V N K"]:
        """Return J_l v for K directions, one tensor per parameter."""

    @abstractmethod
    def adjoint_product(self, u: Float[Tensor, "V N K"]) -> list[Float[Tensor, "K ..."]]:
        """Return J_lᵀ u for K vectors, one tensor per parameter."""

    @abstractmethod
    def rows(self, points: slice) -> list[Float[Tensor, "V n _"]]:
        """Return the rows of some points, one tensor per parameter, flattened."""

    @abstractmethod
    def joint_rows(self, points: slice) -> Float[Tensor, "Vn _"]:
        """Return the rows of some points on the joint matrix [W, b] of a layer, flattened."""

    def add_gram_(self, total: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Add J_lᵀJ_l on the joint matrix, flattened, to a symmetric matrix, and return the sum."""
        V, N = self.num_rows
        for points in row_ranges(N, V * len(total), total.device):
            add_lower_product_(total, self.joint_rows(points))
        return mirror_(total)

    def squared_rows(self) -> Float[Tensor, "d_out d_joint"]:
        """Return Σ_nv J_nv² by entries of the joint matrix, the diagonal of J_lᵀJ_l."""
        layer = self.as_layer()
        return squared_products(layer.gradients, layer.with_bias_column(layer.Z, 0))

    @abstractmethod
    def as_layer(self) -> LinearLayer:
        """Return the block as a linear layer, whose rows are the same."""

    @abstractmethod
    def at(self, points: slice) -> JacobianBlock:
        """Return the block at some of its points."""

    def components(self, chosen: slice) -> JacobianBlock:
        """Return the rows of some of the V components."""
        raise NotImplementedError(f"{type(self).__name__} has a single component.")

    @abstractmethod
    def to(self, dtype: torch.dtype) -> JacobianBlock:
        """Return the block in a data type."""

    @abstractmethod
    def with_fisher(self, fisher: Fisher, residual: Float[Tensor, "N V"]) -> JacobianBlock:
        """Return the block with another choice of output gradients, from the exact one."""

    @staticmethod
    @abstractmethod
    def join(parts: Sequence[JacobianBlock]) -> JacobianBlock:
        """Join the records of several sets of points into one."""

    def as_dense(self) -> list[DenseRows]:
        """Return one dense block per parameter."""
        everything = slice(None)
        pairs = zip(self.names, self.rows(everything), self.shapes, strict=True)
        return [DenseRows(name, rows, shape) for name, rows, shape in pairs]

    @property
    @abstractmethod
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters."""


@dataclass(frozen=True, eq=False)
class LinearLayer(JacobianBlock):
    """What one linear layer contributes, from its inputs Z and output gradients G.

    J_n = Σ_s g_ns ⊗ [z_ns, 1 if s is a value channel else 0]

    The bias column of the mathematics is not stored: the value channels say where it is one.

    Args:
        weight: Name of the parameter ``[d_out, d_in]``.
        bias: Name of the parameter ``[d_out]``, or None.
        Z: Inputs of the layer, ``[S, N, d_in]``, the channels first.
        G: Gradients of the V residual components with respect to the layer's outputs,
            ``[V, S, N, d_out]``, or None for the forward-only choice.
        value_channels: Which of the S channels carry a value, on which the bias acts.
        d_out: Width of the layer's output.
        transposed: Whether the parameter is stored as ``[d_in, d_out]``.
    """

    weight: str
    bias: str | None
    Z: Float[Tensor, "S N d_in"]
    G: Float[Tensor, "V S N d_out"] | None
    value_channels: tuple[int, ...]
    d_out: int
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shapes(self) -> list[torch.Size]:
        shape = (self.d_out, self.Z.shape[-1])
        weight = torch.Size(shape[::-1] if self.transposed else shape)
        return [weight] if self.bias is None else [weight, torch.Size([self.d_out])]

    @property
    def num_rows(self) -> tuple[int, int]:
        return len(self.gradients), self.Z.shape[1]

    @property
    def gradients(self) -> Float[Tensor, "V S N d_out"]:
        """G.

        Raises:
            ValueError: If the linearization is the forward-only one, which has no Jacobian.
        """
        if self.G is None:
            raise ValueError(
                f"The Jacobian of layer {self.weight} needs output gradients, but the "
                "linearization is forward-only. Linearize with fisher=Type2()."
            )
        return self.G

    def sum_values(self, channels: Tensor, dim: int) -> Tensor:
        """Sum over the channels that carry a value, on which the bias acts."""
        if self.value_channels == (0,):
            return channels.select(dim, 0)
        index = torch.tensor(self.value_channels, device=channels.device)
        return channels.index_select(dim, index).sum(dim)

    def with_bias_column(self, Z: Tensor, dim: int) -> Tensor:
        """Append to inputs, ``[*, *, d_in]``, a 1 in the channels that carry a value.

        Args:
            Z: The inputs, points and channels in either order.
            dim: Which axis the channels are, 0 or 1.
        """
        if self.bias is None:
            return Z
        column = Z.new_zeros(*Z.shape[:2], 1)
        column.movedim(dim, 0)[list(self.value_channels)] = 1
        return torch.cat([Z, column], -1)

    def product(self, vectors: Sequence[Tensor]) -> Float[Tensor, "V N K"]:
        # (J v)_n = Σ_s g_nsᵀ (W z_ns + b [s is a value channel]); the narrower side of the layer is
        # where the matrix product ends and the sum is taken
        weight = vectors[0].mT if self.transposed else vectors[0]
        G, Z = self.gradients, self.Z
        d_out, d_in = weight.shape[1:]
        if d_out <= d_in:
            stacked = weight.reshape(-1, d_in).t()
            products = [_transported_inner_product(Z, component, stacked) for component in G]
        else:
            stacked = weight.transpose(0, 1).reshape(d_out, -1)
            products = [_transported_inner_product(component, Z, stacked) for component in G]
        total = torch.stack(products) if len(products) > 1 else products[0][None]
        if self.bias is not None:
            total += self.sum_values(G, 1) @ vectors[1].t()
        return total

    def adjoint_product(self, u: Float[Tensor, "V N K"]) -> list[Tensor]:
        # Jᵀu = Σ_nv u_nv Σ_s g_nvs z_nsᵀ, for the bias the sum over the value channels
        columns = [_scaled_outer_sum(self.gradients, self.Z, column) for column in u.unbind(-1)]
        weight = torch.stack(columns) if len(columns) > 1 else columns[0][None]
        weight = weight.mT if self.transposed else weight
        if self.bias is None:
            return [weight]
        return [weight, u.flatten(0, 1).t() @ self.sum_values(self.gradients, 1).flatten(0, 1)]

    def _row_matrices(self, points: slice) -> Float[Tensor, "V n d_out d_in"]:
        inputs = self.Z[:, points].permute(1, 0, 2)
        return torch.stack(
            [g.permute(1, 2, 0).matmul(inputs) for g in self.gradients[:, :, points]]
        )

    def rows(self, points: slice) -> list[Tensor]:
        weight = self._row_matrices(points)
        weight = (weight.mT if self.transposed else weight).flatten(2)
        if self.bias is None:
            return [weight]
        return [weight, self.sum_values(self.gradients[:, :, points], 1)]

    def joint_rows(self, points: slice) -> Float[Tensor, "Vn _"]:
        weight = self._row_matrices(points)
        if self.bias is not None:
            bias = self.sum_values(self.gradients[:, :, points], 1)
            weight = torch.cat([weight, bias[..., None]], -1)
        return weight.flatten(0, 1).flatten(1)

    def as_layer(self) -> LinearLayer:
        return self

    def at(self, points: slice) -> LinearLayer:
        return replace(self, Z=self.Z[:, points], G=self.gradients[:, :, points])

    def components(self, chosen: slice) -> LinearLayer:
        return replace(self, G=self.gradients[chosen])

    def to(self, dtype: torch.dtype) -> LinearLayer:
        return replace(self, Z=self.Z.to(dtype), G=self.gradients.to(dtype))

    def with_fisher(self, fisher: Fisher, residual: Float[Tensor, "N V"]) -> LinearLayer:
        if self.G is None:
            return self
        return replace(self, G=fisher.output_gradients(self.G, residual))

    @staticmethod
    def join(parts: Sequence[LinearLayer]) -> LinearLayer:  # type: ignore[override]  # same class
        Z = torch.cat([part.Z for part in parts], 1)
        G = None if parts[0].G is None else torch.cat([part.gradients for part in parts], 2)
        return replace(parts[0], Z=Z, G=G)


@dataclass(frozen=True, eq=False)
class DenseRows(JacobianBlock):
    """The rows of the Jacobian of a parameter that is no weight of a linear layer.

    J_nv = ∂(sqrt(w_n / N) r_nv) / ∂θ

    Args:
        name: The parameter.
        matrix: The rows, ``[V, N, numel]``.
        shape: The parameter's shape.
    """

    name: str
    matrix: Float[Tensor, "V N numel"]
    shape: torch.Size

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def shapes(self) -> list[torch.Size]:
        return [self.shape]

    @property
    def num_rows(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def product(self, vectors: Sequence[Tensor]) -> Float[Tensor, "V N K"]:
        return self.matrix @ vectors[0].reshape(len(vectors[0]), -1).t()

    def adjoint_product(self, u: Float[Tensor, "V N K"]) -> list[Tensor]:
        flat = u.flatten(0, 1).t() @ self.matrix.flatten(0, 1)
        return [flat.reshape(-1, *self.shape)]

    def rows(self, points: slice) -> list[Tensor]:
        return [self.matrix[:, points]]

    def joint_rows(self, points: slice) -> Float[Tensor, "Vn _"]:
        return self.matrix[:, points].flatten(0, 1)

    def as_layer(self) -> LinearLayer:
        # with one channel per component, J_nv = Σ_s δ_vs z_ns
        V, N, _ = self.matrix.shape
        G = torch.eye(V).to(self.matrix)[:, :, None, None].expand(V, V, N, 1)
        return LinearLayer(self.name, None, self.matrix, G, tuple(range(V)), 1)

    def at(self, points: slice) -> DenseRows:
        return replace(self, matrix=self.matrix[:, points])

    def components(self, chosen: slice) -> DenseRows:
        return replace(self, matrix=self.matrix[chosen])

    def to(self, dtype: torch.dtype) -> DenseRows:
        return replace(self, matrix=self.matrix.to(dtype))

    def with_fisher(self, fisher: Fisher, residual: Float[Tensor, "N V"]) -> DenseRows:
        if isinstance(fisher, ForwardOnly):  # there is no factor that it could leave out
            return self
        rows = fisher.output_gradients(self.matrix[:, None], residual)
        assert rows is not None
        return replace(self, matrix=rows[:, 0])

    @staticmethod
    def join(parts: Sequence[DenseRows]) -> DenseRows:  # type: ignore[override]  # same class
        return replace(parts[0], matrix=torch.cat([part.matrix for part in parts], 1))


def row_ranges(n: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    """Cut n points such that their rows, to be multiplied with each other, stay small."""
    step = max(1, sizes_of(device).held // max(1, row_elements))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def squared_products(
    G: Float[Tensor, "V S N d_out"], Z: Float[Tensor, "S N d_joint"]
) -> Float[Tensor, "d_out d_joint"]:
    """Form the rows of a few points at a time, and sum their squares."""
    total = G.new_zeros(G.shape[-1], Z.shape[-1])
    step = max(1, sizes_of(G.device).cache // 2 // total.numel())  # two are in the cache
    inputs = Z.transpose(0, 1).split(step)
    for component in G:
        gradients = component.permute(1, 2, 0).split(step)
        for left, right in zip(gradients, inputs, strict=True):
            total += left.matmul(right).square_().sum(0)
    return total


def _channel_ranges(S: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Cut S channels such that a temporary with so many elements per channel stays small."""
    step = max(1, sizes_of(device).cache // 2 // max(1, elements))  # beside what it is made of
    for start in range(0, S, step):
        yield slice(start, start + step)


def _transported_inner_product(
    left: Float[Tensor, "S N a"], right: Float[Tensor, "S N b"], stacked: Float[Tensor, "a Kb"]
) -> Float[Tensor, "N K"]:
    """Return Σ_s (M_k left_ns) · right_ns for K matrices M_k, given as [M_1ᵀ, ..., M_Kᵀ]."""
    S, N, b = right.shape
    total = None
    for channels in _channel_ranges(S, N * stacked.shape[1], left.device):
        images = left[channels].reshape(-1, left.shape[-1]) @ stacked
        images = images.view(-1, N, stacked.shape[1] // b, b)
        part = images.mul_(right[channels].unsqueeze(2)).sum(-1).sum(0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _scaled_outer_sum(
    G: Float[Tensor, "V S N d_out"], Z: Float[Tensor, "S N d_in"], u: Float[Tensor, "V N"]
) -> Float[Tensor, "d_out d_in"]:
    """Return Σ_nsv u_vn g_vns z_nsᵀ; the narrower of the two is scaled and comes first."""
    d_in, d_out = Z.shape[-1], G.shape[-1]
    total = None
    for component, scale in zip(G, u.unsqueeze(-1), strict=True):
        narrow, wide = (component, Z) if d_out <= d_in else (Z, component)
        S, N, width = narrow.shape
        for channels in _channel_ranges(S, N * width, G.device):
            left = (narrow[channels] * scale).reshape(-1, width).t()
            right = wide[channels].reshape(-1, wide.shape[-1])
            total = left @ right if total is None else total.addmm_(left, right)
    assert total is not None
    return total if d_out <= d_in else total.t()
