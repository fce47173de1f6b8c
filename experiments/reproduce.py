"""Start where the published runs of arXiv 2405.15603 started, and follow them step by step.

``python experiments/reproduce.py poisson2d_257`` takes the first steps of every published run of a
row from the same network and on the same points, and compares loss and error with the published
curve; without a row it does so for all. What is found is added to ``paper/results``. The published
curves must be at hand, see ``experiments/README.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from torch import Generator, Tensor, nn

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.command import ExitCode, Interruption, check_positive, files_told, main_of
from experiments.experiment import Experiment
from experiments.folder import LOCK, describe_environment
from experiments.objects import UserError, first_line, near_misses
from experiments.presets import PRESETS, ROWS
from experiments.reporting.followed import FIRST, FOLLOWED, KEY, read, summary
from experiments.reporting.published import curves
from experiments.results import PUBLISHED, write_table
from experiments.store import STORE
from experiments.training import Trainer, progress
from pinncurv.optim import Proposal, QuadraticModel, Situation, StepSize
from pinncurv.problems import Faces, Fixed, Interior, Product, Union

# A share of a step that changes no digit that was published, but has a direction.
_NOTHING = 1e-13


@dataclass(frozen=True)
class FirstWithheld(StepSize):
    """The quadratic model, but that the first update is not taken, though remembered.

    θ₁ = θ₀,  δ₁ ∝ Δ₁

    The published runs of KFAC* did this: their first step moves nothing, and their second one takes
    the best combination of its own direction and the first one.

    Args:
        model: Step size and momentum of the other steps.
    """

    model: QuadraticModel = field(default_factory=QuadraticModel)

    def propose(self, situation: Situation) -> Proposal:
        proposal = self.model.propose(situation)
        if situation.previous is not None:
            return proposal
        return dataclasses.replace(proposal, step_size=_NOTHING * proposal.step_size)


class PublishedStart(Trainer):
    """A training from the network and on the points of a published run.

    All is drawn in single precision from one stream, that of torch's generator on the CPU with seed
    1: the network, the first points, those that errors are measured on, then those of later steps.

    Args:
        experiment: A row of the paper.
        label: Which of its optimizers.
    """

    _stream: Generator | None = None

    def __init__(self, experiment: Experiment, label: str) -> None:
        super().__init__(experiment, label, 1, torch.device("cpu"))
        self._stream = Generator().manual_seed(1)
        for layer in self.network.modules():
            if isinstance(layer, nn.Linear):
                _draw_layer(layer, self._stream)
        self._draw()
        interior = self.problem.terms[0].points
        if not isinstance(interior, Interior):
            raise UserError(f"{experiment.problem} has no published runs: its domain is no box.")
        many = dataclasses.replace(interior, n=10 * interior.n)
        self._evaluation_points = drawn(many, self._stream).to(self.dtype)

    def _draw(self) -> None:
        if self._stream is None:  # while that is built which is replaced
            return super()._draw()
        points = [drawn(term.points, self._stream).to(self.dtype) for term in self.problem.terms]
        self.objective = self._objective(points)


@torch.no_grad()
def _draw_layer(layer: nn.Linear, stream: Generator) -> None:
    """Draw a layer as torch does by default, in single precision."""
    weight = nn.init.kaiming_uniform_(
        torch.empty(layer.weight.shape), math.sqrt(5), generator=stream
    )
    layer.weight.copy_(weight)
    bound = 1 / math.sqrt(layer.in_features)
    layer.bias.copy_(torch.empty(layer.bias.shape).uniform_(-bound, bound, generator=stream))


def drawn(sampler: object, stream: Generator) -> Tensor:
    """Draw points as the published runs did: faces after where on them, times before places.

    Args:
        sampler: Of a box, its faces, and what is made of them.
        stream: What they are drawn from, in single precision.

    Raises:
        TypeError: If it is another sampler.
    """
    match sampler:
        case Product():
            return torch.cat([drawn(factor, stream) for factor in sampler.factors], 1)
        case Union():
            return torch.cat([drawn(part, stream) for part in sampler.parts])
        case Fixed():
            return sampler.points.float()
        case Interior() | Faces():
            lower, upper = (torch.tensor(side) for side in (sampler.box.lower, sampler.box.upper))
            d = len(lower)
            x = torch.rand(sampler.n, d, generator=stream)
            if isinstance(sampler, Faces):
                axis = torch.randint(0, d, (sampler.n,), generator=stream)
                side = torch.randint(0, 2, (sampler.n,), generator=stream)
                x[torch.arange(sampler.n), axis] = side.float()
            return x * (upper - lower) + lower
    raise TypeError(f"sampler must be that of a box, got {type(sampler).__name__}.")


def follow(
    row: str,
    label: str,
    published: pd.DataFrame,
    steps: int,
    seconds: float,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Take the first steps of a published run.

    Args:
        row: The row of the paper.
        label: The optimizer.
        published: Its published curve: step, loss before and rmse after it.
        steps: How many at most.
        seconds: For how long at most.
        stopped: Whether no further step is to be taken.

    Yields:
        A line for every step that is on the curve: ``KEY``, loss, rmse, and by which share both
        differ from the published ones.
    """
    trainer = PublishedStart(PRESETS[row], label)
    if label == "kfac_star":
        trainer.optimizer.step_size = FirstWithheld()
        trainer.optimizer.monotone = False
    known = published.set_index("step")
    while trainer.step < steps and trainer.seconds < seconds and not stopped():
        loss = trainer.advance().loss
        if trainer.step in known.index:
            there = known.loc[trainer.step]
            rmse = float(trainer.measure()["rmse"])
            yield {
                **dict(zip(KEY, (row, label, trainer.step), strict=True)),
                "loss": loss,
                "rmse": rmse,
                "loss_differs": _relative(loss, there["loss"]),
                "rmse_differs": _relative(rmse, there["rmse"]),
            }


