"""The jet: a function value with its derivatives, pushed through unmodified torch code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import resolve_name

from pinncurv.jets.layout import Layout
from pinncurv.jets.location import calling_module

TorchFunction = Callable[..., Any]
Rule = Callable[..., Any]
_RULES: dict[Any, Rule] = {}
# Methods that have a rule because the function of the same name has one.
_IMPLIED: set[Any] = set()


def dispatched(function: TorchFunction) -> TorchFunction:
    """Make a function of one's own one that can have a rule.

    What is returned acts on jets by the rule that is registered for it, and otherwise as before. It
    is what a network must call:

        @dispatched
        def my_function(x): ...

    Args:
        function: A function of tensors, such as the ``apply`` of a ``torch.autograd.Function``.
    """

    @functools.wraps(function)
    def by_rule(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        given += [part for each in given if isinstance(each, list | tuple) for part in each]
        if any(isinstance(each, Jet) for each in given):
            return apply_rule(by_rule, args, kwargs)
        return function(*args, **kwargs)

    by_rule.pinncurv_dispatches = True  # type: ignore[attr-defined]
    return by_rule


def _check_reachable(function: Any) -> None:
    """Check that a call with a jet asks for a rule.

    Raises:
        TypeError: If it does not.
    """
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    asks = code is not None and "handle_torch_function" in code.co_names
    if asks or resolve_name(function) or hasattr(function, "pinncurv_dispatches"):
        return
    what = getattr(function, "__name__", repr(function))
    if isinstance(function, type) or hasattr(function, "forward"):
        raise TypeError(
            f"A rule must be registered for a function, got the class or module {what}. Register "
            "the function that its forward calls."
        )
    raise TypeError(
        f"A rule must be registered for a function that asks for it, but {what} is none of torch's "
        "that do, and would run without. Decorate it with @pinncurv.jets.dispatched, or write "
        "f = dispatched(Function.apply) for a torch.autograd.Function, and call what that returns."
    )


def register_rule(*functions: TorchFunction) -> Callable[[Rule], Rule]:
    """Register how torch functions act on jets.

    The rule receives the arguments of the function, at least one of them a ``Jet`` (or a sequence
    that contains one), and returns what the function returns, with jets in place of tensors. The
    tensor method of the same name is registered along (``torch.sin`` and ``Tensor.sin``).

    Args:
        functions: The functions that the rule is for: of torch, or ``dispatched``, or such that
            call ``torch.overrides.handle_torch_function``.

    Returns:
        A decorator that registers the rule and returns it unchanged.

    Raises:
        TypeError: If the rule would never be asked for; says how it will.
        ValueError: If a function has a rule already; names it.
    """

    def register(rule: Rule) -> Rule:
        known = [public_name(f) for f in functions if f in _RULES and f not in _IMPLIED]
        if known:
            raise ValueError(
                f"A function has one jet rule, but there is one for torch.{', torch.'.join(known)} "
                "already. Define a function of your own, which is @dispatched, and register that."
            )
        for function in functions:
            _check_reachable(function)
        for function in functions:
            _RULES[function] = rule
            method = getattr(Tensor, getattr(function, "__name__", ""), None)
            if method is not None and resolve_name(function) is not None:
                _RULES.setdefault(method, rule)
                _IMPLIED.add(method)
            _IMPLIED.discard(function)
        return rule

    return register


def supported() -> list[str]:
    """Return the names of the functions and methods that jets can be pushed through."""
    return sorted({public_name(function) for function in _RULES})


def apply_rule(function: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a torch function to jets by its rule.

    Raises:
        NotImplementedError: If the function works in place or has no rule, an argument is complex,
            or autograd is off where it was on before; names the function, the module it was called
            in, and the remedy.
        TypeError: If an argument is a numpy array.
    """
    rule = _RULES.get(function)
    if rule is None:
        raise NotImplementedError(_missing_rule(function))
    args = tuple([_checked(argument, function) for argument in args])
    kwargs = {name: _checked(argument, function) for name, argument in kwargs.items()}
    return rule(*args, **kwargs)


def _checked(argument: Any, function: TorchFunction) -> Any:
    """Return an argument of a rule, numbers of numpy as such of Python."""
    if isinstance(argument, Jet):
        if argument.tracked and not torch.is_grad_enabled():
            raise NotImplementedError(
                "A network must not switch autograd off, which would cut its derivatives in x, too,"
                f" but torch.{public_name(function)} is called (in {calling_module()}) under "
                "torch.no_grad(), in the forward of a torch.autograd.Function, or in a reentrant "
                "checkpoint. Freeze layers with requires_grad_(False), cut all derivatives with "
                "detach(), register dispatched(Function.apply) with @register_elementwise, or pass "
                "use_reentrant=False."
            )
    elif isinstance(argument, complex) or (isinstance(argument, Tensor) and argument.is_complex()):
        raise NotImplementedError(
            f"Jets are real, but torch.{public_name(function)} got a complex argument (in "
            f"{calling_module()}). Compute real and imaginary part as two real outputs."
        )
    elif isinstance(argument, list | tuple):
        for part in argument:
            _checked(part, function)
    elif type(argument).__module__ == "numpy" and hasattr(argument, "item"):
        if argument.ndim:
            raise TypeError(
                f"torch.{public_name(function)} of a jet takes tensors and numbers, got a numpy "
                f"array (in {calling_module()}). Convert it with torch.as_tensor."
            )
        return argument.item()
    return argument


