"""What one pass of a term looks like, found once: layers, other parameters, and who uses them."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.jets import ConstantUse, LinearCall, Tape, record
from pinncurv.linearization.part import TermPart

Entry = LinearCall | ConstantUse


class UncapturedParameterError(ValueError):
    """A trained tensor enters the loss where its rows of the Jacobian cannot be found."""


@dataclass(frozen=True)
class Layer:
    """A linear layer: a group of parameters with a Kronecker structure.

    Args:
        weight: Name of its weight.
        bias: Name of its bias, if that is used with this weight only, and always.
        transposed: Whether the weight is stored as ``[d_in, d_out]``.
        calls: Which entries of the tape are its calls.
    """

    weight: str
    bias: str | None
    transposed: bool
    calls: tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """One use of a trained tensor: as ``weight``, ``bias`` or ``constant`` of an entry."""

    entry: int
    role: str


@dataclass(frozen=True, eq=False)
class Structure:
    """Who uses the trained tensors of one term, and how.

    Args:
        signature: Ids of the trained parameters that the entries of the tape use, in order.
        layers: The linear layers.
        dense: The other parameters by name, with their direct uses.
        computed: Uses of tensors that are computed from parameters.
        plain: Entries that are linear layers on tensors without points, in the graph of these.
        components: V, the number of residual components.
        entrywise: Whether the term is an L2 term, whose rows fit any blocks.
    """

    signature: tuple[tuple[int, ...], ...]
    layers: tuple[Layer, ...]
    dense: dict[str, tuple[Use, ...]]
    computed: tuple[Use, ...]
    plain: tuple[int, ...]
    components: int
    entrywise: bool = False

    @property
    def used(self) -> set[str]:
        """Names of the parameters that the term uses."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        return {*(layer.weight for layer in self.layers), *biases, *self.dense}


def find_structure(
    part: TermPart, model: Module, parameters: Mapping[str, Tensor], as_jets: bool
) -> Structure:
    """Run one pass at a few points, and find out what the trained tensors do.

    Args:
        part: The term at a few points.
        model: The network.
        parameters: The trained tensors by name.
        as_jets: Whether the residual has trained tensors.

    Raises:
        UncapturedParameterError: If one is used where its rows cannot be found; names it.
    """
    with torch.enable_grad(), record(plain=True) as tape:
        residual = part.evaluate(model, as_jets)
    names = {id(parameter): name for name, parameter in parameters.items()}
    reached = _reached(residual, tape, names, part.term.name)
    direct: dict[str, list[Use]] = {}
    computed: list[Use] = []
    hidden: set[str] = set()  # parameters that tensors are computed from
    plain: set[int] = set()
    for i, role, tensor in _trained(tape.entries, reached):
        if id(tensor) in names:
            direct.setdefault(names[id(tensor)], []).append(Use(i, role))
            continue
        computed.append(Use(i, role))
        found, passed = _ancestors(tensor, tape, names, part.term.name)
        hidden |= found
        plain |= passed
    for i, role, tensor in _trained(tape.entries, plain):
        if id(tensor) not in names:
            raise _uncaptured({_foreign(tensor): "a linear layer"}, part.term.name)
        direct.setdefault(names[id(tensor)], []).append(Use(i, role))
    layers = _find_layers(direct, hidden, tape.entries)
    taken = {name for layer in layers for name in (layer.weight, layer.bias)}
    dense = {name: tuple(uses) for name, uses in direct.items() if uses and name not in taken}
    dense.update({name: () for name in sorted(hidden) if name not in dense})
    return Structure(
        signature(tape, names),
        tuple(layers),
        {name: dense[name] for name in parameters if name in dense},
        tuple(computed),
        tuple(sorted(plain)),
        residual.shape[1],
    )


def signature(tape: Tape, known: Container[int]) -> tuple[tuple[int, ...], ...]:
    """Return what identifies a pass: the trained parameters of every entry, 0 for other tensors."""
    return tuple(
        tuple(id(t) if id(t) in known else 0 for t in entry.trained if t.requires_grad)
        for entry in tape.entries
    )


def _has_points(entry: Entry) -> bool:
    return isinstance(entry, ConstantUse) or entry.has_points


