"""The parameter space that linearizations share: names, shapes and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pinncurv.linearization import (
    BoundTerm,
    Chunk,
    DenseRows,
    EntryRows,
    Fisher,
    JacobianBlock,
    Linearization,
    LinearLayer,
    Type2,
    of_layer,
    run,
)
from pinncurv.linops import Block


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """The trained tensors of network and terms, in their order, and the blocks they belong to.

    Args:
        parameters: The parameters by name: those of the network, then those of the terms.
        blocks: One block per linear layer, weight and bias together, and one per other parameter.
    """

    parameters: dict[str, Tensor]
    blocks: tuple[Block, ...]
    _fits: dict[int, tuple[Any, bool]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, linearizations: Sequence[Linearization]) -> ParameterSpace:
        """Return the space of some terms; that of an objective is known already.

        Raises:
            TypeError: If there is no sequence of them.
            ValueError: If there is no linearization, the terms differ in their network, or a
                parameter is used by no term (names it).
        """
        if not isinstance(linearizations, Sequence):
            raise TypeError(
                "A curvature is a function of linearizations, one per term, got "
                f"{type(linearizations).__name__}. Pass objective.linearize(), or [linearization]."
            )
        own = getattr(linearizations, "space", None)
        return own if isinstance(own, ParameterSpace) else cls.of_bound(linearizations)

    @classmethod
    def of_bound(
        cls, terms: Sequence[Linearization | BoundTerm], check: bool = True
    ) -> ParameterSpace:
        """Return the space of bound or linearized terms, which must use all of it if ``check``."""
        if not terms:
            raise ValueError("There must be at least one linearization, got none.")
        first = terms[0]
        parameters: dict[str, Tensor] = {}
        for other in terms:
            if [id(p) for p in other.model.parameters()] != [
                id(p) for p in first.model.parameters()
            ]:
                raise ValueError(
                    "All terms must be linearized in the same parameters, but term "
                    f"'{other.term.name}' has others than '{first.term.name}'. Pass one model that "
                    "contains all networks."
                )
            known = {id(p) for p in parameters.values()}
            parameters.update({n: p for n, p in other.parameters.items() if id(p) not in known})
        blocks = _find_blocks(parameters, terms)
        used = {position for block in blocks for position in block.positions}
        unused = [name for i, name in enumerate(parameters) if i not in used]
        if check and unused:
            raise ValueError(
                f"Every trainable parameter must be used by a term, but {', '.join(unused)} is "
                "used by none. Freeze it with requires_grad_(False); that an L2 term makes it "
                "smaller does not count."
            )
        return cls(parameters, blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.parameters)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters."""
        return [parameter.shape for parameter in self.parameters.values()]

    @property
    def dimension(self) -> int:
        """D, the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def zeros(self, *shape: int) -> Tensor:
        """Return a zero tensor of the parameters' dtype and device."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def arrange(self, linearization: Linearization, chunk: Chunk) -> list[JacobianBlock | None]:
        """Return the blocks of a chunk in the order of those of the space; None for unused ones."""
        if linearization.structure.entrywise:
            return self._entries(linearization, chunk)
        if self._fit(linearization):
            names = self.names
            return [chunk.blocks.get(names[block.weight]) for block in self.blocks]
        return self._rearranged(linearization, chunk)

    def _entries(self, linearization: Linearization, chunk: Chunk) -> list[JacobianBlock | None]:
        """Return the blocks of an L2 term, whose rows are put together as the others ask."""
        rows: dict[int, EntryRows] = {}
        for name, block in chunk.blocks.items():
            assert isinstance(block, EntryRows)
            rows[id(linearization.parameters[name])] = block
        parameters = list(self.parameters.items())
        arranged: list[JacobianBlock | None] = []
        for place in self.blocks:
            own = [parameters[position] for position in place.positions]
            weight, bias = (rows.get(id(p)) for _, p in (*own, (None, None))[:2])
            shapes = {name: p.shape for name, p in own}
            flipped = place.kronecker and place.stored is not None
            arranged.append(
                of_layer(weight, bias, shapes, transposed=flipped, kronecker=place.kronecker)
            )
        return arranged

    def _fit(self, linearization: Linearization) -> bool:
        """Whether a term knows its blocks by the same names and in the same form."""
        structure = linearization.structure
        known = self._fits.get(id(structure))
        if known is None or known[0] is not structure:
            names = self.names
            mine = {
                names[b.weight]: (b.bias if b.bias is None else names[b.bias], b.kronecker)
                for b in self.blocks
            }
            theirs = {layer.weight: (layer.bias, True) for layer in structure.layers}
            theirs.update(dict.fromkeys(structure.dense, (None, False)))
            same = all(self.parameters.get(n) is p for n, p in linearization.parameters.items())
            known = structure, same and all(mine.get(n) == form for n, form in theirs.items())
            self._fits[id(structure)] = known
        return known[1]

    def _rearranged(self, linearization: Linearization, chunk: Chunk) -> list[JacobianBlock | None]:
        """Do the same where terms differ in what is a layer, by other blocks of the same rows."""
        canonical = {id(p): name for name, p in self.parameters.items()}
        names = {name: canonical[id(p)] for name, p in linearization.parameters.items()}
        layers = {
            names[block.weight]: block
            for block in chunk.blocks.values()
            if isinstance(block, LinearLayer)
        }
        wanted = {self.names[block.weight] for block in self.blocks if not block.kronecker}
        dense: dict[str, DenseRows] = {}
        for block in chunk.blocks.values():
            if wanted.intersection(names[name] for name in block.names):
                dense.update({names[part.name]: part for part in block.as_dense()})
        arranged: list[JacobianBlock | None] = []
        for place in self.blocks:
            name = self.names[place.weight]
            layer = layers.get(name) if place.kronecker else None
            if layer is not None and place.bias is None:
                layer = replace(layer, bias=None)
            arranged.append(layer if place.kronecker else dense.get(name))
        return arranged


