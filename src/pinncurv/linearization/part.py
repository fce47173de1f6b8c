"""A loss term at some of its points, with all that is known before a pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import Plan
from pinncurv.jets import Jet, seed
from pinncurv.machine import form_of, sizes_of
from pinncurv.problems import LossTerm
from pinncurv.problems.residual import call_residual


@dataclass(frozen=True, eq=False)
class TermPart:
    """A loss term at some or all of its points.

    r̃_n = sqrt(w_n / N) r_n, with N the number of all points, not of those of the part

    Args:
        term: The term.
        x: The points, ``[n, d]``.
        plan: The channels at these points.
        data: What is known at these points.
        scale: sqrt(w_n / N), a number or ``[n, 1]``, ``[1, V]``, ``[n, V]``.
    """

    term: LossTerm
    x: Float[Tensor, "n d"]
    plan: Plan
    data: dict[str, Tensor]
    scale: float | Float[Tensor, "_ _"]

    @classmethod
    def of_all(cls, term: LossTerm, x: Float[Tensor, "N d"]) -> TermPart:
        """Return the part of all N points."""
        term = term.to(x)
        return cls(term, x, Plan.of(term.operators, x), dict(term.data), term.scale(x))

    def at(self, points: slice | Tensor) -> TermPart:
        """Return the part at some of these points."""
        scale = self.scale
        if isinstance(scale, Tensor) and len(scale) == len(self.x):
            scale = scale[points]
        data = {name: tensor[points] for name, tensor in self.data.items()}
        return replace(self, x=self.x[points], plan=self.plan.at(points), data=data, scale=scale)

    def cut(self, widest: int, chunk_size: int | None = None) -> Iterator[TermPart]:
        """Cut into equal parts whose jets stay in the cache, of at most ``chunk_size`` points.

        Args:
            widest: Width of the widest layer.
            chunk_size: Most points of a part; None for no further limit.
        """
        N = len(self.x)
        parts = math.ceil(N * self.plan.layout.S * widest / sizes_of(self.x.device).cache)
        step = min(math.ceil(N / parts), chunk_size or N)
        if step >= N:
            yield self
            return
        for start in range(0, N, step):
            yield self.at(slice(start, start + step))

    @cached_property
    def traceable(self) -> TermPart:
        """The part with a scale that is a tensor, so that no number belongs to these points."""
        scale = self.scale
        if isinstance(scale, Tensor):
            return self
        with torch.inference_mode(mode=False):  # it serves later passes that autograd follows, too
            return replace(self, scale=self.x.new_full((1, 1), scale))

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors that are others at other points, in the same order for every part."""
        scale = [self.scale] if isinstance(self.scale, Tensor) else []
        layout = self.plan.layout.tensors
        return [self.x, self.seed.channels, *layout, *self.data.values(), *scale]

    @cached_property
    def form(self) -> tuple[object, ...]:
        """What parts have in common that one graph serves."""
        return form_of(self.tensors)

    @cached_property
    def seed(self) -> Jet:
        """The jet of the points."""
        with torch.inference_mode(mode=False):  # it serves later passes that autograd follows, too
            return seed(self.x, self.plan.layout)

    def evaluate(self, model: Module, as_jets: bool = False) -> Float[Tensor, "n V"]:
        """Evaluate the residual r, without the scale.

        Args:
            model: The network.
            as_jets: Whether the residual is called with jets without derivatives, by which its
                trained tensors are recorded.
        """
        x: Any = Jet(self.x[None], self.plan.without_derivatives) if as_jets else self.x
        points = Jet(self.seed.channels, self.plan.layout)  # which knows whether autograd is on now
        values = self.plan.read(x, model(points), as_jets)
        return self.call(x, {**values, **self.data})

    outputs = evaluate  # what a pass differentiates: of an energy not its density alone

    def call(self, x: Any, values: Mapping[str, Any]) -> Float[Tensor, "n V"]:
        """Call the residual with the values of the operators and the data."""
        return call_residual(self.term.name, self.term.residual, x, values)

    def residual(self, model: Module) -> Float[Tensor, "n V"]:
        """Evaluate the scaled residual r̃."""
        return self.evaluate(model) * self.scale

    def loss(self, model: Module) -> Float[Tensor, ""]:
        """Evaluate what these points contribute to the loss, ½‖r̃‖²."""
        return 0.5 * self.residual(model).square().sum()

    def slopes(self, model: Module) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n V"]]:
        """Return y(θ) and u(y), in the graph, with which the gradient of the loss is (∂y/∂θ)ᵀu.

        Of a sum of squares both are r̃.
        """
        residual = self.residual(model)
        return residual, residual
