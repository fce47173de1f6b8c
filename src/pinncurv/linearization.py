"""Linearization of one loss term: inputs Z and output gradients G of every linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.jets import LinearCall, record
from pinncurv.problems import LossTerm


@dataclass(frozen=True, eq=False)
class LayerLinearization:
    """What one linear layer contributes to the Jacobian of the scaled residual.

    J_n = Σ_s g_ns ⊗ [z_ns, 1 if s is a value channel else 0]

    The bias column of the mathematics is not stored: the value channels say where it is one.

    Args:
        weight: Name of the parameter ``[d_out, d_in]``.
        bias: Name of the parameter ``[d_out]``, or None.
        Z: Inputs of the layer, ``[S, N, d_in]``, the channels first.
        G: Gradients of the V residual components with respect to the layer's outputs,
            ``[V, S, N, d_out]``, or None for the forward-only choice.
        value_channels: Which of the S channels carry a value, on which the bias acts.
        d_out: Width of the layer's output.
    """

    weight: str
    bias: str | None
    Z: Float[Tensor, "S N d_in"]
    G: Float[Tensor, "V S N d_out"] | None
    value_channels: tuple[int, ...]
    d_out: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """The linearization at a part of the points.

    Args:
        residual: The scaled residual r̃ = sqrt(w_n / N) r_n, ``[n, V]``; the loss is ½‖r̃‖².
        unscaled: The residual r itself, ``[n, V]``.
        layers: The layers by the name of their weight.
    """

    residual: Float[Tensor, "n V"]
    unscaled: Float[Tensor, "n V"]
    layers: dict[str, LayerLinearization]

    def with_fisher(self, fisher: Fisher) -> Chunk:
        """Return the chunk with another choice of G, from the exact one."""
        layers = {
            name: replace(layer, G=fisher.output_gradients(layer.G, self.unscaled))
            for name, layer in self.layers.items()
            if layer.G is not None
        }
        return replace(self, layers=layers)


class Fisher(ABC):
    """Which output gradients G stand in for the curvature of the squared loss."""

    @abstractmethod
    def output_gradients(
        self, G: Float[Tensor, "V S N d_out"], residual: Float[Tensor, "N V"]
    ) -> Float[Tensor, "W S N d_out"] | None:
        """Return the chosen gradients.

        Args:
            G: The gradients of the exact Gauss-Newton, one per residual component.
            residual: The residual r itself, without weights and 1/N.
        """


@dataclass(frozen=True)
class Type2(Fisher):
    """The exact Gauss-Newton: one gradient per residual component.

    g_nv = ∂(sqrt(w_n / N) r_nv) / ∂y_n
    """

    def output_gradients(self, G: Tensor, residual: Tensor) -> Tensor:
        """Return the gradients as they are."""
        return G


@dataclass(frozen=True)
class Empirical(Fisher):
    """The empirical choice: the gradient of each point's loss, scaled by the residual.

    g_n = Σ_v r_nv ∂(sqrt(w_n / N) r_nv) / ∂y_n
    """

    def output_gradients(self, G: Tensor, residual: Tensor) -> Tensor:
        """Sum the components, weighted by the residual."""
        return torch.einsum("vsno,nv->sno", G, residual)[None]


@dataclass(frozen=True)
class ForwardOnly(Fisher):
    """No gradients at all: KFAC then takes B = w I, with w the mean weight of the term."""

    def output_gradients(self, G: Tensor, residual: Tensor) -> None:
        """Return nothing."""
        return


class Linearization:
    """One loss term, linearized in the parameters at one set of points.

    r̃(θ + v) ≈ r̃(θ) + J v,  J_n = Σ_s g_ns ⊗ z_ns per layer,  L_t = ½‖r̃‖²

    Iterating yields the chunks. Without a chunk size there is one, computed at once and kept; with
    a chunk size every iteration recomputes them one by one, so that memory does not grow with N.

    Args:
        term: The loss term.
        model: The network.
        x: The points, ``[N, d]``.
        fisher: Which output gradients G to take.
        chunk_size: How many points to linearize at a time; None for all.

    Raises:
        ValueError: If the points, dtypes or parameters do not fit; names the term.
        UncapturedParameterError: If a parameter is used outside linear layers.
    """

    def __init__(
        self,
        term: LossTerm,
        model: Module,
        x: Float[Tensor, "N d"],
        fisher: Fisher | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_compatible(term, model, x)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
        self.term = term
        self.model = model
        self.x = x
        self.fisher = Type2() if fisher is None else fisher
        self.chunk_size = chunk_size if chunk_size is not None and chunk_size < len(x) else None
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        weights = term.weights(x)
        self.mean_weight = float(weights if isinstance(weights, float) else weights.mean())
        self._scale = term.scale(x)
        self._versions = self._current_versions()
        self._kept = None if self.chunk_size else self._linearize(slice(None))
        # the structure is the same at every point, so a chunked linearization looks at one
        sample = self._linearize(slice(0, 1)) if self._kept is None else self._kept
        self.num_components = sample.residual.shape[1]
        self.layer_parameters = {name: layer.bias for name, layer in sample.layers.items()}

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks.

        Raises:
            RuntimeError: If chunks must be recomputed but the parameters have changed since.
        """
        if self._kept is not None:
            yield self._kept
            return
        assert self.chunk_size is not None
        for start in range(0, len(self.x), self.chunk_size):
            if self._versions != self._current_versions():
                raise RuntimeError(
                    f"The linearization of term '{self.term.name}' recomputes its chunks, but the "
                    "parameters have changed since it was made. Linearize again after an update."
                )
            yield self._linearize(slice(start, start + self.chunk_size))

    @property
    def residual(self) -> Float[Tensor, "N V"]:
        """The scaled residual r̃ at all points, ``[N, V]``."""
        return torch.cat([chunk.residual for chunk in self])

    @property
    def layers(self) -> dict[str, LayerLinearization]:
        """Z and G of every layer at all points.

        Raises:
            ValueError: If the linearization is chunked: iterate over its chunks instead.
        """
        if self._kept is None:
            raise ValueError(
                "A chunked linearization does not hold Z and G of all points at once. Iterate "
                "over it, or linearize with chunk_size=None."
            )
        return self._kept.layers

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters.values())

    def _linearize(self, part: slice) -> Chunk:
        """Run one forward and one backward pass at a part of the points."""
        scale = self._scale if isinstance(self._scale, float) else self._scale[part]
        x = self.x[part]
        with torch.enable_grad(), record(list(self.parameters.values())) as tape:
            residual = self.term.evaluate(self.model, x)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        check_captured(residual, names, self.term.name)
        detached = residual.detach()
        gradients = _pull_back(residual, tape.calls, _unit_vectors(detached, scale))
        layers = _collect_layers(tape.calls, gradients, names, len(x))
        return Chunk(detached * scale, detached, layers).with_fisher(self.fisher)


