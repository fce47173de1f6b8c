"""Functions of tensors as flat graphs, compiled once, and called without guards."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

Run = Callable[..., Sequence[Tensor]]


_TRACING: ContextVar[bool] = ContextVar("tracing", default=False)


def is_tracing() -> bool:
    """Whether a graph is traced, of which a compiler fuses what is written one by one."""
    return _TRACING.get()


class NotCompiled(UserWarning):
    """Something that should be compiled can't be, and runs as it is written."""


class _NoReads(TorchFunctionMode):
    """Refuses to read values, which would be frozen into the graph.

    Of tensors that a graph makes, torch refuses it already.

    Args:
        given: The tensors whose values may change from call to call, by identity.
    """

    def __init__(self, given: Mapping[int, object]) -> None:
        super().__init__()
        self._given = given

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let everything pass but the methods that return numbers."""
        name = getattr(func, "__name__", "")
        if name in _READS and args and id(args[0]) in self._given:
            raise RuntimeError(f"Tensor.{name} reads a value that may change from call to call")
        return func(*args, **(kwargs or {}))


_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "cpu"} | {
    f"__{name}__"
    for name in ("bool", "float", "int", "index", "complex", "array", "dlpack", "contains")
}


# Graphs of one function. More come from numbers that change all the time.
_MOST_GRAPHS = 8
# Graphs of one function that uses no numbers but its tensors', as more terms or shapes need.
_MOST_CLOSED = 32
# In how many of its first calls a graph is compared with the function that it was traced from.
_COMPARED = 2


@dataclass
class _Known:
    """A compiled function, and how often it was compared."""

    run: Compiled
    compared: set[int] = field(default_factory=set)  # which tensors, by the first one's identity
    further: Any = None

    def is_settled(self, given: Sequence[Tensor]) -> bool:
        """Whether there is no need to compare results any more."""
        return len(self.compared) >= _COMPARED or id(given[0]) in self.compared


@dataclass
class Graphs:
    """Functions of tensors, each compiled once for any tensors of the same shapes.

    What can't be compiled is called as it is, after one warning. The results of the first two calls
    with other tensors are compared with those of the function itself.

    Args:
        what: What the functions are, for the warning.
        closed: Whether functions use no other tensors than those they are given.
    """

    what: str
    closed: bool = False
    known: dict[Any, _Known] = field(default_factory=dict)
    traced: Counter[Hashable] = field(default_factory=Counter)
    gives_up: bool = False

    @property
    def off(self) -> bool:
        """Whether functions are called as they are now."""
        return self.gives_up or torch.is_inference_mode_enabled()

    def __call__(
        self,
        key: tuple[Hashable, ...],
        function: Callable[[], Sequence[Tensor]],
        given: Sequence[Tensor],
        fixed: Sequence[Tensor] = (),
    ) -> Sequence[Tensor]:
        """Return what a function returns.

        Args:
            key: All that the function depends on but tensors, its name first; with the shapes of
                the given tensors.
            function: Uses the given tensors themselves, and returns tensors.
            given: The tensors that may be others in a later call.
            fixed: Those whose values may change, but which are always the same ones.
        """
        full = self.closed and self.traced[key[0]] >= _MOST_CLOSED and key not in self.known
        if self.off or full:
            return function()
        found, start = self.known.get(key), time.perf_counter()
        settled = found is not None and found.is_settled(given)
        try:
            found = found or self._trace(key, function, given, fixed)
            result = found.run(given)
            if not settled:
                found.compared.add(id(given[0]))
                _compare(result, function())
        except Exception as error:  # of many types; the function as it is written is right
            return self._refused(error, function)
        finally:
            if not settled:
                _SPENT.append(time.perf_counter() - start)
        return result

    def kept(self, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
        """Return what else belongs to a graph, made when its function was called last."""
        found = self.known.get(key)
        if found is None:  # the function itself was called
            return make()
        if found.further is None:
            found.further = make()
        return found.further

    def _trace(
        self,
        key: tuple[Hashable, ...],
        function: Callable[[], Sequence[Tensor]],
        given: Sequence[Tensor],
        fixed: Sequence[Tensor],
    ) -> _Known:
        self.traced[key[0]] += 1
        if not self.closed and self.traced[key[0]] > _MOST_GRAPHS:
            raise RuntimeError(
                f"it would be compiled more than {_MOST_GRAPHS} times, for other numbers in the "
                "functions or other numbers of points each time"
            )
        self.known[key] = _Known(compiled(function, given, fixed, self.closed))
        return self.known[key]

    def _refused(
        self, error: Exception, function: Callable[[], Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        """Return what the function returns, and say why, unless that fails as well."""
        result = function()
        self.gives_up = True
        self.known.clear()
        reason = (str(error).strip().splitlines() or ["no reason is given"])[0]
        warnings.warn(
            f"{self.what} can't be compiled and will run as written, as right but slower "
            f"({type(error).__name__}: {reason}).",
            NotCompiled,
            stacklevel=2,
        )
        return result


_SPENT: list[float] = []


def seconds_spent() -> float:
    """Return how long this process has traced, compiled and compared: no time of a step."""
    return sum(_SPENT)


def form_of(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Return what tensors have in common that one graph serves: all but the values."""
    ids = [id(tensor) for tensor in tensors]
    return tuple((t.dtype, t.shape, t.stride(), ids.index(id(t))) for t in tensors)


