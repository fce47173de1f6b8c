"""Diffusion processes dX = μ dt + S dW: what the Fokker-Planck equation needs to know of them.

Points are (t, x) with time first; every derivative below is with respect to x only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.func import jacfwd, vmap

from pinncurv.diffops import DifferentialOperator, Laplacian, SecondOrder

Field = Callable[[Tensor], Tensor]


@runtime_checkable
class DiffusionProcess(Protocol):
    """A process with drift μ and diffusion matrix D = S Sᵀ, as its Fokker-Planck equation sees it.

    p_t + div(μ p) - 1/2 Σ_ij ∂_i∂_j (D_ij p)
        = p_t + velocity · ∇p + rate p - 1/2 Σ_ij D_ij ∂_i∂_j p

    where the product rule, D being symmetric, gives with (div D)_i = Σ_j ∂_j D_ij

    velocity = μ - div D,    rate = div μ - 1/2 div div D.
    """

    @property
    def dim(self) -> int:
        """Dimension of x, without time."""

    def velocity(self, x: Tensor) -> Tensor:
        """Return μ - div D at points [N, 1 + d], shape [N, d]."""

    def rate(self, x: Tensor) -> Tensor:
        """Return div μ - 1/2 div div D at points [N, 1 + d], shape [N, 1]."""

    @property
    def second_order(self) -> DifferentialOperator:
        """The operator u -> `strength` ⁻¹ Σ_ij D_ij ∂_i∂_j u."""

    @property
    def strength(self) -> float:
        """The number that the operator leaves out."""

    def energy(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return vᵀ D v for the vectors v in gradient, [N, d], shape [N, 1]."""


@dataclass(frozen=True)
class IsotropicDiffusion:
    """A process with the constant diffusivity S = `scale` I.

    dX = μ(t, X) dt + scale dW

    It needs the Laplacian only, one collapsed channel.

    Args:
        dim: Dimension d of x, without time.
        drift: The drift μ, [N, 1 + d] -> [N, d].
        scale: The diffusivity.
        drift_divergence: div μ, [N, 1 + d] -> [N, 1]. Computed with `torch.func` from the drift if
            it is left out, see `divergence`.
    """

    dim: int
    drift: Field
    scale: float
    drift_divergence: Field | None = None

    def velocity(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d"]:
        """Return μ, as D is constant."""
        return _checked("drift", self.drift(x), (x.shape[0], self.dim))

    def rate(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """Return div μ, as D is constant."""
        return _given_or(self, "drift_divergence", divergence, self.drift, x, 1)

    @property
    def second_order(self) -> DifferentialOperator:
        """The Laplacian in space."""
        return Laplacian(dims=tuple(range(1, 1 + self.dim)))

    @property
    def strength(self) -> float:
        """The diagonal of D."""
        return self.scale**2

    def energy(
        self, x: Float[Tensor, "N D"], gradient: Float[Tensor, "N d"]
    ) -> Float[Tensor, "N 1"]:
        """Return scale² |v|²."""
        return self.scale**2 * (gradient**2).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class FullDiffusion:
    """A process whose diffusivity is a full matrix that varies from point to point.

    dX = μ(t, X) dt + S(t, X) dW

    Derivatives of the coefficients that are left out are computed at every evaluation with forward
    mode `torch.func` under `vmap`, exactly, for about d (second derivatives: d²) evaluations of the
    coefficient per point. Pass closed forms where that matters, or where a coefficient is not
    vmappable (in-place writes, control flow that depends on values).

    Args:
        dim: Dimension d of x, without time.
        drift: The drift μ, [N, 1 + d] -> [N, d].
        diffusivity: The diffusivity S, [N, 1 + d] -> [N, d, r].
        drift_divergence: div μ, [N, 1 + d] -> [N, 1].
        diffusion_divergence: (div D)_i = Σ_j ∂_j D_ij, [N, 1 + d] -> [N, d].
        diffusion_double_divergence: div div D = Σ_ij ∂_i∂_j D_ij, [N, 1 + d] -> [N, 1].
    """

    dim: int
    drift: Field
    diffusivity: Field
    drift_divergence: Field | None = None
    diffusion_divergence: Field | None = None
    diffusion_double_divergence: Field | None = None

    def matrix(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d d"]:
        """Return the diffusion matrix D = S Sᵀ."""
        factor = self._factor(x)
        return factor @ factor.mT

    def velocity(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d"]:
        """Return μ - div D."""
        drift = _checked("drift", self.drift(x), (x.shape[0], self.dim))
        return drift - self.row_divergence(x)

    def rate(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """Return div μ - 1/2 div div D."""
        drift = _given_or(self, "drift_divergence", divergence, self.drift, x, 1)
        return drift - 0.5 * self.double_divergence(x)

    def row_divergence(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d"]:
        """Return div D, the divergence of each row of D."""
        return _given_or(self, "diffusion_divergence", row_divergence, self.matrix, x, self.dim)

    def double_divergence(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """Return div div D."""
        name = "diffusion_double_divergence"
        return _given_or(self, name, divergence, self.row_divergence, x, 1)

    @property
    def second_order(self) -> DifferentialOperator:
        """The operator Σ_ij D_ij ∂_i∂_j in space, in the standard basis."""
        return SecondOrder(self.matrix, dims=tuple(range(1, 1 + self.dim)))

    @property
    def strength(self) -> float:
        """One: the operator is complete."""
        return 1.0

    def energy(
        self, x: Float[Tensor, "N D"], gradient: Float[Tensor, "N d"]
    ) -> Float[Tensor, "N 1"]:
        """Return |Sᵀ v|²."""
        return (gradient.unsqueeze(1) @ self._factor(x)).square().sum(dim=2)

    def _factor(self, x: Tensor) -> Tensor:
        factor = self.diffusivity(x)
        return _checked("diffusivity", factor, (x.shape[0], self.dim, factor.shape[-1]))


def divergence(field: Field, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
    """Differentiate a vector field in space, exactly, with forward mode under vmap.

    Σ_i ∂f_i / ∂x_i of a vmappable f, [N, 1 + d] -> [N, d]
    """
    return _spatial_jacobian(field, x).diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)


def row_divergence(matrix: Field, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d"]:
    """Differentiate the rows of a matrix field in space, exactly, with forward mode under vmap.

    Σ_j ∂D_ij / ∂x_j of a vmappable D, [N, 1 + d] -> [N, d, d]
    """
    return _spatial_jacobian(matrix, x).diagonal(dim1=-2, dim2=-1).sum(-1)


def _spatial_jacobian(field: Field, x: Tensor) -> Tensor:
    """Return ∂f / ∂x_j, [N, ..., d], without the derivative in time."""
    return vmap(jacfwd(lambda point: field(point.unsqueeze(0)).squeeze(0)))(x)[..., 1:]


def _given_or(
    process: DiffusionProcess,
    name: str,
    differentiate: Callable[[Field, Tensor], Tensor],
    field: Field,
    x: Tensor,
    columns: int,
) -> Tensor:
    """Return a coefficient that was given with the process, or else a field's derivative."""
    given = getattr(process, name)
    value = differentiate(field, x) if given is None else given(x)
    return _checked(name, value, (x.shape[0], columns))


def _checked(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the value if it has the shape: a broadcast here would go unnoticed."""
    if tuple(value.shape) != shape:
        raise ValueError(
            f"The coefficient '{name}' must have shape {list(shape)} at {shape[0]} points, got "
            f"{list(value.shape)}. Keep the points as first dimension and scalars as a column."
        )
    return value
