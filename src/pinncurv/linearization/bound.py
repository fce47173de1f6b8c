"""A loss term bound to a network and points: found out once, evaluated many times."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as globally

from pinncurv.jets import check_hooks, check_network, record
from pinncurv.linearization.capture import blocks_of_pass
from pinncurv.linearization.checks import (
    CHECKED_POINTS,
    check_derivatives,
    check_pointwise,
    check_residual_on_jets,
)
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.passes import CompiledPasses, LossWithGradient
from pinncurv.linearization.structure import Structure, find_structure, signature
from pinncurv.linearization.watching import circumstances, identity
from pinncurv.problems import L2, LossTerm


def plain_network(model: Any) -> Module:
    """Return a network whose parameters can be followed: what torch.compile was called with.

    Raises:
        TypeError: If it is no network, a part of it is compiled, or a parameter is complex.
    """
    if not isinstance(model, Module):
        what = model.__name__ if hasattr(model, "__name__") else type(model).__name__
        raise TypeError(
            f"The network must be a torch.nn.Module, whose parameters are trained, got {what}. "
            "Write a module that owns the layers, with the function as its forward."
        )
    original = getattr(model, "_orig_mod", model)
    _check_not_compiled(original)
    for name, parameter in original.named_parameters():
        if parameter.is_complex():
            raise TypeError(
                f"The parameters must be real, but {name} is {parameter.dtype}. Hold its real and "
                "imaginary part as two parameters, and compute with them as two real layers."
            )
    return original


def _check_not_compiled(module: Module) -> None:
    """Refuse parts that torch.compile hides from jets."""
    compiled = [
        name or type(part).__name__
        for name, part in module.named_modules()
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None
    ]
    if compiled:
        raise TypeError(
            "A network or residual must not be compiled by torch.compile, into which jets can't "
            f"look, but these modules are: {', '.join(compiled)}. Use the modules that they were "
            "made from, and compile after the training."
        )


class BoundTerm:
    """A loss term with a network and points, of which all that does not change is found once.

    The structure of a pass, the channels, coefficients, weights and data at the parts of the points
    are kept. What they are made from is followed: tensors by their version counters, functions by
    the numbers that they use, parameters that are frozen or replaced. This is the only place that
    looks at them. That the points do not mix is checked with the structure.

    Args:
        term: The loss term.
        model: The network.
        x: The points, ``[N, d]``.
        chunk_size: Most points of a part; None for no limit but the cache.
        terms: All terms of the objective, in whose order trained tensors are named.
        check: Whether to compare the derivatives of the network with reverse mode, at two points.
        compile: Whether to compile passes.

    Raises:
        ValueError: If points mix or the points, dtypes or parameters do not fit; names the term.
        UncapturedParameterError: If a trained tensor is used where its rows cannot be found.
        FloatingPointError: If a parameter is not finite; names it.
    """

    part_type: ClassVar[type[TermPart]] = TermPart
    further: ClassVar[int] = 0  # outputs of a pass beyond the V components

    def __init__(
        self,
        term: LossTerm,
        model: Module,
        x: Tensor,
        chunk_size: int | None = None,
        terms: Sequence[LossTerm] = (),
        check: bool = False,
        compile: bool = False,
    ) -> None:
        check_chunk_size(chunk_size)
        self.term = term
        self.model = plain_network(model)
        self.x = x
        self._terms = tuple(terms) or (term,)
        self.chunk_size = chunk_size
        self._checks = check
        self.compiles = compile and not isinstance(term, L2)
        self._passes: CompiledPasses | None = None
        self._kept_parts: list[TermPart] | None = None
        self.followed: tuple[object, ...] = ()  # the state that was followed last
        self.follow()
        if chunk_size is not None and chunk_size >= len(x):
            self.chunk_size = None
            self._kept_parts = self._kept_parts or list(self._cut())

    def follow(self, network: NetworkState | None = None) -> None:
        """Find out again what has changed since the last time, if anything has.

        Args:
            network: The state of the network, if it is known.
        """
        state = self.state(network)
        if state == self.followed:
            return
        mine = trained_tensors(self.model, self.term)
        check_hooks(self.model, mine)
        if isinstance(self.term.residual, Module):
            check_hooks(self.term.residual)
            _check_not_compiled(self.term.residual)
        own = {id(p) for p in mine.values()}
        named = trained_tensors(self.model, *self._terms)
        self.parameters = {name: p for name, p in named.items() if id(p) in own}
        self._check()
        # trained tensors of the residual are recorded by jets, those of coefficients when read
        self.as_jets = any(self.term.named_parameters())
        with torch.inference_mode(mode=False):  # it serves later passes that autograd follows, too
            # a copy: x may share memory with what leaves no trace when it is written to, as numpy
            self.whole = self.part_type.of_all(self.term, self.x.detach().clone())
        self._kept_parts = None if self.chunk_size else list(self._cut())
        self._structure: Structure | None = None
        self.followed = state

    @property
    def parts(self) -> Iterable[TermPart]:
        """The term at the points that are differentiated at a time.

        With a chunk size they are made anew, or what is known of them would grow with the points.
        """
        return self._cut() if self._kept_parts is None else self._kept_parts

    def _cut(self) -> Iterator[TermPart]:
        widest = max((max(p.shape, default=1) for p in self.parameters.values()), default=1)
        return self.whole.cut(widest, self.chunk_size)

    @property
    def structure(self) -> Structure:
        """What a pass looks like."""
        if self._structure is None:
            terms = _FOUND.setdefault(self.model, weakref.WeakKeyDictionary())
            before, made_from = terms.setdefault(self.term, {}), self._made_from()
            known = before.get(self.model.training)
            if known is None or known.made_from != made_from or self._checks > known.checked:
                # a loss may be asked for in inference mode, and is refused like a linearization
                with torch.inference_mode(mode=False):
                    check_network(self.model, self.x)
                    check_pointwise(self.whole, self.model)
                    if self.as_jets:
                        check_residual_on_jets(self.whole, self.model)
                    few = self.whole.at(slice(0, 2))
                    found = find_structure(few, self.model, self.parameters, self.as_jets)
                    if self._checks:
                        check_derivatives(self.whole, self.model, self.parameters)
                passes = CompiledPasses.of(self.term.name, known.passes if known else None)
                known = _Found(made_from, found, self._checks, passes)
                before[self.model.training] = known
            found, scale = known.structure, self.whole.scale
            if isinstance(scale, Tensor) and scale.shape[1] not in (1, found.components):
                raise ValueError(
                    f"Term '{self.term.name}': there must be one weight per component of the "
                    f"residual, V = {found.components}, got {scale.shape[1]}. Pass one number for "
                    "all, or one for each component."
                )
            self._structure = found
            self._passes = known.passes
        return self._structure

    def _made_from(self) -> tuple[object, ...]:
        """Return what the structure depends on and what was checked, but for the points."""
        term = self.term
        return (
            tuple((name, identity(p)) for name, p in self.parameters.items()),
            self.whole.plan.layout.S,
            min(len(self.x), CHECKED_POINTS),
            tuple((name, data.dtype, data.shape[1:]) for name, data in term.data.items()),
            *map(circumstances, (self.model, term.residual, *term.operators.values())),
        )

    def state(self, network: NetworkState | None = None) -> tuple[object, ...]:
        """Return what changes when anything that the loss depends on does, but for parameters.

        Args:
            network: The state of the network, if it is known.
        """
        term, network = self.term, network or network_state(self.model)
        own = {id(p) for _, p in term.named_parameters()}
        # weights and coefficients may depend on the network, as numbers
        given = (self.x, term.data, term.weight, *term.operators.values())
        found_once = tuple(circumstances(part, own) for part in given)
        hooks = len(globally._global_backward_hooks) + len(globally._global_backward_pre_hooks)
        hooks += len(globally._global_forward_hooks) + len(globally._global_forward_pre_hooks)
        return found_once, circumstances(term.residual, network[0] | own), network, hooks

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy needs, which finds out everything again; no compiled code."""
        return {**vars(self), "followed": (), "_structure": None, "_passes": None}

    def linearize(self, part: TermPart) -> Chunk:
        """Linearize at some points by one forward pass, and one backward pass per component.

        Raises:
            RuntimeError: In inference mode, or if the network takes another path than before.
        """
        check_differentiable(self.term.name)
        structure = self.structure
        with torch.enable_grad(), record(bool(structure.plain)) as tape:
            outputs = part.outputs(self.model, self.as_jets)
        found = signature(tape, {id(p) for p in self.parameters.values()})
        if found != structure.signature or outputs.shape[1] != structure.components + self.further:
            raise RuntimeError(
                f"A pass of term '{self.term.name}' must do the same at any points, but at "
                f"{len(part.x)} of them the network or the residual used {len(found)} linear maps "
                f"and trained tensors, {len(structure.signature)} when it was looked at, or "
                "others. Branch on nothing that changes from call to call or with the number of "
                "points; after a change of the network, make a new objective."
            )
        with record(bool(structure.plain)):  # for checkpoints, which run the forward pass again
            blocks = blocks_of_pass(outputs, part.scale, tape.entries, structure, self.parameters)
        detached = outputs.detach()
        return Chunk(detached * part.scale, detached, blocks)

    def linearize_again(self, part: TermPart, gradient: bool = False) -> Chunk:
        """Do the same by a compiled pass.

        Args:
            part: The points, of which there are as many every time.
            gradient: Whether to compute the gradient along.
        """

        def linearize(part: TermPart) -> Chunk:
            chunk = self.linearize(part)
            return chunk.with_gradient() if gradient else chunk

        check_differentiable(self.term.name)
        kind = "linearization with gradient" if gradient else "linearization"
        chunk: Chunk = self._run(kind, linearize, part)
        return chunk

    def _run(self, kind: str, function: Callable[[TermPart], Any], part: TermPart) -> Any:
        """Make a pass, compiled if passes are."""
        if not self.compiles:
            return function(part)
        assert self.structure is not None  # which finds both
        assert self._passes is not None
        return self._passes.call(kind, function, part, list(self.parameters.values()))

    @torch.no_grad()
    def residual(self, part: TermPart) -> Float[Tensor, "n V"]:
        """Evaluate the scaled residual r̃ without a graph."""
        residual: Tensor = self._run("residual", lambda part: part.residual(self.model), part)
        return residual

    def losses(self) -> Iterator[Tensor]:
        """Yield what the parts contribute to the loss, with a graph unless torch.no_grad is on.

        What has changed must have been followed.
        """
        if not self.compiles:
            return (part.loss(self.model) for part in self.parts)
        if not torch.is_grad_enabled():
            return (self._run("loss", lambda p: p.loss(self.model), part) for part in self.parts)
        parameters = tuple(self.parameters.values())

        def evaluate(part: TermPart) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                loss = part.loss(self.model)
                grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
            return loss.detach(), *grads

        return (
            LossWithGradient.apply(partial(self._run, "gradient", evaluate, part), *parameters)
            for part in self.parts
        )

    def _check(self) -> None:
        """Check points against term and network before any work."""
        self.term.check_points(self.x)
        if not self.parameters:
            raise ValueError(
                f"The network {type(self.model).__name__} must have a parameter that requires a "
                "gradient, got none. Call requires_grad_() on the layers to train."
            )
        for name, parameter in self.parameters.items():
            if (self.x.dtype, self.x.device) != (parameter.dtype, parameter.device):
                raise ValueError(
                    "Points and network must agree in dtype and device, got points in "
                    f"{self.x.dtype} on {self.x.device} for term '{self.term.name}' and parameter "
                    f"{name} in {parameter.dtype} on {parameter.device}. Convert one of them with "
                    ".to(...)."
                )
        named = {**dict(self.model.named_parameters()), **self.parameters}
        bad = [name for name, parameter in named.items() if not parameter.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"The parameters must be finite, but {', '.join(bad)} contains NaN or infinity. "
                "Initialize the network again, or load a checkpoint from before it diverged."
            )


