"""The equations written down once more, on one point, with nested torch.func and no jets.

An oracle takes a function u of one point and the point, and returns the terms of the equation,
whose sum is the residual. The single terms are the scale on which a residual is zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, vmap

PI = torch.pi
Scalar = Callable[[Tensor], Tensor]
Oracle = Callable[[Scalar, Tensor], Tensor]


def on_one_point(u: Callable[[Tensor], Tensor]) -> Scalar:
    """Turn a function [N, d] -> [N, 1] into a function of one point with a scalar value."""
    if isinstance(u, torch.nn.Module):
        parameters = dict(u.named_parameters())
        return lambda point: functional_call(u, parameters, (point[None],))[0, 0]
    return lambda point: u(point[None])[0, 0]


def terms_of(oracle: Oracle, u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Evaluate the terms of an equation at all points, [N, number of terms]."""
    return vmap(lambda point: oracle(on_one_point(u), point))(x)


def poisson(source: Scalar) -> Oracle:
    """-Δu - f."""

    def terms(u: Scalar, x: Tensor) -> Tensor:
        return torch.stack([-hessian(u)(x).trace(), -source(x)])

    return terms


def heat(conductivity: float) -> Oracle:
    """u_t - κ Δu."""

    def terms(u: Scalar, x: Tensor) -> Tensor:
        return torch.stack([grad(u)(x)[0], -conductivity * hessian(u)(x)[1:, 1:].trace()])

    return terms


def ornstein_uhlenbeck_log(q: Scalar, x: Tensor) -> Tensor:
    """q_t + div μ + μ·∇q - |∇q|² - Δq with μ = -x / 2: the reference's equation."""
    gradient, second = grad(q)(x), hessian(q)(x)
    divergence = torch.full_like(x[0], -(len(x) - 1) / 2)
    transport = (-x[1:] / 2 * gradient[1:]).sum()
    return torch.stack(
        [gradient[0], divergence, transport, -(gradient[1:] ** 2).sum(), -second[1:, 1:].trace()]
    )


def fokker_planck(drift: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> Oracle:
    """p_t + div(μ p) - 1/2 Σ_ij ∂_i∂_j (D_ij p), without the product rule."""

    def terms(p: Scalar, x: Tensor) -> Tensor:
        def flux(point: Tensor) -> Tensor:
            return drift(point[None])[0] * p(point)

        def diffused(point: Tensor) -> Tensor:
            factor = sigma(point[None])[0]
            return factor @ factor.T * p(point)

        second = jacfwd(jacfwd(diffused))(x)[:, :, 1:, 1:]
        return torch.stack(
            [
                grad(p)(x)[0],
                jacfwd(flux)(x)[:, 1:].trace(),
                -0.5 * torch.einsum("ijij->", second),
            ]
        )

    return terms


def logarithmic(density: Oracle) -> Oracle:
    """The terms for q = log p: those for p = exp(q), divided by p."""

    def terms(q: Scalar, x: Tensor) -> Tensor:
        return density(lambda point: torch.exp(q(point)), x) / torch.exp(q(x))

    return terms
