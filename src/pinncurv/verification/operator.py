"""Checks of a linear operator: the laws of a symmetric matrix and of its inverse."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pinncurv.linops import PyTorchLinearOperator, SymmetricLinearOperator
from pinncurv.verification.checklist import TOLERANCE, Checklist, describe
from pinncurv.verification.report import Report


def verify_operator(
    operator: PyTorchLinearOperator,
    dense: Tensor | None = None,
    semidefinite: bool = True,
    dampings: Sequence[float] = (1e-6, 1e-3, 1.0),
) -> Report:
    """Check that a linear operator obeys the laws of a symmetric matrix.

    Products in every format agree; it is its own adjoint, symmetric and, if it should be, positive
    semidefinite; ``to_dense``, ``diagonal`` and ``trace`` agree with the products; products write
    to no argument and give the same result again; ``inverse(damping)`` is that of a dense solve.

    Args:
        operator: The operator, on up to a few thousand parameters.
        dense: The matrix that it should represent; by default its products with the identity.
        semidefinite: Whether it should have no negative eigenvalue.
        dampings: For which the inverse is checked, relative to the largest eigenvalue.
    """
    checks = Checklist(type(operator).__name__)
    with checks.guard():
        check_operator(checks, operator, dense, semidefinite, dampings)
    return checks.report


def check_operator(
    checks: Checklist,
    operator: PyTorchLinearOperator,
    dense: Tensor | None,
    semidefinite: bool,
    dampings: Sequence[float],
) -> None:
    """Make the checks of ``verify_operator``."""
    products = checks.attempt("product with the identity", lambda: identity_product(operator))
    if products is None:
        return
    tolerance = max(TOLERANCE, 1e3 * torch.finfo(products.dtype).eps)
    if dense is not None:
        checks.compare("is the right matrix", products, dense, tolerance)
    matrix = products.double()
    checks.compare("symmetric", matrix, matrix.mT, tolerance)
    if semidefinite:
        checks.demand("positive semidefinite", _negative(matrix, tolerance))
    _check_formats(checks, operator, products, tolerance)
    views = {"to_dense": products, "diagonal": products.diagonal(), "trace": products.trace()}
    for name, expected in views.items():
        if method := getattr(operator, name, None):
            checks.compare(f"{name}()", method, expected, tolerance)
    if hasattr(operator, "inverse"):
        for damping in dampings:
            _check_inverse(checks, operator, matrix, damping)


def identity_product(operator: PyTorchLinearOperator) -> Tensor:
    """Return an operator's products with the unit vectors."""
    rows, columns = operator.shape
    if rows != columns:
        raise ValueError(f"must be square, has shape {operator.shape}")
    product = operator @ torch.eye(columns, dtype=operator.dtype, device=operator.device)
    bad = int((~product.isfinite()).sum())
    if bad:
        raise ValueError(f"must have finite entries, {bad} of {product.numel()} are not")
    return product


def _negative(matrix: Tensor, tolerance: float) -> str:
    """Say which eigenvalue is negative beyond rounding."""
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    if smallest >= -tolerance * max(largest, 0.0):
        return ""
    return f"eigenvalues in [{smallest:.3e}, {largest:.3e}]; pass semidefinite=False if it may be"


def _by_lists(operator: PyTorchLinearOperator, flat: Tensor) -> Tensor:
    """Multiply ``[D]`` or ``[D, K]`` in the list format."""
    shapes = operator._in_shape
    pieces = zip(flat.split([shape.numel() for shape in shapes]), shapes, strict=True)
    product = operator @ [piece.reshape((*shape, *flat.shape[1:])) for piece, shape in pieces]
    return torch.cat([part.reshape(-1, *flat.shape[1:]) for part in product])


def _check_formats(
    checks: Checklist, operator: PyTorchLinearOperator, matrix: Tensor, tolerance: float
) -> None:
    """Check products in all formats, after each other to find what is written to."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(len(matrix), 2, generator=generator, dtype=torch.float64).to(matrix)
    before, x, Y = X.clone(), X[:, 0].clone(), matrix @ X
    y = Y[:, 0]
    formats: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "product with a vector": (lambda: operator @ x, y),
        "product with a matrix": (lambda: operator @ X, Y),
        "product with a list (vector)": (lambda: _by_lists(operator, x), y),
        "product with a list (matrix)": (lambda: _by_lists(operator, X), Y),
        "adjoint": (lambda: operator.adjoint() @ X, matrix.mT @ X),
        "to_scipy": (
            lambda: torch.from_numpy(operator.to_scipy() @ x.cpu().double().numpy()),
            y.cpu(),
        ),
    }
    if isinstance(operator, SymmetricLinearOperator):
        formats["product from the left"] = (lambda: X.mT @ operator, X.mT @ matrix)
    formats["product once more"] = (lambda: operator @ X, Y)
    for name, (got, expected) in formats.items():
        checks.compare(name, got, expected, tolerance)
    checks.compare("arguments are not written to", X, before, 0.0)


def _check_inverse(
    checks: Checklist, operator: PyTorchLinearOperator, matrix: Tensor, relative: float
) -> None:
    """Check the damped inverse against the eigendecomposition of the dense matrix.

    The error of a stable solve is a few roundings times the condition number.
    """
    m, V = torch.linalg.eigh((matrix + matrix.mT) / 2)
    damping = relative * (m.abs().max().item() or 1.0)
    name = f"inverse(damping={damping:.1e})"
    damped = m + damping
    condition = (damped.abs().max() / damped.abs().min()).item()
    eps = torch.finfo(operator.dtype).eps
    tolerance = max(1e-8, 100 * len(m) * eps * condition)
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(len(m), generator=generator, dtype=torch.float64).to(matrix)
    if tolerance > 0.1:
        checks.skip(name, f"the damped matrix has condition number {condition:.0e}")
        return
    try:
        inverse = operator.inverse(damping)
    except NotImplementedError as error:
        checks.skip(name, describe(error))
        return
    except Exception as error:
        checks.fail(name, error)
        return
    right = V @ ((V.mT @ b) / damped)
    checks.compare(name, lambda: inverse @ b.to(operator.dtype), right, tolerance)