def public_name(function: TorchFunction) -> str:
    """Return what a user calls a torch function, without the leading ``torch.``."""
    name = resolve_name(function) or getattr(function, "__name__", repr(function))
    name = name.removeprefix("torch.")
    plain = name.removeprefix("Tensor.").removeprefix("functional.")
    return plain if callable(getattr(torch, plain, None)) else name


_AS_A_CONSTANT = (
    "A jet is no tensor of numbers: write the network with torch functions, and take constants "
    "from x.detach()"
)
_AUTOGRAD = (
    "Jets carry the derivatives in x: request them by the term's operators, or inside of a network "
    "by pinncurv.jets.derivative"
)
_REAL = "Jets are real: compute real and imaginary part as two real outputs"
# What to do instead of some functions, for which no rule could be registered.
_REMEDIES = {
    "requires_grad_": f"Leave it out. {_AUTOGRAD}",
    "autograd.grad": _AUTOGRAD,
    "backward": _AUTOGRAD,
    "retain_grad": _AUTOGRAD,
    "register_hook": "Hooks of gradients are ignored by a linearization: leave it out",
    "copy_": "Use the jet itself instead of a copy",
    **dict.fromkeys(("set_", "resize_", "zero_", "fill_"), "Make a new tensor instead"),
    **dict.fromkeys(("tensor", "as_tensor", "asarray", "from_numpy"), _AS_A_CONSTANT),
    **dict.fromkeys(("cdouble", "cfloat", "complex", "polar", "view_as_complex"), _REAL),
    **dict.fromkeys(("item", "tolist", "numpy", "cpu"), _AS_A_CONSTANT),
    **dict.fromkeys(("grad", "grad_fn"), _AUTOGRAD),
    "is_nested": (
        "nn.MultiheadAttention, and a layer of a transformer that is made of it, move the axis of "
        "the points: project with nn.Linear, and call "
        "torch.nn.functional.scaled_dot_product_attention on [N, heads, tokens, features]"
    ),
}


def _missing_rule(function: TorchFunction) -> str:
    """Say which function has no rule, where it was called, and what to do."""
    if isinstance(function, torch.ScriptMethod | torch.ScriptFunction):
        return (
            f"A scripted or traced module can't act on a jet (called in {calling_module()}). Use "
            "the nn.Module that it was made from."
        )
    name = public_name(function)
    remedy = _REMEDIES.get(name.removeprefix("Tensor."))
    if remedy is not None:
        return f"torch.{name} can't act on a jet (called in {calling_module()}). {remedy}."
    if name.endswith("_") and not name.endswith("__"):
        return in_place_error(name)
    return (
        f"No jet rule for torch.{name} (called in {calling_module()}). Register one with "
        f"@register_rule(torch.{name})."
    )


def in_place_error(name: str) -> str:
    """Say that a function works in place, where it was called, and what to do."""
    plain = name.rstrip("_")
    remedy = f"Use torch.{plain}" + (" without inplace=True" if plain == name else "")
    return (
        f"Jets are immutable, but torch.{name} works in place (called in {calling_module()}). "
        f"{remedy} instead."
    )


