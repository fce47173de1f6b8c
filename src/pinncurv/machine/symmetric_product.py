"""Products of a matrix with its own transpose at about half the price, which torch has not.

The rows of the result are cut into panels, of which only what is left of the diagonal is computed.
BLAS's syrk in SciPy does it in fewer operations, but has threads of its own, which fight torch's.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from pinncurv.machine.sizes import sizes_of

# Fewest panels, if any: more of them save operations, but narrow products run below the machine's
# rate.
_FEWEST = 4


def symmetric_product(X: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Return XᵀX, exactly symmetric.

    Args:
        X: The matrix, with rows or columns that are contiguous.
    """
    # Zeros, as what torch 2.14 compiles of a 1 x 1 addmm multiplies by beta = 0 what is there.
    return mirror_(add_lower_product_(X.new_zeros(X.shape[1], X.shape[1]), X, keep=False))


def add_lower_product_(
    total: Float[Tensor, "d d"], X: Float[Tensor, "n d"], keep: bool = True
) -> Float[Tensor, "d d"]:
    """Add the lower triangle of XᵀX; what is above of the diagonal is undefined until ``mirror_``.

    Args:
        total: What is added to.
        X: The matrix.
        keep: Whether what is there is kept, or written over.

    Returns:
        ``total``.
    """
    for columns in _panels(total):
        panel = total[columns, : columns.stop]
        panel.addmm_(X[:, columns].mT, X[:, : columns.stop], beta=1 if keep else 0)
    return total


def mirror_(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Write the lower triangle into the upper one, after ``add_lower_product_``.

    Returns:
        ``matrix``, exactly symmetric.
    """
    for columns in _panels(matrix):
        square = matrix[columns, columns]
        upper = square.mT.triu(1)
        square.tril_().add_(upper)
        if columns.start:
            before = slice(0, columns.start)
            matrix[before, columns] = matrix[columns, before].mT
    return matrix


def _panels(matrix: Tensor) -> Iterator[slice]:
    """Cut the rows of the result."""
    d = len(matrix)
    widest = sizes_of(matrix.device).panel
    step = max(d, 1) if d < widest else min(-(-d // _FEWEST), widest)
    for start in range(0, d, step):
        yield slice(start, min(d, start + step))
