"""What one step makes: torch calls, matrix products, kernel launches, reads of device values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any, Protocol

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    f"aten::{n}{i}" for n in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv") for i in ("", "_")
}
STEPS = 5
_LAUNCHES = {
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    *("cudaLaunchCooperativeKernel", "cudaGraphLaunch"),
}
_SYNCHRONIZATIONS = {"cudaStreamSynchronize", "cudaEventSynchronize"}
# Methods of a tensor by which Python reads values of it, from whatever device.
_READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Event(Protocol):
    """What the profiler recorded of one operation."""

    name: str
    cpu_parent: Any


@dataclass(frozen=True)
class Counts:
    """What the profiler sees of one step.

    Attributes:
        calls: Torch operations, without those that they call themselves.
        products: Matrix products, with those inside of compiled graphs.
        launches: Launches of kernels and of graphs on a GPU.
        synchronizations: How often the CPU waits for a stream of a GPU.
    """

    calls: int
    products: int
    launches: int
    synchronizations: int


def count_events(events: Iterable[Event]) -> Counts:
    """Count what the profiler recorded."""
    calls = products = launches = synchronizations = 0
    for event in events:
        outer = set(_outer(event))
        calls += event.name.startswith("aten::") and not any(n.startswith("aten::") for n in outer)
        products += event.name in _PRODUCTS and not outer & _PRODUCTS
        launches += event.name in _LAUNCHES
        synchronizations += event.name in _SYNCHRONIZATIONS
    return Counts(calls, products, launches, synchronizations)


def _outer(event: Event) -> Iterator[str]:
    """Yield the names of the operations that an operation is part of."""
    while (event := event.cpu_parent) is not None:
        yield event.name


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Collect the names of the methods by which values are read."""
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return original(self, *args, **kwargs)

        return read

    own = {name: Tensor.__dict__[name] for name in _READS if name in Tensor.__dict__}
    try:
        for name, read in {name: counted(name) for name in _READS}.items():
            setattr(Tensor, name, read)
        yield reads
    finally:
        for name in _READS:
            if name in own:
                setattr(Tensor, name, own[name])
            else:
                delattr(Tensor, name)


class ProductFlops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, two for a multiplication.

    FlopCounterMode follows modules by hooks, which nested calls of autograd do not allow.
    """

    total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count, and do what was asked for."""
        if func.overloadpacket._qualified_op_name in _PRODUCTS:
            left, right = args[-2:]  # of those that add, the first is what they add to
            self.total += 2 * left.numel() * (right.shape[-1] if right.ndim > 1 else 1)
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object], device: str, compiled: bool) -> dict[str, int]:
    """Return the medians of each count over some steps, a few of which shorten their update."""
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    steps = []
    for _ in range(STEPS):
        with profile(activities=activities) as profiler:
            work()
        with counted_reads() as reads:
            work()
        step = {**asdict(count_events(profiler.events())), "reads": len(reads)}
        if not compiled:  # which would be traced anew for a mode
            with ProductFlops() as products:
                work()
            step["flops"] = products.total
        steps.append(step)
    return {name: median_low(step[name] for step in steps) for name in steps[0]}
