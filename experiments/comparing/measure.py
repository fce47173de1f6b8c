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
from experiments.objects import first_line
from experiments.training import Trainer
from pinncurv.comparison import (
    FrobeniusComparison,
    FrobeniusEstimate,
    cg_records,
    compare_steps,
    condition_number,
    estimate_frobenius,
    estimate_frobenius_by_layer_pair,
    frobenius,
    frobenius_by_layer,
    frobenius_by_layer_pair,
    mass,
    spectral_density,
    spectrum,
    squared_block_norms,
)
from pinncurv.curvature import (
    BlockDiagonalGaussNewton,
    GaussNewtonLinearOperator,
    InSubspace,
    JacobianLinearOperator,
    Objective,
    PreconditionedCG,
)
from pinncurv.linops import (
    Damped,
    DenseLinearOperator,
    LayerwiseLinearOperator,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    block_diagonal,
)
from pinncurv.optim import CurvatureOptimizer, QuadraticModel, offers

# Probes per estimate of a spectrum, each of as many Lanczos steps as condition numbers take.
_SPECTRUM_PROBES = 2
# The kernel of so many residuals gives the exact spectrum of the exact matrix.
_KERNEL_LIMIT = 2048
# Most entries of the Jacobian that are held as a matrix, 1 GiB in float64.
_MOST_ROWS = 1 << 27

Row = dict[str, Any]


class _Rows(SymmetricLinearOperator):
    """The exact matrix JᵀJ by the rows of J: products with many vectors are several times faster.

    Args:
        jacobian: J.
    """

    def __init__(self, jacobian: JacobianLinearOperator) -> None:
        super().__init__(jacobian.space.shapes, jacobian.device, jacobian.dtype)
        self._J = jacobian.to_dense()

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        Y = self._J.mT @ (self._J @ torch.cat([x.reshape(-1, x.shape[-1]) for x in X]))
        pieces = Y.split(self._in_shape_flat)
        return [y.reshape(x.shape) for y, x in zip(pieces, X, strict=True)]


