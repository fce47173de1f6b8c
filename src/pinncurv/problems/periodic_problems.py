"""Evolution problems that are periodic on an interval, with computed references."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pinncurv.diffops import DifferentialOperator, Partial, Value
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.periodic_equation import PeriodicEquation
from pinncurv.problems.periodic_reference import PeriodicReference
from pinncurv.problems.problem import Problem

InitialValues = Callable[[Tensor], Tensor]


def allen_cahn(
    n_interior: int = 2000,
    n_initial: int = 200,
    start: float = 0.0,
    end: float = 1.0,
    initial: InitialValues | None = None,
    initial_weight: float = 1.0,
) -> Problem:
    """The Allen-Cahn equation, whose solution becomes ±1 with steep layers between.

    u_t = 1e-4 u_xx + 5u - 5u³ in [0, 1] x [-1, 1],    u = x² cos(πx) at t = 0,    periodic

    The network has to be periodic in x, see `PeriodicEmbedding`, or get a term `periodic`. The
    initial values have slopes of ±2 at x = ±1, so that their periodic extension has a kink there,
    which a smooth periodic network can't match: a small residual of the initial term remains. In
    the solution it is round at once, over a width of about sqrt(1e-4 t).

    Args:
        n_interior: Number of points in the domain.
        n_initial: Number of points at the start.
        start: The first time, of a time window.
        end: The last time.
        initial: The values at the first time, a function of points (t, x): e.g. the network of the
            window before. Those of the equation by default, which hold at time 0.
        initial_weight: The weight of the initial term.

    Raises:
        ValueError: If the times do not lie in [0, 1] or initial values are missing.

    Source: Raissi, Perdikaris, Karniadakis 2019, section 3.2.1.
    """
    operators = {"u": Value(), "u_t": Partial(0), "u_xx": Partial(1, 1)}
    return _problem(
        ALLEN_CAHN,
        operators,
        _allen_cahn,
        n_interior,
        n_initial,
        (start, end),
        initial,
        initial_weight,
    )


def kdv(
    n_interior: int = 2000,
    n_initial: int = 200,
    start: float = 0.0,
    end: float = 1.0,
    initial: InitialValues | None = None,
    initial_weight: float = 1.0,
) -> Problem:
    """The Korteweg-de Vries equation, in which a cosine becomes a train of solitons.

    u_t + u u_x + 0.022² u_xxx = 0 in [0, 1] x [-1, 1],    u = cos(πx) at t = 0,    periodic

    The network has to be periodic in x, see `PeriodicEmbedding`, or get a term `periodic`.

    Arguments and errors as `allen_cahn`.

    Source: Zabusky and Kruskal 1965.
    """
    operators = {"u": Value(), "u_t": Partial(0), "u_x": Partial(1), "u_xxx": Partial(1, 1, 1)}
    return _problem(
        KDV, operators, _kdv, n_interior, n_initial, (start, end), initial, initial_weight
    )


def kuramoto_sivashinsky(
    n_interior: int = 4000,
    n_initial: int = 200,
    start: float = 0.0,
    end: float = 1.0,
    initial: InitialValues | None = None,
    initial_weight: float = 1.0,
) -> Problem:
    """The Kuramoto-Sivashinsky equation until it is chaotic.

    u_t + 100/16 u u_x + 100/16² u_xx + 100/16⁴ u_xxxx = 0 in [0, 1] x [0, 2π],    periodic,
    u = cos(x) (1 + sin(x)) at t = 0

    The network has to be periodic in x, see `PeriodicEmbedding`, or get a term `periodic`. Small
    errors grow by about four orders of magnitude until t = 1.

    Arguments and errors as `allen_cahn`.

    Source: Wang, Sankaran, Perdikaris 2022 (arXiv 2203.07404), section 4.3.
    """
    operators = {
        "u": Value(),
        "u_t": Partial(0),
        "u_x": Partial(1),
        "u_xx": Partial(1, 1),
        "u_xxxx": Partial(1, 1, 1, 1),
    }
    return _problem(
        KURAMOTO_SIVASHINSKY,
        operators,
        _kuramoto_sivashinsky,
        n_interior,
        n_initial,
        (start, end),
        initial,
        initial_weight,
    )


def _problem(
    reference: PeriodicReference,
    operators: Mapping[str, DifferentialOperator],
    residual: Callable[..., Tensor],
    n_interior: int,
    n_initial: int,
    times: tuple[float, float],
    initial: InitialValues | None,
    initial_weight: float,
) -> Problem:
    """Build a problem with the equation, and initial values, in a part of the time."""
    start, end = times
    if not 0 <= start < end <= reference.end:
        raise ValueError(
            f"The times of {reference.name} must satisfy 0 <= start < end <= {reference.end}, got "
            f"start={start}, end={end}. Its reference ends there."
        )
    if initial is None and start > 0:
        raise ValueError(
            f"Initial values at start={start} must be given, since those of {reference.name} hold "
            "at time 0, got initial=None. Pass a function of points (t, x), such as the network of "
            "the window before."
        )
    equation = reference.equation
    domain = SpaceTimeBox(Box((equation.lower,), (equation.upper,)), start, end)
    values = reference.initial if initial is None else initial
    interior = LossTerm(operators, residual, domain.interior(n_interior), name="interior")
    at_start = dirichlet(values, domain.initial(n_initial), initial_weight, "initial")
    return Problem(
        name=reference.name,
        terms=(interior, at_start),
        d_in=2,
        evaluation=domain.interior(10 * n_interior),
        solution=reference,
        coordinates=("$t$", "$x$"),
        periodic={1: (equation.lower, equation.upper)},
    )


def _allen_cahn(x: Tensor, u: Tensor, u_t: Tensor, u_xx: Tensor) -> Tensor:
    return u_t - 1e-4 * u_xx + 5 * (u**3 - u)


def _kdv(x: Tensor, u: Tensor, u_t: Tensor, u_x: Tensor, u_xxx: Tensor) -> Tensor:
    return u_t + u * u_x + 0.022**2 * u_xxx


def _kuramoto_sivashinsky(
    x: Tensor, u: Tensor, u_t: Tensor, u_x: Tensor, u_xx: Tensor, u_xxxx: Tensor
) -> Tensor:
    return u_t + 100 / 16 * u * u_x + 100 / 16**2 * u_xx + 100 / 16**4 * u_xxxx


def _squares(x: Tensor) -> Tensor:
    return x[:, 1:] ** 2 * torch.cos(math.pi * x[:, 1:])


def _cosine(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x[:, 1:])


def _waves(x: Tensor) -> Tensor:
    return torch.cos(x[:, 1:]) * (1 + torch.sin(x[:, 1:]))


# Twice the points, and half the step, change these solutions by the relative L2 norms that are
# given; the tests compare them with coarser ones.
ALLEN_CAHN = PeriodicReference(  # 1e-6 because of the kink at the start; 1e-10 after t = 0.1
    "allen_cahn",
    PeriodicEquation(-1.0, 1.0, (5.0, 0.0, 1e-4), -5.0, 0, 3),
    _squares,
    end=1.0,
    n=1024,
    steps=1000,
    snapshots=500,
)
KDV = PeriodicReference(  # 1e-10
    "kdv",
    PeriodicEquation(-1.0, 1.0, (0.0, 0.0, 0.0, -(0.022**2)), -0.5, 1, 2),
    _cosine,
    end=1.0,
    n=512,
    steps=16000,
    snapshots=1000,
)
KURAMOTO_SIVASHINSKY = PeriodicReference(  # 1e-8
    "kuramoto_sivashinsky",
    PeriodicEquation(0.0, 2 * math.pi, (0.0, 0.0, -100 / 16**2, 0.0, -100 / 16**4), -50 / 16, 1, 2),
    _waves,
    end=1.0,
    n=320,
    steps=20000,
    snapshots=1000,
)
