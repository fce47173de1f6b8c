"""The L2 term as a part of the linearization: one row of the Jacobian per entry of a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import Plan
from pinncurv.linearization.blocks import JacobianBlock, LinearLayer
from pinncurv.linearization.bound import BoundTerm, NetworkState, trained_tensors
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.fisher import Fisher
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.structure import Structure
from pinncurv.linearization.watching import identity
from pinncurv.problems import L2


@dataclass(frozen=True, eq=False)
class EntryRows(JacobianBlock):
    """Rows that are multiples of unit vectors, in the columns of one block.

    J_n = s e_(i_n)ᵀ, or zero where the n-th entry belongs to another block

    Args:
        parameters: Names and shapes of the block's parameters.
        scale: s, a tensor without axes.
        entries: i_n, the number of the entry in the block's flattened parameters, ``[n]``; -1 for
            that of another block.
        transposed: Whether the first parameter is stored as ``[d_in, d_out]``.
        kronecker: Whether the block is a linear layer.
    """

    parameters: Mapping[str, torch.Size]
    scale: Float[Tensor, ""]
    entries: Int[Tensor, " n"]
    transposed: bool = False
    kronecker: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @property
    def shapes(self) -> list[torch.Size]:
        return list(self.parameters.values())

    @property
    def num_rows(self) -> tuple[int, int]:
        return 1, len(self.entries)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Cut the last axis of a tensor into one part per parameter."""
        return list(flat.split([shape.numel() for shape in self.shapes], -1))

    def product(self, vectors: Sequence[Tensor]) -> Float[Tensor, "1 n K"]:
        flat = torch.cat([vector.reshape(len(vector), -1) for vector in vectors], 1)
        values = flat[:, self.entries.clamp(min=0)] * self.scale
        return values.where(self.entries >= 0, 0).t()[None]

    def adjoint_product(self, u: Float[Tensor, "1 n K"]) -> list[Tensor]:
        own = self.entries >= 0
        total = u.new_zeros(u.shape[2], sum(shape.numel() for shape in self.shapes))
        total.index_add_(1, self.entries[own], u[0, own].t() * self.scale)
        pairs = zip(self._split(total), self.shapes, strict=True)
        return [part.reshape(-1, *shape) for part, shape in pairs]

    def rows(self, points: slice) -> list[Tensor]:
        entries = self.entries[points]
        numbers = torch.arange(sum(shape.numel() for shape in self.shapes), device=entries.device)
        return self._split((entries[:, None] == numbers).to(self.scale)[None] * self.scale)

    def _joint(self, parts: Sequence[Tensor]) -> Tensor:
        """Bring one flattened part per parameter to the joint matrix, further axes first."""
        first, *bias = parts
        if not self.kronecker:
            return first.unsqueeze(-2)
        matrix = first.unflatten(-1, self.shapes[0])
        matrix = matrix.mT if self.transposed else matrix
        return torch.cat([matrix, bias[0].unsqueeze(-1)], -1) if bias else matrix

    def joint_rows(self, points: slice) -> Float[Tensor, "n _"]:
        return self._joint(self.rows(points))[0].flatten(1)

    @cached_property
    def _counts(self) -> Float[Tensor, "d_out d_joint"]:
        """How many rows there are for each entry of the joint matrix."""
        total = self.scale.new_zeros(sum(shape.numel() for shape in self.shapes))
        own = self.entries[self.entries >= 0]
        return self._joint(self._split(total.index_add_(0, own, total.new_ones(len(own)))))

    def squared_rows(self) -> Float[Tensor, "d_out d_joint"]:
        return self._counts * self.scale**2

    def add_gram_(self, total: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        total.diagonal().add_(self.squared_rows().flatten())
        return total

    def as_layer(self) -> LinearLayer:
        """Return a layer with the same rows but for their order and zeros.

        Its points are the c columns of the joint matrix with entries, z_j = √c e_j, and its
        components the rows of it, g_i = s / √c e_i, so that A = diag of ones and B = s² I.
        """
        used = self._counts.any(0).nonzero().flatten()
        c, d_out = len(used), len(self._counts)
        unit = torch.eye(self._counts.shape[1]).to(self._counts)
        weights = self._counts[:, used].sqrt() * (self.scale / sqrt(max(c, 1)))
        G = weights.t().diag_embed()[None].permute(2, 0, 1, 3)
        return LinearLayer(self.names[0], None, unit[used][None] * sqrt(c), G, (0,), d_out)

    def at(self, points: slice | Tensor) -> EntryRows:
        return replace(self, entries=self.entries[points])

    def to(self, dtype: torch.dtype) -> EntryRows:
        return replace(self, scale=self.scale.to(dtype))

    def with_fisher(self, fisher: Fisher, residual: Tensor) -> EntryRows:
        return self  # it is no average over data that another choice would approximate

    @staticmethod
    def join(parts: Sequence[EntryRows]) -> EntryRows:  # type: ignore[override]  # same class
        return replace(parts[0], entries=torch.cat([part.entries for part in parts]))


class EntryPart(TermPart):
    """An L2 term at some of the entries of its parameters: the points are their numbers."""

    def at(self, points: slice | Tensor) -> TermPart:
        return replace(self, x=self.x[points])

    def evaluate(self, model: Module, as_jets: bool = False) -> Float[Tensor, "n 1"]:
        flat = torch.cat([parameter.flatten() for parameter in self.data.values()])
        return flat[self.x[:, 0].long(), None]


class BoundL2(BoundTerm):
    """An L2 term with the parameters of a network; arguments as of ``BoundTerm``."""

    term: L2

    def follow(self, network: NetworkState | None = None) -> None:
        state = self.state(network)
        if state == self.followed:
            return
        self.term.check_points(self.x)
        own = trained_tensors(self.model)
        named = trained_tensors(self.model, *self._terms)
        chosen = self.term.chosen(named, own)
        self.parameters = {name: p for name, p in named.items() if name in {**own, **chosen}}
        numbers = torch.arange(sum(p.numel() for p in chosen.values()), dtype=torch.float64)
        x = numbers[:, None].to(self.x.device)
        self.whole = EntryPart(self.term, x, Plan.of({}, x), chosen, self.term.scale(x))
        self._kept_parts = [self.whole]
        self._structure = Structure((), (), {}, (), (), 1, entrywise=True)
        self.followed = state

    @property
    def structure(self) -> Structure:
        assert self._structure is not None
        return self._structure

    def state(self, network: NetworkState | None = None) -> tuple[object, ...]:
        trained = trained_tensors(self.model, *self._terms)
        chosen = [self.term.of is None or self.term.of(name) for name in trained]
        return self.term.weight, tuple(map(identity, trained.values())), tuple(chosen)

    def linearize(self, part: TermPart) -> Chunk:
        with torch.no_grad():
            residual = part.evaluate(self.model)
        numbers = part.x[:, 0].long()
        scale = residual.new_tensor(part.scale)
        blocks: dict[str, JacobianBlock] = {}
        start = 0
        for name, p in part.data.items():
            mine = (numbers >= start) & (numbers < start + p.numel())
            entries = (numbers - start).where(mine, -1)
            blocks[name] = EntryRows({name: p.shape}, scale, entries)
            start += p.numel()
        return Chunk(residual * scale, residual, blocks)


def of_layer(
    weight: EntryRows | None, bias: EntryRows | None, shapes: Mapping[str, torch.Size], **form: bool
) -> EntryRows | None:
    """Return the rows in the joint block of weight and bias; None if there are none in either.

    Args:
        weight: The rows in the weight, if it has some.
        bias: Those in the bias.
        shapes: The names and shapes of both, or of the weight alone.
        form: ``transposed`` and ``kronecker``, see ``EntryRows``.
    """
    known = weight or bias
    if known is None:
        return None
    entries = torch.full_like(known.entries, -1) if weight is None else weight.entries
    if bias is not None:
        first = next(iter(shapes.values())).numel()
        entries = (bias.entries + first).where(bias.entries >= 0, entries)
    return EntryRows(shapes, known.scale, entries, **form)