class Point:
    """The exact matrix G = JᵀJ at one point, and what was compared with it so far.

    Args:
        training: The name of the training.
        trainer: The training, at the point.
        job: What to measure.
        tables: Where to.
    """

    def __init__(self, training: str, trainer: Trainer, job: Comparison, tables: Tables) -> None:
        self.job, self.tables, self.objective = job, tables, trainer.objective
        self._where = {"training": training, "step": trainer.step}
        metrics = trainer.measure()
        self._losses = {name: metrics[name] for name in ("loss", "rmse")}
        self.linearized = self.objective.linearize()
        self.free = GaussNewtonLinearOperator(self.linearized.jacobian)
        self.layers = self.linearized.space.blocks
        self.dimension = self.free.shape[1]
        self.is_dense = self.dimension <= job.dense_limit
        self.has_blocks = max(block.numel for block in self.layers) <= job.block_limit
        self.gradient = torch.cat([part.flatten() for part in self.linearized.gradient()])
        self._matrices: dict[str, PyTorchLinearOperator] = {}
        self._steps: dict[tuple[str, float], Tensor] = {}
        self._best: dict[float, Tensor] = {}

    # --- the exact matrix ------------------------------------------------------------------------

    @cached_property
    def exact(self) -> PyTorchLinearOperator:
        """G, dense below the limit, else from the rows of J if these fit, else matrix-free."""
        if self.is_dense:
            return self._dense(self.free)
        fits = math.prod(self.free.jacobian.shape) <= _MOST_ROWS
        return _Rows(self.free.jacobian) if fits else self.free

    @cached_property
    def blocks(self) -> PyTorchLinearOperator:
        """The diagonal blocks of G, formed below the limit."""
        if self.has_blocks:
            return BlockDiagonalGaussNewton()(self.linearized)
        return block_diagonal([self.exact] * len(self.layers), self.layers)

    @cached_property
    def mass(self) -> Tensor:
        """The share of each pair of layers in ‖G‖², exact below the limit."""
        if self.is_dense:
            return mass(squared_block_norms(self.exact, self.layers))
        estimate = estimate_frobenius_by_layer_pair(
            self.exact, self.exact, self.layers, **self._probing()
        )
        return mass(estimate.squared_norm.value)

    def _best_step(self, damping: float) -> Tensor:
        """Return −(G + λI)⁻¹∇L; above the limit from the kernel if that is small enough."""
        if damping not in self._best:
            operator = self.exact if self.is_dense else self.free
            self._best[damping] = self._direction(Damped(damping)(operator))
        return self._best[damping]

    def _direction(self, inverse: PyTorchLinearOperator) -> Tensor:
        """Return the step of an inverse, as the optimizer computes it."""
        if offers(inverse, "solve_residual"):
            return -torch.cat([s.flatten() for s in inverse.solve_residual(self.linearized.residual)])
        return -(inverse @ self.gradient)

    def _dense(self, operator: PyTorchLinearOperator) -> DenseLinearOperator:
        eye = torch.eye(self.dimension, dtype=operator.dtype, device=operator.device)
        return DenseLinearOperator(operator @ eye, operator._in_shape)

    def _probing(self) -> dict[str, Any]:
        """Return the arguments of an estimate; the same probes for every operator."""
        probes = self.job.probes
        generator = Generator().manual_seed(0)
        return {"vectors": probes, "sketch": probes // 2, "generator": generator}

    # --- operators -------------------------------------------------------------------------------

    def measure(self, label: str, recipe: Recipe) -> None:
        """Compare an operator with the exact matrix and those before; what fails becomes a note."""
        row: Row = {**self._where, "operator": label, "damping": math.nan, **self._losses}
        row |= dict.fromkeys(COLUMNS[len(row) : COLUMNS.index("note")], math.nan)
        notes: list[str] = []
        cosines: dict[str, float] = {}
        operator = None
        with self._noting(label, notes):
            start = self._now()
            operator = recipe.curvature(self.linearized)
            row["build_seconds"] = self._now() - start
            # where the inverse alone is the approximation, only its step and condition are compared
            exact = isinstance(operator, GaussNewtonLinearOperator)
            if not exact or recipe.is_plain:
                row |= self._compare_matrix(label, operator)
                for other in self._matrices:
                    with self._noting(f"{label} and {other}", notes):
                        cosines[other] = self._cosine(label, other)
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
            except Exception as error:  # also in code of the user's own; others may do
                notes.append(f"{type(error).__name__}: {first_line(error)}")
                self.tables.failures.append(f"{what}: {notes[-1]}")
        notes += [first_line(str(warning.message)) for warning in caught]

    def _compare_matrix(self, label: str, operator: PyTorchLinearOperator) -> Row:
        """Return how similar an operator is, and note its eigenvalues and pairs of layers."""
        matrix = self.exact if isinstance(operator, GaussNewtonLinearOperator) else operator
        if self.is_dense and matrix is not self.exact:
            matrix = self._dense(operator)
        whole: FrobeniusComparison | FrobeniusEstimate
        if self.is_dense:
            pairs = frobenius_by_layer_pair(matrix, self.exact, self.layers)
            whole, blocks, by_layer = pairs.total(), pairs.diagonal().total(), pairs.cosine
        else:
            whole = estimate_frobenius(matrix, self.exact, **self._probing())
            by_layer = estimate_frobenius_by_layer_pair(
                matrix, self.exact, self.layers, **self._probing()
            ).cosine.value
            blocks = self._compare_blocks(matrix)
        about = {**self._where, "operator": label}
        self.tables.rows["spectra"] += [
            {**about, "rank": rank, "eigenvalue": value}
            for rank, value in zip(*self._spectrum(operator, matrix), strict=True)
        ]
        self.tables.rows["layers"] += [
            {**about, "row": i, "column": j, "cosine": cosine, "mass": self.mass[i, j].item()}
            for i, cosines in enumerate(by_layer.tolist())
            for j, cosine in enumerate(cosines)
        ]
        self._matrices[label] = matrix
        return _similarity("", whole) | _similarity("block_", blocks)

    def _compare_blocks(
        self, operator: PyTorchLinearOperator
    ) -> FrobeniusComparison | FrobeniusEstimate:
        """Compare diagonal blocks above the limit, exactly where an operator has them."""
        if operator is self.exact:
            operator = self.blocks
        if not isinstance(operator, LayerwiseLinearOperator):
            operator = block_diagonal([operator] * len(self.layers), self.layers)
        elif self.has_blocks:
            return frobenius_by_layer(operator, self.blocks, self.layers).total()
        return estimate_frobenius(operator, self.blocks, **self._probing())

    def _spectrum(
        self, operator: PyTorchLinearOperator, matrix: PyTorchLinearOperator
    ) -> tuple[list[float], list[float]]:
        """Return ranks and eigenvalues; above the limit estimates, but for the exact one's kernel."""
        values = None
        if self.is_dense:
            values = spectrum(matrix)
        elif isinstance(operator, GaussNewtonLinearOperator):
            if operator.jacobian.shape[0] <= _KERNEL_LIMIT:
                values = spectrum(operator.kernel)[: self.dimension]
        if values is not None:
            return list(range(1, len(values) + 1)), values.tolist()
        density = spectral_density(
            operator,
            steps=self.job.lanczos_steps,
            vectors=_SPECTRUM_PROBES,
            generator=Generator().manual_seed(0),
        )
        nodes, order = density.nodes.flatten().sort(descending=True)
        shares = self.dimension * density.weights.flatten()[order] / len(density.weights)
        # the rank at the middle of a node's share is that of the eigenvalue it stands for
        return (shares.cumsum(0) - shares / 2).clamp(min=0.5).tolist(), nodes.tolist()

    def _cosine(self, label: str, other: str) -> float:
        """Return the cosine of two operators, an estimate where they have no blocks to form."""
        P, Q = self._matrices[other], self._matrices[label]
        layerwise = all(isinstance(M, LayerwiseLinearOperator) for M in (P, Q))
        if self.is_dense or (layerwise and self.has_blocks):
            return frobenius(P, Q).cosine.item()
        return estimate_frobenius(P, Q, **self._probing()).cosine.value.item()

    def _compare_inverse(
        self, row: Row, label: str, operator: PyTorchLinearOperator, recipe: Recipe
    ) -> None:
        """Add to a row what the damped inverse does: its step, and as a preconditioner."""
        job, damping = self.job, row["damping"]
        start = self._now()
        inverse = recipe.inverse(damping)(operator)
        step = self._direction(inverse)
        row["invert_seconds"] = self._now() - start
        steps = compare_steps(
            self.exact, damping, self.gradient, step, self._best_step(damping)
        )
        row |= {
            "decrease": steps.decrease_fraction,
            "step_length": steps.length,
            "step_cosine": steps.cosine,
        }
        self._steps[label, damping] = step.double()
        if isinstance(recipe.template, InSubspace):
            row["condition"] = math.inf
        elif not isinstance(recipe.template, PreconditionedCG):  # whose inverse is no matrix
            row["condition"] = condition_number(
                self.exact,
                inverse,
                damping,
                dense=self.is_dense,
                steps=job.lanczos_steps,
                generator=Generator().manual_seed(0),
            )
            row["condition_is_bound"] = not self.is_dense
            record = cg_records(
                self.exact,
                damping,
                self.gradient,
                {label: inverse},
                tolerance=job.cg_tolerance,
                max_iterations=job.cg_limit,
            )[label]
            row |= {"cg_iterations": record.iterations, "cg_converged": record.converged}
        if job.continued_steps:
            row["continued_loss"] = math.inf  # if it fails
            row["continued_loss"] = _continued_loss(self.objective, recipe, damping, job)

    def _compare_steps(self, label: str, damping: float, cosines: dict[str, float]) -> None:
        """Note the cosines of the step and of the matrix with those of the operators before."""
        step = self._steps[label, damping]
        for (other, same), theirs in self._steps.items():
            if same == damping and other != label:
                cosine = torch.cosine_similarity(theirs, step, 0).item()
                row = {**self._where, "damping": damping, "first": other, "second": label}
                row |= {"step_cosine": cosine, "cosine": cosines.get(other, math.nan)}
                self.tables.rows["pairs"].append(row)

    def _now(self) -> float:
        if self.gradient.device.type == "cuda":
            torch.cuda.synchronize(self.gradient.device)
        return time.perf_counter()


def _similarity(prefix: str, found: FrobeniusComparison | FrobeniusEstimate) -> Row:
    """Return cosine and relative error, with standard errors that are 0 where they are exact."""
    row: Row = {}
    for name, part in (("cosine", found.cosine), ("error", found.relative_error)):
        value, error = (part, 0.0) if isinstance(part, Tensor) else (part.value, part.standard_error)
        row |= {f"{prefix}{name}": float(value), f"{prefix}{name}_se": float(error)}
    return row


def _continued_loss(
    objective: Objective, recipe: Recipe, damping: float, job: Comparison
) -> float:
    """Return the loss after further steps of a copy of the network on the same points.

    θ ← θ - α (P + λI)⁻¹∇L + μ δ,  with α and μ from the exact quadratic model
    """
    model, terms = copy.deepcopy((objective.model, objective.terms))
    loss = Objective(model, terms, objective.points, objective.chunk_size, check=False)
    optimizer = CurvatureOptimizer(
        loss.parameters(),
        recipe.curvature,
        recipe.inverse(damping),
        QuadraticModel(),
        damping_rule=job.rule(),
    )
    return [optimizer.step(loss).new_loss for _ in range(job.continued_steps)][-1]
