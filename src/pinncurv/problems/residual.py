"""Calling the residual function of a loss term, and explaining what is wrong with its result."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.jets import Jet, for_every_point

Residual = Callable[..., Tensor]


def call_residual(
    term: str, residual: Residual, x: Any, values: Mapping[str, Any]
) -> Float[Tensor, "N V"]:
    """Call a residual function at points, with one column per component.

    r(x_n, values_n)

    Args:
        term: The name of the loss term, for errors.
        residual: The residual function.
        x: The points, ``[N, d]``: a tensor, or a jet without derivatives where trained tensors are
            to be recorded.
        values: The values of the operators and the data, by name.

    Raises:
        TypeError: If the residual returns no tensor.
        ValueError: If the shapes of the values do not fit together, or the residual has not one
            row per point, another dtype than the points, or mixes the points.
    """
    result = _call(term, residual, x, values)
    N = x.shape[0]
    if result.ndim == 1:
        result = result.unsqueeze(1)
    if result.ndim != 2 or result.shape[0] != N or not result.shape[1]:
        raise ValueError(
            f"Term '{term}': the residual must have shape [N] or [N, V], V >= 1, with N = {N} "
            f"points, got {list(result.shape)} from values of shapes {_shapes(values)}. Keep the "
            "points as first dimension and at most one more, and pass tensors with one row per "
            "point by data= of the LossTerm, since points are processed in blocks."
        )
    if result.dtype != x.dtype:
        dtypes = {name: str(value.dtype) for name, value in values.items()}
        raise ValueError(
            f"Term '{term}': the residual must have the dtype of the points, {x.dtype}, got "
            f"{result.dtype} from values of dtypes {dtypes}. Pass tensors by data=, which are "
            "converted, or write tensor.to(x) in the residual."
        )
    if result.shape[1] == N > 1 and isinstance(x, Tensor):
        _check_not_broadcast(term, residual, x, values)
    if isinstance(result, Jet):
        return result.value
    return for_every_point(result, x) if isinstance(x, Jet) else result  # of parameters alone


def _call(term: str, residual: Residual, x: Any, values: Mapping[str, Any]) -> Any:
    """Call the residual function; explain shapes that do not fit together."""
    try:
        result = residual(x, **values)
    except RuntimeError as error:
        if type(error) is RuntimeError and "inplace" in str(error):
            raise ValueError(
                f"Term '{term}': the residual must not write to its arguments, but torch says: "
                f"{error}. Write u = u - ... instead of u -= ... or u.sub_(...)."
            ) from error
        # subclasses (out of memory, not implemented) and other messages speak for themselves
        if type(error) is not RuntimeError or not re.search("size|shape", str(error).lower()):
            raise
        raise ValueError(
            f"Term '{term}': the residual must accept any block of the points, but failed for "
            f"N = {x.shape[0]} points and values of shapes {_shapes(values)}: {error}. Pass "
            "tensors with one row per point by data= of the LossTerm, since points are processed "
            "in blocks."
        ) from error
    if not isinstance(result, Tensor | Jet):
        raise TypeError(
            f"Term '{term}': the residual must return a tensor [N] or [N, V], got "
            f"{type(result).__name__}. Return what shall vanish."
        )
    return result


def _check_not_broadcast(
    term: str, residual: Residual, x: Tensor, values: Mapping[str, Tensor]
) -> None:
    """Raise if [N, N] came from [N] against [N, 1]: one point alone has fewer components."""
    N = x.shape[0]
    with torch.no_grad():
        first = _call(term, residual, x[:1], {name: value[:1] for name, value in values.items()})
    components = first.shape[1] if first.ndim == 2 else 1
    if components != N:
        raise ValueError(
            f"Term '{term}': the residual has shape [{N}, {N}] for N = {N} points, but "
            f"{components} component(s) for the first point alone. A tensor of shape [N] was "
            "broadcast against one of shape [N, 1] to [N, N]. Values of operators have shape "
            "[N, d_out]; give your own data that shape too, e.g. by f[:, None] or "
            "sum(dim=-1, keepdim=True)."
        )


def _shapes(values: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in values.items()}
