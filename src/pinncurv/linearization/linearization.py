"""Linearization of one loss term at one set of points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from pinncurv.linearization.blocks import TermBlock
from pinncurv.linearization.capture import linearize_points, trainable_parameters
from pinncurv.linearization.fisher import Fisher, Type2
from pinncurv.linearization.layers import Chunk, LayerLinearization, join_points
from pinncurv.problems import LossTerm


class Linearization:
    """One loss term, linearized in the parameters at one set of points.

    r̃(θ + v) ≈ r̃(θ) + J v,  J_n = Σ_s g_ns ⊗ z_ns per layer,  L_t = ½‖r̃‖²

    Iterating yields the chunks. Without a chunk size they are computed at once and kept, in blocks
    of points that stay in the cache; with a chunk size every iteration recomputes them one by one,
    so that memory does not grow with N. ``linearize`` builds it after checking its arguments.

    Args:
        term: The loss term.
        model: The network.
        x: The points, ``[N, d]``.
        fisher: Which output gradients G to take.
        chunk_size: How many points to linearize at a time; None for all.
    """

    def __init__(
        self,
        term: LossTerm,
        model: Module,
        x: Tensor,
        fisher: Fisher | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.model = model
        self.fisher = Type2() if fisher is None else fisher
        self.chunk_size = chunk_size if chunk_size is not None and chunk_size < len(x) else None
        self.parameters = trainable_parameters(model)
        self._all = TermBlock.of_all(term, x)
        self._versions = self._current_versions()
        self._kept = list(self._chunks()) if self.chunk_size is None else None
        # the structure is the same at every point, so a chunked linearization looks at one
        sample = self._kept[0] if self._kept else self._linearize(self._all.at(slice(0, 1)))
        self.num_components = sample.residual.shape[1]
        self.layer_parameters = {name: layer.bias for name, layer in sample.layers.items()}

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks.

        Raises:
            RuntimeError: If chunks must be recomputed but the parameters have changed since.
        """
        return iter(self._chunks() if self._kept is None else self._kept)

    def _chunks(self) -> Iterator[Chunk]:
        return map(self._linearize, self.term_blocks())

    def term_blocks(self) -> Iterator[TermBlock]:
        """Yield the term at the points that are differentiated at a time.

        Raises:
            RuntimeError: If the parameters have changed since the linearization.
        """
        for block in self._all.cut(self.parameters, self.chunk_size):
            if self._versions != self._current_versions():
                raise RuntimeError(
                    f"Passes of the linearization of term '{self.term.name}' are recomputed, but "
                    "the parameters have changed since it was made. Linearize again after an "
                    "update."
                )
            yield block

    @property
    def term(self) -> LossTerm:
        """The loss term."""
        return self._all.term

    @property
    def x(self) -> Float[Tensor, "N d"]:
        """The points."""
        return self._all.x

    @property
    def mean_weight(self) -> float:
        """The mean of the points' weights."""
        weights = self.term.weights(self.x)
        return float(weights if isinstance(weights, float) else weights.mean())

    @property
    def residual(self) -> Float[Tensor, "N V"]:
        """The scaled residual r̃ at all points, ``[N, V]``."""
        return torch.cat([chunk.residual for chunk in self])

    @property
    def layers(self) -> dict[str, LayerLinearization]:
        """Z and G of every layer at all points, by the name of the layer's weight."""
        return join_points([chunk.layers for chunk in self])

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters.values())

    def at(self, points: Int[Tensor, " m"]) -> Linearization:
        """Linearize anew at some of the points, as parts of all: with the same scale w_n / N.

        Args:
            points: Which points.
        """
        part = Linearization.__new__(Linearization)
        part.__dict__.update(vars(self))
        part._all, part.chunk_size = self._all.at(points), None
        part._kept = [self._linearize(part._all)]
        return part

    def _linearize(self, block: TermBlock) -> Chunk:
        """Run one forward and one backward pass at some points."""
        return linearize_points(block, self.model, self.parameters).with_fisher(self.fisher)


def linearize(
    term: LossTerm,
    model: Module,
    x: Tensor,
    fisher: Fisher | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    """Linearize one loss term at points x: one forward and one backward pass.

    Args:
        term: The loss term.
        model: The network.
        x: The points, ``[N, d]``.
        fisher: Which output gradients G to take.
        chunk_size: How many points to linearize at a time; None for all.

    Raises:
        RuntimeError: In inference mode, in which there is no backward pass.
        ValueError: If the points, dtypes or parameters do not fit; names the term.
        UncapturedParameterError: If a parameter is used outside linear layers.
        FloatingPointError: If a parameter is not finite; names it.
    """
    check_compatible(term, model, x)
    check_finite_parameters(model)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    return Linearization(term, model, x, fisher, chunk_size)


def check_compatible(term: LossTerm, model: Module, x: Tensor) -> None:
    """Check points against a term and a network before any work.

    Raises:
        ValueError: If the points do not fit the term, or their dtype or device the network's.
    """
    term.check_points(x)
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError(
            f"The network {type(model).__name__} must have a parameter that requires a gradient, "
            "got none. Call requires_grad_() on the layers to train."
        )
    for name, parameter in parameters.items():
        if (x.dtype, x.device) != (parameter.dtype, parameter.device):
            raise ValueError(
                f"Points and network must agree in dtype and device, got points in {x.dtype} on "
                f"{x.device} for term '{term.name}' and parameter {name} in {parameter.dtype} on "
                f"{parameter.device}. Convert one of them with .to(...)."
            )


def check_finite_parameters(model: Module) -> None:
    """Check that no parameter is NaN or infinite.

    Raises:
        FloatingPointError: If one is; names it.
    """
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"The parameters must be finite, but {', '.join(bad)} contains NaN or infinity. "
            "Initialize the network again, or load a checkpoint from before it diverged."
        )
