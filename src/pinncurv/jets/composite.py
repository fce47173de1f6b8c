"""Rules for functions that are compositions of others: for any order, and trained tensors."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pinncurv.jets.axes import free_dim, point_axis_mixed
from pinncurv.jets.functions import root
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


def _one_axis(input: Jet, dim: int | None, name: str) -> int:
    """Return the axis that a function was given; torch's guesses may be that of the points."""
    if dim is None:
        raise ValueError(
            f"torch.{name} on jets must be given its axis, got dim=None (in {calling_module()}). "
            "Pass dim=-1, or another axis behind the points'."
        )
    _axes(input, dim, name)
    return dim


def _on_channels(tensor: Tensor, input: Jet) -> Tensor:
    """View a tensor so that it meets the axis behind the points'."""
    return tensor.reshape(*tensor.shape, *(1,) * (input.ndim - 2)) if input.ndim > 2 else tensor


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
            " for which the layer needs track_running_stats=True, or use LayerNorm."
        )
    result = input - _on_channels(running_mean, input)
    result = result * _on_channels((running_var + eps).rsqrt(), input)
    result = result if weight is None else result * _on_channels(weight, input)
    return result if bias is None else result + _on_channels(bias, input)


@register_rule(functional.group_norm)
def group_norm(
    input: Value,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    """Normalize over groups of the axis behind the points', and all further axes."""
    grouped = input.unflatten(1, (num_groups, -1)).flatten(2)
    result = layer_norm(grouped, grouped.shape[2:], eps=eps).reshape(input.shape)
    result = result if weight is None else result * _on_channels(weight, input)
    return result if bias is None else result + _on_channels(bias, input)


def _shift(input: Jet, dim: int | tuple[int, ...]) -> Tensor:
    """Return the largest value along axes: what is subtracted before exp, without effect."""
    return input.value.detach().amax(dim, keepdim=True)


@register_rule(torch.softmax, functional.softmax)
def softmax(
    input: Value, dim: int | None = None, dtype: torch.dtype | None = None, *, _stacklevel: int = 3
) -> Value:
    """Exponentials, normalized along an axis."""
    axis = _one_axis(input, dim, "softmax")
    input = input if dtype is None else input.to(dtype)
    exponentials = (input - _shift(input, axis)).exp()
    return exponentials / exponentials.sum(axis, keepdim=True)


@register_rule(functional.softmin)
def softmin(input: Value, *args: Any, **kwargs: Any) -> Value:
    """The same of the negative."""
    return softmax(-input, *args, **kwargs)


@register_rule(torch.logsumexp)
def logsumexp(input: Value, dim: int | Sequence[int], keepdim: bool = False) -> Value:
    """Logarithm of the sum of exponentials."""
    dims = _axes(input, dim, "logsumexp")
    shift = _shift(input, dims)
    result = (input - shift).exp().sum(dims, keepdim=True).log() + shift
    return result if keepdim else result.squeeze(dims)


@register_rule(torch.log_softmax, functional.log_softmax)
def log_softmax(
    input: Value, dim: int | None = None, dtype: torch.dtype | None = None, *, _stacklevel: int = 3
) -> Value:
    """Logarithm of the softmax."""
    axis = _one_axis(input, dim, "log_softmax")
    input = input if dtype is None else input.to(dtype)
    return input - logsumexp(input, axis, keepdim=True)


@register_rule(functional.glu)
def glu(input: Value, dim: int = -1) -> Value:
    """The first half of an axis times the logistic function of the second."""
    _axes(input, dim, "nn.functional.glu")
    first, second = input.chunk(2, dim)
    return first * second.sigmoid()


@register_rule(functional.prelu, torch.prelu)
def prelu(input: Value, weight: Tensor) -> Value:
    """x for x > 0, weight · x otherwise; one weight, or one for each entry of the second axis."""
    weight = weight if weight.numel() == 1 else _on_channels(weight, input)
    return torch.where(input > 0, input, input * weight)


@register_rule(torch.norm, torch.linalg.vector_norm)
def norm(
    input: Value,
    ord: float | str | None = 2,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    out: None = None,
    dtype: torch.dtype | None = None,
    *,
    p: float | str | None = None,
) -> Value:
    """The norm of the entries over axes, of order ``ord``, which ``torch.norm`` calls p.

    Raises:
        NotImplementedError: Unless the order is a positive number.
    """
    order = ord if p is None else p
    order = 2 if order in (None, "fro") else order
    if isinstance(order, str) or not order > 0:
        raise NotImplementedError(
            f"The order of the norm of a jet must be a positive number, got {order!r} (in "
            f"{calling_module()}). Write the function as sums and products."
        )
    input = input if dtype is None else input.to(dtype)
    dims = _axes(input, dim, "norm")
    if order == float("inf"):
        return amax(input.abs(), dim, keepdim)
    if order == 1:
        return input.abs().sum(dims, keepdim=keepdim)
    powers = input.square() if order == 2 else root(input.abs(), 1 / order, flat=False)
    return root(powers.sum(dims, keepdim=keepdim), order, flat=order > 2)


@register_rule(torch.linalg.norm)
def linalg_norm(
    input: Value,
    ord: float | str | None = None,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    """The norm over one axis, or Frobenius' over two.

    Raises:
        NotImplementedError: If it is another norm of matrices, as an order over two axes means.
    """
    number = input.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if number == 2 and ord not in (None, "fro"):
        raise NotImplementedError(
            f"The norm of a matrix of jets must be Frobenius', got ord={ord!r} over two axes (in "
            f"{calling_module()}). Use torch.linalg.vector_norm for the norm of the entries."
        )
    return norm(input, ord, dim, keepdim, dtype=dtype)


@register_rule(functional.normalize)
def normalize(
    input: Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Value:
    """Divide by the norm along an axis."""
    length = norm(input, p, dim, keepdim=True)
    return input / torch.where(length > eps, length, eps)


@register_rule(functional.cosine_similarity)
def cosine_similarity(x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    """Σ_i x_i y_i / (|x| |y|) along an axis."""
    axis = _from_the_end(dim, x1, x2)
    first, second = (functional.normalize(x, dim=axis, eps=eps) for x in (x1, x2))
    return (first * second).sum(axis)


def _from_the_end(dim: int, *operands: Value) -> int:
    """Count an axis of what operands are broadcast to from the end: it is that of each, too."""
    ndim = max(operand.ndim for operand in operands)
    return dim if dim < 0 else dim - ndim


@register_rule(torch.linalg.vecdot)
def vecdot(x: Value, y: Value, *, dim: int = -1) -> Value:
    """Σ_i x_i y_i along an axis."""
    return (x * y).sum(_from_the_end(dim, x, y))


@register_rule(torch.cross)
def cross(input: Value, other: Value, dim: int | None = None) -> Value:
    """The vector product along an axis of size three."""
    jet = input if isinstance(input, Jet) else other
    axis = _from_the_end(_one_axis(jet, dim, "cross"), input, other)
    left, right = ([1, 2, 0], [2, 0, 1])

    def select(x: Value, order: list[int]) -> Value:
        return x.index_select(axis, torch.tensor(order, device=x.device))

    return select(input, left) * select(other, right) - select(input, right) * select(other, left)


@register_rule(torch.linalg.cross)
def linalg_cross(input: Value, other: Value, *, dim: int = -1) -> Value:
    """The same along the last axis, if none is given."""
    return cross(input, other, dim)


@register_rule(torch.outer, torch.ger)
def outer(input: Value, vec2: Value) -> Value:
    """All products of a number at every point and the entries of a constant vector."""
    return input.unsqueeze(-1) * vec2.unsqueeze(0)


@register_rule(torch.maximum)
def maximum(input: Value, other: Value) -> Value:
    """The larger one, and of equal ones the mean, as torch differentiates them."""
    return torch.where(input > other, input, torch.where(input < other, other, _mean(input, other)))


def _mean(a: Value, b: Value) -> Value:
    return 0.5 * (a + b)


@register_rule(torch.minimum)
def minimum(input: Value, other: Value) -> Value:
    """The smaller one, and of equal ones the mean."""
    return torch.where(input < other, input, torch.where(input > other, other, _mean(input, other)))


@register_rule(torch.gather)
def gather(input: Jet, dim: int, index: Tensor) -> Jet:
    """Take entries along an axis."""
    axis = free_dim(input, dim, "gather")
    return input.like(input.channels.gather(axis, index.expand(input.layout.S, *index.shape)))


@register_rule(torch.amax)
def amax(input: Value, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    """The largest entry over axes, and of equal ones the mean, as torch differentiates them."""
    dims = tuple(axis % input.ndim for axis in _axes(input, dim, "amax"))
    largest = input.value == input.value.amax(dims, keepdim=True)
    chosen = torch.where(largest, input.channels, 0.0).sum(
        [axis + 1 for axis in dims], keepdim=True
    )
    result = input.like(chosen / largest.sum(dims, keepdim=True))
    return result if keepdim else result.squeeze(dims)


def _along(input: Value, dim: int, keepdim: bool, find: Callable[..., Tensor]) -> Any:
    """Return the entries that ``find`` finds along an axis, and where."""
    index = find(input.value, dim, True)
    entries = gather(input, dim, index)
    return (entries, index) if keepdim else (entries.squeeze(dim), index.squeeze(dim))


@register_rule(torch.amin)
def amin(input: Value, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    """The smallest entry over axes."""
    return -amax(-input, dim, keepdim)


def _extreme(
    choose: Callable[..., Value],
    reduce: Callable[..., Value],
    find: Callable[..., Tensor],
    pair: Callable[..., Any],
) -> Callable[..., Value]:
    """Make the rule of max or min: of two, of all, or along an axis with its index."""

    def rule(input: Value, dim: Any = None, keepdim: bool = False, *, other: Value = None) -> Value:
        other = dim if isinstance(dim, Jet | Tensor) else other
        if other is not None:
            return choose(input, other)
        return reduce(input) if dim is None else pair(_along(input, dim, keepdim, find))

    return rule


register_rule(torch.max)(_extreme(maximum, amax, torch.argmax, torch.return_types.max))
register_rule(torch.min)(_extreme(minimum, amin, torch.argmin, torch.return_types.min))


@register_rule(torch.cumsum)
def cumsum(input: Jet, dim: int) -> Jet:
    """Cumulative sums along an axis."""
    return input.like(input.channels.cumsum(free_dim(input, dim, "cumsum")))


@register_rule(torch.cumprod)
def cumprod(input: Value, dim: int) -> Value:
    """The products of the first entries along an axis, slice by slice."""
    slices = list(input.unbind(dim))
    for i in range(1, len(slices)):
        slices[i] = slices[i - 1] * slices[i]
    return torch.stack(slices, dim)


@register_rule(torch.hypot)
def hypot(input: Value, other: Value) -> Value:
    """sqrt(x² + y²)."""
    return (input * input + other * other).sqrt()


@register_rule(torch.atan2, torch.arctan2)
def atan2(input: Value, other: Value) -> Value:
    """The angle of (other, input): atan of a quotient below one, plus a constant."""
    y, x = (v.value if isinstance(v, Jet) else v for v in (input, other))
    steep = y.abs() > x.abs()
    angle: Any = torch.atan(torch.where(steep, -other, input) / torch.where(steep, input, other))
    return angle + (torch.atan2(y, x) - angle.value).detach()


@register_rule(torch.tensordot)
def tensordot(a: Value, b: Value, dims: Any = 2, out: None = None) -> Value:
    """Sum over pairs of axes, the last of a and the first of b if their number is given."""
    if isinstance(dims, int):
        dims = range(a.ndim - dims, a.ndim), range(dims)
    pairs = [[i % v.ndim for i in axes] for axes, v in zip(dims, (a, b), strict=True)]
    first, second = string.ascii_letters[: a.ndim], list(string.ascii_letters[a.ndim :][: b.ndim])
    for i, j in zip(*pairs, strict=True):
        second[j] = first[i]
    kept = [c for i, c in enumerate(first) if i not in pairs[0]]
    kept += [c for j, c in enumerate(second) if j not in pairs[1]]
    return torch.einsum(f"{first},{''.join(second)}->{''.join(kept)}", a, b)


@register_rule(torch.var)
def var(
    input: Value,
    dim: int | Sequence[int] | None = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = 1,
) -> Value:
    """The variance over axes."""
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    dims = _axes(input, dim, "var")
    number = math.prod(input.shape[axis] for axis in dims)
    fewer = float(unbiased) if unbiased is not None else 1 if correction is None else correction
    centred = input - input.mean(dims, keepdim=True)
    return centred.square().sum(dims, keepdim=keepdim) / (number - fewer)


@register_rule(torch.std)
def std(input: Value, *args: Any, **kwargs: Any) -> Value:
    """The standard deviation over axes."""
    return root(var(input, *args, **kwargs), 2, flat=True)


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


@register_rule(functional.conv1d)
def conv1d(
    input: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Value:
    """Σ_ck w_ock x_c(l + k), along the last axis of ``[N, channels, length]``.

    Raises:
        ValueError: If the points would be the channels.
        NotImplementedError: With several groups of channels.
    """
    if input.ndim != 3:
        raise ValueError(
            "The input of torch.conv1d must be [N, channels, length], got shape "
            f"{tuple(input.shape)} (in {calling_module()}). Insert an axis with unsqueeze(1)."
        )
    if groups != 1:
        raise NotImplementedError(
            f"torch.conv1d on jets must have one group of channels, got groups={groups} (in "
            f"{calling_module()}). Split the channels and convolve each group."
        )
    stride, dilation = (v if isinstance(v, int) else v[0] for v in (stride, dilation))
    span = dilation * (weight.shape[-1] - 1)
    if isinstance(padding, str):
        before, total = (span // 2, span) if padding == "same" else (0, 0)
    else:
        before = padding if isinstance(padding, int) else padding[0]
        total = 2 * before
    padded = functional.pad(input, (before, total - before))
    windows = padded.unfold(-1, span + 1, stride)[..., ::dilation]
    result = torch.einsum("nclk,ock->nol", windows, weight)
    return result if bias is None else result + bias.unsqueeze(-1)


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
