"""What has a name on the command line: problems, networks, optimizers, curvature operators."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from experiments import baselines
from pinncurv import presets, problems
from pinncurv.optim import SSBFGS, CurvatureOptimizer, FirstOrder, SSBroyden


class Sine(nn.Module):
    """The sine as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return sin(x)."""
        return torch.sin(x)


Activation = Literal["tanh", "sigmoid", "sin", "gelu", "silu", "softplus"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "sin": Sine,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


def mlp(
    d_in: int,
    d_out: int,
    widths: Sequence[int] = (64,),
    activation: Activation = "tanh",
    frequency: float = 1.0,
) -> nn.Sequential:
    """Return a multilayer perceptron with torch's initialization, the paper's network.

    Args:
        d_in: Dimension of a point.
        d_out: Number of components of the unknown.
        widths: Widths of the hidden layers.
        activation: After every layer but the last.
        frequency: By which the first layer's weights are multiplied; more than one for solutions
            that oscillate (SIREN's ω₀).
    """
    if not all(width > 0 for width in widths):
        raise ValueError(f"widths must be positive, got {tuple(widths)}.")
    if not 0 < frequency < math.inf:
        raise ValueError(f"frequency must be positive and finite, got {frequency}.")
    layers: list[nn.Module] = []
    for left, right in pairwise((d_in, *widths, d_out)):
        layers += [nn.Linear(left, right), _ACTIVATIONS[activation]()]
    first = cast(nn.Linear, layers[0])
    first.weight.data.mul_(frequency)
    return nn.Sequential(*layers[:-1])


def periodic_mlp(
    d_in: int,
    d_out: int,
    periods: Sequence[float | None],
    modes: int = 1,
    widths: Sequence[int] = (64,),
    activation: Activation = "tanh",
) -> nn.Sequential:
    """Return a multilayer perceptron of sines and cosines of the periodic coordinates.

    Args:
        d_in: Dimension of a point.
        d_out: Number of components of the unknown.
        periods: The period of each coordinate, None for those that are not periodic.
        modes: The number of multiples of the lowest frequency.
        widths: Widths of the hidden layers.
        activation: After every layer but the last.
    """
    if len(periods) != d_in:
        raise ValueError(f"periods must have {d_in} entries, one per coordinate, got {periods}.")
    embedding = problems.PeriodicEmbedding(periods, modes)
    return nn.Sequential(embedding, *mlp(embedding.d_out, d_out, widths, activation))


def _functions(module: ModuleType, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    return {name: getattr(module, name) for name in names}


PROBLEMS = _functions(
    problems,
    (
        *("poisson2d", "poisson5d", "poisson10d", "poisson100d", "heat1d", "heat4d"),
        *("fokker_planck", "log_fokker_planck", "log_fokker_planck9d"),
        *("anisotropic_fokker_planck", "anisotropic_log_fokker_planck"),
        *("burgers", "allen_cahn", "kdv", "kuramoto_sivashinsky", "cavity"),
        *("heat_coefficient", "poisson_coefficient", "poisson_source"),
        *("kovasznay", "beltrami", "helmholtz", "wave1d", "biharmonic_plate"),
        *("poisson2d_multiscale", "convection", "reaction", "kdv_two_solitons", "nls"),
        *("black_scholes", "poisson_disk", "poisson_disk_ritz", "poisson_l_shape"),
    ),
)

NETWORKS: dict[str, Callable[..., Any]] = {"mlp": mlp, "periodic_mlp": periodic_mlp}

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **_functions(
        presets, [name for name in vars(presets) if inspect.isfunction(getattr(presets, name))]
    ),
    "curvature_optimizer": CurvatureOptimizer,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "lbfgs": torch.optim.LBFGS,
    "ssbfgs": SSBFGS,
    "ssbroyden": SSBroyden,
    "nadam": torch.optim.NAdam,
    "muon": baselines.Muon,
    "soap": baselines.soap,
}


def stepped(optimizer: Any) -> Any:
    """Return an optimizer that steps on objectives: torch's own are wrapped."""
    plain = isinstance(optimizer, torch.optim.Optimizer)
    return (
        FirstOrder(optimizer)
        if plain and not isinstance(optimizer, CurvatureOptimizer)
        else optimizer
    )
