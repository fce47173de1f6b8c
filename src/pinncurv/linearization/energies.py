"""An energy as a part of the linearization: rows are the root of ∂²ℓ times those of the values."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.jets import Jet
from pinncurv.linearization.bound import BoundTerm
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.structure import Structure
from pinncurv.problems import Energy
from pinncurv.problems.energy import check_squares


class EnergyPart(TermPart):
    """An energy at some or all of its points."""

    def flat_values(self, model: Module) -> tuple[Float[Tensor, "n P"], dict[str, torch.Size]]:
        """Return the values y of all operators as columns, and the shape of each at a point."""
        values = self.plan.read(self.x, model(Jet(self.seed.channels, self.plan.layout)))
        shapes = {name: value.shape[1:] for name, value in values.items()}
        return torch.cat([value.flatten(1) for value in values.values()], 1), shapes

    def density(
        self, y: Float[Tensor, "n P"], shapes: dict[str, torch.Size]
    ) -> Float[Tensor, "n 1"]:
        """Return ℓ of the values y."""
        parts = y.split([shape.numel() for shape in shapes.values()], 1)
        pairs = zip(parts, shapes.items(), strict=True)
        values = {name: part.reshape(-1, *shape) for part, (name, shape) in pairs}
        return self.call(self.x, {**values, **self.data})

    def residual(self, model: Module) -> Float[Tensor, "n V"]:
        check_squares([self.term])
        return super().residual(model)

    def loss(self, model: Module) -> Float[Tensor, ""]:
        return (self.evaluate(model) * self.scale**2).sum()

    def slopes(self, model: Module) -> tuple[Float[Tensor, "n P"], Float[Tensor, "n P"]]:
        y, shapes = self.flat_values(model)
        total = (self.density(y, shapes) * self.scale**2).sum()
        return y, _gradient(total, y)

    def outputs(self, model: Module, as_jets: bool = False) -> Float[Tensor, "n P_plus_1"]:
        """Evaluate Lᵀy, with L Lᵀ = ∂²ℓ not in the graph, and beside it ℓ."""
        y, shapes = self.flat_values(model)
        density = self.density(y, shapes)
        slope = _gradient(density.sum(), y)
        H = _hessian(slope, y)
        # where the slope is not finite, the gradient says so
        root = self._root(H) if slope.isfinite().all() else H
        return torch.cat([torch.einsum("npq,np->nq", root, y), density], 1)

    def _root(self, H: Float[Tensor, "n P P"]) -> Float[Tensor, "n P P"]:
        """Return L with L Lᵀ = H.

        Raises:
            FloatingPointError: If a matrix is not finite; names the first point.
            ValueError: If one has negative eigenvalues beyond rounding; names the first point.
        """
        bad = (~H.isfinite().all(2).all(1)).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"Term '{self.term.name}': the density must have finite second derivatives in the "
                f"operators' values, but has not at {len(bad)} of {len(H)} points, the first of "
                f"them x = {self.x[bad[0]].tolist()}. Smooth it, as |v| by sqrt(v² + ε²)."
            )
        values, vectors = torch.linalg.eigh(H.double())
        lowest, tolerance = values[:, 0], torch.finfo(H.dtype).eps ** 0.5 * values.abs().max()
        bad = (lowest < -tolerance).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"Term '{self.term.name}': the density must be convex in the operators' values, "
                f"got the eigenvalue {float(lowest[bad[0]]):.3g} of its second derivatives at "
                f"x = {self.x[bad[0]].tolist()}, and negative ones at {len(bad)} of {len(H)} "
                "points. Without that its Gauss-Newton matrix is indefinite; write what is not "
                "convex as a LossTerm."
            )
        return (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).to(H)


class BoundEnergy(BoundTerm):
    """An energy with a network and points; arguments as of ``BoundTerm``."""

    term: Energy
    part_type = EnergyPart
    further = 1

    @property
    def structure(self) -> Structure:
        """What a pass looks like, with a component for each value of the operators.

        Raises:
            ValueError: If the density has several components, or is trained along.
        """
        if self._structure is None:
            trained = [name for name, p in self.term.named_parameters() if p.requires_grad]
            if trained:
                raise ValueError(
                    f"Term '{self.term.name}': nothing but the network may be trained by an "
                    f"energy, got {', '.join(trained)}. Freeze it with requires_grad_(False)."
                )
            found = super().structure
            self._structure = None  # until it is known to be one of an energy
            if found.components != 1:
                raise ValueError(
                    f"Term '{self.term.name}': the density of an energy must be one number per "
                    f"point, shape [N] or [N, 1], got {found.components}. Return their sum."
                )
            few = self.whole.at(slice(0, 1))
            assert isinstance(few, EnergyPart)
            with torch.no_grad():
                y, _ = few.flat_values(self.model)
            self._structure = replace(found, components=y.shape[1])
        return self._structure

    def linearize(self, part: TermPart) -> Chunk:
        """Linearize at some points by one forward pass, and one backward pass per value and one.

        Raises:
            FloatingPointError: If the density has infinite second derivatives at a point.
            RuntimeError: In inference mode, or if the network takes another path than before.
            ValueError: If the density is not convex at a point.
        """
        both = super().linearize(part)
        rows, slopes = slice(0, -1), slice(-1, None)
        density, ones = both.unscaled[:, slopes], torch.ones_like(both.unscaled[:, slopes])
        return Chunk(
            both.residual[:, rows],
            both.unscaled[:, rows],
            {name: block.components(rows) for name, block in both.blocks.items()},
            Chunk(
                ones * part.scale,
                ones,
                {name: block.components(slopes) for name, block in both.blocks.items()},
            ),
            (density * part.scale**2).sum(),
        )


def _gradient(total: Tensor, y: Float[Tensor, "n P"]) -> Float[Tensor, "n P"]:
    """Return the derivative in y, in the graph; zero where there is none."""
    if not total.requires_grad:
        return torch.zeros_like(y)
    (gradient,) = torch.autograd.grad(total, y, create_graph=True, allow_unused=True)
    return torch.zeros_like(y) if gradient is None else gradient


def _hessian(slope: Float[Tensor, "n P"], y: Float[Tensor, "n P"]) -> Float[Tensor, "n P P"]:
    """Return the symmetric derivative of the slopes, by one backward pass per value."""
    columns = [_gradient(column.sum(), y).detach() for column in slope.unbind(1)]
    H = torch.stack(columns, 1)
    return (H + H.mT) / 2
