"""Loss terms of every form: linear, nonlinear, vector residuals, weights per point."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pinncurv.diffops import Directional, Gradient, Laplacian, Partial, SecondOrder, Value
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points


def _source(x: Tensor) -> Tensor:
    return torch.sin(3 * x).sum(1, keepdim=True)


def diffusivity(x: Tensor) -> Tensor:
    """A full symmetric matrix that varies from point to point."""
    return torch.einsum("ni,nj->nij", 1 + x, 1 + x) + torch.eye(x.shape[1]).to(x)


def _term(name: str, operators: dict, residual, weight=1.0) -> LossTerm:
    return LossTerm(operators, residual, Fixed(points()), weight, name)


TERMS: dict[str, LossTerm] = {
    "value": _term("value", {"u": Value()}, lambda x, u: u - _source(x)),
    "poisson": _term("poisson", {"lap": Laplacian()}, lambda x, lap: -lap - _source(x), 2.5),
    "allen_cahn": _term(
        "allen_cahn",
        {"u": Value(), "u_t": Partial(0), "lap": Laplacian(dims=[1])},
        lambda x, u, u_t, lap: u_t - 0.1 * lap + 5 * (u**3 - u),
    ),
    "log_fokker_planck": _term(
        "log_fokker_planck",
        {"q_t": Partial(0), "grad": Gradient(dims=[1]), "lap": Laplacian(dims=[1])},
        lambda x, q_t, grad, lap: q_t - 0.5 * lap - 0.5 * grad.square().sum(-1),
        weight=lambda x: 0.5 + x[:, 0],
    ),
    "anisotropic": _term(
        "anisotropic",
        {"flow": Directional(torch.cos), "second": SecondOrder(diffusivity)},
        lambda x, flow, second: flow + second,
        weight=torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64),
    ),
    "diffusion": _term(
        "diffusion",
        {"second": SecondOrder(diffusivity), "u": Value()},
        lambda x, second, u: second * u,
        weight=torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64),
    ),
    "point_tensors": _term(
        "point_tensors",
        {"flow": Directional(points(3, 2, seed=2)), "second": SecondOrder(diffusivity(points()))},
        lambda x, flow, second: flow * second,
    ),
    "vector": _term(
        "vector",
        {"u": Value(), "grad": Gradient(), "lap": Laplacian()},
        lambda x, u, grad, lap: torch.cat([grad[:, 0] * u, lap + u**2], 1),
        0.7,
    ),
    "data": LossTerm(
        {"u": Value(), "lap": Laplacian()},
        lambda x, u, lap, observed, sign: sign[:, None] * (lap + u**2) - observed,
        Fixed(points()),
        name="data",
        data={"observed": points(3, 1, seed=6), "sign": torch.tensor([1, -1, 1])},
    ),
}


def acting_on(name: str, of: str) -> LossTerm:
    """Return a term whose operators act on one of the outputs of a network."""
    term = TERMS[name]
    operators = {key: replace(operator, of=of) for key, operator in term.operators.items()}
    return replace(term, operators=operators)


# For the two outputs of networks.TwoParts: the first term does not use all layers.
PARTS = [acting_on("value", "u"), acting_on("poisson", "product")]