def _trained(
    entries: Sequence[Entry], chosen: Collection[int]
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield what is trained in some entries of a tape, with its role there."""
    for i, entry in enumerate(entries):
        roles = ("constant",) if isinstance(entry, ConstantUse) else ("weight", "bias")
        for role, tensor in zip(roles, entry.trained, strict=False):
            if i in chosen and tensor.requires_grad:
                yield i, role, tensor


def _find_layers(
    direct: Mapping[str, Sequence[Use]], hidden: set[str], entries: Sequence[Entry]
) -> list[Layer]:
    """Find the parameters that are weights of linear layers and nothing else, and their biases."""
    names = {use.entry: name for name, uses in direct.items() for use in uses if use.role == "bias"}
    layers = []
    for weight, uses in direct.items():
        calls = [entries[use.entry] for use in uses]
        if not uses or weight in hidden or any(use.role != "weight" for use in uses):
            continue
        flags = {call.transposed for call in calls if isinstance(call, LinearCall)}
        if len(flags) != 1:
            continue
        biases = {names.get(use.entry) for use in uses}
        bias = biases.pop() if len(biases) == 1 else None
        if bias is not None:
            alone = {(use.entry, use.role) for use in direct[bias]}
            if bias in hidden or alone != {(use.entry, "bias") for use in uses}:
                bias = None
        layers.append(Layer(weight, bias, flags.pop(), tuple(use.entry for use in uses)))
    return layers


def _leaves(roots: Iterable[Any], stops: Mapping[Any, int]) -> Iterator[tuple[Tensor, str] | int]:
    """Walk through an autograd graph; yield leaves with their first user, and stops on the way."""
    pending: list[tuple[Any, str]] = [(node, "the residual") for node in roots]
    seen = set()
    while pending:
        node, user = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            yield stops[node]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf, user
        name = node.name()
        pending.extend((following, name) for following, _ in node.next_functions)


def _node(tensor: Tensor) -> Any:
    """Return a tensor's node in the autograd graph, also for a leaf."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


def _ancestors(
    tensor: Tensor, tape: Tape, names: Mapping[int, str], term: str
) -> tuple[set[str], set[int]]:
    """Return the parameters that a tensor is computed from, and the plain layers on the way."""
    plain = {_node(e.root): i for i, e in enumerate(tape.entries) if not _has_points(e)}
    found: set[str] = set()
    passed: set[int] = set()
    recorded = {id(entry.root) for entry in tape.entries}
    for item in _leaves([_node(tensor)], plain):
        if isinstance(item, int):
            passed.add(item)
        elif id(item[0]) in names:
            found.add(names[id(item[0])])
        elif id(item[0]) not in recorded:
            raise _uncaptured({_foreign(item[0]): item[1]}, term)
    return found, passed


def _reached(residual: Tensor, tape: Tape, names: Mapping[int, str], term: str) -> set[int]:
    """Return the entries that a residual depends on.

    Raises:
        UncapturedParameterError: If a trained tensor enters elsewhere; names it and its first use.
    """
    roots = {_node(e.root): i for i, e in enumerate(tape.entries) if _has_points(e)}
    recorded = {id(entry.root) for entry in tape.entries}
    # a linear layer on a plain tensor that no jet has met: in a residual that is no nn.Module
    plain = {id(entry.root): entry for entry in tape.entries if not _has_points(entry)}
    reached: set[int] = set()
    uses: dict[str, str] = {}
    # a root itself, if it is of parameters alone
    for item in _leaves([_node(residual)] if residual.requires_grad else [], roots):
        if isinstance(item, int):
            reached.add(item)
        elif id(item[0]) in plain:
            for tensor in plain[id(item[0])].trained:
                if tensor.requires_grad:
                    uses.setdefault(names.get(id(tensor), _foreign(tensor)), "a linear layer")
        elif id(item[0]) not in recorded:
            uses.setdefault(names.get(id(item[0]), _foreign(item[0])), item[1])
    if uses:
        raise _uncaptured(uses, term)
    return reached


def _foreign(leaf: Tensor) -> str:
    return (
        f"a tensor of shape {list(leaf.shape)} that is no parameter of the network, the residual "
        "or an operator (are layers in a list, not an nn.ModuleList, or is it no nn.Parameter?)"
    )


def _uncaptured(uses: Mapping[str, str], term: str) -> UncapturedParameterError:
    if any(user.startswith("CompiledFunction") for user in uses.values()):
        return UncapturedParameterError(
            f"Term '{term}' must not call what torch.compile returns, into which jets can't look, "
            f"but a compiled function uses {', '.join(uses)}. Call the function itself."
        )
    listing = ", ".join(f"{name} (used by {user})" for name, user in uses.items())
    return UncapturedParameterError(
        f"Every trained tensor must enter term '{term}' through the network, a residual that is an "
        "nn.Module, or a coefficient of an operator, by functions with a jet rule, but these do "
        f"not: {listing}. Make the residual an nn.Module that owns the tensor; in a rule of your "
        "own, pass it through pinncurv.jets.for_every_point; or freeze it with "
        "requires_grad_(False)."
    )
