"""The Helmholtz equation with a product of sines as solution."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Laplacian, Value
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import Box
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_finite
from pinncurv.problems.problem import Problem, TensorOrJet


def helmholtz(
    frequencies: Sequence[float] = (1.0, 4.0),
    wave_number: float = 1.0,
    n_interior: int = 2500,
    n_boundary: int = 400,
) -> Problem:
    """A product of sines, one frequency per coordinate.

    Δu + k² u = (k² - π² Σ a_i²) u*,    u* = Π_i sin(a_i π x_i),    on [-1, 1]^d

    Args:
        frequencies: The numbers a_i.
        wave_number: The number k.
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the faces, where u = u* is prescribed. 0 leaves that out,
            for networks that are periodic by themselves, with period 2 (and whole numbers a_i): the
            solution is unique there, too, unless k² / π² is a sum of d squares of whole numbers.

    Raises:
        ValueError: If a frequency or the wave number is not finite, or a frequency is no whole
            number without points on the faces.

    Source: S. Wang, Y. Teng, P. Perdikaris, arXiv 2001.04536, with (1, 4) and k = 1.
    """
    a = tuple(float(frequency) for frequency in frequencies)
    for number in (*a, wave_number):
        check_finite("frequencies and the wave number", number)
    if not n_boundary and not all(f.is_integer() for f in a):
        raise ValueError(
            "Without points on the faces, frequencies must be whole numbers, for which the "
            f"solution has the period 2, got {a}. Pass n_boundary > 0."
        )
    domain = Box.cube(len(a), -1.0, 1.0)
    solution = partial(_sines, a)
    strength = wave_number**2 - math.pi**2 * sum(f * f for f in a)
    interior = LossTerm(
        operators={"u": Value(), "lap_u": Laplacian()},
        residual=partial(_residual, a, wave_number, strength),
        points=domain.interior(n_interior),
        name="interior",
    )
    boundary = (dirichlet(solution, domain.faces(n_boundary)),) if n_boundary else ()
    return Problem(
        name="helmholtz",
        terms=(interior, *boundary),
        d_in=domain.dim,
        evaluation=domain.interior(10_000),
        solution=solution,
        periodic={} if n_boundary else dict.fromkeys(range(domain.dim), (-1.0, 1.0)),
    )


def _residual(
    a: tuple[float, ...], wave_number: float, strength: float, x: Tensor, u: Tensor, lap_u: Tensor
) -> Tensor:
    return lap_u + wave_number**2 * u - strength * _sines(a, x)


def _sines(a: tuple[float, ...], x: TensorOrJet) -> TensorOrJet:
    product = torch.sin(a[0] * math.pi * x[:, :1])
    for i, frequency in enumerate(a[1:], 1):
        product = product * torch.sin(frequency * math.pi * x[:, i : i + 1])
    return product
