"""All figures of one size in turns, and what follows from their times."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from experiments.benchmarking.figures import target, verdict
from experiments.benchmarking.floors import needed
from experiments.benchmarking.processes import HERE, Job, Worker, last_line
from experiments.benchmarking.sizes import SIZES

TURNS = 5  # of every process in a round
OVER_OLD = 1.03  # that new / old should not exceed


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Args:
        rounds: How often all processes are started.
        threads: Threads of the CPU.
        device: Where.
        against: Another checkout, to take turns with.
    """

    rounds: int = 3
    threads: int = 2
    device: str = "cpu"
    against: Path | None = None


@dataclass(frozen=True)
class Series:
    """What takes turns: a figure, eager or compiled, with the package of a checkout."""

    figure: str
    compiled: bool = False
    root: Path = HERE

    @property
    def mode(self) -> str:
        """Whether it is compiled, as a word."""
        return "compiled" if self.compiled else "eager"


_BASELINE, _MACHINE = Series("baseline"), Series("machine")


@dataclass(frozen=True)
class Row:
    """The results of a figure, eager or compiled.

    Attributes:
        ratio: The time over that of the baseline.
        megabytes: The peak memory of a step.
        ready: Seconds until the first turn.
        floor: Milliseconds of what is needed.
        share: The part of the time that the floor is.
        old_milliseconds: Of the other checkout.
        old_megabytes: Of the other checkout.
        over_old: The time over that of the other checkout.
        verdicts: Which targets are met.
        missing: Why there are no results.
        missing_old: Why there are none of the other checkout.
    """

    size: str
    figure: str
    mode: str
    milliseconds: float | None = None
    ratio: float | None = None
    megabytes: float | None = None
    ready: float | None = None
    floor: float | None = None
    share: float | None = None
    old_milliseconds: float | None = None
    old_megabytes: float | None = None
    over_old: float | None = None
    verdicts: tuple[str, ...] = ()
    missing: str | None = None
    missing_old: str | None = None


def measure_size(name: str, figures: Sequence[tuple[str, bool]], setting: Setting) -> list[Row]:
    """Return the results of one size, those of the baseline first.

    Args:
        name: The size.
        figures: What to measure besides, and whether compiled.
        setting: How.
    """
    roots = (HERE, setting.against) if setting.against else (HERE,)
    every = (("baseline", False), *figures)
    series = [Series(figure, compiled, root) for figure, compiled in every for root in roots]
    measured = _Measured(name, setting)
    for i in range(setting.rounds):
        say(f"{name}: round {i + 1} of {setting.rounds}")
        measured.take_round([_MACHINE, *series])
    return [measured.row(each) for each in series if each.root == HERE]


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class _Measured:
    """The turns of one size.

    Attributes:
        turns: The results of each series, turn by turn.
        missing: Why a series has none.
        ready: How long each took to be ready, in seconds.
    """

    name: str
    setting: Setting
    turns: dict[Series, list[dict[str, Any]]] = field(default_factory=dict)
    missing: dict[Series, str] = field(default_factory=dict)
    ready: dict[Series, float] = field(default_factory=dict)

    def take_round(self, every: Sequence[Series]) -> None:
        """Start a process for each series, and let them take turns."""
        workers: dict[Series, Worker] = {}
        try:
            for series in every:
                if series not in self.missing and (worker := self._start(series)):
                    workers[series] = worker
            for i in range(TURNS):
                for series in list(workers)[:: 1 - 2 * (i % 2)]:  # forth and back
                    self.turns.setdefault(series, []).append(workers[series].turn())
        finally:
            for worker in workers.values():
                worker.end()

    def _start(self, series: Series) -> Worker | None:
        """Start a process; None where a compiled step or another checkout has not got the figure.

        Raises:
            ChildProcessError: If an eager figure of this checkout can't be measured.
        """
        kind = "machine" if series == _MACHINE else "time"
        setting = self.setting
        job = Job(kind, series.figure, self.name, series.compiled, setting.device, setting.threads)
        try:
            worker = Worker(job, series.root)
        except ChildProcessError as error:
            if series.root == HERE and not series.compiled:
                raise
            self.missing[series] = last_line(error)
            return None
        self.ready.setdefault(series, worker.about["ready"])
        which = "" if series.root == HERE else " (old)"
        say(f"{self.name}: {series.figure} {series.mode}{which}, {worker.about['ready']:.1f} s")
        for warning in worker.about["warnings"]:
            say(f"{self.name}: {series.figure} {series.mode}{which} warns: {warning}")
        return worker

    def row(self, series: Series) -> Row:
        """Return the results of a series."""
        row = Row(self.name, series.figure, series.mode)
        if series in self.missing:
            return replace(row, missing=self.missing[series])
        row = replace(
            row,
            milliseconds=1e3 * self._median(series, "seconds"),
            ratio=self._over(series, _BASELINE),
            megabytes=self._median(series, "megabytes"),
            ready=self.ready[series],
        )
        row = self._with_floor(row, series)
        if self.setting.against:
            row = self._with_old(row, replace(series, root=self.setting.against))
        return replace(row, verdicts=tuple(self._verdicts(row, series)))

    def _with_floor(self, row: Row, series: Series) -> Row:
        """Add the floor, with the rates of each turn."""
        work = needed(series.figure, SIZES[self.name])
        if work is None:
            return row
        floors = [
            work.seconds(turn["rate"], {int(n): s for n, s in turn["eigen"].items()})
            for turn in self.turns[_MACHINE]
        ]
        pairs = zip(floors, self.turns[series], strict=True)
        share = median(floor / turn["seconds"] for floor, turn in pairs)
        return replace(row, floor=1e3 * median(floors), share=share)

    def _with_old(self, row: Row, old: Series) -> Row:
        """Add the results of the other checkout."""
        if old in self.missing:
            return replace(row, missing_old=self.missing[old])
        return replace(
            row,
            old_milliseconds=1e3 * self._median(old, "seconds"),
            old_megabytes=self._median(old, "megabytes"),
            over_old=self._over(replace(old, root=HERE), old),
        )

    def _verdicts(self, row: Row, series: Series) -> Iterator[str]:
        """Yield which targets are met."""
        assert row.ratio is not None
        assert row.megabytes is not None
        goal = target(series.figure, self.name, self.setting.device)
        baseline = self._median(_BASELINE, "megabytes")
        yield from verdict("ratio", row.ratio, goal.compiled if series.compiled else goal.eager)
        yield from verdict("MB", row.megabytes, goal.megabytes)
        yield from verdict("MB over baseline", row.megabytes / baseline, goal.memory)
        if series.compiled and row.share:
            yield from verdict("over floor", 1 / row.share, goal.over_floor)
        eager = replace(series, compiled=False)
        if series.compiled and eager in self.turns:
            yield from verdict("over eager", self._over(series, eager), goal.over_eager)
        if row.over_old is not None and row.old_megabytes is not None:
            yield from verdict("new / old", row.over_old, OVER_OLD)
            yield from verdict("MB new / old", row.megabytes / row.old_megabytes, OVER_OLD)

    def _median(self, series: Series, key: str) -> float:
        return median(turn[key] for turn in self.turns[series])

    def _over(self, series: Series, other: Series) -> float:
        """Return the median ratio of the times within a turn."""
        pairs = zip(self.turns[series], self.turns[other], strict=True)
        return median(mine["seconds"] / theirs["seconds"] for mine, theirs in pairs)
