"""What is compared: a curvature and its damped inverse, named, written out, or the user's own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments import catalog
from experiments.objects import UserError, evaluate, is_own, resolve, short
from pinncurv import linops
from pinncurv.curvature import ParameterSpace, gauss_newton_diagonal
from pinncurv.optim import Curvature, Inverse

# Blocks up to this size get the inverse of their own. For larger ones it would be an
# eigendecomposition (minutes for 4000 parameters) or conjugate gradients within each product.
_OWN_INVERSE = 1024


@dataclass(frozen=True)
class DampedBlocks:
    """Inverse recipe: ``Damped``, with one Cholesky factorization per layer if blocks are large.

    C ↦ (C + λ I)⁻¹
    """

    damping: float

    def __call__(self, operator: linops.PyTorchLinearOperator) -> linops.PyTorchLinearOperator:
        """Return the inverse."""
        kronecker = isinstance(operator, linops.SumKroneckerLinearOperator)
        closed_form = isinstance(operator, linops.KroneckerEigenLinearOperator) or (
            kronecker and len(operator.terms) == 1
        )
        layerwise = isinstance(operator, linops.LayerwiseLinearOperator) and not closed_form
        if layerwise and max(block.numel for block in operator.blocks) > _OWN_INVERSE:
            return linops.factorize_damped_blocks(operator, self.damping)
        return linops.Damped(self.damping)(operator)


def scaled_identity(linearizations: Sequence[Any]) -> linops.DiagonalLinearOperator:
    """Return the multiple of the identity that is closest to the exact matrix, tr(JᵀJ) / D · I."""
    space = ParameterSpace.of(linearizations)
    diagonal = gauss_newton_diagonal(linearizations, space)
    mean = diagonal.trace() / space.dimension
    return linops.DiagonalLinearOperator([torch.ones_like(d) * mean for d in diagonal.diagonals])


_CG = (
    "(MatrixFreeGaussNewton(), PreconditionedCG(1.0, {}, tolerance=1e-14, max_iterations={}, "
    "stop=None))"
)
_CG_WITH = {"": "None", "_kfac": "KFAC()", "_ekfac": "EKFAC(), Damped(1e-8)"}

# A curvature, or a pair of a curvature and the recipe of its inverse, whose damping is replaced;
# as expressions of the library's names, or the objects themselves.
OPERATORS: dict[str, Any] = {
    "exact": "MatrixFreeGaussNewton()",
    "exact_blocks": "BlockDiagonalGaussNewton()",
    "exact_diagonal": "DiagonalGaussNewton()",
    "kfac_expand": "KFAC()",
    "kfac_reduce": "KFAC(reduce)",
    "kfac_merged": "KFAC(merge_terms=True)",
    "kfac_factor_damping": "(KFAC(), FactorDamping(1.0, trace_norm))",
    "kfac_empirical": "KFAC(fisher=Empirical())",
    "kfac_forward_only": "KFAC(fisher=ForwardOnly())",
    "channels": "ChannelKronecker(pairs=False)",
    "channel_pairs": "ChannelKronecker()",
    "ekfac": "EKFAC()",
    "ekfac_reduce": "EKFAC(reduce)",
    "ekfac_traces": "EKFAC(basis=PartialTraces())",
    "kronecker": "OptimalKronecker()",
    "kronecker_2": "OptimalKronecker(2)",
    "kronecker_4": "OptimalKronecker(4)",
    "kronecker_per_term": "OptimalKronecker(per_term=True)",
    "subspace": "(SubspaceGaussNewton(100), InSubspace(1.0))",
    "nystroem": "(MatrixFreeGaussNewton(), Nystroem(1.0, 100))",
    **{f"cg_{n}{name}": _CG.format(P, n) for n in (5, 10) for name, P in _CG_WITH.items()},
    "identity": scaled_identity,
}
_PRESETS = {n: f for n, f in catalog.OPTIMIZERS.items() if "pinncurv.presets" in f.__module__}


@dataclass(frozen=True)
class Recipe:
    """How an operator C is built from linearizations, and its inverse for some damping."""

    curvature: Curvature
    template: Any = DampedBlocks(1.0)

    @property
    def is_plain(self) -> bool:
        """Whether the inverse is (C + λI)⁻¹."""
        return isinstance(self.template, linops.Damped | DampedBlocks)

    def inverse(self, damping: float) -> Inverse:
        """Return the recipe of the inverse for a damping."""
        return dataclasses.replace(self.template, damping=damping)


def recipes(names: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes of operators by their labels.

    Args:
        names: Names of ``OPERATORS`` or of presets, whose curvature and inverse are taken;
            expressions of the library; FILE.py:NAME; or LABEL=ANY OF THESE.

    Raises:
        UserError: If one is none of these.
    """
    found: dict[str, Recipe] = {}
    for text in names:
        label, separator, name = text.partition("=")
        if not (separator and label.isidentifier()):
            label, name = short(text), text
        if label in found:
            raise UserError(f"--operators must be different, got {label} twice. Use LABEL=NAME.")
        found[label] = _recipe(name)
    return found


def _recipe(name: str) -> Recipe:
    found: Any = name
    if is_own(name) or "(" not in name:
        found = resolve(name, {**_PRESETS, **OPERATORS}, "operator")
    if isinstance(found, str):
        found = evaluate(found)
    if found in _PRESETS.values():
        part = found([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))]).preconditioner
        found = part.curvature, part.inverse
    parts = found if isinstance(found, tuple) else (found() if inspect.isclass(found) else found,)
    recipe = Recipe(*parts[:2])
    if not callable(recipe.curvature) or not hasattr(recipe.template, "damping") or parts[2:]:
        raise UserError(
            f"--operators {name} must be a function of linearizations, such as KFAC(), or a pair "
            f"of it and a damped inverse, such as (KFAC(), FactorDamping(1.0)), got {found!r}."
        )
    return recipe
