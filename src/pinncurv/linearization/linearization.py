"""Linearization of one loss term at one set of points, and one pass over several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from pinncurv.linearization.blocks import JacobianBlock
from pinncurv.linearization.bound import BoundTerm
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.energies import BoundEnergy
from pinncurv.linearization.entries import BoundL2
from pinncurv.linearization.fisher import Fisher, Type2
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.structure import Structure
from pinncurv.problems import L2, Energy, LossTerm
from pinncurv.problems.energy import check_squares

# What is done with every part of the points: it is called with the position of the term.
Visitor = Callable[[int, Chunk], None]


class Linearization:
    """One loss term, linearized in the parameters at one set of points.

    r̃(θ + v) ≈ r̃(θ) + J v,  L_t = ½‖r̃‖²,  or of an energy  L_t(θ + v) ≈ L_t + ∇L_tᵀv + ½‖J v‖²

    Without a chunk size the chunks are computed at once and kept, in parts that stay in the cache;
    with a chunk size every iteration recomputes them one by one, so that memory does not grow with
    N. ``linearize`` makes one.

    Args:
        bound: The term with network and points.
        fisher: Which output gradients G to take.
        kept: The chunks, if they are known.
    """

    def __init__(
        self, bound: BoundTerm, fisher: Fisher | None = None, kept: list[Chunk] | None = None
    ) -> None:
        self.bound = bound
        self.fisher = Type2() if fisher is None else fisher
        self.parameters = bound.parameters
        self.structure: Structure = bound.structure
        self.chunk_size = bound.chunk_size if kept is None else None
        self._whole = bound.whole
        self._versions = self._current_versions()
        self._followed = bound.followed
        if kept is None and self.chunk_size is None:
            kept = list(self._chunks(bound.parts))
        self._kept = kept

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks.

        Raises:
            RuntimeError: If chunks must be recomputed but the parameters have changed since.
        """
        return iter(self._chunks(self.parts()) if self._kept is None else self._kept)

    def _chunks(self, parts: Iterable[TermPart]) -> Iterator[Chunk]:
        exact, linearize = self.fisher == Type2(), self.bound.linearize
        if self.bound.compiles:
            linearize = partial(self.bound.linearize_again, gradient=self.chunk_size is None)
        for part in parts:
            chunk = linearize(part)
            yield chunk if exact else chunk.with_fisher(self.fisher)
            del chunk  # or it would live on while the next one is computed

    def parts(self) -> Iterator[TermPart]:
        """Yield the term at the points that are differentiated at a time.

        Raises:
            RuntimeError: If the parameters, or what the loss depends on, have changed since the
                linearization.
        """
        if self._followed != self.bound.state():
            raise RuntimeError(
                f"Passes of the linearization of term '{self.term.name}' are recomputed, but what "
                "the loss depends on (points, data, weights, numbers that functions use) has "
                "changed since it was made. Linearize again."
            )
        parts = self.bound.parts if self._whole is self.bound.whole else [self._whole]
        for part in parts:
            if self._versions != self._current_versions():
                raise RuntimeError(
                    f"Passes of the linearization of term '{self.term.name}' are recomputed, but "
                    "the parameters have changed since it was made. Linearize again after an "
                    "update."
                )
            yield part

    @property
    def term(self) -> LossTerm:
        """The loss term."""
        return self.bound.term

    @property
    def model(self) -> Module:
        """The network."""
        return self.bound.model

    @property
    def x(self) -> Float[Tensor, "N d"]:
        """The points."""
        return self._whole.x

    @property
    def num_components(self) -> int:
        """V, the number of residual components."""
        return self.structure.components

    @property
    def mean_weight(self) -> float:
        """The mean of the points' weights."""
        scale = self._whole.scale
        N = len(self.bound.x)
        return N * (scale**2 if isinstance(scale, float) else float(scale.square().mean()))

    @property
    def residual(self) -> Float[Tensor, "N V"]:
        """The scaled residual r̃ at all points, ``[N, V]``.

        Raises:
            TypeError: If the term is an energy, which has none.
        """
        check_squares([self.term])
        return torch.cat([chunk.residual for chunk in self])

    @property
    def blocks(self) -> dict[str, JacobianBlock]:
        """The blocks of the Jacobian at all points, by the name of their first parameter."""
        chunks = list(self)
        if len(chunks) == 1:
            return chunks[0].blocks
        return {
            name: block.join([chunk.blocks[name] for chunk in chunks])
            for name, block in chunks[0].blocks.items()
        }

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters.values())

    @torch.no_grad()
    def residual_now(self) -> Float[Tensor, "N V"]:
        """Evaluate r̃ at the same points and the parameters of now, without a graph."""
        if self._whole is not self.bound.whole:  # of other numbers of points every time
            return self._whole.residual(self.model)
        return torch.cat([self.bound.residual(part) for part in self.bound.parts])

    def at(self, points: Int[Tensor, " m"]) -> Linearization:
        """Linearize anew at some of the points, as parts of all: with the same scale w_n / N.

        Args:
            points: Which points.
        """
        return _of_part(self.bound, self._whole.at(points), self.fisher)


def linearize_some(bound: BoundTerm, points: Int[Tensor, " m"]) -> Linearization:
    """Linearize a term at some of its points as if there were no others.

    r̃_n = sqrt(w_n / m) r_n

    Args:
        bound: The term with network and all N points.
        points: Which m of them.
    """
    part = bound.whole.at(points)
    scale = part.scale * math.sqrt(len(bound.x) / len(part.x))
    return _of_part(bound, replace(part, scale=scale), Type2())


def _of_part(bound: BoundTerm, part: TermPart, fisher: Fisher) -> Linearization:
    result = Linearization(bound, fisher, [bound.linearize(part).with_fisher(fisher)])
    result._whole = part
    return result


def bind(
    term: LossTerm,
    model: Module,
    x: Tensor,
    chunk_size: int | None = None,
    terms: Sequence[LossTerm] = (),
    check: bool = False,
    compile: bool = False,
) -> BoundTerm:
    """Bind a term to a network and points; arguments as of ``BoundTerm``."""
    if not isinstance(term, LossTerm):
        raise TypeError(
            f"What is linearized must be a LossTerm, got {type(term).__name__}. Write "
            "linearize(term, model, x)."
        )
    kinds: dict[type[LossTerm], type[BoundTerm]] = {L2: BoundL2, Energy: BoundEnergy}
    kind = next((kind for own, kind in kinds.items() if isinstance(term, own)), BoundTerm)
    return kind(term, model, x, chunk_size, terms, check, compile)


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
        UncapturedParameterError: If a trained tensor is used where its rows cannot be found.
        FloatingPointError: If a parameter is not finite; names it.
    """
    return Linearization(bind(term, model, x, chunk_size), fisher)


def run(linearizations: Sequence[Linearization], *visitors: Visitor) -> None:
    """Go over all points of all terms once, and call every visitor with each chunk.

    This is how sums over points are taken: several in one pass, and no chunk lives longer than its
    visits. An objective's linearization may have a ``run`` of its own, which adds visitors.

    Args:
        linearizations: One per term.
        visitors: Functions of the position of the term and the chunk.
    """
    own = getattr(linearizations, "run", None)
    if own is not None:
        own(*visitors)
        return
    visit_all(linearizations, visitors)


def visit_all(linearizations: Sequence[Linearization], visitors: Sequence[Visitor]) -> None:
    """Call every visitor with each chunk, one after the other."""
    for t, linearization in enumerate(linearizations):
        for chunk in linearization:
            for visit in visitors:
                visit(t, chunk)
            del chunk  # or it would live on while the next one is computed
