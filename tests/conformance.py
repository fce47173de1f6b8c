"""One check that every symmetric linear operator of the package passes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pinncurv.linops import SymmetricLinearOperator

DAMPINGS = (1e-12, 1e-9, 1e-6, 1e-3, 1.0)


def to_list(flat: Tensor, operator: SymmetricLinearOperator) -> list[Tensor]:
    """Split ``[D]`` or ``[D, K]`` to the list format ``[*shape]`` or ``[*shape, K]``."""
    sizes = [shape.numel() for shape in operator.shapes]
    pieces = zip(flat.split(sizes), operator.shapes, strict=True)
    return [piece.reshape((*shape, *flat.shape[1:])) for piece, shape in pieces]


def check_operator(
    operator: SymmetricLinearOperator,
    dense: Tensor | None = None,
    dampings: Sequence[float] = DAMPINGS,
    tolerance: float | None = None,
) -> None:
    """Check that an operator obeys the laws of a symmetric positive semidefinite matrix.

    Args:
        operator: The operator.
        dense: The matrix that it represents, by default its products with the identity.
        dampings: Dampings for which the inverse is compared with a dense solve. Empty for
            operators without an inverse.
        tolerance: Relative tolerance, by default a few hundred roundings.
    """
    tolerance = 300 * torch.finfo(operator.dtype).eps if tolerance is None else tolerance
    identity = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    dense = operator @ identity if dense is None else dense.to(operator.dtype)
    scale = dense.abs().max().item() or 1.0

    def check(received: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(received, expected, rtol=tolerance, atol=tolerance * scale)

    check_products(operator, dense, check)
    check(operator.to_dense(), dense)
    check(operator.to_dense(), operator.to_dense().mT)
    check(operator.diagonal(), dense.diagonal())
    torch.testing.assert_close(
        operator.trace(), dense.trace(), rtol=tolerance, atol=tolerance * scale * len(dense)
    )
    for damping in dampings:
        inverse = check_inverse(operator, dense, damping)
        if damping in (min(dampings), max(dampings)) and isinstance(
            inverse, SymmetricLinearOperator
        ):
            eps = torch.finfo(operator.dtype).eps
            check_operator(inverse, dampings=(), tolerance=max(1e-8, 1e3 * eps * len(dense)))
    if dampings:
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="damping must be a finite number >= 0, got"):
                operator.inverse(bad)


def check_products(operator: SymmetricLinearOperator, dense: Tensor, check) -> None:
    """Check all formats of products, twice to find mutation."""
    D = len(dense)
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(D, 3, generator=generator, dtype=torch.float64)
    X = X.to(device=operator.device, dtype=operator.dtype)
    x, before = X[:, 0].clone(), X.clone()
    as_list = to_list(X, operator)
    for _ in range(2):
        check(operator @ x, dense @ x)
        check(operator @ X, dense @ X)
        check(operator @ X[:, :1], dense @ X[:, :1])
        check(operator.adjoint() @ X, dense.mT @ X)
        for received, expected in zip(
            operator @ as_list, to_list(dense @ X, operator), strict=True
        ):
            check(received, expected)
        vectors = to_list(x, operator)
        for received, expected in zip(
            operator @ vectors, to_list(dense @ x, operator), strict=True
        ):
            check(received, expected)
        check(x @ operator, x @ dense)
        check(X.mT @ operator, X.mT @ dense)
        for received, expected in zip(
            [v.movedim(-1, 0) for v in as_list] @ operator,
            to_list(dense @ X, operator),
            strict=True,
        ):
            check(received, expected.movedim(-1, 0))
        for received, expected in zip(
            vectors @ operator, to_list(dense @ x, operator), strict=True
        ):
            check(received, expected)
        scipy_product = torch.from_numpy(operator.to_scipy() @ x.cpu().double().numpy())
        check(scipy_product.to(x), dense @ x)
        scipy_adjoint = torch.from_numpy(operator.to_scipy().H @ X.cpu().double().numpy())
        check(scipy_adjoint.to(x), dense.mT @ X)
    assert torch.equal(X, before), "a product wrote to its argument"
    assert (operator @ x).dtype == operator.dtype
    assert operator.SELF_ADJOINT


def check_inverse(operator: SymmetricLinearOperator, dense: Tensor, damping: float):
    """Check the damped inverse against a dense solve in float64, and return it.

    The error of a backward stable solve is a few roundings times the condition number, relative to
    the solution; its residual is a few roundings of ‖C + λ I‖ ‖x‖ whatever the condition.
    """
    inverse = operator.inverse(damping)
    D = len(dense)
    generator = torch.Generator().manual_seed(2)
    b = torch.randn(D, generator=generator, dtype=torch.float64).to(dense)
    m, V = torch.linalg.eigh(dense.double())
    m = m.clamp(min=0) + damping
    expected = V @ ((V.mT @ b.double()) / m)
    eps = torch.finfo(operator.dtype).eps
    condition = (m.max() / m.min()).item()
    for _ in range(2):
        x = inverse @ b
        assert x.dtype == operator.dtype
        assert bool(x.isfinite().all())
        error = ((x.double() - expected).norm() / expected.norm()).item()
        assert error <= max(1e-9, 100 * D * eps * condition), (damping, error, condition)
        residual = b.double() - dense.double() @ x.double() - damping * x.double()
        bound = 100 * D * eps * m.max().item() * x.double().norm().item()
        assert residual.norm().item() <= 1e-9 * b.norm().item() + bound
        assert torch.dot(b, x).item() > 0
    return inverse
