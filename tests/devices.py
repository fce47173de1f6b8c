"""A device that is none: it computes on the CPU and refuses what a GPU would refuse.

Tensors on it have values, so that whole trainings run and end where those on the CPU do. They
refuse to meet tensors of the CPU, and what the host reads has to be copied there. Backward passes
run on a thread of their own, as on a GPU. What only a GPU has (its libraries, streams, graphs,
rounding, speed) is not seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, _utils, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten

PRETENDED = "pretended"
# Torch itself offers operations for every device; these it composes by resizing, which a wrapper
# can't follow, or calls beneath Python (an index that is a list).
KERNELS = """
    eye eye.m arange arange.start arange.start_step linspace logspace range range.step
    randperm randperm.generator tril_indices triu_indices
    empty.memory_format empty_strided copy_ index.Tensor
"""
# For tests of what has to be right on a device: the pretended one, and a GPU where there is one.
has_gpu = torch.cuda.is_available()
not_beside_a_gpu = pytest.mark.skipif(has_gpu, reason="torch knows one accelerator at a time")
_needs_a_gpu = pytest.mark.skipif(not has_gpu, reason="needs CUDA")
DEVICES = [
    pytest.param(PRETENDED, marks=not_beside_a_gpu),
    pytest.param("cuda", marks=[pytest.mark.gpu, _needs_a_gpu]),
]
COPIES = {aten._to_copy, aten.copy_}
# Their second argument, a list of indices, may be on the CPU.
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# They take a number that is a tensor on the CPU, as all pointwise operations do.
NUMBERS = {*INDEXED, aten.masked_fill, aten.masked_fill_, aten.fill_}

_library: list[torch.library.Library] = []


def register() -> None:
    """Tell torch of the device, before the process' first backward pass makes its threads."""
    if _library or has_gpu:
        return
    backend_registration._setup_privateuseone_for_python_backend(PRETENDED)
    # torch.utils.checkpoint asks the accelerator for it
    getattr(torch, PRETENDED).get_amp_supported_dtype = list
    _library.append(torch.library.Library("aten", "IMPL"))
    for name in KERNELS.split():
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        _library[0].impl(name, partial(_kernel, func), "PrivateUse1")
    zeros = partial(_kernel, aten.zeros.default)  # forward mode's zeros, without their shortcuts
    _library[0].impl("_efficientzerotensor", zeros, "PrivateUse1")


def move_(module: nn.Module, device: str) -> None:
    """Move a network as ``module.to``, which fails where somebody holds weak references to it.

    The parameters stay the same objects, as they do when they move to a GPU.
    """
    if PRETENDED not in (device, next(module.parameters()).device.type):
        module.to(device)
        return
    for parameter in module.parameters():
        other = nn.Parameter(parameter.detach().to(device))
        parameter.__class__, other.__class__ = other.__class__, parameter.__class__
        parameter.__dict__, other.__dict__ = other.__dict__, parameter.__dict__
        torch._C._swap_tensor_impl(parameter, other)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


class Pretended(Tensor):
    """A tensor that says that it is on the device, and holds one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(PRETENDED, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.held})"

    # Whatever has these two is swapped, not written to, where a module moves.

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, shape, strides) -> Pretended:
        return Pretended(inner["held"])

    def __deepcopy__(self, memo: dict) -> Pretended:
        if id(self) not in memo:
            copied = Pretended(self.held.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                copied._is_param = True  # what makes it one
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        held, where = self.held.detach(), str(self.device)
        if isinstance(self, nn.Parameter):
            return _utils._rebuild_parameter, (Pretended(held), self.requires_grad, OrderedDict())
        return _utils._rebuild_device_tensor_from_cpu_tensor, (held, self.dtype, where, False)

    # What torch refuses for subclasses that it allows for tensors on a GPU.

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Run an operation on what the tensors hold.

    Raises:
        RuntimeError: If it mixes devices as no operation of a GPU does.
    """
    given = [tensor for tensor in _tensors(args, *kwargs.values()) if isinstance(tensor, Pretended)]
    _refuse_mixed(func, args, kwargs, len(given))
    device = kwargs.get("device")
    pretends = bool(given) if device is None else torch.device(device).type == PRETENDED
    if pretends:
        _refuse_generator(func, kwargs)
    options = {name: _mapped(_held, value) for name, value in kwargs.items()}
    if device is not None:
        options["device"] = "cpu"
    out = func(*_mapped(_held, args), **options)
    if pretends:
        out = _mapped(_pretending, out)
        if func._schema.is_mutable:
            out = return_and_correct_aliasing(func, args, kwargs, out)
    if any(tensor.shape != tensor.held.shape for tensor in given):
        raise NotImplementedError(f"The pretended device can't follow a resize: {func}.")
    return out


def _kernel(func, *args, **kwargs):
    return dispatch(func, args, kwargs)


def _refuse_mixed(func, args, kwargs, there: int) -> None:
    """Raise where CUDA would: tensors of both devices, but for copies, indices and numbers."""
    packet = func.overloadpacket
    if not there or packet in COPIES:
        return
    written = func._schema.is_mutable and not isinstance(args[0], Pretended)
    if packet in INDEXED and isinstance(args[0], Pretended):
        args = (args[0], *args[2:])
    tensors = _tensors(args, *kwargs.values())
    here = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    if not here:
        return
    numbers = torch.Tag.pointwise in func.tags or packet in NUMBERS
    if written or not numbers or any(tensor.dim() for tensor in here):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got {len(here)} on the CPU and "
            f"{there} on the device in {func}."
        )


def _refuse_generator(func, kwargs) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != PRETENDED:
        raise RuntimeError(f"Expected a generator on the device, got a CPU generator in {func}.")


# Operations take and return tensors and lists of them; torch's own trees take four times as long.


def _tensors(*values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(*value)


def _mapped(change, value):
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, item) for item in value])
    return change(value) if isinstance(value, Tensor) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Pretended) else tensor


def _pretending(tensor: Tensor) -> Pretended:
    return tensor if isinstance(tensor, Pretended) else Pretended(tensor)
