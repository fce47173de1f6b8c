"""Functions whose higher derivatives torch has wrong, or cannot nest, by more elementary ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Dims = int | tuple[int, ...] | None


class Spelled(TorchFunctionMode):
    """Writes functions out, where jets are compared with torch (2.13): of no use to jets.

    The third derivatives of torch's layer_norm and group_norm are wrong, attention has no forward
    mode, and the second ones of norms and of std cannot be batched.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SPELLED:
            return func(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # out, dtype
        return _SPELLED[func](*args, **given)


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _affine(_standardized(input, len(normalized_shape), eps), weight, bias)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = input.reshape(len(input), num_groups, -1)
    shape = (-1, *(1,) * (input.ndim - 2))
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(_standardized(grouped, 1, eps).reshape(input.shape), weight, bias)


def _standardized(x: Tensor, axes: int, eps: float) -> Tensor:
    dims = tuple(range(-axes, 0))
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _norm(x: Tensor, p: Any = 2, dim: _Dims = None, keepdim: bool = False) -> Tensor:
    dims = tuple(range(x.ndim)) if dim is None else dim
    order = 2 if p in (None, "fro") else p
    if order == 2:
        return x.square().sum(dims, keepdim=keepdim).sqrt()
    if isinstance(order, str) or math.isinf(order) or order == 0:
        return torch.norm(x, p, dim, keepdim)
    return x.abs().pow(order).sum(dims, keepdim=keepdim) ** (1 / order)


def _of_vectors(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same for torch.linalg, whose orders of matrices are left to torch."""

    def norm(x: Tensor, ord: Any = None, dim: _Dims = None, keepdim: bool = False) -> Tensor:
        axes = x.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
        if ord not in (None, "fro") and axes > 1 and original is torch.linalg.norm:
            return original(x, ord, dim, keepdim)
        return _norm(x, ord, dim, keepdim)

    return norm


def _normalize(input: Tensor, p: float = 2, dim: int = 1, eps: float = 1e-12) -> Tensor:
    return input / _norm(input, p, dim, True).clamp_min(eps)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (_normalize(x1, 2, dim, eps) * _normalize(x2, 2, dim, eps)).sum(dim)


def _std(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.var(*args, **kwargs).sqrt()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


_SPELLED: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((functional.group_norm, torch.group_norm), _group_norm),
    **dict.fromkeys((torch.norm, Tensor.norm), _norm),
    **{f: _of_vectors(f) for f in (torch.linalg.norm, torch.linalg.vector_norm)},
    functional.normalize: _normalize,
    **dict.fromkeys((functional.cosine_similarity, torch.cosine_similarity), _cosine_similarity),
    **dict.fromkeys((torch.std, Tensor.std), _std),
    functional.scaled_dot_product_attention: _attention,
}