def _relative(ours: float, published: float) -> float:
    return ours / published - 1 if math.isfinite(ours) else math.inf


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if all was followed, 1 if a run failed, 2 if the request was wrong, 130 if
        interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}; all by default")
    parser.add_argument("--optimizers", metavar="O", nargs="+", help="only these; all by default")
    parser.add_argument("--steps", metavar="K", type=int, default=25, help="of each run")
    parser.add_argument("--seconds", metavar="S", type=float, default=60.0, help="of each run")
    parser.add_argument(
        "--store", metavar="F", type=Path, default=STORE, help="the results that are kept"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(ROWS):
        raise UserError(
            f"rows must be some of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}."
        )
    check_positive(options, "steps", "seconds")
    rows = options.rows or list(ROWS)
    known = sorted({label for row in rows for label in PRESETS[row].labels})
    for label in set(options.optimizers or ()) - set(known):
        raise UserError(
            f"There is no optimizer {label!r}.{near_misses(label, known)} It must be one of "
            f"{', '.join(known)}."
        )
    read(options.store)  # what is no store is found out before anything is followed
    if not PUBLISHED.is_file():
        raise UserError(f"The published curves are not here: {PUBLISHED} must be there.")
    found = {row: curves(row) for row in rows}
    jobs = [
        (row, label, curve)
        for row, table in found.items()
        if table is not None
        for label, curve in table.groupby("optimizer", sort=False)
        if label in (options.optimizers or PRESETS[row].labels)
    ]
    if not jobs:
        raise UserError("No run of these was published: choose other rows or optimizers.")
    return _follow_all(jobs, options)


def _follow_all(
    jobs: Sequence[tuple[str, str, pd.DataFrame]], options: argparse.Namespace
) -> ExitCode:
    torch.set_num_threads(1)
    made = describe_environment(torch.device("cpu"))
    origin = {
        "device": made["device_name"],
        "threads": made["threads"],
        "torch": made["packages"]["torch"],
        "commit": str(made["commit"])[:8],
        "changed": made["uncommitted_changes"],
    }
    failed = False
    with Interruption() as interruption, progress(total=len(jobs)) as bar:

        def stopped() -> bool:
            return interruption.requested

        for row, label, curve in jobs:
            if stopped():
                break
            bar.set_description(f"{row}, {label}")
            lines = []
            try:
                for line in follow(row, label, curve, options.steps, options.seconds, stopped):
                    lines.append({**line, **origin})
            except (ArithmeticError, ValueError, RuntimeError, MemoryError, UserError) as error:
                bar.write(f"{row}, {label}: stopped: {first_line(error)}")
                failed = True
            bar.update()
            if not lines:
                continue
            with files_told():
                keep(pd.DataFrame(lines), options.store)
            for run in summary(pd.DataFrame(lines)).itertuples():
                bar.write(
                    f"{row}, {label}: agrees with the published run up to step {run.agrees} of "
                    f"{run.steps}, and to {run.differs:.1%} up to step {min(run.steps, FIRST)}"
                )
    if stopped():
        return ExitCode.INTERRUPTED
    return ExitCode.FAILURE if failed else ExitCode.SUCCESS


def keep(lines: pd.DataFrame, store: Path) -> None:
    """Put what was found into the store, in the place of the same steps of the same runs.

    Args:
        lines: Of steps, each with what it was made with.
        store: The store, to which other programs may write, too.
    """
    path = store / FOLLOWED
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / LOCK):
        old = read(store)
        lines = pd.concat([old, lines]) if len(old) else lines
        newest = lines.drop_duplicates(KEY, keep="last")
        write_table(path, newest.sort_values(KEY, ignore_index=True))


if __name__ == "__main__":
    main_of(main)
