"""Rules for functions that only rearrange: the same operation on every channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pinncurv.jets.axes import (
    broadcast_together,
    channel_dim,
    channel_dims,
    check_same_pass,
    free_dim,
    point_axis_mixed,
    prepend_axes,
    trailing_view,
)
from pinncurv.jets.jet import Jet, lift, register_rule
from pinncurv.jets.location import calling_module
from pinncurv.jets.recording import for_every_point


def _as_sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Accept sizes as separate arguments or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@register_rule(torch.reshape, Tensor.view)
def reshape(input: Jet, *sizes: Any, shape: Sequence[int] = ()) -> Jet:
    """Reshape the value; the first axis stays the axis of the points."""
    if any(isinstance(size, torch.dtype) for size in sizes):
        raise NotImplementedError(
            f"The channels of a jet can't be viewed as {sizes[0]} (in {calling_module()}). Convert "
            "with .to(dtype) instead."
        )
    data = input.channels.reshape(input.layout.S, *(_as_sizes(sizes) if sizes else shape))
    if data.ndim < 2 or data.shape[1] != input.shape[0]:
        point_axis_mixed(input, "reshape")
    return input.like(data)


@register_rule(torch.flatten)
def flatten(input: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    """Flatten axes of the value."""
    start, end = channel_dims(input, [start_dim, end_dim])
    if start == 1 and end > 1:
        point_axis_mixed(input, "flatten")
    return input.like(input.channels.flatten(start, end))


@register_rule(torch.unflatten)
def unflatten(input: Jet, dim: int, sizes: Sequence[int]) -> Jet:
    """Split one axis of the value into several."""
    axis = free_dim(input, dim, "unflatten")
    return input.like(input.channels.unflatten(axis, sizes))


@register_rule(torch.squeeze)
def squeeze(input: Jet, dim: int | tuple[int, ...] | None = None) -> Jet:
    """Drop axes of size one."""
    dims = range(input.ndim) if dim is None else ([dim] if isinstance(dim, int) else dim)
    dropped = [d for d in channel_dims(input, list(dims)) if input.channels.shape[d] == 1]
    if 1 in dropped:
        if dim is None:
            dropped.remove(1)
        else:
            point_axis_mixed(input, "squeeze")
    return input.like(input.channels.squeeze(dropped))


@register_rule(torch.unsqueeze)
def unsqueeze(input: Jet, dim: int) -> Jet:
    """Insert an axis of size one."""
    axis = channel_dim(input, dim, new_axes=1)
    if axis == 1:
        point_axis_mixed(input, "unsqueeze")
    return input.like(input.channels.unsqueeze(axis))


@register_rule(torch.transpose, torch.swapaxes, torch.swapdims)
def transpose(input: Jet, dim0: int, dim1: int) -> Jet:
    """Exchange two axes of the value."""
    first, second = channel_dims(input, [dim0, dim1])
    if 1 in (first, second) and first != second:
        point_axis_mixed(input, "transpose")
    return input.like(input.channels.transpose(first, second))


@register_rule(torch.t)
def t(input: Jet) -> Jet:
    """Transpose a matrix."""
    return transpose(input, 0, 1) if input.ndim > 1 else input


@register_rule(torch.permute)
def permute(input: Jet, *axes: Any, dims: Sequence[int] = ()) -> Jet:
    """Reorder the axes of the value."""
    order = channel_dims(input, _as_sizes(axes) if axes else dims)
    if order[0] != 1:
        point_axis_mixed(input, "permute")
    return input.like(input.channels.permute(0, *order))


@register_rule(torch.movedim, torch.moveaxis)
def movedim(input: Jet, source: int, destination: int) -> Jet:
    """Move one axis of the value."""
    start, end = channel_dims(input, [source, destination])
    if 1 in (start, end) and start != end:
        point_axis_mixed(input, "movedim")
    return input.like(input.channels.movedim(start, end))


@register_rule(Tensor.expand)
def expand(input: Jet, *sizes: Any) -> Jet:
    """Expand axes of size one."""
    shape = _as_sizes(sizes)
    if len(shape) != input.ndim:
        point_axis_mixed(input, "expand")
    return input.like(trailing_view(input, len(shape)).expand(-1, *shape))


@register_rule(Tensor.repeat)
def repeat(input: Jet, *sizes: Any) -> Jet:
    """Tile the value."""
    counts = _as_sizes(sizes)
    if len(counts) != input.ndim or counts[0] != 1:
        point_axis_mixed(input, "repeat")
    return input.like(trailing_view(input, len(counts)).repeat(1, *counts))


@register_rule(torch.tile)
def tile(input: Jet, *sizes: Any, dims: Sequence[int] = ()) -> Jet:
    """Tile the value; axes without a count stay."""
    counts = _as_sizes(sizes) if sizes else tuple(dims)
    return repeat(input, (1,) * (input.ndim - len(counts)) + tuple(counts))


@register_rule(torch.roll)
def roll(input: Jet, shifts: int | Sequence[int], dims: int | Sequence[int] | None = None) -> Jet:
    """Shift axes of the value, what leaves at one end enters at the other."""
    axes = [0] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    shifted = channel_dims(input, axes)
    if 1 in shifted:
        point_axis_mixed(input, "roll")
    if dims is None:
        return input.like(input.channels.flatten(1).roll(shifts, 1).reshape(input.channels.shape))
    return input.like(input.channels.roll(shifts, shifted))


@register_rule(torch.flip)
def flip(input: Jet, *axes: Any, dims: Sequence[int] = ()) -> Jet:
    """Reverse axes of the value."""
    flipped = channel_dims(input, _as_sizes(axes) if axes else dims)
    if 1 in flipped:
        point_axis_mixed(input, "flip")
    return input.like(input.channels.flip(flipped))


@register_rule(Tensor.__getitem__)
def getitem(input: Jet, index: Any) -> Jet:
    """Index the value as a tensor is indexed."""
    indices = index if isinstance(index, tuple) else (index,)
    first = indices[0] if indices else None
    keeps_points = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    used = sum(part is not None for part in indices)
    if not keeps_points or (first is Ellipsis and used > input.ndim):
        point_axis_mixed(input, "Tensor.__getitem__")
    advanced = [i for i, part in enumerate(indices) if isinstance(part, Tensor | list)]
    if advanced and advanced[-1] - advanced[0] >= len(advanced):
        raise NotImplementedError(
            "Index tensors must be next to each other when they index a jet, got them at "
            f"positions {advanced}. Index in two steps."
        )
    return input.like(input.channels[(slice(None), *indices)])


@register_rule(torch.narrow)
def narrow(input: Jet, dim: int, start: int, length: int) -> Jet:
    """Cut a range out of one axis."""
    axis = free_dim(input, dim, "narrow")
    return input.like(input.channels.narrow(axis, start, length))


@register_rule(Tensor.unfold)
def unfold(input: Jet, dimension: int, size: int, step: int) -> Jet:
    """View all windows of one axis."""
    axis = free_dim(input, dimension, "Tensor.unfold")
    return input.like(input.channels.unfold(axis, size, step))


@register_rule(functional.pad)
def pad(input: Jet, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Jet:
    """Extend the last axes; a constant enters the value only."""
    if len(pad) // 2 >= input.ndim and any(pad[2 * (input.ndim - 1) :]):
        point_axis_mixed(input, "nn.functional.pad")
    if mode != "constant":  # the modes take a limited number of axes
        data = functional.pad(input.channels.flatten(0, 1), list(pad), mode)
        return input.like(data.unflatten(0, (input.layout.S, -1)))
    data = functional.pad(input.channels[1:], list(pad))
    return input.like(torch.cat([functional.pad(input.channels[:1], list(pad), value=value), data]))


@register_rule(torch.select)
def select(input: Jet, dim: int, index: int) -> Jet:
    """Take one slice of one axis."""
    axis = free_dim(input, dim, "select")
    return input.like(input.channels.select(axis, index))


@register_rule(torch.index_select)
def index_select(input: Jet, dim: int, index: Tensor) -> Jet:
    """Take slices of one axis."""
    axis = free_dim(input, dim, "index_select")
    return input.like(input.channels.index_select(axis, index))


@register_rule(torch.split, torch.functional.split)
def split(input: Jet, split_size: int | list[int], dim: int = 0) -> tuple[Jet, ...]:
    """Split along one axis into pieces of given sizes."""
    axis = free_dim(input, dim, "split")
    return tuple(input.like(part) for part in input.channels.split(split_size, axis))


@register_rule(torch.chunk)
def chunk(input: Jet, chunks: int, dim: int = 0) -> tuple[Jet, ...]:
    """Split along one axis into a number of pieces."""
    axis = free_dim(input, dim, "chunk")
    return tuple(input.like(part) for part in input.channels.chunk(chunks, axis))


@register_rule(torch.unbind)
def unbind(input: Jet, dim: int = 0) -> tuple[Jet, ...]:
    """Take all slices of one axis."""
    axis = free_dim(input, dim, "unbind")
    return tuple(input.like(part) for part in input.channels.unbind(axis))


def _lift_all(tensors: Sequence[Any]) -> list[Jet]:
    """Turn the constants among jets of one pass into jets."""
    jets = [tensor for tensor in tensors if isinstance(tensor, Jet)]
    check_same_pass(*jets)
    return [
        t if isinstance(t, Jet) else lift(for_every_point(t, jets[0], t.ndim), like=jets[0])
        for t in tensors
    ]


@register_rule(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0) -> Jet:
    """Concatenate jets and constants."""
    jets = _lift_all(tensors)
    axis = channel_dim(jets[0], dim)
    if axis == 1:
        point_axis_mixed(jets[0], "cat")
    return jets[0].like(torch.cat([jet.channels for jet in jets], axis))


@register_rule(torch.stack)
def stack(tensors: Sequence[Any], dim: int = 0) -> Jet:
    """Stack jets and constants along a new axis."""
    jets = _lift_all(tensors)
    axis = channel_dim(jets[0], dim, new_axes=1)
    if axis == 1:
        point_axis_mixed(jets[0], "stack")
    return jets[0].like(torch.stack([jet.channels for jet in jets], axis))


@register_rule(torch.hstack)
def hstack(tensors: Sequence[Any]) -> Jet:
    """Concatenate along the second axis."""
    return cat(tensors, dim=1)


@register_rule(torch.where)
def where(condition: Tensor, input: Any, other: Any) -> Jet:
    """Choose between two jets; the condition is constant almost everywhere."""
    reference = input if isinstance(input, Jet) else other
    if isinstance(input, Jet) and isinstance(other, Jet):
        broadcast_together(input, other)  # checks that they can be combined
    ndim = max(getattr(part, "ndim", 0) for part in (condition, input, other))
    first, second = (_view_lifted(branch, reference, ndim) for branch in (input, other))
    return reference.like(torch.where(condition, first, second))


def _view_lifted(branch: Any, reference: Jet, ndim: int) -> Tensor:
    """View the channels of a jet, or of a constant, whose first axis need not be the points."""
    if isinstance(branch, Jet):
        return trailing_view(branch, ndim)
    constant = torch.as_tensor(branch, dtype=reference.dtype, device=reference.device)
    constant = for_every_point(constant, reference, ndim)
    return prepend_axes(lift(constant, like=reference).channels, ndim - constant.ndim)


@register_rule(Tensor.where)
def where_method(input: Any, condition: Tensor, other: Any) -> Jet:
    """Choose between two jets; the method has another order of arguments."""
    return where(condition, input, other)


@register_rule(torch.clone, Tensor.contiguous)
def clone(input: Jet, *, memory_format: Any = None) -> Jet:
    """Return the jet itself, since jets are immutable."""
    return input


@register_rule(torch.detach)
def detach(input: Jet) -> Jet:
    """Return the jet of a constant: what autograd does not see has no derivative in x, either."""
    return lift(input.value.detach(), like=input)


def _conversion(convert: Any) -> Any:
    """Make the rule of a conversion of dtype or device: of every channel, if it stays real."""

    def rule(input: Any, *args: Any, **kwargs: Any) -> Jet | Tensor:
        args = tuple(part.value if isinstance(part, Jet) else part for part in args)
        kwargs = {k: part.value if isinstance(part, Jet) else part for k, part in kwargs.items()}
        if not isinstance(input, Jet):
            return convert(input, *args, **kwargs)
        value = convert(input.value.detach(), *args, **kwargs)
        if value.is_complex():
            raise NotImplementedError(
                f"Jets are real, but one is converted to {value.dtype} (in {calling_module()}). "
                "Compute real and imaginary part as two real outputs."
            )
        if not value.is_floating_point():  # constant almost everywhere, as a comparison
            return value
        return input.like(input.channels.to(value.device, value.dtype))

    return rule


_REAL = ("to", "type_as", "double", "float", "half", "bfloat16")
for _name in (*_REAL, "long", "int", "short", "bool"):
    _function = getattr(Tensor, _name)
    register_rule(_function)(_conversion(_function))


@register_rule(torch.is_floating_point)
def is_floating_point(input: Jet) -> bool:
    """Jets are."""
    return True


@register_rule(torch.is_complex)
def is_complex(input: Jet) -> bool:
    """Jets are not."""
    return False


@register_rule(Tensor.__pos__, torch.positive)
def positive(input: Jet) -> Jet:
    """Return the jet itself."""
    return input


@register_rule(functional.dropout)
def dropout(input: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    """Pass through in evaluation; a random mask has no place in a deterministic loss.

    Raises:
        NotImplementedError: In training with p > 0.
    """
    if training and p > 0:
        raise NotImplementedError(
            "Dropout draws a new mask in every pass, which a loss with curvature can't have; got "
            f"p = {p} in training mode. Call model.eval() or remove the layer."
        )
    return input


def _comparison(function: Any) -> Any:
    """Make the rule of a comparison, which is constant almost everywhere: a plain tensor."""

    def rule(input: Any, other: Any) -> Tensor:
        first, second = (x.value if isinstance(x, Jet) else x for x in (input, other))
        return function(first, second)

    return rule


for _name in ("gt", "lt", "ge", "le", "eq", "ne"):
    _function = getattr(torch, _name)
    register_rule(_function, getattr(Tensor, f"__{_name}__"))(_comparison(_function))


def _constant_like(function: Any) -> Any:
    """Make the rule of a factory that takes shape, dtype and device only: a plain tensor."""

    def rule(input: Jet, *args: Any, **kwargs: Any) -> Tensor:
        return function(input.value.detach(), *args, **kwargs)

    return rule


for _function in (
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.empty_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    Tensor.new_tensor,
):
    register_rule(_function)(_constant_like(_function))
