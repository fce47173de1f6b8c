"""Time windows: networks for one slab of time after the other, each from the last state."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pinncurv.problems.problem import Problem, TensorOrJet


class State(nn.Module):
    """A trained network at a fixed time, as initial values: a function of points (t, x).

    g(t, x) = u(time, x)

    As it does not depend on t, it serves as values of an initial term and as offset of an ansatz,
    ``Ansatz(network, state.elapsed, state)``, which needs no such term. A term costs a pass through
    the network before, at the initial points alone. An ansatz leaves no jump, but its offset is the
    ansatz of the window before: the k-th one passes k networks, at all points.

    Args:
        network: The network u.
        time: The time.
    """

    def __init__(self, network: nn.Module, time: float) -> None:
        super().__init__()
        self.network, self.time = network, time

    def forward(self, x: TensorOrJet) -> TensorOrJet:
        """Evaluate the state at points (t, x)."""
        return self.network(torch.cat([torch.full_like(x[:, :1], self.time), x[:, 1:]], 1))

    def elapsed(self, x: TensorOrJet) -> TensorOrJet:
        """Return t - time at points (t, x)."""
        return x[:, :1] - self.time


class SlabTime(nn.Module):
    """Time as seen from the middle of a slab, for points (t, x); a first layer of networks.

    t -> (2t - start - end) / (end - start),    from -1 to 1

    Args:
        start: Where the slab begins.
        end: Where it ends.
    """

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, x: TensorOrJet) -> TensorOrJet:
        """Scale the first coordinate."""
        t = (2 * x[:, :1] - (self.start + self.end)) / (self.end - self.start)
        return torch.cat([t, x[:, 1:]], 1)


class Windows(nn.Module):
    """The solution in slabs of time, a network for each that has been trained.

    u(t, x) = u_k(t, x) for t in (edges_k, edges_k+1],    u_k(edges_k, x) ≈ u_k-1(edges_k, x)

    Until all slabs are trained: build the `problem` of the next one, train a network on it, and
    `append` the network. Give networks the time of their slab, see `scaled`: it is short.

    Args:
        edges: The times at which slabs begin and end, in order.

    Raises:
        ValueError: If there are not at least two finite edges that increase.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        super().__init__()
        self.edges = tuple(float(edge) for edge in edges)
        if len(self.edges) < 2 or not all(
            -math.inf < a < b < math.inf for a, b in zip(self.edges, self.edges[1:], strict=False)
        ):
            raise ValueError(
                f"The edges of time windows must be two or more finite times that increase, got "
                f"{self.edges}. Pass e.g. (0.0, 0.5, 1.0) for two windows."
            )
        self.networks = nn.ModuleList()

    @property
    def complete(self) -> bool:
        """Whether every slab has its network."""
        return len(self.networks) == len(self.edges) - 1

    @property
    def state(self) -> State | None:
        """The values at the beginning of the next slab, or at the end; None before the first."""
        done = len(self.networks)
        return State(self.networks[-1], self.edges[done]) if done else None

    def problem(self, build: Callable[..., Problem]) -> Problem:
        """Return the problem on the next slab, whose initial values are the last state.

        Args:
            build: A function such as `kdv`, or a `functools.partial` of one: it is called with
                start=, end= and initial=, the last state or, for the first slab, None.

        Raises:
            ValueError: If there is no next slab.
        """
        start, end = self._next()
        return build(start=start, end=end, initial=self.state)

    def scaled(self, network: nn.Module) -> nn.Sequential:
        """Return a network of the next slab, for which time goes from -1 to 1 there.

        Raises:
            ValueError: If there is no next slab.
        """
        return nn.Sequential(SlabTime(*self._next()), network)

    def append(self, network: nn.Module) -> None:
        """Add a frozen copy of the network of the next slab, which shares the networks before.

        Raises:
            ValueError: If there is no next slab.
        """
        self._next()
        shared = {id(known): known for known in self.networks}
        self.networks.append(copy.deepcopy(network, shared).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the solution at points (t, x) in the slabs that have been trained.

        Raises:
            ValueError: If a time lies outside of them, or there is none yet.
        """
        if not self.networks:
            raise ValueError(
                f"There must be a window that is trained, got none of {self.edges}. Train a "
                "network on the problem of the first one, and append it."
            )
        first, last = self.edges[0], self.edges[len(self.networks)]
        times = x.detach()[:, 0]
        if not ((times >= first) & (times <= last)).all():
            raise ValueError(
                f"Times must lie in the windows that are trained, [{first}, {last}], got "
                f"{times.min()} to {times.max()}. Train the other windows first."
            )
        done = len(self.networks)
        inner = times.new_tensor(self.edges[1:done])
        slab = torch.bucketize(times.contiguous(), inner)
        order = slab.argsort(stable=True)
        parts = x[order].split(slab.bincount(minlength=done).tolist())
        values = [net(part) for net, part in zip(self.networks, parts, strict=True)]
        return torch.cat(values)[order.argsort()]

    def _next(self) -> tuple[float, float]:
        if self.complete:
            raise ValueError(
                f"There must be a window left to train, got all {len(self.networks)} of "
                f"{self.edges}. Make new Windows with later edges."
            )
        start, end = self.edges[len(self.networks) :][:2]
        return start, end
