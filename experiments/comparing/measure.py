"""All that is measured of operators at one point of a training, as rows of tables."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from experiments.comparing.job import Comparison
from experiments.comparing.operators import Recipe
from experiments.comparing.tables import COLUMNS, Tables
from experiments.objects import evaluate, first_line
from experiments.training import Trainer
from pinncurv import comparison, curvature, linops
from pinncurv.curvature import GaussNewtonLinearOperator
from pinncurv.linops import LayerwiseLinearOperator, PyTorchLinearOperator
from pinncurv.optim import CurvatureOptimizer, QuadraticModel, offers

_SPECTRUM_PROBES = 2  # of an estimated spectrum, each of as many steps as condition numbers take
_KERNEL_LIMIT = 2048  # the kernel of so many residuals gives all eigenvalues of the exact matrix
_BLOCK_LIMIT = 4200  # most parameters of a layer for which its block is formed

Row = dict[str, Any]
Similarity = comparison.FrobeniusComparison | comparison.FrobeniusEstimate


class Point:
    """The exact matrix G = JᵀJ at one point, and the operators that were compared so far.

    Args:
        training: The name of the training.
        trainer: The training, at the point.
        job: What to measure.
        tables: Where to.
    """

    def __init__(self, training: str, trainer: Trainer, job: Comparison, tables: Tables) -> None:
        self.job, self.tables, self.objective = job, tables, trainer.objective
        metrics = trainer.measure()
        self._where = {"training": training, "step": trainer.step}
        self._losses = {name: metrics[name] for name in ("loss", "rmse")}
        self.linearized = self.objective.linearize()
        free = GaussNewtonLinearOperator(self.linearized.jacobian)
        self.layers, self.dimension = self.linearized.space.blocks, free.shape[1]
        self.is_dense = self.dimension <= job.dense_limit
        self.exact = self._dense(free) if self.is_dense else free
        self.has_blocks = max(block.numel for block in self.layers) <= _BLOCK_LIMIT
        self.gradient = torch.cat([part.flatten() for part in self.linearized.gradient()])
        self._matrices: dict[str, PyTorchLinearOperator] = {}
        self._steps: dict[tuple[str, float], Tensor] = {}

    # --- the exact matrix ------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> LayerwiseLinearOperator:
        """The diagonal blocks of G, formed below the limit."""
        if self.has_blocks:
            return curvature.BlockDiagonalGaussNewton()(self.linearized)
        return self._blocks_of(self.exact)

    @cached_property
    def mass(self) -> Tensor:
        """The share of each pair of layers in ‖G‖²."""
        return comparison.mass(_value(self._by_layer_pair(self.exact).squared_norm)[0])

    @cached_property
    def best_steps(self) -> dict[float, Tensor]:
        """−(G + λI)⁻¹∇L by λ; above the limit from the kernel if that is small enough."""
        return {d: self._step(linops.Damped(d)(self.exact)) for d in self.job.dampings}

    def _step(self, inverse: PyTorchLinearOperator) -> Tensor:
        """Return the step of an inverse, as the optimizer computes it."""
        if not offers(inverse, "solve_residual"):
            return -(inverse @ self.gradient)
        parts = inverse.solve_residual(self.linearized.residual)
        return -torch.cat([part.flatten() for part in parts])

    def _dense(self, operator: PyTorchLinearOperator) -> linops.DenseLinearOperator:
        eye = torch.eye(self.dimension, dtype=operator.dtype, device=operator.device)
        return linops.DenseLinearOperator(operator @ eye, operator._in_shape)

    def _blocks_of(self, operator: PyTorchLinearOperator) -> LayerwiseLinearOperator:
        return linops.block_diagonal([operator] * len(self.layers), self.layers)

    # --- matrices --------------------------------------------------------------------------------

    def _probing(self) -> dict[str, Any]:
        """Return the arguments of an estimate; the same probes for every operator."""
        generator = Generator().manual_seed(0)
        return {"vectors": self.job.probes, "sketch": self.job.probes // 2, "generator": generator}

    def _by_layer_pair(self, P: PyTorchLinearOperator) -> Similarity:
        if self.is_dense:
            return comparison.frobenius_by_layer_pair(P, self.exact, self.layers)
        return comparison.estimate_frobenius_by_layer_pair(
            P, self.exact, self.layers, **self._probing()
        )

    def _similarity(self, P: PyTorchLinearOperator, Q: PyTorchLinearOperator) -> Similarity:
        """Compare two matrices, exactly below the limit and where both have blocks to form."""
        layerwise = all(isinstance(M, LayerwiseLinearOperator) for M in (P, Q))
        if self.is_dense or (layerwise and self.has_blocks):
            return comparison.frobenius(P, Q)
        return comparison.estimate_frobenius(P, Q, **self._probing())

    def _compare_blocks(self, P: PyTorchLinearOperator) -> Similarity:
        """Compare the diagonal blocks, above the limit of operators without any by probes."""
        if self.is_dense:
            return comparison.frobenius_by_layer(P, self.exact, self.layers).total()
        if isinstance(P, LayerwiseLinearOperator):
            return self._similarity(P, self.blocks)
        part = self.blocks if P is self.exact else self._blocks_of(P)
        return comparison.estimate_frobenius(part, self.blocks, **self._probing())

    def _compare_matrix(self, label: str, operator: PyTorchLinearOperator) -> Row:
        """Return how similar an operator is, and note its eigenvalues and pairs of layers."""
        P = operator
        if isinstance(operator, GaussNewtonLinearOperator):
            P = self.exact
        elif self.is_dense:
            P = self._dense(operator)
        row = _cells("", self._similarity(P, self.exact))
        row |= _cells("block_", self._compare_blocks(P))
        cosines = _value(self._by_layer_pair(P).cosine)[0]
        about = {**self._where, "operator": label}
        self.tables.rows["layers"] += [
            {**about, "row": i, "column": j, "cosine": cosine, "mass": self.mass[i, j].item()}
            for i, own in enumerate(cosines.tolist())
            for j, cosine in enumerate(own)
        ]
        self.tables.rows["spectra"] += [
            {**about, "rank": rank, "eigenvalue": value}
            for rank, value in zip(*self._spectrum(operator, P), strict=True)
        ]
        self._matrices[label] = P
        return row

    def _spectrum(
        self, operator: PyTorchLinearOperator, P: PyTorchLinearOperator
    ) -> tuple[list[float], list[float]]:
        """Return ranks and eigenvalues; above the limit estimates, unless the kernel is small."""
        exact = isinstance(operator, GaussNewtonLinearOperator)
        if self.is_dense or (exact and operator.jacobian.shape[0] <= _KERNEL_LIMIT):
            values = comparison.spectrum(P if self.is_dense else operator.kernel)[: self.dimension]
            return list(range(1, len(values) + 1)), values.tolist()
        steps, generator = self.job.lanczos_steps, Generator().manual_seed(0)
        density = comparison.spectral_density(
            P, steps=steps, vectors=_SPECTRUM_PROBES, generator=generator
        )
        kept = density.weights > 0  # a probe may need fewer nodes than others
        nodes, order = density.nodes[kept].sort(descending=True)
        shares = self.dimension * density.weights[kept][order] / _SPECTRUM_PROBES
        # the rank at the middle of a node's share is that of the eigenvalue it stands for
        return (shares.cumsum(0) - shares / 2).clamp(min=0.5).tolist(), nodes.tolist()

    # --- operators -------------------------------------------------------------------------------

    def measure(self, label: str, recipe: Recipe) -> None:
        """Compare an operator with the exact matrix and those before; what fails becomes a note."""
        row: Row = {**self._where, "operator": label, "damping": math.nan, **self._losses}
        row |= dict.fromkeys(COLUMNS[len(row) :], math.nan)
        notes: list[str] = []
        cosines: dict[str, float] = {}
        operator = None
        with self._noting(label, notes):
            start = self._now()
            operator = recipe.curvature(self.linearized)
            row["build_seconds"] = self._now() - start
            # of another inverse of the exact matrix, the inverse alone is the approximation
            if recipe.is_plain or not isinstance(operator, GaussNewtonLinearOperator):
                others = dict(self._matrices)
                row |= self._compare_matrix(label, operator)
                for other, matrix in others.items():
                    with self._noting(f"{label} and {other}", notes):
                        found = self._similarity(matrix, self._matrices[label])
                        cosines[other] = _value(found.cosine)[0].item()
        for damping in self.job.dampings:
            own, own_notes = {**row, "damping": damping}, list(notes)
            if operator is not None:
                with self._noting(label, own_notes):
                    self._compare_inverse(own, label, operator, recipe)
                    self._compare_steps(label, damping, cosines)
            own["note"] = "; ".join(dict.fromkeys(own_notes))
            self.tables.rows["table"].append(own)

    @contextmanager
    def _noting(self, what: str, notes: list[str]) -> Iterator[None]:
        """Turn warnings and failures into notes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:  # also in code of the user's own; other operators may do
                notes.append(f"{type(error).__name__}: {first_line(error)}")
                self.tables.failures.append(f"{what}: {notes[-1]}")
        notes += [first_line(str(warning.message)) for warning in caught]

    def _compare_inverse(
        self, row: Row, label: str, operator: PyTorchLinearOperator, recipe: Recipe
    ) -> None:
        """Add to a row what the damped inverse does: its step, and as a preconditioner."""
        job, damping, G, g = self.job, row["damping"], self.exact, self.gradient
        start = self._now()
        inverse = recipe.inverse(damping)(operator)
        step = self._step(inverse)
        row["invert_seconds"] = self._now() - start
        self._steps[label, damping] = step.double()
        found = comparison.compare_steps(G, damping, g, step, self.best_steps[damping])
        row["decrease"], row["step_cosine"] = found.decrease_fraction, found.cosine
        row["step_length"] = found.length
        if isinstance(recipe.template, curvature.InSubspace):
            row["condition"] = math.inf
        elif not isinstance(recipe.template, curvature.PreconditionedCG):  # which is no matrix
            steps, generator = job.lanczos_steps, Generator().manual_seed(0)
            row["condition_is_bound"] = not self.is_dense
            number = comparison.condition_number(
                G, inverse, damping, dense=self.is_dense, steps=steps, generator=generator
            )
            bounded = self.is_dense or math.isfinite(number)  # rounding makes no lower bound
            row["condition"] = number if bounded else math.nan
            record = comparison.cg_records(
                *(G, damping, g, {"": inverse}),
                tolerance=job.cg_tolerance,
                max_iterations=job.cg_limit,
            )[""]
            row["cg_iterations"], row["cg_converged"] = record.iterations, record.converged
        if job.continued_steps:
            row["continued_loss"] = math.inf  # if it fails
            row["continued_loss"] = self._continued_loss(recipe, damping)

    def _compare_steps(self, label: str, damping: float, cosines: dict[str, float]) -> None:
        """Note the cosines of the step and of the matrix with those of the operators before."""
        step = self._steps[label, damping]
        self.tables.rows["pairs"] += [
            {
                **{**self._where, "damping": damping, "first": other, "second": label},
                "step_cosine": torch.cosine_similarity(theirs, step, 0).item(),
                "cosine": cosines.get(other, math.nan),
            }
            for (other, theirs_damping), theirs in self._steps.items()
            if theirs_damping == damping and other != label
        ]

    def _continued_loss(self, recipe: Recipe, damping: float) -> float:
        """Return the loss after further steps of a copy of the network on the same points.

        θ ← θ - α (P + λI)⁻¹∇L + μ δ,  with α and μ from the exact quadratic model
        """
        old, rule = self.objective, evaluate(self.job.continued_rule)
        model, terms = copy.deepcopy((old.model, old.terms))
        objective = curvature.Objective(model, terms, old.points, old.chunk_size, check=False)
        parts = (recipe.curvature, recipe.inverse(damping), QuadraticModel())
        optimizer = CurvatureOptimizer(objective.parameters(), *parts, damping_rule=rule)
        return [optimizer.step(objective).new_loss for _ in range(self.job.continued_steps)][-1]

    def _now(self) -> float:
        if self.gradient.device.type == "cuda":
            torch.cuda.synchronize(self.gradient.device)
        return time.perf_counter()


def _value(part: Tensor | comparison.Estimate) -> tuple[Tensor, Tensor]:
    """Return a number or an estimate with its standard error, which is 0 for a number."""
    return (
        (part, torch.tensor(0.0)) if isinstance(part, Tensor) else (part.value, part.standard_error)
    )


def _cells(prefix: str, found: Similarity) -> Row:
    """Return cosine and relative error, with standard errors that are 0 where they are exact."""
    row: Row = {}
    for name, part in (("cosine", found.cosine), ("error", found.relative_error)):
        value, se = _value(part)
        row |= {f"{prefix}{name}": float(value), f"{prefix}{name}_se": float(se)}
    return row
