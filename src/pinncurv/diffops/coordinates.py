"""Coordinates that operators differentiate along: what the user may give, and their directions."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor


def standard_basis(x: Tensor, dims: Sequence[int] | None) -> tuple[Tensor, ...]:
    """Return the unit vectors of some coordinates (all of them for None).

    Raises:
        IndexError: If a coordinate does not exist.
        ValueError: If two of them are the same, counted from the front and from the end.
    """
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return tuple(identity[dim] for dim in present(x, dims))


def embed(z: Tensor, x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return Σ_i z_i e_{dims_i}, ``[..., d]``, for coordinates z, ``[..., len(dims)]``."""
    embedded = z.new_zeros(*z.shape[:-1], x.shape[-1])
    embedded[..., list(dims)] = z
    return embedded


def present(x: Tensor, dims: Sequence[int] | None) -> Sequence[int]:
    """Return some coordinates (all of them for None) after checking that points have them.

    Raises:
        IndexError: If a coordinate does not exist.
        ValueError: If two of them are the same, counted from the front and from the end.
    """
    d = x.shape[-1]
    chosen = range(d) if dims is None else dims
    for dim in chosen:
        if not -d <= dim < d:
            raise IndexError(
                f"A coordinate must be between {-d} and {d - 1} for points with {d} coordinates, "
                f"got {dim}. Coordinates count from 0."
            )
    if len({dim % d for dim in chosen}) != len(chosen):
        raise ValueError(
            f"dims must name different coordinates, got {list(chosen)} for points with {d} "
            "coordinates. Name each once."
        )
    return chosen


def as_dims(dims: Any) -> tuple[int, ...] | None:
    """Make coordinates hashable; reject repetitions, which would count a derivative twice.

    Raises:
        TypeError: If they are no sequence of integers.
        ValueError: If there is none, or one is repeated.
    """
    if dims is None:
        return None
    if not isinstance(dims, Iterable):
        raise TypeError(
            f"dims must be a sequence of integers, got {dims!r}. Write dims=[{dims!r}] for one "
            "coordinate, or None for all."
        )
    as_tuple = tuple(as_dim(dim) for dim in dims)
    if len(set(as_tuple)) != len(as_tuple) or not as_tuple:
        raise ValueError(
            f"dims must name one or more different coordinates, got {list(as_tuple)}. Name each "
            "once, or pass None for all."
        )
    return as_tuple


def as_dim(dim: Any) -> int:
    """Make a coordinate an integer; reject what only compares like one.

    Raises:
        TypeError: If it is no integer.
    """
    try:
        if isinstance(dim, bool):
            raise TypeError
        return index(dim)
    except TypeError:
        raise TypeError(
            f"A coordinate must be an integer that counts from 0, got {dim!r} of type "
            f"{type(dim).__name__}. Write e.g. Partial(0) or Laplacian(dims=[0, 1])."
        ) from None
