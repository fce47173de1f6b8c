"""Matrices with known spectra, and an operator that has products and nothing else."""

import torch
from torch import Generator, Tensor

from pinncurv.linops import PyTorchLinearOperator
from tests.linops.cases import kronecker, psd


class MatrixFree(PyTorchLinearOperator):
    """A symmetric operator of which no one may take more than a few columns at a time.

    Attributes:
        products: How many columns it was multiplied by so far.
    """

    SELF_ADJOINT = True
    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(self, matrix: Tensor, shapes=None, widest: int = 128) -> None:
        shapes = [(len(matrix),)] if shapes is None else shapes
        super().__init__(shapes, shapes)
        self.matrix, self.widest, self.products = matrix, widest, 0
        self.dtype = matrix.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        K = X[0].shape[-1]
        assert self.widest >= K, f"{K} columns at a time"
        self.products += K
        flat = self.matrix @ torch.cat([x.reshape(-1, K) for x in X])
        pieces = flat.split(self._in_shape_flat)
        return [y.reshape(x.shape) for y, x in zip(pieces, X, strict=True)]

    def to_dense(self) -> Tensor:
        raise AssertionError("a matrix-free path asked for the dense matrix")


def with_eigenvalues(eigenvalues: Tensor, generator: Generator) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    X = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    Q, _ = torch.linalg.qr(X)
    C = Q * eigenvalues @ Q.mT
    return (C + C.mT) / 2


def decaying(n: int, decades: float = 6.0, top: float = 10.0) -> Tensor:
    """Eigenvalues that decay exponentially from the top, descending."""
    return top * torch.logspace(0, -decades, n, dtype=torch.float64)


def randn(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


__all__ = ["MatrixFree", "decaying", "kronecker", "psd", "randn", "with_eigenvalues"]
