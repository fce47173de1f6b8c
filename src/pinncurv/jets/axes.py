"""Where the value's axes are in a jet's stored channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pinncurv.jets.jet import Jet
from pinncurv.jets.location import calling_module
from pinncurv.jets.recording import active_tape


def channel_dim(jet: Jet, dim: int, new_axes: int = 0) -> int:
    """Return where an axis of the value is in the stored channels.

    Args:
        jet: The jet.
        dim: The axis, counted as torch counts, possibly from the end.
        new_axes: How many axes the function is about to insert (1 for stack and unsqueeze).

    Raises:
        IndexError: If the value has no such axis.
    """
    ndim = jet.ndim + new_axes
    if not -ndim <= dim < max(ndim, 1):
        raise IndexError(
            f"The axis must be between {-ndim} and {ndim - 1} for a value of shape "
            f"{tuple(jet.shape)}, got {dim} (in {calling_module()})."
        )
    return dim % max(ndim, 1) + 1


def free_dim(jet: Jet, dim: int, name: str) -> int:
    """Return where an axis is in the stored channels, and refuse the points' where that is wrong.

    Args:
        jet: The jet.
        dim: The axis of the value that a function mixes, cuts or removes.
        name: The function, for the error message.

    Raises:
        IndexError: If the value has no such axis.
        ValueError: See ``point_axis_mixed``.
    """
    axis = channel_dim(jet, dim)
    if axis == 1:
        point_axis_mixed(jet, name)
    return axis


def channel_dims(jet: Jet, dims: Sequence[int]) -> list[int]:
    """Return where several axes of the value are in the stored channels."""
    return [channel_dim(jet, dim) for dim in dims]


def trailing_view(jet: Jet, ndim: int) -> Tensor:
    """View the channels so that the value's axes align from the right with ``ndim`` axes.

    Raises:
        ValueError: If this moves the points where what follows relies on their axis.
    """
    if 0 < jet.ndim < ndim:
        point_axis_mixed(jet, "broadcast_tensors")
    return prepend_axes(jet.channels, ndim - jet.ndim)


def prepend_axes(data: Tensor, number: int) -> Tensor:
    """Insert axes of size one between the channels and the value's axes."""
    return data.reshape(data.shape[0], *(1,) * number, *data.shape[1:]) if number > 0 else data


def broadcast_together(first: Jet, second: Jet) -> tuple[Tensor, Tensor]:
    """View the channels of two jets so that their values align from the right.

    Raises:
        ValueError: If they come from different passes, or their points do not align: ``[N]``
            against ``[N, 1]`` is ``[N, N]``, every point with every other, which is never meant.
    """
    check_same_pass(first, second)
    if first.ndim != second.ndim and first.ndim and second.ndim:
        raise ValueError(
            "The first axis must stay the axis of the points, but broadcasting shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)} pairs every point with every other "
            f"(in {calling_module()}). Insert the missing axes behind it, e.g. by unsqueeze(-1)."
        )
    return trailing_view(first, second.ndim), trailing_view(second, first.ndim)


def check_same_pass(*jets: Jet) -> None:
    """Check that the channels of jets mean the same.

    Raises:
        ValueError: If they do not.
    """
    if any(jet.layout is not jets[0].layout for jet in jets[1:]):
        raise ValueError(
            "Jets must come from the same pass to be combined, but their layouts differ "
            f"(in {calling_module()}). Seed one jet and derive both from it."
        )


def point_axis_mixed(jet: Jet, name: str) -> None:
    """Refuse to mix or move the points where what follows relies on their axis.

    Per-point coefficients belong to the first axis, and a linearization takes the network apart
    point by point, which a function that couples the points would silently break.

    Raises:
        ValueError: If the jet has per-point coefficients or is being recorded.
    """
    if jet.layout.per_point or active_tape() is not None:
        raise ValueError(
            f"The first axis must stay the axis of the points, but torch.{name} mixes or moves it "
            f"(called in {calling_module()}). Act on the other axes only."
        )
