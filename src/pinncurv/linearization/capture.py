"""The forward pass that records the linear layers, and the backward pass to their outputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.jets import LinearCall, record
from pinncurv.linearization.blocks import TermBlock
from pinncurv.linearization.layers import Chunk, LayerLinearization


def linearize_points(block: TermBlock, model: Module, parameters: dict[str, Tensor]) -> Chunk:
    """Linearize a term at points by one forward and one backward pass.

    Args:
        block: The term and the points.
        model: The network.
        parameters: The trainable parameters by name.

    Raises:
        RuntimeError: In inference mode, in which there is no backward pass.
        UncapturedParameterError: If a parameter is used outside linear layers.
    """
    check_differentiable(block.term.name)
    with torch.enable_grad(), record(list(parameters.values())) as tape:
        residual = block.term.evaluate(model, block.x)
    names = {id(parameter): name for name, parameter in parameters.items()}
    check_captured(residual, names, {id(call.output) for call in tape.calls}, block.term.name)
    detached = residual.detach()
    gradients = _pull_back(residual, tape.calls, _unit_vectors(detached, block.scale))
    layers = _collect_layers(tape.calls, gradients, names, len(block.x))
    return Chunk(detached * block.scale, detached, layers)


def check_differentiable(term: str) -> None:
    """Check that autograd is able to differentiate a term.

    Args:
        term: Its name.

    Raises:
        RuntimeError: In inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"Differentiating term '{term}' must be possible by a backward pass, got "
            "torch.inference_mode(), which allows none. Use torch.no_grad() instead."
        )


def trainable_parameters(model: Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, by name, in the network's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class UncapturedParameterError(ValueError):
    """A parameter enters the loss other than as weight or bias of a linear layer."""


def check_captured(residual: Tensor, names: dict[int, str], recorded: set[int], term: str) -> None:
    """Check that the parameters enter a recorded residual through linear layers only.

    Linear layers are cut from the graph while they are recorded, so what the graph still reaches
    and requires a gradient is used in another way.

    Args:
        residual: The residual, in the graph.
        names: Names of the trainable parameters by their id.
        recorded: Ids of the recorded outputs, the roots of the graph.
        term: Name of the term.

    Raises:
        UncapturedParameterError: If there is such a tensor; names it and its first use.
    """
    uses: dict[str, str] = {}
    pending: list[tuple[Any, str]] = [(residual.grad_fn, "the residual")]
    seen = set()
    while pending:
        node, user = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in recorded:
            foreign = f"a tensor of shape {list(leaf.shape)} that is no parameter of the network"
            uses.setdefault(names.get(id(leaf), foreign), user)
        name = node.name()
        pending.extend((following, name) for following, _ in node.next_functions)
    if uses:
        listing = ", ".join(f"{name} (used by {user})" for name, user in uses.items())
        raise UncapturedParameterError(
            f"Every trainable parameter must enter term '{term}' as weight or bias of a linear "
            f"layer (torch.nn.functional.linear), but these are used in another way: {listing}. "
            "Rewrite them as linear layers or freeze them with requires_grad_(False)."
        )


def _unit_vectors(residual: Tensor, scale: Tensor | float) -> list[Tensor]:
    """Return sqrt(w_n / N) times the unit vector of each residual component."""
    vectors = []
    for v in range(residual.shape[1]):
        vector = torch.zeros_like(residual)
        vector[:, v] = scale if isinstance(scale, float) else scale[:, 0]
        vectors.append(vector)
    return vectors


def _pull_back(
    residual: Tensor, calls: list[LinearCall], vectors: list[Tensor]
) -> list[list[Tensor | None]]:
    """Return the gradient of every call's output for each vector."""
    if not calls or not residual.requires_grad:
        return [[None] * len(calls) for _ in vectors]
    outputs = [call.output for call in calls]
    last = len(vectors) - 1
    return [
        list(
            torch.autograd.grad(
                residual, outputs, vector, allow_unused=True, retain_graph=v != last
            )
        )
        for v, vector in enumerate(vectors)
    ]


def _collect_layers(
    calls: list[LinearCall],
    gradients: list[list[Tensor | None]],
    names: dict[int, str],
    N: int,
) -> dict[str, LayerLinearization]:
    """Make one record per layer; the calls of a layer used several times are joined along S."""
    grouped: dict[tuple[str, str | None], list[LayerLinearization]] = {}
    for i, call in enumerate(calls):
        layer = _record(call, [row[i] for row in gradients], names, N)
        grouped.setdefault((layer.weight, layer.bias), []).append(layer)
    layers: dict[str, LayerLinearization] = {}
    owners: dict[str, str] = {}
    for (weight, bias), records in grouped.items():
        if weight in layers:
            raise NotImplementedError(
                f"A weight must always come with the same bias, but {weight} is used with "
                f"{layers[weight].bias} and with {bias}. Give each bias a weight of its own."
            )
        layers[weight] = _join(records)
        known = owners.setdefault(bias, weight) if bias is not None else weight
        if known != weight:
            raise NotImplementedError(
                f"A bias must belong to one weight, but {bias} is used with {known} and {weight}. "
                "Give each weight a bias of its own."
            )
    return layers


def _record(
    call: LinearCall, gradients: list[Tensor | None], names: dict[int, str], N: int
) -> LayerLinearization:
    """Make the record of one call."""
    weight = names.get(id(call.weight))
    bias = None if call.bias is None else names.get(id(call.bias))
    if weight is None or (call.bias is not None and bias is None):
        raise NotImplementedError(
            "Weight and bias of a linear layer must be trained together, but only "
            f"{weight or bias} requires a gradient. Freeze both or neither."
        )
    Z = _channels_first(call.input, N, weight)
    filled = [torch.zeros_like(call.output) if g is None else g for g in gradients]
    components = [_channels_first(g.detach(), N, weight) for g in filled]
    G = torch.stack(components) if len(components) > 1 else components[0][None]
    positions = Z.shape[0] // call.input.shape[0]
    return LayerLinearization(weight, bias, Z, G, tuple(range(positions)), call.weight.shape[0])


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


def _join(records: list[LayerLinearization]) -> LayerLinearization:
    """Join the records of one layer along the channels."""
    if len(records) == 1:
        return records[0]
    value_channels: list[int] = []
    offset = 0
    for layer in records:
        value_channels.extend(offset + channel for channel in layer.value_channels)
        offset += layer.Z.shape[0]
    gradients = [layer.G for layer in records if layer.G is not None]
    return LayerLinearization(
        records[0].weight,
        records[0].bias,
        torch.cat([layer.Z for layer in records]),
        torch.cat(gradients, 1) if gradients else None,
        tuple(value_channels),
        records[0].d_out,
    )
