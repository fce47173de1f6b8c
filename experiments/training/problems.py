"""Problems by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from experiments.training.errors import UserError
from pinncurv import problems
from pinncurv.problems import Problem


@dataclass(frozen=True)
class Entry:
    """A problem that can be named.

    Args:
        build: Returns the problem; its parameters say which sizes can be chosen.
        coordinates: Names of the first two coordinates.
    """

    build: Callable[..., Problem]
    coordinates: tuple[str, str] = ("$x_1$", "$x_2$")


_SPACE_TIME = ("$t$", "$x$")

PROBLEMS = {
    "poisson2d": Entry(problems.poisson2d),
    "poisson5d": Entry(problems.poisson5d),
    "poisson10d": Entry(problems.poisson10d),
    "poisson100d": Entry(problems.poisson100d),
    "heat1d": Entry(problems.heat1d, _SPACE_TIME),
    "heat4d": Entry(problems.heat4d, _SPACE_TIME),
    "fokker-planck": Entry(problems.fokker_planck, _SPACE_TIME),
    "log-fokker-planck": Entry(problems.log_fokker_planck, _SPACE_TIME),
    "anisotropic-fokker-planck": Entry(problems.anisotropic_fokker_planck, _SPACE_TIME),
    "anisotropic-log-fokker-planck": Entry(problems.anisotropic_log_fokker_planck, _SPACE_TIME),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem; None where the problem has no such size, or for its default.

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points of the boundary or initial condition.
        dimension: Dimension of space.
    """

    n_interior: int | None
    n_boundary: int | None
    dimension: int | None


def resolve_sizes(name: str, sizes: Sizes) -> Sizes:
    """Fill in the defaults of a problem.

    Raises:
        UserError: If a dimension is given for a problem of fixed dimension.
    """
    parameters = signature(PROBLEMS[name].build).parameters
    if "dim" not in parameters and sizes.dimension is not None:
        choices = [n for n, e in PROBLEMS.items() if "dim" in signature(e.build).parameters]
        raise UserError(
            f"The dimension of {name} is fixed, got --dimension {sizes.dimension}. Drop it, or "
            f"choose one of {', '.join(choices)}."
        )

    def or_default(value: int | None, parameter: str) -> int | None:
        if value is not None or parameter not in parameters:
            return value
        default = parameters[parameter].default
        return 1 if default is parameters[parameter].empty else default

    return Sizes(
        n_interior=or_default(sizes.n_interior, "n_interior"),
        n_boundary=or_default(sizes.n_boundary, _condition(name)),
        dimension=or_default(sizes.dimension, "dim"),
    )


def build_problem(name: str, sizes: Sizes) -> Problem:
    """Return the problem of a name.

    Args:
        name: One of ``PROBLEMS``.
        sizes: Its resolved sizes.
    """
    arguments = {"n_interior": sizes.n_interior, _condition(name): sizes.n_boundary}
    if sizes.dimension is not None:
        if sizes.dimension < 1:
            raise UserError(f"--dimension must be at least 1, got {sizes.dimension}.")
        arguments["dim"] = sizes.dimension
    return PROBLEMS[name].build(**arguments)


def _condition(name: str) -> str:
    """Return what the problem calls the number of points of its condition."""
    parameters = signature(PROBLEMS[name].build).parameters
    return "n_boundary" if "n_boundary" in parameters else "n_initial"