def check_chunk_size(chunk_size: Any) -> None:
    """Check that a chunk size is a number of points, or None.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is less than 1.
    """
    if chunk_size is None:
        return
    if not isinstance(chunk_size, Integral) or isinstance(chunk_size, bool):
        raise TypeError(
            "chunk_size must be a whole number of points or None, got "
            f"{chunk_size!r} of type {type(chunk_size).__name__}. Pass e.g. 1000."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")


# The ids of a network's parameters, and what changes when anything else of it does.
NetworkState = tuple[frozenset[int], object]


def network_state(model: Module) -> NetworkState:
    """Return what a network is, but for the numbers in its parameters."""
    parameters = frozenset(map(id, model.parameters()))
    return parameters, circumstances(model, parameters)


@dataclass(frozen=True)
class _Found:
    """What is known of a term and a network, whatever the points are."""

    made_from: tuple[object, ...]
    structure: Structure
    checked: bool
    passes: CompiledPasses


_Terms = weakref.WeakKeyDictionary[LossTerm, dict[bool, _Found]]
_FOUND: weakref.WeakKeyDictionary[Module, _Terms] = weakref.WeakKeyDictionary()


def trained_tensors(model: Module, *terms: LossTerm) -> dict[str, Tensor]:
    """Return what requires a gradient in a network and in terms, by name, each tensor once."""
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    for term in terms:
        named += term.named_parameters()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named:
        if tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


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
