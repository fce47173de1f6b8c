"""The L2 term: a multiple of the squared norm of the parameters, as one more term of the loss."""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import DifferentialOperator
from pinncurv.problems.loss_term import LossTerm, checked_number
from pinncurv.problems.residual import Residual
from pinncurv.problems.samplers import Sampler


@dataclass(frozen=True)
class NoPoints:
    """The sampler of a term that has no points: a sample is an empty tensor, [1, 0]."""

    n: int = 1
    dim: int = 0
    fixed: bool = True

    def sample(
        self, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Return an empty tensor; the generator is not used."""
        return torch.empty(self.n, self.dim, dtype=dtype, device=device)


def _parameters(x: Tensor) -> Tensor:
    raise TypeError("The residual of an L2 term is the parameters, not a function of x.")


@dataclass(frozen=True, eq=False)
class L2(LossTerm):
    """Weight decay: half the squared norm of the trained parameters, times a weight.

    w/2 ‖θ‖²,  r̃ = √w θ,  J = √w I

    It is a term like any other: in the loss, the gradient, the records, and exact in every
    operator, also in KFAC and EKFAC, of which w I is a Kronecker product. It stays exact under
    every choice of the output gradients. In Jacobian and kernel it has a row per parameter: there
    are then no fewer residuals than parameters, so that the side of the residuals is never the
    cheaper one, and ``CheaperSide`` takes conjugate gradients as soon as there are more parameters
    than its ``largest``, also at few points (``GrowingBatch``). Records tell by their iterations.

    Args:
        weight: w, a number >= 0.
        name: How errors and records call it.
        of: Which parameters, a function of their name; by default all of the network, and none of
            those that residuals or coefficients of the PDE own.

    Raises:
        ValueError: If the weight is no finite number >= 0.
    """

    operators: Mapping[str, DifferentialOperator] = field(init=False, default_factory=dict)
    residual: Residual = field(init=False, default_factory=lambda: _parameters)
    points: Sampler = field(init=False, default_factory=NoPoints)
    weight: float = field()
    name: str = "l2"
    data: Mapping[str, Tensor] = field(init=False, default_factory=dict)
    of: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", checked_number(self.name, self.weight))

    def chosen(self, trained: Mapping[str, Tensor], network: Container[str]) -> dict[str, Tensor]:
        """Return the parameters that decay.

        Args:
            trained: Those of network and terms that require a gradient.
            network: Which names are of the network.

        Raises:
            ValueError: If there is none.
        """
        decays = network.__contains__ if self.of is None else self.of
        found = {name: p for name, p in trained.items() if decays(name)}
        if not found:
            raise ValueError(
                f"Term '{self.name}' must have a parameter, but of= chose none of "
                f"{', '.join(trained) or 'no trained parameters'}. Return True for "
                "those that shall decay."
            )
        return found

    def evaluate(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "D 1"]:
        named = dict(model.named_parameters()) if isinstance(model, Module) else {}
        trained = {name: p for name, p in named.items() if p.requires_grad}
        return torch.cat([p.flatten() for p in self.chosen(trained, trained).values()])[:, None]

    def scale(self, x: Tensor) -> float:
        return math.sqrt(self.weight)

    def check_points(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.shape[-1:] != (0,):
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"Term '{self.name}' is about the parameters and has no points, got {got} as such. "
                "Pass its sample, or torch.empty(1, 0)."
            )
