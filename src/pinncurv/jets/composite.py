"""Rules for functions that are compositions of others: for any order, and trained tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pinncurv.jets.axes import free_dim, point_axis_mixed
from pinncurv.jets.jet import Jet, register_rule
from pinncurv.jets.location import calling_module

# Jets do everything that tensors do, which no type says.
Value = Any


def _axes(input: Jet, dim: int | Sequence[int] | None, name: str) -> tuple[int, ...]:
    """Return axes of the value, none of which is the points'."""
    if dim is None or dim == () or dim == []:
        point_axis_mixed(input, name)
        dim = tuple(range(input.ndim))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for axis in dims:
        free_dim(input, axis, name)
    return dims


@register_rule(functional.layer_norm, torch.layer_norm)
def layer_norm(
    input: Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    """Normalize over the last axes."""
    dims = _axes(input, range(-len(normalized_shape), 0), "nn.functional.layer_norm")
    centred = input - input.mean(dims, keepdim=True)
    result = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


@register_rule(functional.rms_norm, torch.rms_norm)
def rms_norm(
    input: Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Value:
    """Divide by the root mean square over the last axes."""
    dims = _axes(input, range(-len(normalized_shape), 0), "nn.functional.rms_norm")
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    result = input * (input.square().mean(dims, keepdim=True) + eps).rsqrt()
    return result if weight is None else result * weight


@register_rule(functional.batch_norm)
def batch_norm(
    input: Value,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    """Normalize by the running statistics.

    Raises:
        NotImplementedError: In training, where statistics over the points mix them.
    """
    if training or running_mean is None or running_var is None:
        raise NotImplementedError(
            "Batch normalization must use running statistics, since statistics over the points "
            f"make every residual depend on all of them (in {calling_module()}). Call model.eval(),"
            " or use LayerNorm."
        )
    trailing = (1,) * (input.ndim - 2)

    def on_channels(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape, *trailing) if trailing else tensor

    result = (input - on_channels(running_mean)) * on_channels((running_var + eps).rsqrt())
    result = result if weight is None else result * on_channels(weight)
    return result if bias is None else result + on_channels(bias)


def _shift(input: Jet, dim: int) -> Tensor:
    """Return the largest value along an axis: what is subtracted before exp, without effect."""
    return input.value.detach().amax(dim, keepdim=True)


@register_rule(torch.softmax, functional.softmax)
def softmax(input: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """Exponentials, normalized along an axis."""
    _axes(input, dim, "softmax")
    exponentials = (input - _shift(input, dim)).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


@register_rule(functional.softmin)
def softmin(input: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """The same of the negative."""
    return softmax(-input, dim)


@register_rule(torch.logsumexp)
def logsumexp(input: Value, dim: int | Sequence[int], keepdim: bool = False) -> Value:
    """Logarithm of the sum of exponentials."""
    dims = _axes(input, dim, "logsumexp")
    shift = input.value.detach().amax(dims, keepdim=True)
    result = (input - shift).exp().sum(dims, keepdim=True).log() + shift
    if keepdim:
        return result
    for axis in sorted((d % input.ndim for d in dims), reverse=True):
        result = result.squeeze(axis)
    return result


@register_rule(torch.log_softmax, functional.log_softmax)
def log_softmax(input: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """Logarithm of the softmax."""
    return input - logsumexp(input, dim, keepdim=True)


@register_rule(functional.glu)
def glu(input: Value, dim: int = -1) -> Value:
    """The first half of an axis times the logistic function of the second."""
    _axes(input, dim, "nn.functional.glu")
    first, second = input.chunk(2, dim)
    return first * second.sigmoid()


@register_rule(functional.prelu, torch.prelu)
def prelu(input: Value, weight: Tensor) -> Value:
    """x for x > 0, weight · x otherwise; one weight, or one for each entry of the second axis."""
    if weight.numel() > 1 and input.ndim > 2:
        weight = weight.reshape(-1, *(1,) * (input.ndim - 2))
    return torch.where(input > 0, input, input * weight)


@register_rule(torch.norm, torch.linalg.vector_norm, torch.linalg.norm, Tensor.norm)
def norm(
    input: Value,
    p: float | str | None = 2,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    ord: float | None = None,
    dtype: torch.dtype | None = None,
) -> Value:
    """The norm over axes, of order p (2 by default)."""
    order = ord if ord is not None else p
    order = 2 if order in (None, "fro") else order
    dims = _axes(input, dim, "norm")
    if order == 2:
        return input.square().sum(dims, keepdim=keepdim).sqrt()
    if order == float("inf"):
        return amax(input.abs(), dim, keepdim)
    if order == 1:
        return input.abs().sum(dims, keepdim=keepdim)
    return (input.abs() ** order).sum(dims, keepdim=keepdim) ** (1 / order)  # type: ignore[operator]  # a number


@register_rule(functional.normalize)
def normalize(
    input: Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Value:
    """Divide by the norm along an axis."""
    return input / norm(input, p, dim, keepdim=True).clamp(min=eps)


@register_rule(torch.maximum)
def maximum(input: Value, other: Value) -> Value:
    """The larger one."""
    return torch.where(input > other, input, other)


@register_rule(torch.minimum)
def minimum(input: Value, other: Value) -> Value:
    """The smaller one."""
    return torch.where(input < other, input, other)


@register_rule(torch.gather)
def gather(input: Jet, dim: int, index: Tensor) -> Jet:
    """Take entries along an axis."""
    axis = free_dim(input, dim, "gather")
    return input.like(input.data.gather(axis, index.expand(input.layout.S, *index.shape)))


@register_rule(torch.amax)
def amax(input: Jet, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    """The largest entry along an axis; which one it is, is constant almost everywhere."""
    (axis,) = _axes(input, dim, "amax")
    largest: Value = gather(input, axis, input.value.argmax(axis, keepdim=True))
    return largest if keepdim else largest.squeeze(axis)


@register_rule(torch.amin)
def amin(input: Value, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    """The smallest entry along an axis."""
    return -amax(-input, dim, keepdim)


@register_rule(torch.max)
def max(input: Value, *args: Any, **kwargs: Any) -> Value:
    """The larger of two, or the largest along an axis with its index."""
    if args and isinstance(args[0], Jet | Tensor):
        return maximum(input, args[0])
    index = input.value.argmax(*args, **kwargs)
    return torch.return_types.max((amax(input, *args, **kwargs), index))


@register_rule(torch.cumsum)
def cumsum(input: Jet, dim: int) -> Jet:
    """Cumulative sums along an axis."""
    return input.like(input.data.cumsum(free_dim(input, dim, "cumsum")))


@register_rule(torch.var)
def var(input: Value, dim: Any = None, *, correction: float = 1, keepdim: bool = False) -> Value:
    """The variance over axes."""
    dims = _axes(input, dim, "var")
    number = 1
    for axis in dims:
        number *= input.shape[axis]
    centred = input - input.mean(dims, keepdim=True)
    return centred.square().sum(dims, keepdim=keepdim) / (number - correction)


@register_rule(torch.std)
def std(input: Value, dim: Any = None, *, correction: float = 1, keepdim: bool = False) -> Value:
    """The standard deviation over axes."""
    return var(input, dim, correction=correction, keepdim=keepdim).sqrt()


@register_rule(torch.lerp)
def lerp(input: Value, end: Value, weight: Value) -> Value:
    """Interpolate: input + weight (end - input)."""
    return input + (end - input) * weight


@register_rule(torch.addcmul)
def addcmul(input: Value, tensor1: Value, tensor2: Value, *, value: float = 1) -> Value:
    """Add a product."""
    return input + tensor1 * tensor2 * value


@register_rule(torch.addmm)
def addmm(input: Value, mat1: Value, mat2: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """Add a matrix product."""
    return (mat1 @ mat2) * alpha + input * beta


@register_rule(functional.bilinear)
def bilinear(input1: Value, input2: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """Σ_ij w_oij x_i y_j."""
    result = torch.einsum("n...i,oij,n...j->n...o", input1, weight, input2)
    return result if bias is None else result + bias


@register_rule(functional.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """softmax(q kᵀ / √d) v, over axes after the points.

    Raises:
        NotImplementedError: With dropout or grouped queries.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError(
            "Attention on jets must have neither dropout nor grouped queries, got "
            f"dropout_p = {dropout_p} and enable_gqa = {enable_gqa} (in {calling_module()}). "
            "Call model.eval()."
        )
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return softmax(scores, -1) @ value
