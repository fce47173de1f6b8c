"""What a network must do: on jets the same as on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as globally
from torch.overrides import TorchFunctionMode

from pinncurv.jets.jet import Jet, apply_rule, seed
from pinncurv.jets.layout import Layout
from pinncurv.jets.location import calling_module, raising_module
from pinncurv.jets.recording import record

Network = Callable[[Any], Any]

_MOST_POINTS = 32
_EXPLAINED = (TypeError, ValueError, AttributeError, IndexError, RuntimeError)


def check_network(network: Network, x: Float[Tensor, "N d"]) -> None:
    """Check at a few points that a network does on jets what it does on tensors.

    u(jet of x) = (u(x), ...)

    Values tell jets that were taken for something else: by isinstance(x, Tensor) and the like, or
    by augmented assignment to what has an alias or a view.

    Args:
        network: The network, ``[N, d] -> [N, ...]``, or a tuple or dictionary of such outputs.
        x: The points.

    Raises:
        ValueError: If values differ on jets, or from call to call; names the output and the point.
    """
    x = x[:_MOST_POINTS].detach()
    check_output(network, x, _on_jet(network, x))


def check_output(network: Network, x: Float[Tensor, "N d"], output: Any) -> None:
    """Check that the output of a network for the jet of x has the values of that for x.

    Args:
        network: The network.
        x: The points.
        output: Its output, a jet, or a tuple or dictionary of jets.

    Raises:
        ValueError: If a value differs; names the output and the first point.
    """
    given = x.detach().clone()
    expected = _values(network(given))
    if not torch.equal(given, x):
        raise ValueError(
            f"The network {_name(network)} must not write to its input, but it changed the points. "
            "Start with x = x.clone() or write x = x + ... instead of x += ..."
        )
    received = _values(output)
    different = [name for name in expected if not agree(received.get(name), expected[name])] + [
        name for name in received if name not in expected
    ]
    if not different:
        return
    name = different[0]
    again = _values(network(x.detach().clone()))
    if not all(agree(again.get(name), tensor) for name, tensor in expected.items()):
        raise ValueError(
            f"The network {_name(network)} must return the same whenever it is called, but{name} "
            "differs between two calls at the same points. Draw no random numbers, count no calls, "
            "and call model.eval() for layers that do."
        )
    difference = _difference(received.get(name), expected.get(name))
    raise ValueError(
        f"The network {_name(network)} must do on jets, by which it is differentiated, what it "
        f"does on tensors, but{name} differs: {difference}. "
        "Don't branch on isinstance(x, Tensor), torch.is_tensor or hasattr, and write h = h + ... "
        "instead of h += ... where something else is, or is a view of, the same tensor."
    )


def check_hooks(module: Module, parameters: Mapping[str, Tensor] | None = None) -> None:
    """Check that no hooks change gradients, which a linearization would not call.

    Args:
        module: The network, or a residual.
        parameters: Trained tensors by name.

    Raises:
        NotImplementedError: If there are some; names the modules or parameters.
    """
    hooked = [
        name or type(module).__name__
        for name, part in module.named_modules()
        if part._backward_hooks or part._backward_pre_hooks
    ]
    for registered in (globally._global_backward_hooks, globally._global_backward_pre_hooks):
        hooked += ["all modules"] if registered else []
    hooked += [name for name, parameter in (parameters or {}).items() if has_hooks(parameter)]
    if hooked:
        raise NotImplementedError(
            "Modules and parameters must have no backward hooks, which exact derivatives can't "
            f"contain, got some on {', '.join(hooked)}. Remove them with handle.remove(); write "
            "what changes gradients as a function with @register_elementwise."
        )


def has_hooks(parameter: Tensor) -> bool:
    """Whether hooks change the gradient of a tensor."""
    return bool(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    )


class _Conversions(TorchFunctionMode):
    """Explains functions that do not ask a jet what to do."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse jets by the name of the function."""
        makes_tensor = func in (torch.tensor, torch.as_tensor, torch.asarray)
        if makes_tensor and any(isinstance(argument, Jet) for argument in args):
            apply_rule(func, args, {})
        if func is torch.einsum and isinstance(args[0], Jet):
            raise NotImplementedError(
                "torch.einsum of jets must be given an equation, got lists of axes (called in "
                f"{calling_module()}). Write it like torch.einsum('ni,ij->nj', h, W)."
            )
        return func(*args, **(kwargs or {}))


def _on_jet(network: Network, x: Float[Tensor, "N d"]) -> Any:
    """Call a network with a jet; an error says where, unless tensors raise one, too."""
    try:
        with record(), _Conversions():  # recording refuses by name what mixes points
            return network(seed(x, Layout(x.new_ones(1, x.shape[-1]))))
    except Exception as error:
        try:
            network(x.clone())
        except Exception as same:
            same.add_note(
                f"The network {_name(network)} was called with points [N, d], of shape "
                f"{list(x.shape)}: d is the number of coordinates, time included."
            )
            raise same from None
        where = raising_module(error)
        if type(error) not in _EXPLAINED or f"in {where})" in str(error):
            raise
        raise type(error)(
            f"The network {_name(network)} runs on tensors, but not on jets, by which it is "
            f"differentiated: {error} (raised in {where}). Call functions of "
            "pinncurv.jets.supported() directly, with tensors and numbers besides jets."
        ) from error


def outputs(output: Any, name: str = " the output") -> Iterator[tuple[str, Jet | Tensor]]:
    """Yield all jets or tensors that a network returns, with names for errors."""
    if isinstance(output, Mapping):
        for key, part in output.items():
            yield from outputs(part, f"{name}[{key!r}]")
    elif isinstance(output, list | tuple):
        for i, part in enumerate(output):
            yield from outputs(part, f"{name}[{i}]")
    elif isinstance(output, Jet | Tensor):
        yield name, output


def _values(output: Any) -> dict[str, Tensor]:
    """Return the values of all outputs by their names."""
    return {
        name: (part.value if isinstance(part, Jet) else part).detach()
        for name, part in outputs(output)
    }


def agree(received: Tensor | None, expected: Tensor) -> bool:
    """Whether two values are the same but for rounding."""
    if received is None or received.shape != expected.shape or received.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(received, expected)
    tolerance = torch.finfo(expected.dtype).eps ** 0.4
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(received, expected, tolerance, tolerance * scale, equal_nan=True)


def _difference(received: Tensor | None, expected: Tensor | None) -> str:
    """Say how two values differ."""
    if received is None or expected is None:
        return f"got {'none' if received is None else 'one'} on a jet, but not so on a tensor"
    if received.shape != expected.shape or received.dtype != expected.dtype:
        return (
            f"got shape {list(received.shape)} in {received.dtype} on a jet, "
            f"{list(expected.shape)} in {expected.dtype} on a tensor"
        )
    distance = (received - expected).abs().nan_to_num(float("inf")).flatten()
    worst = int(distance.argmax())
    point = worst // max(expected[0].numel(), 1) if expected.ndim else 0
    return (
        f"got {received.flatten()[worst].item():.6g} on a jet, "
        f"{expected.flatten()[worst].item():.6g} on a tensor, at point {point}"
    )


def _name(network: Network) -> str:
    return getattr(network, "__name__", type(network).__name__)
