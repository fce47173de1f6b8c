"""KFAC: one Kronecker product per layer and term, with expand or reduce weight sharing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.parameters import ParameterSpace, visit_chunks
from pinncurv.curvature.single import (
    add_gram_,
    check_single,
    is_narrow,
    lifted_,
    widened,
    with_single_gradients,
    with_single_inputs,
)
from pinncurv.curvature.together import together
from pinncurv.linearization import (
    Fisher,
    JacobianBlock,
    Linearization,
    LinearLayer,
)
from pinncurv.linops import KroneckerFactors, SumKroneckerLinearOperator, merge, policy
from pinncurv.machine import symmetric_product


class WeightSharing(ABC):
    """How the S channels of a layer enter the two Kronecker factors."""

    @abstractmethod
    def input_moment(self, layer: LinearLayer) -> Float[Tensor, "d_joint d_joint"]:
        """Return N times the factor A of the layer's inputs."""

    @abstractmethod
    def gradient_moment(self, layer: LinearLayer) -> Float[Tensor, "d_out d_out"]:
        """Return the factor B of the layer's output gradients."""


@dataclass(frozen=True)
class Expand(WeightSharing):
    """Treat the channels as if they were further points.

    A = 1/(N S) Σ_ns z_ns z_nsᵀ,  B = Σ_ns g_ns g_nsᵀ

    Source: Eschenhagen et al. 2023 (KFAC-expand); Dangel, Müller, Zeinhofer 2024, section 3.3.
    """

    def input_moment(self, layer: LinearLayer) -> Float[Tensor, "d_joint d_joint"]:
        S, N, d_in = layer.Z.shape
        rows = layer.Z.reshape(-1, d_in)
        if layer.bias is None:
            return symmetric_product(rows).div_(S)
        moment = rows.new_empty(d_in + 1, d_in + 1)
        moment[:-1, :-1] = symmetric_product(rows)
        moment[-1, :-1] = moment[:-1, -1] = layer.sum_values(layer.Z, 0).sum(0)
        moment[-1, -1] = len(layer.value_channels) * N
        return moment.div_(S)

    def gradient_moment(self, layer: LinearLayer) -> Float[Tensor, "d_out d_out"]:
        G = layer.gradients.reshape(-1, layer.d_out)
        return symmetric_product(G)


@dataclass(frozen=True)
class Reduce(WeightSharing):
    """Average the inputs and sum the gradients over the channels first.

    A = 1/N Σ_n (mean_s z_ns)(mean_s z_ns)ᵀ,  B = Σ_n (Σ_s g_ns)(Σ_s g_ns)ᵀ

    Source: Eschenhagen et al. 2023 (KFAC-reduce); Dangel, Müller, Zeinhofer 2024, section 3.3.
    """

    def input_moment(self, layer: LinearLayer) -> Float[Tensor, "d_joint d_joint"]:
        mean = layer.Z.mean(0)
        if layer.bias is not None:
            share = len(layer.value_channels) / layer.Z.shape[0]
            mean = torch.cat([mean, mean.new_full((mean.shape[0], 1), share)], 1)
        return symmetric_product(mean)

    def gradient_moment(self, layer: LinearLayer) -> Float[Tensor, "d_out d_out"]:
        G = layer.gradients.sum(1).flatten(0, 1)
        return symmetric_product(G)


expand = Expand()
reduce = Reduce()


class KFACLinearOperator(SumKroneckerLinearOperator):
    """KFAC of a loss with any number of terms.

    diag_l Σ_t B_lt ⊗ A_lt

    The channels are part of its definition: standard-basis directions, each once, and collapsed
    derivatives of the highest order. A parameter that is no weight of a linear layer has its exact
    block, A_lt = J_ltᵀJ_lt and B_lt = 1.

    Cost: ``expand`` takes N S (d_in² + V d_out²) to build, ``reduce`` N (d_in² + V d_out²) and a
    sum over channels; d_in² + d_out² numbers per layer and term. A product takes d_in d_out (d_in +
    d_out) per layer and term. ``FactorDamping`` takes O(d_in³ + d_out³) per layer to build and as
    much as two terms per product.
    """


