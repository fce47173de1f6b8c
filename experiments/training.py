"""One optimizer at work on one problem: its state, its checkpoints, its metrics, and the loop."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.command import Interruption
from experiments.experiment import DTYPES, Experiment
from experiments.folder import write_atomically
from experiments.objects import UserError, first_line, short, told
from pinncurv.curvature import Objective
from pinncurv.linops import FactorizationError
from pinncurv.machine import seconds_spent
from pinncurv.optim import HeldOut, StepRecord
from pinncurv.problems import Errors, ResidualBased, Windows, warn_unless_periodic

METRICS = "metrics.csv"
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FINISHED, INTERRUPTED, PRUNED = "finished", "interrupted", "pruned"
NOT_STARTED = "not started"

# Seeds of what all trainings share, far from those that trainings draw their points with. The CPU's
# generator takes their lower 32 bits alone.
_EVALUATION, _HELD_OUT = 3_735_928_559, 3_735_928_495

# The hexadecimal SHA-256 of all that stands before it, and a newline. torch.load ignores it.
_CHECKSUM_BYTES = 65

# Of an optimizer that says nothing about its steps, and before the first step.
_NO_RECORD = StepRecord(math.nan, {}, momentum=math.nan)

Value = float | int | bool | str
Row = dict[str, Value]


class Trainer:
    """A network, its optimizer, the current batch, and how far they have come.

    Args:
        experiment: The checked experiment.
        label: Which of its optimizers.
        seed: Which of its seeds.
        device: Where to compute.
    """

    def __init__(self, experiment: Experiment, label: str, seed: int, device: torch.device) -> None:
        self.experiment = experiment = experiment.only(label)
        self.label, self.seed, self.device = label, seed, device
        self.dtype = DTYPES[experiment.dtype]
        self.windows = Windows(experiment.windows) if experiment.windows else None
        self.step, self.seconds, self.rejected = 0, 0.0, 0
        self._generator = torch.Generator().manual_seed(seed - 1)
        # of torch's own generator, which the user's code may draw from
        self._random = torch.Generator().manual_seed(seed).get_state()
        self.objective: Objective
        self._begin()
        self.identity = experiment.identity(label, seed)  # now, as files may change later

    def _begin(self) -> None:
        """Build what is trained, in the next time window if there are any."""
        experiment, part, windows = self.experiment, self.experiment.build_problem, self.windows
        self._part = windows.problem(part) if windows else part()
        self.problem = self._part  # at all times so far, as is the model
        self.network = self.model = experiment.build_network(self._part, self.seed)
        if windows:
            self.network = windows.scaled(self.network)
            edges = windows.edges[: len(windows.networks) + 2]
            self.problem = part(start=edges[0], end=edges[-1], initial=None)
            self.model = Windows(edges)
            self.model.networks.extend([*windows.networks, self.network])
        try:
            self._draw()
            held_out = self._sample(torch.Generator().manual_seed(_HELD_OUT))
            warn_unless_periodic(self._part, self.network, held_out)
            self._held_out = HeldOut(self._objective(held_out, held_out=True))
            parameters = self.objective.parameters()
            evaluation = torch.Generator().manual_seed(_EVALUATION)
            self._evaluation_points = self.problem.evaluation.sample(
                evaluation, self.dtype, self.device
            )
            shape, width = self.model(self._evaluation_points).shape, self.problem.d_out
            if shape != (len(self._evaluation_points), width):
                raise ValueError(f"the network must return [N, {width}], got {list(shape)}")
        except (Exception, SystemExit) as error:  # of the user's own code it may be any
            raise UserError(f"{experiment.problem}: {told(error)}") from error
        self.optimizer = experiment.build_optimizer(self.label, parameters)

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        count = sum(parameter.numel() for parameter in self.objective.parameters())
        settings = [f"{k}={v}" for k, v in self.experiment.of("network").items()]
        network = f"{short(self.experiment.network)}({', '.join(settings)})"
        windows = f", {len(self.windows.edges) - 1} time windows" if self.windows else ""
        chunks = ""
        if self.experiment.chunk_size == "auto":
            picked = self.objective.chunk_size
            chunks = f", {'all' if picked is None else picked} points at a time"
        dtype = self.experiment.dtype
        return f"{self.problem.name}, {network}, {count} parameters, {dtype}{windows}{chunks}"

    def begin(self) -> None:
        """Let what draws from torch's own generator draw as if no other training had."""
        torch.set_rng_state(self._random)

    def advance(self) -> StepRecord:
        """Take one step, in a new time window or on new points if they are due, and count its time.

        Raises:
            FloatingPointError: If the loss was not finite before the step.
        """
        if self.windows and spent(self) >= (self._window + 1) / (len(self.windows.edges) - 1):
            self._next_window()
        self._synchronize()
        start = time.perf_counter() - seconds_spent()  # what compiles is not a step
        every = self.experiment.resample_every
        if every and self.step and self.step % every == 0:
            self._draw()
        record = self.optimizer.step(self.objective)
        self._synchronize()
        self.seconds += time.perf_counter() - seconds_spent() - start
        self.step += 1
        record = record if isinstance(record, StepRecord) else _NO_RECORD
        self.rejected += not record.accepted
        return record

    @torch.no_grad()
    def measure(self, record: StepRecord | None = None) -> Row:
        """Return a row of the metrics: where the parameters are now, and what the last step did.

        With time windows losses are those of the window that is trained; errors are those at all
        times until its end.
        """
        terms = {name: float(loss) for name, loss in self.objective.term_losses().items()}
        known = self.problem.solution is not None
        errors = (
            self.problem.errors(self.model, self._evaluation_points)
            if known
            else Errors(math.nan, math.nan, (math.nan,))
        )
        record, total = record or _NO_RECORD, sum(terms.values())
        held_out, words = self._held_out.measure(total)
        if words:
            tqdm.write(f"{self.label} seed {self.seed}, step {self.step}: {words}", sys.stderr)
        return {
            "step": self.step,
            "seconds": self.seconds,
            **({"until": self.windows.edges[self._window + 1]} if self.windows else {}),
            "loss": total,
            **{f"loss_{name}": loss for name, loss in terms.items()},
            "held_out_loss": held_out,
            "rmse": errors.rmse,
            "relative_error": errors.relative,
            **({"mean_error": errors.mean} if self.problem.d_out > 1 else {}),
            "step_size": record.step_size,
            "momentum": record.momentum,
            "damping": record.damping,
            "rejected": self.rejected,
            "accepted": record.accepted,
            "reason": record.reason,
        }

    def check_finite(self) -> None:
        """Check that the parameters are worth keeping.

        Raises:
            FloatingPointError: If one of them is not finite.
        """
        bad = [name for name, p in self.objective.named_parameters() if not p.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"After step {self.step}, {', '.join(bad)} contains NaN or infinity."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue exactly."""
        own = {id(p) for p in self.network.parameters()}
        named = self.objective.named_parameters()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "rejected": self.rejected,
            "generator": self._generator.get_state(),
            "points": self.objective.points,
            "random": torch.get_rng_state(),
            "windows": [net.state_dict() for net in self.windows.networks] if self.windows else [],
            "model": self.network.state_dict(),
            "terms": {name: p.detach() for name, p in named if id(p) not in own},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        if self._window:  # beyond the first one, with networks of another state
            self.windows = Windows(self.experiment.windows)
            self._begin()
        for network in state["windows"]:
            self.network.load_state_dict(network)
            self._next_window()
        self.network.load_state_dict(state["model"])
        for name, parameter in self.objective.named_parameters():
            if name in state["terms"]:
                parameter.data.copy_(state["terms"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self._random = state["random"]
        points = [x.to(self.device) for x in state["points"]]
        self.objective = self._objective(points)
        self.step, self.seconds, self.rejected = state["step"], state["seconds"], state["rejected"]

    @property
    def missed(self) -> str:
        """Say which time windows have no network yet; nothing where each one has."""
        edges = self.windows.edges if self.windows else (0.0, 0.0)
        done = self._window + 1
        if done == len(edges) - 1:
            return ""
        return (
            f"the budget was spent in the first {done} of {len(edges) - 1} time windows, and "
            f"errors are those until t = {edges[done]:g}; raise seconds, or steps to one a window "
            "at least"
        )

    @property
    def _window(self) -> int:
        return len(self.windows.networks) if self.windows else 0

    def _next_window(self) -> None:
        assert self.windows
        self.windows.append(self.network)
        self._begin()

    def _sample(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return self._part.sample(generator, self.dtype, self.device)

    def _objective(self, points: Sequence[torch.Tensor], held_out: bool = False) -> Objective:
        size, compile = self.experiment.chunk_size, self.experiment.compile and not held_out
        return Objective(self.network, self._part.terms, points, size, not held_out, compile)

    def _draw(self) -> None:
        """Draw a batch, of the first term by its residuals if there are more candidates."""
        first, *others = self._part.terms
        if (draws := self.experiment.candidates) > 1:
            chosen = ResidualBased(first, self.network, first.points.n, draws=draws)
            first = replace(first, points=chosen)
        terms, where = (first, *others), (self.dtype, self.device)
        points = [term.points.sample(self._generator, *where) for term in terms]
        self.objective = self._objective(points)

    def _synchronize(self) -> None:
        """Wait for the device, so that the clock counts what was computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(folder: Path, trainer: Trainer) -> None:
    """Save a checkpoint; the one before it stays until the new one is complete, and after.

    Raises:
        FloatingPointError: If a parameter is not finite.
        OSError: If it cannot be written.
    """
    trainer.check_finite()
    buffer = io.BytesIO()
    torch.save({"identity": trainer.identity, "state": trainer.state_dict()}, buffer)
    buffer.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
        raise TypeError(
            f"the state_dict of {trainer.label} must hold tensors, numbers, strings, lists and "
            f"dicts to be restored without running code, got {', '.join(unsafe)}"
        )
    content = buffer.getvalue()
    write_atomically(folder / CURRENT, content + _checksum(content), keep=folder / PREVIOUS)


def restore(folder: Path, trainer: Trainer) -> bool:
    """Continue from the newest whole checkpoint of a folder; say whether there was one.

    Raises:
        UserError: If all checkpoints are damaged or lost, or they belong to something else.
    """
    problems = []
    for path in (folder / CURRENT, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except (UserError, OSError) as error:
            problems.append(str(error))
            print(f"warning: {error} Trying the one before it.", file=sys.stderr)
            continue
        check_identity(path, checkpoint["identity"], trainer.identity)
        try:
            trainer.load_state_dict(checkpoint["state"])
        except (Exception, SystemExit) as error:  # of the user's own code it may be any
            raise UserError(f"{path} does not fit: {told(error)}") from error
        return True
    if not problems and last_row(folder).get("step", 0) > 0:
        problems = [f"{METRICS} has steps, but the checkpoints are gone."]
    if problems:
        raise UserError(
            f"No whole checkpoint is left in {folder}: {' '.join(problems)} Restore one, or delete "
            f"{folder} to train this optimizer again from the start."
        )
    return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify one checkpoint; no code in it is run.

    Raises:
        UserError: If it is not what was written.
    """
    content = path.read_bytes()
    payload, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if checksum != _checksum(payload):
        raise UserError(
            f"{path} is damaged: its {len(content)} bytes do not have the checksum they end with."
        )
    try:
        checkpoint = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.") from error
    if not (isinstance(checkpoint, dict) and {"identity", "state"} <= checkpoint.keys()):
        raise UserError(f"{path} is no checkpoint of this program.")
    return checkpoint


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of something else, and say what differs."""
    was, now = _flat(found), _flat(expected)
    differences = [
        f"{name} was {was.get(name, 'not set')} and now is {now.get(name, 'not set')}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"{path} belongs to another run: {'; '.join(differences)}. Resume with the settings it "
            "was made with (give none of these anew), or start a new run."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return flat


# --- metrics --------------------------------------------------------------------------------------


class MetricsFile:
    """Appends rows to a CSV file; each is on its way to the disk when ``append`` returns.

    Args:
        folder: Where the file is, or will be.
        columns: The columns.
        last_step: Rows of later steps, and incomplete ones, are removed first: what happened after
            the checkpoint that a run continues from happens again.
    """

    def __init__(self, folder: Path, columns: Sequence[str], last_step: int) -> None:
        path = folder / METRICS
        kept = [row for row in _complete_rows(path, columns) if int(row["step"]) <= last_step]
        self.last_step = int(kept[-1]["step"]) if kept else -1
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, columns)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, buffer.getvalue().encode())
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)

    def append(self, row: Mapping[str, Value]) -> None:
        """Append a row; NaN becomes an empty cell."""
        self._writer.writerow({k: "" if v != v else v for k, v in row.items()})
        self._file.flush()
        self.last_step = int(row["step"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def whole_lines(path: Path) -> io.StringIO:
    """Return what was written to the end of a line: half a number is another number."""
    text = path.read_text(errors="replace")
    return io.StringIO(text[: text.rfind("\n") + 1], newline="")


def _complete_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows that were written to the end."""
    return [
        row
        for row in (csv.DictReader(whole_lines(path)) if path.is_file() else ())
        if list(row) == list(columns) and None not in row.values() and row["step"].isdigit()
    ]


def last_row(folder: Path) -> dict[str, float]:
    """Return the numbers of the last row of the metrics; nothing without a file."""
    try:
        rows = list(csv.DictReader(whole_lines(folder / METRICS)))
    except OSError:
        return {}
    numbers: dict[str, float] = {}
    for name, cell in (rows[-1] if rows else {}).items():
        try:
            numbers[name] = float(cell or "nan")
        except (TypeError, ValueError):
            continue
    return numbers


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """What else happens while training.

    Args:
        interruption: Asks to stop after the current step.
        position: What the progress calls this training, e.g. "[1/3]".
        recorded: Called with every row of the metrics; returns whether to stop, e.g. to prune.
        raises: Whether errors that are no sign of a hopeless setting are raised.
    """

    interruption: Interruption
    position: str = ""
    recorded: Callable[[Row], bool] = lambda row: False
    raises: bool = False


def is_recorded(step: int, every: int) -> bool:
    """Return whether a step gets a row: 32 per doubling of the step, or every k-th."""
    return step % (every or max(1, 1 << max(0, step.bit_length() - 6))) == 0


def train(trainer: Trainer, folder: Path, watch: Watch) -> str:
    """Train one optimizer, from where it is until its budget is spent.

    Args:
        trainer: The optimizer at work.
        folder: Where metrics and checkpoints go.
        watch: What else happens.

    Returns:
        How it ended: ``FINISHED``, ``INTERRUPTED``, ``PRUNED``, or what went wrong. The checkpoint
        then is of the last step, or, if something went wrong, of an earlier one.
    """
    experiment, record, metrics = trainer.experiment, None, None
    bar = _Bar(trainer, watch.position)
    trainer.begin()
    saved, pruned = time.monotonic(), False
    try:
        first = trainer.measure()
        metrics = MetricsFile(folder, list(first), trainer.step)
        if trainer.step == 0:
            if metrics.last_step < 0:
                metrics.append(first)
            save_checkpoint(folder, trainer)  # shows now what cannot be saved
        bar.measured(first)
        if experiment.compile:
            bar.says("compiling, which takes a minute unless the disk has it already")
        while not (pruned or watch.interruption.requested or spent(trainer) >= 1):
            record = trainer.advance()
            if is_recorded(trainer.step, experiment.record_every):
                row = trainer.measure(record)
                metrics.append(row)
                bar.measured(row)
                pruned = watch.recorded(row)
            bar.update(spent(trainer))
            by_steps = (
                experiment.checkpoint_steps and trainer.step % experiment.checkpoint_steps == 0
            )
            if by_steps or time.monotonic() - saved >= experiment.checkpoint_seconds:
                save_checkpoint(folder, trainer)
                saved = time.monotonic()
        if metrics.last_step < trainer.step:
            metrics.append(trainer.measure(record))
        if record is not None:
            save_checkpoint(folder, trainer)
    except (FloatingPointError, FactorizationError) as error:
        return str(error)
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror or error})"
    except (Exception, SystemExit) as error:  # of the user's own code it may be any
        if watch.raises and not isinstance(
            error, RuntimeError | MemoryError | ValueError | TypeError
        ):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        bar.close()
        if metrics is not None:
            with suppress(OSError):  # what is left in the buffer does not fit on the disk either
                metrics.close()
    if pruned:
        return PRUNED
    if watch.interruption.requested and spent(trainer) < 1:
        return INTERRUPTED
    return trainer.missed or FINISHED


def spent(trainer: Trainer) -> float:
    """Return the part of the budget that is spent."""
    seconds, steps = trainer.experiment.seconds, trainer.experiment.steps
    parts = [trainer.seconds / seconds] if seconds else []
    return max([*parts, trainer.step / steps] if steps else parts)


class _Lines:
    """A stream that is no terminal: it gets lines, not one that is overwritten."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a line, unless it is empty."""
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        """Write what is left."""
        self._stream.flush()


def progress(**options: Any) -> tqdm:
    """Return a bar of progress: a live line in a terminal, now and then a line elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm(
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else 5,
        dynamic_ncols=terminal,
        **options,
    )


class _Bar:
    """How far a training has come, how long it takes yet, and where it is."""

    def __init__(self, trainer: Trainer, position: str) -> None:
        self._bar = progress(
            total=1.0,
            initial=min(1.0, spent(trainer)),
            desc=f"{position} {trainer.label} seed {trainer.seed}".strip(),
            bar_format="{desc} {percentage:3.0f}% {elapsed}<{remaining} {postfix}",
        )

    def measured(self, row: Mapping[str, Value]) -> None:
        known = row["rmse"] == row["rmse"]
        name, value = ("RMSE", row["rmse"]) if known else ("held-out loss", row["held_out_loss"])
        text = f"step {row['step']}, loss {row['loss']:.2e}, {name} {value:.2e}"
        rejected = f", {row['rejected']} rejected" if row["rejected"] else ""
        self._bar.set_postfix_str(text + rejected, refresh=False)

    def says(self, words: str) -> None:
        self._bar.set_postfix_str(words, refresh=True)

    def update(self, part: float) -> None:
        self._bar.update(min(1.0, part) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
