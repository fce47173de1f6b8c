"""Copies in float64 at a few points, on which brute force is affordable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module

from pinncurv.problems import LossTerm

Network = Callable[[Any], Any]
N = TypeVar("N", bound=Network)


def in_double(model: N) -> N:
    """Return a copy of a network in float64; a function is returned as it is."""
    return copy.deepcopy(model).double() if isinstance(model, Module) else model


def first_points(term: LossTerm, x: Tensor, count: int) -> tuple[LossTerm, Tensor]:
    """Return a term and its points, in float64, at the first few of them."""
    part = slice(0, count)
    weight = term.weight[part] if isinstance(term.weight, Tensor) else term.weight
    points = x[part].detach().double()
    small = replace(term.at(part), weight=weight).to(points)
    if any(True for _ in term.named_parameters()):
        small = copy.deepcopy(small)
        for _, parameter in small.named_parameters():
            parameter.data = parameter.data.double()
    return small, points
