"""Products and entries of any linear operator, in float64 and checked to be finite."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pinncurv.comparison.checks import check_finite, describe
from pinncurv.linops import (
    DenseLinearOperator,
    LayerwiseLinearOperator,
    PyTorchLinearOperator,
    symmetrize,
)

# How many columns are multiplied at a time: enough for matrix products, few enough for memory.
COLUMNS = 128

# Asymmetry, relative to the norm, that no rounding of a symmetric operator explains.
_ASYMMETRY = 1e-3


def apply(
    operator: PyTorchLinearOperator, X: Float[Tensor, " D *K"], damping: float = 0.0
) -> Float[Tensor, " D *K"]:
    """Multiply an operator onto one or several columns.

    (C + λ I) X
    """
    parts = [X] if X.ndim == 1 else list(X.split(COLUMNS, 1))
    products = [(operator @ part.to(operator.dtype)).detach().to(X.dtype) for part in parts]
    product = products[0] if len(products) == 1 else torch.cat(products, 1)
    check_finite(product, f"The product with {describe(operator)}")
    return product + damping * X if damping else product


def columns(operator: PyTorchLinearOperator, index: Int[Tensor, " n"]) -> Float[Tensor, "D n"]:
    """Return some columns of an operator's matrix in float64, from products with unit vectors.

    C[:, index]
    """
    if isinstance(operator, DenseLinearOperator):
        chosen = operator.matrix[:, index].double()
        return check_finite(chosen, f"The matrix of {describe(operator)}")
    units = torch.zeros(operator.shape[1], len(index), dtype=torch.float64, device=operator.device)
    units[index, torch.arange(len(index), device=operator.device)] = 1
    return apply(operator, units)


def share_layers(*operators: PyTorchLinearOperator) -> bool:
    """Whether all operators are block diagonal over the same layers."""
    blocks = [op.blocks if isinstance(op, LayerwiseLinearOperator) else None for op in operators]
    return blocks[0] is not None and all(block == blocks[0] for block in blocks)


def symmetric_blocks(
    *operators: PyTorchLinearOperator,
) -> Iterator[tuple[Float[Tensor, "n n"], ...]]:
    """Yield diagonal blocks outside of which all of the operators are zero.

    One tuple per layer if all operators are block diagonal over the same layers, else one tuple
    with the whole matrices; in float64, and checked to be finite and symmetric.
    """
    if share_layers(*operators):
        assert isinstance(operators[0], LayerwiseLinearOperator)
        for i, block in enumerate(operators[0].blocks):
            yield tuple(
                _symmetric(op.block_to_dense(i), f"{describe(op)}, layer {block.name}")
                for op in operators
                if isinstance(op, LayerwiseLinearOperator)
            )
    else:
        yield tuple(_symmetric(to_dense(op), describe(op)) for op in operators)


def to_dense(operator: PyTorchLinearOperator) -> Float[Tensor, "M D"]:
    """Return an operator as a matrix; operators without ``to_dense`` by products."""
    if hasattr(operator, "to_dense"):
        return operator.to_dense().detach()
    return columns(operator, torch.arange(operator.shape[1], device=operator.device))


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    symmetric = symmetrize(matrix, name)
    asymmetry = torch.linalg.matrix_norm(matrix - symmetric)
    if bool(asymmetry > _ASYMMETRY * torch.linalg.matrix_norm(symmetric)):
        raise ValueError(
            f"{name} must be symmetric, got an antisymmetric part of norm "
            f"{asymmetry.item():.1e}. For a product P⁻¹C of two operators use "
            "generalized_spectrum(C, P⁻¹)."
        )
    return symmetric


def flat_vector(
    vector: Tensor | Sequence[Tensor], operator: PyTorchLinearOperator, name: str
) -> Float[Tensor, " D"]:
    """Return a vector as one float64 tensor on an operator's device."""
    parts = [vector] if isinstance(vector, Tensor) else list(vector)
    flat = torch.cat([part.detach().flatten() for part in parts])
    if len(flat) != operator.shape[1]:
        raise ValueError(
            f"{name} must have {operator.shape[1]} entries to be multiplied by "
            f"{describe(operator)}, got {len(flat)}."
        )
    return check_finite(flat.to(operator.device, torch.float64), name)
