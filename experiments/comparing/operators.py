"""What is compared: a curvature and its damped inverse, named, written out, or the user's own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments import catalog
from experiments.comparing.channels import OnChannels, uncollapsed, unmerged
from experiments.objects import UserError, evaluate, is_own, resolve, short
from pinncurv.curvature import KFAC, ParameterSpace, gauss_newton_diagonal, reduce
from pinncurv.linearization import Linearization
from pinncurv.linops import (
    Damped,
    DiagonalLinearOperator,
    KroneckerEigenLinearOperator,
    LayerwiseLinearOperator,
    PyTorchLinearOperator,
    SumKroneckerLinearOperator,
    check_damping,
    factorize_damped_blocks,
)
from pinncurv.optim import Curvature, Inverse

# Blocks up to this size get the inverse of their own. For larger ones it would be an
# eigendecomposition (minutes for 4000 parameters) or conjugate gradients within each product.
_OWN_INVERSE = 1024


@dataclass(frozen=True)
class DampedBlocks:
    """Inverse recipe: ``Damped``, with one Cholesky factorization per layer if blocks are large.

    C ↦ (C + λ I)⁻¹

    Args:
        damping: λ, a finite number >= 0.
    """

    damping: float

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return the inverse."""
        if isinstance(operator, LayerwiseLinearOperator):
            single = isinstance(operator, SumKroneckerLinearOperator) and len(operator.terms) == 1
            closed_form = single or isinstance(operator, KroneckerEigenLinearOperator)
            if not closed_form and max(b.numel for b in operator.blocks) > _OWN_INVERSE:
                return factorize_damped_blocks(operator, self.damping)
        return Damped(self.damping)(operator)


@dataclass(frozen=True)
class ScaledIdentity:
    """Recipe: the multiple of the identity that is closest to the exact matrix.

    tr(JᵀJ) / D · I
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> DiagonalLinearOperator:
        """Build the operator."""
        space = ParameterSpace.of(linearizations)
        diagonal = gauss_newton_diagonal(linearizations, space)
        mean = diagonal.trace() / space.dimension
        return DiagonalLinearOperator([torch.ones_like(d) * mean for d in diagonal.diagonals])


def _cg(iterations: int, preconditioner: str) -> str:
    options = f"tolerance=1e-14, max_iterations={iterations}, stop=None"
    return f"(MatrixFreeGaussNewton(), PreconditionedCG(1.0, {preconditioner}, {options}))"


# A curvature, or a pair of a curvature and the recipe of its inverse, whose damping is replaced:
# objects, or expressions of the library's names.
OPERATORS: dict[str, Any] = {
    "exact": "MatrixFreeGaussNewton()",
    "exact_blocks": "BlockDiagonalGaussNewton()",
    "exact_diagonal": "DiagonalGaussNewton()",
    "kfac_expand": "KFAC()",
    "kfac_reduce": "KFAC(reduce)",
    "kfac_merged": "KFAC(merge_terms=True)",
    "kfac_factor_damping": "(KFAC(), FactorDamping(1.0, trace_norm))",
    "kfac_uncollapsed": OnChannels(KFAC(), uncollapsed),
    "kfac_reduce_uncollapsed": OnChannels(KFAC(reduce), uncollapsed),
    "kfac_unmerged": OnChannels(KFAC(), unmerged),
    "kfac_reduce_unmerged": OnChannels(KFAC(reduce), unmerged),
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
    "cg_5": _cg(5, "None"),
    "cg_5_kfac": _cg(5, "KFAC()"),
    "cg_5_ekfac": _cg(5, "EKFAC(), Damped(1e-8)"),
    "cg_10_kfac": _cg(10, "KFAC()"),
    "cg_10_ekfac": _cg(10, "EKFAC(), Damped(1e-8)"),
    "identity": ScaledIdentity(),
}


@dataclass(frozen=True)
class Recipe:
    """How an operator C and its damped inverse are built.

    Args:
        curvature: Builds C from linearizations.
        template: The recipe of the inverse for some damping.
    """

    curvature: Curvature
    template: Any = DampedBlocks(1.0)

    @property
    def is_plain(self) -> bool:
        """Whether the inverse is (C + λI)⁻¹."""
        return isinstance(self.template, Damped | DampedBlocks)

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
    presets = {n: f for n, f in catalog.OPTIMIZERS.items() if "pinncurv.presets" in f.__module__}
    found: Any = name
    if is_own(name) or "(" not in name:
        found = resolve(name, {**presets, **OPERATORS}, "operator")
    if isinstance(found, str):
        found = evaluate(found)
    if found in presets.values():
        optimizer = found([nn.Parameter(torch.zeros(1, dtype=torch.float64))])
        found = optimizer.preconditioner.curvature, optimizer.preconditioner.inverse
    if inspect.isclass(found):
        found = found()
    recipe = Recipe(*found) if isinstance(found, tuple) and len(found) == 2 else Recipe(found)
    is_inverse = dataclasses.is_dataclass(recipe.template) and hasattr(recipe.template, "damping")
    if not callable(recipe.curvature) or not is_inverse:
        raise UserError(
            f"--operators {name} must be a function of linearizations, such as KFAC(), or a pair "
            "(CURVATURE, INVERSE) with a dataclass that has a damping, such as "
            f"(KFAC(), FactorDamping(1.0)), got {found!r}."
        )
    return recipe
