"""The loss on one frozen batch, and its linearization: what an optimizer steps on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, overload
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.curvature.finiteness import raise_for_gradient
from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.linearization import (
    BoundTerm,
    Chunk,
    Linearization,
    Visitor,
    bind,
    fitting_chunk_size,
    linearize_some,
    network_state,
    plain_network,
    visit_all,
)
from pinncurv.linops import all_finite, check_finite, read
from pinncurv.machine import Graphs
from pinncurv.problems import Energy, LossTerm, Problem, warn_unless_periodic
from pinncurv.problems.samplers import is_fixed

_LOG = logging.getLogger(__name__)

# How many points to process at a time, None for all.
ChunkSize = int | Literal["auto"] | None


class LinearizedObjective(Sequence[Linearization]):
    """All terms of an objective, linearized at the current parameters: a sequence of them.

    L(θ + v) ≈ ½‖r̃ + J v‖²,  ∇L = Jᵀ r̃

    With an energy among the terms, L(θ + v) ≈ L + ∇Lᵀv + ½‖J v‖², and there is no residual.
    Residual and gradient are sums over the points. Where chunks are recomputed, they are taken
    along in the first pass that anybody makes by ``run``, so that a step costs one pass, not two.

    Args:
        linearizations: One per term.
        space: The parameters.
        losses: The losses L_t of all points, if they are known.
        of_some: Whether the linearizations are of some points.
        graphs: What is compiled of functions of the blocks, if it is.
    """

    def __init__(
        self,
        linearizations: Sequence[Linearization],
        space: ParameterSpace,
        losses: dict[str, float] | None = None,
        of_some: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        self.space = space
        self.of_some = of_some
        self.graphs = graphs
        self._losses = losses
        self._terms = tuple(linearizations)
        self._residuals: list[Tensor] = []
        self._totals = space.zeros(0)  # the losses, of the terms
        self._gradient: list[Tensor] | None = None
        self._checked = False  # whether the gradient is finite if the loss is

    @overload
    def __getitem__(self, index: int) -> Linearization: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Linearization]: ...

    def __getitem__(self, index: int | slice) -> Linearization | Sequence[Linearization]:
        """Return the linearization of a term."""
        return self._terms[index]

    def __len__(self) -> int:
        """Return the number of terms."""
        return len(self._terms)

    @property
    def linearizations(self) -> Sequence[Linearization]:
        """What a curvature is built from: the terms, with their common parameters and pass."""
        return self

    def run(self, *visitors: Visitor) -> None:
        """Go over all points of all terms once, and call every visitor with each chunk.

        Args:
            visitors: Functions of the position of the term and the chunk.

        Raises:
            FloatingPointError: If the gradient is not finite though the residuals are; names the
                term and the first point.
        """
        if self._gradient is not None:
            if visitors:
                self._check_gradient()
            visit_all(self._terms, visitors)
            return
        # what outlives a chunk is made before all of them: between temporaries in the heap it would
        # keep their memory from being used again
        residuals = [self.space.zeros(len(lin.x), lin.num_components) for lin in self._terms]
        losses, rows = self.space.zeros(len(self._terms)), [0] * len(self._terms)
        gradient: list[Tensor | None] = [None] * len(self.space.parameters)

        def collect(t: int, chunk: Chunk) -> None:
            n, energy = len(chunk.residual), chunk.energy
            residuals[t][rows[t] : rows[t] + n] = chunk.residual
            rows[t] += n
            losses[t] += 0.5 * chunk.residual.square().sum() if energy is None else energy
            for i, part in self._gradient_parts(self._terms[t], chunk.slope or chunk):
                known = gradient[i]
                gradient[i] = part if known is None else known.add_(part)

        visit_all(self._terms, (*visitors, collect))
        zeros = self.space.parameters.values()
        self._residuals, self._totals = residuals, losses
        self._gradient = [
            torch.zeros_like(p) if g is None else g for g, p in zip(gradient, zeros, strict=True)
        ]
        if visitors:
            self._check_gradient()

    def _gradient_parts(
        self, linearization: Linearization, chunk: Chunk
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the parts of Jᵀr̃ with the positions of their parameters, to be written to."""
        if chunk.gradient is not None:
            for name, part in chunk.gradient.items():
                yield self._positions[id(linearization.parameters[name])], part.clone()
            return
        u = chunk.residual.t()[..., None]
        blocks = self.space.arrange(linearization, chunk)
        for place, block in zip(self.space.blocks, blocks, strict=True):
            if block is not None:
                for i, part in zip(place.positions, block.adjoint_product(u), strict=True):
                    yield i, part[0]

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {id(p): i for i, p in enumerate(self.space.parameters.values())}

    def _check_gradient(self) -> None:
        """Check that the gradient is finite if the loss is, which alone may be asked for."""
        if self._checked:
            return

        def look() -> None:
            self._checked = False
            if all_finite([self._totals]):
                raise_for_gradient(self._terms)

        self._checked = True
        check_finite(self._gradient or [], look)

    checks_gradient = True  # nobody else need do it

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors: the network's in its order, then those of the terms."""
        return list(self.space.parameters.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the trained tensors, in the same order."""
        return self.space.names

    @cached_property
    def jacobian(self) -> JacobianLinearOperator:
        """J, from the list of parameters to one tensor ``[N_t, V_t]`` per term."""
        # of the terms, not of self: without a cycle it is freed at once
        return JacobianLinearOperator(self._terms, self.space, self.graphs)

    @property
    def residual(self) -> list[Float[Tensor, "N V"]] | None:
        """The scaled residuals r̃_t, one per term; None if a term is an energy, which has none."""
        if any(isinstance(linearization.term, Energy) for linearization in self._terms):
            return None
        if self._gradient is None:
            self.run()
        return self._residuals

    def residual_now(self) -> list[Float[Tensor, "N V"]]:
        """Evaluate r̃ at the same points and the parameters of now, without a graph."""
        return [linearization.residual_now() for linearization in self._terms]

    @cached_property
    def term_losses(self) -> dict[str, float]:
        """The losses L_t by the name of the term, of all points."""
        if self._losses is not None:
            return self._losses
        if self._gradient is None:
            self.run()
        names = [linearization.term.name for linearization in self._terms]
        return dict(zip(names, read(self._totals)[0], strict=True))

    def gradient(self) -> list[Tensor]:
        """Return ∇L = Jᵀ r̃, one tensor per parameter.

        Raises:
            FloatingPointError: As ``run`` does.
        """
        if self._gradient is None:
            self.run()
        self._check_gradient()
        assert self._gradient is not None
        return list(self._gradient)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An objective, evaluated at the parameters of that moment.

    Args:
        loss: L.
        linearize: Returns the linearization at these parameters, which must not have changed.
        objective: The objective.
        fingerprint: What the objective depended on.
    """

    loss: float
    linearize: Callable[[], LinearizedObjective]
    objective: Objective
    fingerprint: tuple[object, ...]

    def is_current(self) -> bool:
        """Whether parameters, buffers, points and data are those that were evaluated."""
        same = self.fingerprint == self.objective.fingerprint()
        if same:
            self.objective._looks = self.objective._looks and 0
        return same


class Objective:
    """A loss on one frozen batch.

    L(θ) = Σ_t w_t / (2 N_t) Σ_n ‖r_t(x_n; θ)‖²,  plus the terms that are an ``Energy`` or ``L2``

    Everything is checked, and the structure of a pass found, when it is made.

    Args:
        model: The network.
        terms: The loss terms.
        points: The points of each term, ``[N_t, d]``.
        chunk_size: How many points to process at a time; None for all. It changes the memory that
            is needed, not the results. With ``"auto"`` it is what fits into the memory that is free
            now; the attribute of this name, and the log, say what was picked.
        check: Whether to compare the derivatives of the network with reverse mode once, at two
            points; costs at most a step.
        compile: Whether to trace what is done at the points to flat graphs and compile them, for
            many steps with as many points. It needs a C++ compiler on a CPU and takes seconds to
            minutes, once on a disk. What can't be compiled, as an ``Energy``, runs as it is
            written, with a warning ``NotCompiled``.
            The gradient of ``loss`` can then not be differentiated again.

    Raises:
        TypeError: If a term is no LossTerm.
        ValueError: If terms and points do not match, residual or network mix the points, jets and
            reverse mode differ, points are empty, not finite or of another
            dtype or device than the network, names of terms repeat, or a trained tensor is used by
            no term or where its rows of the Jacobian cannot be found.
        FloatingPointError: If a parameter is not finite.
    """

    def __init__(
        self,
        model: Module,
        terms: Sequence[LossTerm],
        points: Sequence[Tensor],
        chunk_size: ChunkSize = None,
        check: bool = True,
        compile: bool = False,
    ) -> None:
        _check_are_terms(terms)
        self.model = plain_network(model)
        self.terms = tuple(terms)
        self.points = tuple(points)
        self._check = check
        self._compile = compile
        _check_terms(self.terms, self.points)
        if isinstance(chunk_size, str):
            chunk_size = self._fitting(chunk_size)
        self.chunk_size = chunk_size
        self._bound = self._bind(chunk_size)
        self._structures: list[object] = [None for _ in self._bound]
        self._looks: int | None = None  # how often to look for changes; None for every time
        self._space = self.space

    def _bind(self, chunk_size: int | None) -> list[BoundTerm]:
        pairs = zip(self.terms, self.points, strict=True)
        check, compile = self._check, self._compile
        return [
            bind(term, self.model, x, chunk_size, self.terms, check, compile) for term, x in pairs
        ]

    def _fitting(self, chunk_size: str) -> int | None:
        """Pick how many points to process at a time, and say so."""
        if chunk_size != "auto":
            raise ValueError(
                f"chunk_size must be a number of points, None or 'auto', got {chunk_size!r}. Pass "
                "'auto' for what fits into the memory."
            )
        picked = fitting_chunk_size(self._bind(None))
        _LOG.info("chunk_size='auto' picked %s", "all points" if picked is None else picked)
        return picked

    @classmethod
    def sample(
        cls,
        model: Module,
        terms: Problem | Sequence[LossTerm],
        generator: torch.Generator | None = None,
        chunk_size: ChunkSize = None,
        check: bool = True,
        compile: bool = False,
    ) -> Objective:
        """Draw the points of every term from its sampler, in the network's dtype and device.

        Warns with `NotPeriodic` if a problem leaves it to the network to be periodic and it is not.

        Args:
            model: The network.
            terms: A problem, or the loss terms.
            generator: Randomness, on the CPU; seed 0 by default.
            chunk_size: How many points to process at a time; None for all, or ``"auto"``.
            check: Whether to compare the derivatives of the network with reverse mode once.
            compile: Whether to compile what is done at the points.
        """
        chosen = terms.terms if isinstance(terms, Problem) else terms
        _check_are_terms(chosen)
        model = plain_network(model)
        like = next(model.parameters(), torch.empty(0))
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(
                f"Points are drawn by a torch.Generator, got {type(generator).__name__}. Write "
                "torch.Generator().manual_seed(0)."
            )
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        points = [term.points.sample(generator, like.dtype, like.device) for term in chosen]
        made = cls(model, chosen, points, chunk_size, check, compile)
        if isinstance(terms, Problem):
            warn_unless_periodic(terms, model, points)
        return made

    def resampled(self, generator: torch.Generator) -> Objective:
        """Return the objective at new points from the samplers of its terms.

        Random directions of operators are new, too: those of new points are, and where points stay,
        a new seed is drawn.

        Args:
            generator: Randomness.
        """
        terms = [t.redrawn(generator) if is_fixed(t.points) else t for t in self.terms]
        return type(self).sample(
            self.model, terms, generator, self.chunk_size, self._check, self._compile
        )

    def parameters(self) -> list[Tensor]:
        """Return all trained tensors, for an optimizer: of the network and of the terms."""
        return list(self.space.parameters.values())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same with their names."""
        yield from self.space.parameters.items()

    @property
    def space(self) -> ParameterSpace:
        """The trained tensors and the blocks they belong to."""
        return self._follow()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Look for what has changed once inside the block, where nothing but parameters changes."""
        before, self._looks = self._looks, 1
        try:
            yield
        finally:
            self._looks = before

    def _follow(self) -> ParameterSpace:
        """Find out and check what has changed, and return the space."""
        if self._looks == 0:
            return self._space
        self._looks = self._looks and 0
        network = network_state(self.model)  # one look for all terms
        for bound in self._bound:
            bound.follow(network)
        structures: list[object] = [bound.structure for bound in self._bound]
        if any(now is not then for now, then in zip(structures, self._structures, strict=True)):
            self._space, self._structures = ParameterSpace.of_bound(self._bound), structures
        return self._space

    def term_losses(self) -> dict[str, Tensor]:
        """Return L_t by the name of the term, with a graph unless torch.no_grad is on."""
        self._follow()
        return {bound.term.name: _sum(bound.losses()) for bound in self._bound}

    def loss(self) -> Tensor:
        """Return L, with a graph unless torch.no_grad is on."""
        return _sum(iter(self.term_losses().values()))

    def backward(self) -> dict[str, Tensor]:
        """Add the gradient to the parameters' ``.grad``, chunk by chunk.

        Returns:
            L_t by the name of the term, detached.

        Raises:
            FloatingPointError: If the gradient is not finite though the loss is; names the term and
                the first point. ``.grad`` is then None.
        """
        trained = self.parameters()  # follows what has changed
        losses: dict[str, Tensor] = {}
        for bound in self._bound:
            total = self._space.zeros(1)[0]
            for part in bound.losses():
                part.backward()
                total += part.detach()
            losses[bound.term.name] = total
        parameters = [p for p in trained if p.grad is not None]
        gradient = [p.grad for p in parameters if p.grad is not None]
        if not all_finite(gradient) and all_finite(list(losses.values())):
            for parameter in parameters:
                parameter.grad = None
            self.linearize().gradient()  # says where
            raise_for_gradient([])
        return losses

    def linearize(self) -> LinearizedObjective:
        """Linearize all terms at the current parameters."""
        return self._linearize(None)

    def _linearize(self, losses: dict[str, float] | None) -> LinearizedObjective:
        space = self.space  # follows what has changed
        made = [Linearization(bound) for bound in self._bound]
        graphs = _graphs_of(self.model) if self._compile else None
        return LinearizedObjective(made, space, losses, graphs=graphs)

    @property
    def is_sum_of_squares(self) -> bool:
        """Whether there is a residual r̃ with L = ½‖r̃‖², which an energy has not."""
        return not any(isinstance(term, Energy) for term in self.terms)

    @property
    def rows(self) -> int:
        """R, the number of residuals that come from points."""
        return sum(len(b.x) * b.structure.components for b in self._of_points())

    def _of_points(self) -> list[BoundTerm]:
        return [bound for bound in self._bound if not bound.structure.entrywise]

    def linearize_some(self, rows: int, generator: torch.Generator) -> LinearizedObjective:
        """Linearize at random points of each term, at most as many residuals as asked for.

        J and r̃ are those of the objective at these points alone, losses those of all points. Each
        term gets its share, a point at least; one without points (``L2``) is linearized as a whole.

        Args:
            rows: How many residuals, fewer than ``rows`` of the objective.
            generator: Draws the points, on the CPU.
        """
        space = self.space  # follows what has changed
        fewest = sum(b.structure.components for b in self._of_points())  # of a point of each
        further, all_further, chosen = max(0, rows - fewest), self.rows - fewest, []
        for bound in self._bound:
            if bound.structure.entrywise:
                chosen.append(Linearization(bound))
                continue
            N = len(bound.x)
            count = 1 + (N - 1) * further // max(1, all_further)
            points = torch.randperm(N, generator=generator)[:count].sort()
            chosen.append(linearize_some(bound, points.values.to(bound.x.device)))
        with torch.no_grad():
            losses = self._losses_now()
        return LinearizedObjective(chosen, space, losses, of_some=True)

    def _losses_now(self) -> dict[str, float]:
        terms = self.term_losses()
        numbers = read(*terms.values())
        return {name: loss for name, (loss,) in zip(terms, numbers, strict=True)}

    def evaluate(self) -> Evaluation:
        """Evaluate L together with what the next linearization at these parameters needs.

        The linearization is made and kept, unless a chunk size asks to save memory.
        """
        if self.chunk_size is not None:
            with torch.no_grad():
                losses = self._losses_now()
            again = partial(self._linearize, losses)
            return Evaluation(sum(losses.values()), again, self, self.fingerprint())
        linearized = self.linearize()
        loss = sum(linearized.term_losses.values())
        return Evaluation(loss, lambda: linearized, self, self.fingerprint(followed=True))

    def fingerprint(self, followed: bool = False) -> tuple[object, ...]:
        """Return what changes when something that the loss depends on is replaced or written to.

        Writes through ``tensor.data``, and numbers deep inside of objects of one's own, leave no
        trace.

        Args:
            followed: Whether to return that of the last linearization or loss, which is known.
        """
        tensors: list[Tensor] = [*self.model.parameters()]
        tensors += [p for term in self.terms for _, p in term.named_parameters()]
        versions = [(id(tensor), tensor._version) for tensor in tensors]
        if followed:
            return (*versions, *(bound.followed for bound in self._bound))
        network = network_state(self.model)
        return (*versions, *(bound.state(network) for bound in self._bound))


_GRAPHS: WeakKeyDictionary[Module, Graphs] = WeakKeyDictionary()


def _graphs_of(model: Module) -> Graphs:
    return _GRAPHS.setdefault(model, Graphs("Sums over the points", closed=True))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _check_terms(terms: Sequence[LossTerm], points: Sequence[Tensor]) -> None:
    """Check that there are terms, each with a name of its own and points."""
    names = [term.name for term in terms]
    if not names or len(names) != len(points):
        raise ValueError(
            "There must be one or more terms and one tensor of points for each, got "
            f"{len(names)} terms and {len(points)} tensors."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"The names of the terms must differ, got {names}. Rename them.")


def _check_are_terms(terms: object) -> None:
    """Check that terms are declared, not functions that differentiate by themselves.

    Raises:
        TypeError: If one is no LossTerm.
    """
    if not isinstance(terms, Sequence):
        raise TypeError(
            f"The terms must be a list of pinncurv.LossTerm, got {type(terms).__name__}. Write "
            "[term] for a single one."
        )
    for term in terms:
        if not isinstance(term, LossTerm):
            raise TypeError(
                "A term must be a pinncurv.LossTerm, which declares the derivatives that it needs, "
                f"got {type(term).__name__}. A function that differentiates by torch.autograd or "
                "torch.func can't be linearized: write LossTerm({'u': Value(), 'lap': Laplacian()}"
                ", residual=lambda x, u, lap: ..., points=...)."
            )
