"""Kronecker factors of one layer, and how several pairs are added or merged into one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.blocks import Block


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one layer's block of one term.

    B ⊗ A on row-major flattened joint matrices, that is X ↦ B X A

    Attributes:
        A: The symmetric factor of the layer's inputs (and bias) ``[d_in + 1, d_in + 1]``.
        B: The symmetric factor of the layer's output gradients ``[d_out, d_out]``.
    """

    A: Float[Tensor, "d_joint d_joint"]
    B: Float[Tensor, "d_out d_out"]

    def to_dense(self) -> Float[Tensor, "n n"]:
        """Return the matrix B ⊗ A."""
        # torch.kron refuses matrices of which one is row-major and the other is column-major
        return torch.kron(self.B.contiguous(), self.A.contiguous())


P = TypeVar("P")


def grouped(
    kind: Callable[[Tensor, Tensor], P], tensors: Sequence[Tensor], terms: int
) -> list[list[P]]:
    """Return ``factors[layer][term]`` from a list in the order layer, term, (A, B)."""
    pairs = [kind(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
    return [pairs[i : i + terms] for i in range(0, len(pairs), terms)]


def check_factors(
    factors: Sequence[Sequence[Any]], blocks: Sequence[Block], terms: Sequence[str]
) -> None:
    """Check that ``factors[layer][term]``, or stacks of them, fit the layers and terms.

    Raises:
        ValueError: If they do not; names layer and term.
    """
    counts = {len(layer) for layer in factors}
    if len(factors) != len(blocks) or counts != {len(terms)}:
        raise ValueError(
            f"There must be factors for each of the {len(blocks)} layers and the terms {terms}, "
            f"got {len(factors)} layers with {sorted(counts)} terms. Pass factors[layer][term]."
        )
    for block, layer in zip(blocks, factors, strict=True):
        d_out, d_joint = block.shape
        for term, pair in zip(terms, layer, strict=True):
            got, stack = (tuple(pair.A.shape), tuple(pair.B.shape)), tuple(pair.A.shape[:-2])
            expected = (*stack, d_joint, d_joint), (*stack, d_out, d_out)
            if got != expected:
                raise ValueError(
                    f"The factors of layer {block.name}, term {term} must have shapes "
                    f"{expected[0]} and {expected[1]}, got {got[0]} and {got[1]}. "
                    "A acts on the inputs (and bias), B on the outputs."
                )


def add_dense(pairs: Sequence[KroneckerFactors]) -> Float[Tensor, "n n"]:
    """Return the matrix Σ_i B_i ⊗ A_i."""
    dense = pairs[0].to_dense()
    for pair in pairs[1:]:
        dense += pair.to_dense()
    return dense


def add_diagonals(pairs: Sequence[KroneckerFactors]) -> Float[Tensor, "d_out d_joint"]:
    """Return the diagonal of Σ_i B_i ⊗ A_i as a joint matrix."""
    return torch.stack([torch.outer(p.B.diagonal(), p.A.diagonal()) for p in pairs]).sum(0)


def merge(pairs: Sequence[KroneckerFactors]) -> KroneckerFactors:
    """Approximate a sum of positive semidefinite Kronecker products by one.

    Σ_t B_t ⊗ A_t ≈ (Σ_t B_t) ⊗ (Σ_t tr(B_t) A_t / Σ_t tr(B_t))

    The trace is preserved, and the result is exact if all A_t agree.
    """
    if len(pairs) == 1:
        return pairs[0]
    A = torch.stack([pair.A for pair in pairs])
    B = torch.stack([pair.B for pair in pairs])
    traces = B.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = traces.sum()
    # if all B_t are zero the product is zero, whatever the weights
    weights = torch.where(total > 0, traces / total, torch.full_like(traces, 1 / len(pairs)))
    return KroneckerFactors(torch.einsum("t,tij->ij", weights, A), B.sum(0))
