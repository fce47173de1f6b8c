"""How often a computation reads on the host what it has computed."""

import sys
import traceback
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Reads that no operation shows where the tensor is on the CPU.
UNDISPATCHED = {
    Tensor.tolist: "tolist",
    Tensor.numpy: "copy",
    Tensor.__array__: "copy",
    Tensor.cpu: "copy",
}
READS = {aten._local_scalar_dense: "item", aten.equal: "equal", aten.allclose: "equal"}
# Their result has a shape that only the values tell.
SHAPED_BY_VALUES = {
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
# They look at LAPACK's error codes.
CHECKED = {aten._linalg_check_errors, aten._linalg_eigh, aten._linalg_svd}


class HostReads:
    """Counts where the host waits for a value that it needs, by kind and by call site.

    ``item`` (of ``.item()``, ``float``, ``bool`` and ``int`` too), ``tolist``, ``equal`` and
    ``copy`` (to the CPU, to NumPy) are reads. ``shape`` (of a result that the values decide, such
    as a mask's) and ``check`` (of a factorization's error codes) make a GPU wait as well, and
    ``upload`` (from the CPU) may.

    Args:
        device: Of which tensors: those on a GPU, or pretended (``tests.devices``); or those on the
            CPU, where also those count that would be on the host anyway, and no ``.to("cpu")``.

    Attributes:
        counts: How often, by kind.
        sites: How often, by kind and innermost lines within the package.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.counts: Counter[str] = Counter()
        self.sites: Counter[tuple[str, str]] = Counter()
        self.device = device
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*raised)

    @property
    def reads(self) -> int:
        """How often a value was read."""
        return sum(self.counts[kind] for kind in ("item", "tolist", "equal", "copy"))

    def record(self, kind: str) -> None:
        self.counts[kind] += 1
        frames = [f for f, _ in traceback.walk_stack(sys._getframe(1))]
        inside = [f for f in frames if "/pinncurv/" in f.f_code.co_filename][:3]
        lines = [f"{_short(f.f_code.co_filename)}:{f.f_lineno}" for f in inside]
        self.sites[kind, " < ".join(lines) or "elsewhere"] += 1

    def report(self) -> str:
        """One line per call site, the most frequent first."""
        lines = [f"{count:5d}  {kind:6s}  {at}" for (kind, at), count in self.sites.most_common()]
        return "\n".join([f"{self.reads} reads: {dict(self.counts)}", *lines])


class _Functions(TorchFunctionMode):
    def __init__(self, counted: HostReads) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind = UNDISPATCHED.get(func)
        if kind is not None and self._counted.device == args[0].device.type == "cpu":
            self._counted.record(kind)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, counted: HostReads) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kind = _kind(func.overloadpacket, args, given, out, self._counted.device)
        if kind is not None:
            self._counted.record(kind)
        return out


def _kind(packet, args, given: list[str], out, device: str) -> str | None:
    if packet in (aten._to_copy, aten.copy_):  # copy_ returns what it writes to
        crossed = {(device, "cpu"): "copy", ("cpu", device): "upload"}
        return crossed.get((given[-1], out.device.type)) if device != "cpu" else None
    if device not in given:
        return None
    if packet in READS:
        return READS[packet]
    if packet in SHAPED_BY_VALUES or _has_mask(packet, args):
        return "shape"
    return "check" if packet in CHECKED else None


def _has_mask(packet, args) -> bool:
    if packet not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])
