"""The backward pass of a recorded residual, and the blocks of the Jacobian that it yields."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.jets import ConstantUse, LinearCall
from pinncurv.linearization.blocks import DenseRows, JacobianBlock, LinearLayer
from pinncurv.linearization.structure import Entry, Layer, Structure
from pinncurv.machine import sizes_of


def blocks_of_pass(
    residual: Float[Tensor, "N V"],
    scale: float | Float[Tensor, "_ _"],
    entries: Sequence[Entry],
    structure: Structure,
    parameters: Mapping[str, Tensor],
) -> dict[str, JacobianBlock]:
    """Pull a recorded residual back to its trained tensors: one backward pass per component.

    Args:
        residual: The residual r, in the graph.
        scale: sqrt(w_n / N).
        entries: What was recorded.
        structure: What the entries are.
        parameters: The trained tensors by name.
    """
    N = len(residual)
    gradients = _gradients(residual, scale, entries)
    if structure.computed:
        rows = _through_computed(gradients, entries, structure, parameters, N)
    else:
        rows = {}
    blocks: dict[str, JacobianBlock] = {}
    for layer in structure.layers:
        calls = [_record(entries[i], gradients[i], N, layer) for i in layer.calls]
        blocks[layer.weight] = _join(calls)
    for name, uses in structure.dense.items():
        parts = [_rows(entries[use.entry], gradients[use.entry], use.role, N) for use in uses]
        parts += [rows[name]] if name in rows else []
        blocks[name] = DenseRows(name, sum(parts[1:], parts[0]), parameters[name].shape)
    return blocks


def _gradients(
    residual: Tensor, scale: float | Tensor, entries: Sequence[Entry]
) -> dict[int, Float[Tensor, "V ..."]]:
    """Return the gradient of every recorded root that has points, for each component."""
    roots = {i: e.root for i, e in enumerate(entries) if isinstance(e, ConstantUse) or e.has_points}
    if not roots or not residual.requires_grad:
        zeros = (residual.shape[1],)
        return {i: root.new_zeros(zeros + root.shape) for i, root in roots.items()}
    rows = []
    V = residual.shape[1]
    for v in range(V):
        vector = torch.zeros_like(residual)
        vector[:, v] = scale if isinstance(scale, float) else scale[:, min(v, scale.shape[1] - 1)]
        rows.append(
            torch.autograd.grad(
                residual, list(roots.values()), vector, allow_unused=True, retain_graph=v < V - 1
            )
        )
    gradients = {}
    for i, root, *parts in zip(roots, roots.values(), *rows, strict=True):
        filled = [torch.zeros_like(root) if part is None else part for part in parts]
        gradients[i] = torch.stack(filled) if V > 1 else filled[0][None]
    return gradients


def _record(entry: Entry, gradient: Tensor, N: int, layer: Layer) -> LinearLayer:
    """Make the record of one call of a linear layer."""
    assert isinstance(entry, LinearCall)
    if entry.has_points:
        Z = _channels_first(entry.input, N, layer.weight)
        components = [_channels_first(g, N, layer.weight) for g in gradient]
        G = torch.stack(components) if gradient.ndim > 4 else gradient
        positions = Z.shape[0] // entry.input.shape[0]
    else:
        rows = entry.input.reshape(-1, 1, entry.input.shape[-1])
        positions = len(rows)
        Z = rows.expand(-1, N, -1)
        G = gradient.reshape(len(gradient), N, positions, -1).transpose(1, 2)
    values = tuple(range(positions))
    d_out = G.shape[-1]
    return LinearLayer(layer.weight, layer.bias, Z, G, values, d_out, layer.transposed)


def _channels_first(data: Tensor, N: int, weight: str) -> Float[Tensor, "S N d"]:
    """Bring channels ``[S, N, ..., d]`` to ``[S', N, d]``: further axes share the weight too."""
    if data.ndim < 3 or data.shape[1] != N:
        raise ValueError(
            f"The first axis of what a layer is applied to must be the axis of the N = {N} points, "
            f"but layer {weight} got shape {list(data.shape[1:])}. Keep the points first."
        )
    if data.ndim == 3:
        return data
    return data.flatten(2, -2).movedim(2, 1).flatten(0, 1)


def _join(calls: list[LinearLayer]) -> LinearLayer:
    """Join the calls of one layer along the channels."""
    first, *others = calls
    if not others:
        return first
    values: list[int] = []
    offset = 0
    for call in calls:
        values.extend(offset + channel for channel in call.value_channels)
        offset += call.Z.shape[0]
    Z, G = torch.cat([c.Z for c in calls]), torch.cat([c.gradients for c in calls], 1)
    return LinearLayer(first.weight, first.bias, Z, G, tuple(values), first.d_out, first.transposed)


def _rows(entry: Entry, gradient: Tensor, role: str, N: int) -> Float[Tensor, "V N numel"]:
    """Return the rows of the Jacobian in the tensor that one use of it contributes."""
    if isinstance(entry, LinearCall):
        bias = "bias" if role == "bias" else None
        layer = Layer("of a shared weight", bias, entry.transposed, ())
        return _record(entry, gradient, N, layer).rows(slice(None))[-1]
    if entry.per_point:  # row n depends on the n-th row of the tensor alone
        V = len(gradient)
        rows = gradient.new_zeros(V, N, *entry.constant.shape)
        index = torch.arange(N, device=rows.device)
        rows[:, index, index] = gradient
        return rows.flatten(2)
    return gradient.reshape(len(gradient), N, -1)


def _through_computed(
    gradients: dict[int, Tensor],
    entries: Sequence[Entry],
    structure: Structure,
    parameters: Mapping[str, Tensor],
    N: int,
) -> dict[str, Float[Tensor, "V N numel"]]:
    """Pull the rows in tensors that are computed from parameters back to these.

    The gradients of linear layers on tensors without points are added to ``gradients``.
    """
    outputs, cotangents = [], []
    for use in structure.computed:
        entry = entries[use.entry]
        tensor = entry.trained[1 if use.role == "bias" else 0]
        rows = _rows(entry, gradients[use.entry], use.role, N)
        V = len(rows)
        outputs.append(tensor)
        cotangents.append(rows.reshape(V * N, *tensor.shape))
    roots = [entries[i].root for i in structure.plain]
    inputs = [*(parameters[name] for name in structure.dense), *roots]
    pulled = _pull_back(outputs, inputs, cotangents)
    for i, root, part in zip(structure.plain, roots, pulled[len(structure.dense) :], strict=True):
        gradients[i] = part.reshape(V, N, *root.shape)
    named = zip(structure.dense, pulled, strict=False)
    return {name: part.reshape(V, N, -1) for name, part in named}


def _pull_back(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor]:
    """Pull batches of vectors back through a graph, a part of the batch at a time."""
    total = len(cotangents[0])
    largest = max(tensor.numel() for tensor in [*outputs, *inputs])
    step = max(1, sizes_of(cotangents[0].device).held // largest)
    pieces = []
    with warnings.catch_warnings():  # weight_norm has no batching rule: torch loops, which is right
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        for start in range(0, total, step):
            pieces.append(
                torch.autograd.grad(
                    outputs,
                    inputs,
                    [cotangent[start : start + step] for cotangent in cotangents],
                    is_grads_batched=True,
                    allow_unused=True,
                    retain_graph=start + step < total,
                )
            )
    return [_joined(parts, tensor, total) for tensor, *parts in zip(inputs, *pieces, strict=True)]


def _joined(parts: Sequence[Tensor | None], tensor: Tensor, total: int) -> Tensor:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else tensor.new_zeros(total, *tensor.shape)