def _compare(result: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that a compiled function returns what the function does.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    sizes = [float(other.detach().abs().amax()) for other in expected if other.numel()]
    largest = max([0.0, *filter(math.isfinite, sizes)])
    for mine, other in zip(result, expected, strict=True):
        size = other.detach().abs().amax() if other.numel() else 0
        eps = torch.finfo(other.dtype).eps  # what is zero but for rounding is that of the others
        tolerance = eps**0.5 * size + eps * largest
        same = ((mine - other).abs() <= tolerance) | (mine == other)
        if not bool((same | (mine.isnan() & other.isnan())).all()):
            raise RuntimeError("what was compiled returns something else with other tensors")


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled function of some tensors.

    Args:
        run: What the compiler made of the graph; takes the sources in order.
        sources: Where the inputs of the graph come from: the position of a given tensor, or a
            tensor that is always the same one, such as a parameter.
        outputs: What is returned: the position of an output of the graph, or of an input.
        device: The type of the device.
    """

    run: Run
    sources: tuple[int | Tensor, ...]
    outputs: tuple[tuple[bool, int], ...]
    device: str

    @torch.no_grad()
    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs, for given tensors of the same shapes as those it was traced with."""
        inputs = [given[s] if isinstance(s, int) else s for s in self.sources]
        made = self.run(*inputs)
        if self.device != "cpu":  # a CUDA graph writes to the same memory when it runs again
            made = [tensor.clone() for tensor in made]
        return [inputs[i] if is_input else made[i] for is_input, i in self.outputs]


def compiled(
    function: Callable[[], Sequence[Tensor]],
    given: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    closed: bool = False,
) -> Compiled:
    """Trace a function to a flat graph of tensor operations, and compile that.

    The graph holds the numbers that the function uses, but no values of tensors: those that are
    given are its inputs, and all others that it uses are read anew at every call. Graphs that are
    the same are compiled once in a process, and by torch once on a disk.

    Args:
        function: Uses the given tensors themselves and any others, and returns tensors.
        given: The tensors that may be others in a later call.
        fixed: Tensors whose values may change, but which are always the same objects.
        closed: Whether to refuse other tensors.

    Raises:
        Exception: If the function reads values of tensors, or the compiler fails; of many types.
    """
    positions = {id(tensor): i for i, tensor in reversed(list(enumerate(given)))}
    known = {**dict.fromkeys(map(id, fixed)), **positions}
    token = _TRACING.set(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _NoReads(known), torch.no_grad():
            graph = make_fx(lambda: list(function()))()
    finally:
        _TRACING.reset(token)
    if closed:
        _check_closed(graph, known)
    sources, outputs = _flatten(graph, positions)
    _check_no_copies(sources, [*given, *fixed])
    like = [given[s] if isinstance(s, int) else s for s in sources]
    device = next((tensor.device.type for tensor in like if tensor.device.type != "cpu"), "cpu")
    return Compiled(_run_of(graph, like, device), sources, outputs, device)


def _flatten(
    graph: GraphModule, positions: Mapping[int, int]
) -> tuple[tuple[int | Tensor, ...], tuple[tuple[bool, int], ...]]:
    """Make all tensors that a graph uses its inputs, and return only what is none of them."""
    nodes = list(graph.graph.nodes)
    tensors: dict[int, tuple[int | Tensor, Node]] = {}
    used = [node for node in nodes if node.op == "get_attr"]
    with graph.graph.inserting_before(nodes[0]):
        for node in used:
            tensor = getattr(graph, str(node.target))
            if id(tensor) not in tensors:
                placeholder = graph.graph.placeholder(f"input_{len(tensors)}")
                tensors[id(tensor)] = positions.get(id(tensor), tensor), placeholder
            node.replace_all_uses_with(tensors[id(tensor)][1])
    for node in used:
        graph.graph.erase_node(node)
    order = {placeholder: i for i, (_, placeholder) in enumerate(tensors.values())}
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    results: list[Node] = list(output.args[0])
    made = list(dict.fromkeys(node for node in map(_alias, results) if node not in order))
    outputs = tuple(
        (node in order, order[node] if node in order else made.index(node))
        for node in map(_alias, results)
    )
    output.args = (tuple(made),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tuple(source for source, _ in tensors.values()), outputs


def _check_closed(graph: GraphModule, known: Mapping[int, object]) -> None:
    """Check that a graph uses no tensors but known ones and those that its function makes.

    Raises:
        RuntimeError: If it does.
    """
    fresh = torch.ops.aten.lift_fresh_copy.default
    for node in graph.graph.nodes:
        others = [user for user in node.users if user.target is not fresh]
        if node.op == "get_attr" and others and id(getattr(graph, node.target)) not in known:
            raise RuntimeError("it uses a tensor that it is not given")


def _alias(node: Node) -> Node:
    """Return what a node is a detached alias of."""
    while node.target is torch.ops.aten.detach.default:
        (node,) = node.all_input_nodes
    return node


def _check_no_copies(sources: Sequence[int | Tensor], owners: Sequence[Tensor]) -> None:
    """Check that no alias of what may change, as ``tensor.data`` is one, is taken for a constant.

    Raises:
        RuntimeError: If one is.
    """
    ids = {id(owner) for owner in owners}
    memory = {owner.untyped_storage().data_ptr() for owner in owners}
    for source in sources:
        if isinstance(source, Tensor) and id(source) not in ids:
            pointer = source.untyped_storage().data_ptr()
            if pointer and pointer in memory:
                raise RuntimeError("it uses a view of a tensor that may be another one later")


_MADE: dict[Any, Run] = {}


def _run_of(graph: GraphModule, like: Sequence[Tensor], device: str) -> Run:
    """Compile a graph, unless the same one has been compiled."""
    metas = tuple((t.dtype, tuple(t.shape), t.stride(), str(t.device)) for t in like)
    key = graph.code, metas, torch.get_num_threads()
    if key not in _MADE:
        options = {"triton.cudagraphs": device == "cuda"}  # what mode="reduce-overhead" sets
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about itself
            # tensors without values, of an environment of shapes: without that torch caches nothing
            fake = FakeTensorMode(shape_env=ShapeEnv())
            plain: list[Any] = [fake.from_tensor(t.detach(), static_shapes=True) for t in like]
            _MADE[key] = torch._inductor.compile(graph, plain, options=options)
    return _MADE[key]