@dataclass(frozen=True)
class KFAC:
    """Recipe: KFAC of the linearized terms.

    diag_l Σ_t B_lt ⊗ A_lt

    Args:
        sharing: How the channels enter the factors: ``expand`` or ``reduce``.
        fisher: Which output gradients to take; those of the linearizations by default.
        merge_terms: Whether one product per layer approximates the sum over the terms:
            Σ_t B_t ⊗ A_t ≈ (Σ_t B_t) ⊗ (Σ_t tr(B_t) A_t / Σ_t tr(B_t)). It preserves the trace,
            and the damped inverse is cheap.
        dense_limit: Largest exact block of a parameter that is no weight of a linear layer.
        single: Whether the factors are formed in float32, with 1e-7 of its trace on the diagonal of
            each, which is what rounding may make of its eigenvalues; they are kept, averaged and
            factorized as without it.
    """

    sharing: WeightSharing = expand
    fisher: Fisher | None = None
    merge_terms: bool = False
    dense_limit: int = policy.LARGEST_PARAMETER
    single: bool = False

    def __post_init__(self) -> None:
        check_single(self.single)
        if not isinstance(self.sharing, WeightSharing):
            raise TypeError(
                "sharing must be expand or reduce of pinncurv.curvature, got "
                f"{type(self.sharing).__name__}. Write KFAC()(linearizations) for the operator."
            )

    def __call__(self, linearizations: Sequence[Linearization]) -> KFACLinearOperator:
        """Build the operator.

        Raises:
            ValueError: If the linearizations were made with another choice than ``fisher``, or an
                exact block would be too large; names the parameter.
        """
        space = ParameterSpace.of(linearizations)
        check_dense_blocks(space, self.dense_limit)
        T, graphs = range(len(linearizations)), getattr(linearizations, "graphs", None)
        moments: list[list[_Moments | None]] = [[None for _ in T] for _ in space.blocks]

        def visit(t: int, blocks: Sequence[JacobianBlock | None]) -> None:
            used = {
                i: block.as_layer() if space.blocks[i].kronecker else block
                for i, block in enumerate(blocks)
                if block is not None
            }

            def sums() -> list[Tensor]:
                return [M for block in used.values() for M in self._sums(space, block)]

            key = "Kronecker factors", self, tuple(used)
            tensors = iter(together(graphs, key, sums, list(used.values())))
            for i, block in used.items():
                points = block.Z.shape[1] if isinstance(block, LinearLayer) else 1
                new = _Moments(next(tensors), next(tensors), points)
                known = moments[i][t]
                moments[i][t] = new if known is None else known.add_(new)

        visit_chunks(linearizations, space, visit, self.fisher)
        factors = [
            [_factors(moments[i][t], space, i, linearizations[t]) for t in T]
            for i in range(len(space.blocks))
        ]
        names = [linearization.term.name for linearization in linearizations]
        if self.merge_terms:
            factors, names = [[merge(layer)] for layer in factors], ["+".join(names)]
        return KFACLinearOperator(factors, space.blocks, space.shapes, names, graphs)

    def _sums(self, space: ParameterSpace, block: JacobianBlock) -> tuple[Tensor, Tensor]:
        """Return N A and B of one layer at some points; no B without output gradients."""
        if not isinstance(block, LinearLayer):
            numel = sum(shape.numel() for shape in block.shapes)
            A = add_gram_(space.zeros(numel, numel), block, self.single)
            return lifted_(A) if self.single else A, A.new_zeros(())
        sharing = self.sharing
        if self.single and not is_narrow(block.Z.shape[-1]):
            small, scale = with_single_inputs(block)
            A = lifted_(widened(sharing.input_moment(small), scale, scale))
        else:
            A = sharing.input_moment(block)
        if block.G is None:
            return A, A.new_zeros(())
        if self.single and not is_narrow(block.d_out):
            small, scale = with_single_gradients(block)
            return A, lifted_(widened(sharing.gradient_moment(small), scale, scale))
        return A, sharing.gradient_moment(block)


@dataclass
class _Moments:
    """Sums over some points: N A, B, and their number N."""

    A: Tensor
    B: Tensor
    points: int

    def add_(self, other: _Moments) -> _Moments:
        """Add the sums over other points."""
        self.A.add_(other.A)
        self.B.add_(other.B)
        self.points += other.points
        return self


def check_dense_blocks(space: ParameterSpace, limit: int) -> None:
    """Check that the exact blocks of parameters outside of linear layers are not too large.

    Raises:
        ValueError: If one is; names the parameter.
    """
    for block in space.blocks:
        if not block.kronecker and block.numel > limit:
            raise ValueError(
                f"A parameter that is no weight of a linear layer has an exact block of at most "
                f"dense_limit = {limit} rows, but {block.name} has {block.numel} entries (and "
                f"would take {8e-6 * block.numel**2:.0f} MB). Apply it by a linear layer "
                "(torch.nn.functional.linear or x @ weight), freeze it, raise dense_limit, or use "
                "a curvature without blocks such as MatrixFreeGaussNewton()."
            )


def _factors(
    moments: _Moments | None,
    space: ParameterSpace,
    i: int,
    linearization: Linearization,
) -> KroneckerFactors:
    """Normalize the sums; zero factors where the term does not use the layer."""
    block = space.blocks[i]
    d_out, d_joint = block.shape
    if not block.kronecker:
        A = space.zeros(d_joint, d_joint) if moments is None else moments.A
        return KroneckerFactors(A, torch.ones_like(A[:1, :1]))
    if moments is None:
        return KroneckerFactors(space.zeros(d_joint, d_joint), space.zeros(d_out, d_out))
    A, B = moments.A, moments.B
    if B.ndim == 0:
        B = linearization.mean_weight * torch.eye(d_out).to(A)
    return KroneckerFactors(A.div_(moments.points), B)