def _find_blocks(
    parameters: dict[str, Tensor], linearizations: Sequence[Linearization | BoundTerm]
) -> tuple[Block, ...]:
    """Find what is a linear layer in every term that uses it."""
    canonical = {id(p): name for name, p in parameters.items()}
    forms: dict[str, set[tuple[str | None, bool]]] = {}
    others: set[str] = set()
    for linearization in linearizations:
        names = {name: canonical[id(p)] for name, p in linearization.parameters.items()}
        for layer in linearization.structure.layers:
            bias = None if layer.bias is None else names[layer.bias]
            forms.setdefault(names[layer.weight], set()).add((bias, layer.transposed))
        others |= {names[name] for name in linearization.structure.dense}
    owners: dict[str, set[str]] = {}
    for weight, found in forms.items():
        biases = {bias for bias, _ in found if bias is not None}
        if weight in others or len({transposed for _, transposed in found}) > 1:
            others |= {weight, *biases}
        elif len({bias for bias, _ in found}) > 1:
            others |= biases
        for bias in biases:
            owners.setdefault(bias, set()).add(weight)
    others |= {bias for bias, weights in owners.items() if len(weights) > 1}
    positions = {name: i for i, name in enumerate(parameters)}
    blocks: dict[str, Block] = {}
    joined: set[str] = set()
    for weight in forms.keys() - others:
        bias, transposed = next(iter(forms[weight]))
        bias = None if bias in others else bias
        d_out, d_in = parameters[weight].shape[:: -1 if transposed else 1]
        stored = (d_in, d_out) if transposed else None
        position = None if bias is None else positions[bias]
        label = weight.rpartition(".")[0] or weight
        blocks[weight] = Block(label, positions[weight], position, d_out, d_in, stored)
        joined |= {bias} if bias is not None else set()
    for name in others - joined:
        blocks[name] = Block.dense(name, positions[name], parameters[name].shape)
    return tuple(blocks[name] for name in parameters if name in blocks)


def visit_blocks(
    linearizations: Sequence[Linearization],
    space: ParameterSpace,
    visit: Callable[[int, int, JacobianBlock], None],
    fisher: Fisher | None = None,
) -> None:
    """Go over all points once; call a function with each term, block and its rows at some points.

    ``visit`` gets the positions of term and block, and the block's rows with the output gradients
    of ``fisher``, by default those of the linearization.

    Raises:
        ValueError: If a linearization was made with another choice than ``fisher``.
    """

    def visit_each(t: int, blocks: Sequence[JacobianBlock | None]) -> None:
        for i, block in enumerate(blocks):
            if block is not None:
                visit(t, i, block)

    visit_chunks(linearizations, space, visit_each, fisher)


def visit_chunks(
    linearizations: Sequence[Linearization],
    space: ParameterSpace,
    visit: Callable[[int, Sequence[JacobianBlock | None]], None],
    fisher: Fisher | None = None,
) -> None:
    """Do the same with all blocks of a chunk at a time, None where the term does not use one."""
    for linearization in linearizations:
        made = linearization.fisher
        if fisher is not None and made not in (Type2(), fisher):
            raise ValueError(
                f"Term '{linearization.term.name}' was linearized with {made}, which can't be "
                f"turned into {fisher}. Linearize with fisher=Type2(), the default."
            )

    def visit_chunk(t: int, chunk: Chunk) -> None:
        if fisher not in (None, linearizations[t].fisher):
            assert fisher is not None
            chunk = chunk.with_fisher(fisher)
        visit(t, space.arrange(linearizations[t], chunk))

    run(linearizations, visit_chunk)