def linearize(
    term: LossTerm,
    model: Module,
    x: Float[Tensor, "N d"],
    fisher: Fisher | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    """Linearize one loss term at points x: one forward and one backward pass.

    See ``Linearization`` for what it holds, its arguments and errors.
    """
    return Linearization(term, model, x, fisher, chunk_size)


def check_compatible(term: LossTerm, model: Module, x: Tensor) -> None:
    """Check points against a term and a network before any work.

    Raises:
        ValueError: If the points do not fit the term, or their dtype or device the network's.
    """
    term.check_points(x)
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    if parameter is None:
        raise ValueError(
            f"The network {type(model).__name__} must have a parameter that requires a gradient, "
            "got none. Call requires_grad_() on the layers to train."
        )
    if (x.dtype, x.device) != (parameter.dtype, parameter.device):
        raise ValueError(
            f"Points and network must agree in dtype and device, got points in {x.dtype} on "
            f"{x.device} for term '{term.name}' and a network in {parameter.dtype} on "
            f"{parameter.device}. Convert one of them with .to(...)."
        )


class UncapturedParameterError(ValueError):
    """A parameter enters the loss other than as weight or bias of a linear layer."""


def check_captured(residual: Tensor, names: dict[int, str], term: str) -> None:
    """Check that the parameters enter a recorded residual through linear layers only.

    Linear layers are cut from the graph while they are recorded, so a parameter that the graph
    still reaches is used in another way.

    Raises:
        UncapturedParameterError: If there is such a parameter; names it and its first use.
    """
    uses: dict[str, str] = {}
    pending: list[tuple[Any, str]] = [(residual.grad_fn, "the residual")]
    seen = set()
    while pending:
        node, user = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            uses.setdefault(names[id(variable)], user)
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
        record = _record(call, [row[i] for row in gradients], names, N)
        grouped.setdefault((record.weight, record.bias), []).append(record)
    layers: dict[str, LayerLinearization] = {}
    for (weight, bias), records in grouped.items():
        if weight in layers:
            raise NotImplementedError(
                f"A weight must always come with the same bias, but {weight} is used with "
                f"{layers[weight].bias} and with {bias}. Give each bias a weight of its own."
            )
        layers[weight] = _join(records)
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
    for record in records:
        value_channels.extend(offset + channel for channel in record.value_channels)
        offset += record.Z.shape[0]
    gradients = [record.G for record in records if record.G is not None]
    return LayerLinearization(
        records[0].weight,
        records[0].bias,
        torch.cat([record.Z for record in records]),
        torch.cat(gradients, 1) if gradients else None,
        tuple(value_channels),
        records[0].d_out,
    )