class Jet:
    """A value and its derivatives, one channel each, in one contiguous tensor.

    channels[s] = s-th derivative of the value, as the layout says

    To the code it is pushed through, a jet looks like its value: it has the value's shape, dtype
    and device, ``data`` and ``detach()`` give its value as a constant, and torch functions accept
    it by ``__torch_function__``. It is deliberately not a Tensor, so that a function without a rule
    raises instead of acting on the wrong axes.

    Args:
        channels: ``[S, N, ...]``, the channels first, then the points.
        layout: What the channels mean.
        tracked: Whether autograd was on where the pass began; by default, whether it is on now.
    """

    __slots__ = ("channels", "layout", "tracked")
    __array_ufunc__ = None  # numpy's numbers leave arithmetic to the jet

    def __init__(
        self, channels: Float[Tensor, " S *value"], layout: Layout, tracked: bool | None = None
    ) -> None:
        self.channels = channels
        self.layout = layout
        self.tracked = torch.is_grad_enabled() if tracked is None else tracked

    @classmethod
    def __torch_function__(
        cls,
        func: TorchFunction,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route a torch function to its rule."""
        return apply_rule(func, args, kwargs or {})

    def like(self, channels: Tensor) -> Jet:
        """Return a jet with other channels in the same layout."""
        return Jet(channels, self.layout, self.tracked)

    @property
    def data(self) -> Jet:
        """The jet of a constant, as for a tensor: it has the value, and no derivatives."""
        result: Jet = self.detach()
        return result

    @property
    def value(self) -> Tensor:
        """The value channel."""
        return self.channels[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self.channels.shape[1:]

    @property
    def ndim(self) -> int:
        """Number of axes of the value."""
        return self.channels.ndim - 1

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the value."""
        return self.channels.dtype

    @property
    def device(self) -> torch.device:
        """Device of the value."""
        return self.channels.device

    @property
    def mT(self) -> Jet:
        """The value's last two axes exchanged, at every point."""
        result: Jet = self.transpose(-2, -1)
        return result

    @property
    def T(self) -> Jet:
        """The transpose, which would move the points."""
        result: Jet = self.permute(*reversed(range(self.ndim)))
        return result

    @property
    def requires_grad(self) -> bool:
        """Whether autograd tracks the channels."""
        return self.channels.requires_grad

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the value's shape, or its size along one axis."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the value's number of axes."""
        return self.ndim

    def numel(self) -> int:
        """Return the value's number of elements."""
        return self.shape.numel()

    def __len__(self) -> int:
        """Return the number of points."""
        return self.shape[0]

    def __repr__(self) -> str:
        """Show shape and channels."""
        layout = self.layout
        return f"Jet(shape={tuple(self.shape)}, S={layout.S}, dtype={self.dtype})"

    def __bool__(self) -> bool:
        """Refuse to be a condition, as a tensor with several elements does."""
        raise RuntimeError(
            f"The truth value of a jet is not defined (used in {calling_module()}). Compare with "
            "torch.where, or branch on something that does not depend on the points."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to become an array of numpy."""
        raise NotImplementedError(_missing_rule(Tensor.numpy))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Refuse to be written to."""
        raise NotImplementedError(
            f"Jets are immutable, but one is assigned to (in {calling_module()}). Build the result "
            "with torch.cat, torch.stack or torch.where instead."
        )

    def __getattr__(self, name: str) -> Any:
        """Offer the methods of a tensor, each routed to its rule."""
        method = getattr(Tensor, name, None)
        if name.startswith("__") or not callable(method):
            remedy = f" {_REMEDIES[name]}." if name in _REMEDIES else ""
            raise AttributeError(
                f"A jet has no attribute {name!r} (asked for in {calling_module()}).{remedy}"
            )
        return functools.partial(_call_method, method, self)


def _call_method(method: TorchFunction, jet: Jet, *args: Any, **kwargs: Any) -> Any:
    """Call a tensor method on a jet."""
    return apply_rule(method, (jet, *args), kwargs)


def _add_operator(name: str, function: TorchFunction, reflected: bool = False) -> None:
    """Give jets a Python operator, routed to the rule of its torch function."""

    def operator(self: Jet, *args: Any) -> Any:
        ordered = (*args, self) if reflected else (self, *args)
        return apply_rule(function, ordered, {})

    operator.__name__ = name
    setattr(Jet, name, operator)


_ARITHMETIC: dict[str, TorchFunction] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.div,
    "pow": torch.pow,
    "mod": torch.remainder,
    "floordiv": torch.floor_divide,
    "matmul": torch.matmul,
}
for _name, _function in _ARITHMETIC.items():
    _add_operator(f"__{_name}__", _function)
    _add_operator(f"__r{_name}__", _function, reflected=True)
for _name in ("neg", "pos", "getitem", "abs", "gt", "lt", "ge", "le", "eq", "ne"):
    _add_operator(f"__{_name}__", getattr(Tensor, f"__{_name}__"))


def seed(x: Float[Tensor, "N d"], layout: Layout) -> Jet:
    """Return the jet of the identity at x, the input of every jet computation.

    data = [x,  v_1, ..., v_R,  0, ..., 0]

    Args:
        x: The points, ``[N, d]``.
        layout: The channels to carry.
    """
    data = x.new_zeros(layout.S, *x.shape)
    data[0] = x
    directions = layout.directions
    data[1 : 1 + layout.R] = directions if directions.ndim == 3 else directions[:, None, :]
    return Jet(data, layout)


def lift(constant: Tensor, like: Jet) -> Jet:
    """Return the jet of a constant: its value, and zero in every other channel."""
    data = constant.new_zeros(like.layout.S, *constant.shape, dtype=like.dtype)
    data[0] = constant
    return like.like(data)
