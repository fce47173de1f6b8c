"""A derivative of a network inside of a network, at any point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pinncurv.jets.jet import Jet, seed
from pinncurv.jets.layout import Layout
from pinncurv.jets.location import calling_module
from pinncurv.jets.requests import HIGHEST_ORDER


def derivative(network: Callable[[Any], Any], x: Jet | Tensor, dim: int) -> Any:
    """Return the derivative of a network with respect to one coordinate, at points of one's own.

    ∂u/∂x_dim (x),  x = x(t) any function of the points t that are evaluated

    In a ``forward`` it makes conditions hold by construction, here ∂u/∂x = 0 at x = 1:

        wall = torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1)
        return self.net(x) - x[:, :1] * derivative(self.net, wall, 0)

    Args:
        network: The network, ``[N, d] -> [N, ...]``.
        x: Where to differentiate it, ``[N, d]``, with derivatives of its own if it is a jet.
        dim: The coordinate of the network's input.

    Raises:
        NotImplementedError: If derivatives of more than order four would be needed.
        TypeError: If the network's output does not depend on its input.
    """
    is_jet = isinstance(x, Jet)
    jet = x if isinstance(x, Jet) else seed(x, Layout(x.new_zeros(0, x.shape[-1])))
    if jet.layout.orders[-1] >= HIGHEST_ORDER + 1:
        raise NotImplementedError(
            "Derivatives inside of a network add to the order of the differential operators, which "
            f"must be at most {HIGHEST_ORDER + 1} together, got {jet.layout.orders[-1] + 1} (in "
            f"{calling_module()})."
        )
    layout, old, new = jet.layout.extended()
    data = jet.channels.new_zeros(layout.S, *jet.shape)
    data = data.index_copy(0, torch.tensor(old, device=data.device), jet.channels)
    data[new[0], :, dim] = 1
    output = network(Jet(data, layout, jet.tracked))
    if not isinstance(output, Jet):
        raise TypeError(
            "A network that is differentiated must return one function of its input, got "
            f"{type(output).__name__}. Pass a function that returns the output in question."
        )
    channels = output.channels[new]
    return jet.like(channels) if is_jet else channels[0]
