"""What all programs share: options, errors in one line, exit codes, signals, streams."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import torch

from experiments import catalog
from experiments.experiment import Experiment, from_json
from experiments.folder import CONFIG, read_config
from experiments.objects import (
    UserError,
    arguments,
    describe,
    first_line,
    is_own,
    near_misses,
    resolve,
    short,
    summary,
)

_KINDS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "problem": catalog.PROBLEMS,
    "network": catalog.NETWORKS,
    "optimizer": catalog.OPTIMIZERS,
}


def number_or_auto(text: str) -> int | str:
    """Read a number of points, or auto."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got {text!r}") from None


# Of every field of an experiment: what the help shows for its value, how it is read, and for what.
_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "problem": ("P", str, "the PDE: a name, or FILE.py:NAME for your own"),
    "network": ("N", str, "the network, likewise"),
    "optimizers": ("O", str, "what trains, likewise; LABEL=O names one that is run twice"),
    "seconds": ("S", float, "budget of each optimizer, in seconds of its steps alone"),
    "steps": ("K", int, "the same in steps"),
    "seeds": ("I", int, "one training for each"),
    "resample_every": ("K", int, "steps after which new points are drawn; 0 for never"),
    "candidates": ("K", int, "points drawn for each of the first term, chosen by residual"),
    "windows": ("T", float, "times that divide the training: a network for each part"),
    "dtype": ("T", str, "float64 or float32"),
    "device": ("D", str, "cpu, cuda, ..."),
    "threads": ("K", int, "threads of the CPU"),
    "chunk_size": ("K", number_or_auto, "points to process at a time, or auto; same result"),
    "compile": ("", bool, "compile what is done at the points; not counted as time of steps"),
    "record_every": ("K", int, "steps between two rows of metrics; 0 for ever fewer"),
    "checkpoint_seconds": ("S", float, "seconds between two checkpoints"),
    "checkpoint_steps": ("K", int, "steps between two checkpoints"),
}


_STDERR = 2


class ExitCode(IntEnum):
    """How a program ended."""

    SUCCESS = 0
    FAILURE = 1
    USER_ERROR = 2
    INTERRUPTED = 130  # as shells have it: 128 + SIGINT


# --- options --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that answers an unknown option with those that it resembles.

    Args:
        description: What the program does.
        without: Fields of an experiment that are no options of the program.
    """

    def __init__(self, description: str, without: Iterable[str] = ()) -> None:
        super().__init__(
            description=description,
            usage="%(prog)s [options]",
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=30, width=max(60, _columns())
            ),
        )
        self.fields = [name for name in _OPTIONS if name not in without]
        self.add_argument("--preset", metavar="X", help="start from this experiment of presets.py")
        for name in self.fields:
            metavar, kind, text = _OPTIONS[name]
            several = "+" if name in ("optimizers", "seeds", "windows") else None
            flag = f"--{name.replace('_', '-')}"
            if kind is bool:
                self.add_argument(flag, action="store_const", const=True, help=text)
                continue
            self.add_argument(flag, dest=name, metavar=metavar, type=kind, nargs=several, help=text)
        self.add_argument(
            *("--set", "-s"),
            metavar="X.A=V",
            nargs="+",
            action="extend",
            default=[],
            help="argument A of problem, network or optimizer X; see --list X",
        )
        self.add_argument(
            "--list", metavar="X", nargs="?", const="", help="names, or the arguments of X"
        )
        self.add_argument(
            "--config", metavar="F", type=Path, help="start from the config.json of a run"
        )
        self.add_argument(
            "--run-folder", metavar="F", type=Path, help="a new folder; by default in runs/"
        )

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as an error of the user."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = "".join(
            near_misses(word.partition("=")[0], flags) for word in unknown if word.startswith("-")
        )
        raise UserError(f"{message}.{near} See --help.")


def _columns() -> int:
    with suppress(OSError):
        return os.get_terminal_size().columns - 2
    return 98


def experiment_of(
    parser: Parser, options: argparse.Namespace, stored: Experiment | None = None
) -> Experiment:
    """Return the experiment that options ask for, on top of a preset or of what was stored.

    Settings of a preset or a file whose optimizer, problem or network is replaced go with it.

    Args:
        parser: What has read the options.
        options: The options.
        stored: The experiment of an earlier run.

    Raises:
        UserError: If the experiment is not possible.
    """
    from experiments.presets import PRESETS  # noqa: PLC0415 - presets are made of experiments

    if options.preset is not None and (options.config or stored):
        raise UserError("--preset and --config or --resume exclude each other; drop one.")
    named = any(getattr(options, name, None) for name in ("problem", "network", "optimizers"))
    base = stored or (Experiment() if named else PRESETS["quick"])
    if options.config is not None:
        base = from_json(read_config(options.config, "--config"), str(options.config))
    if options.preset is not None:
        if options.preset not in PRESETS:
            near = near_misses(options.preset, PRESETS) or f" There are {', '.join(PRESETS)}."
            raise UserError(f"--preset: there is no experiment {options.preset!r}.{near}")
        base = PRESETS[options.preset]
    given = {n: v for n in parser.fields if (v := getattr(options, n)) is not None}
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    if options.config is not None or stored is not None:
        _check_own_code(base, given)
    changed = dataclasses.replace(base, **given)
    gone = {n for n in ("problem", "network") if getattr(changed, n) != getattr(base, n)}
    kept = (set(changed.labels) | {"problem", "network"}) - gone
    settings = {k: v for k, v in base.settings.items() if k.partition(".")[0] in kept}
    return dataclasses.replace(
        changed, settings=settings | dict(map(_setting, options.set))
    ).checked()


def _setting(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set must be X.A=VALUE, got {text!r}.")
    return key, value


def own_names(experiment: Experiment) -> dict[str, list[str]]:
    """Return the options of an experiment that name files of the user's own, as they are given."""
    given = {n: getattr(experiment, n) for n in ("problem", "network", "optimizers")}
    words = {n: [v] if isinstance(v, str) else v for n, v in given.items()}
    return {n: [f"--{n}", *v] for n, v in words.items() if any(map(is_own, v))}


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Check that options are positive where they are given.

    Raises:
        UserError: If one is not.
    """
    for name in names:
        if (value := getattr(options, name)) is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value}.")


def again(option: str, path: Path, experiment: Experiment) -> str:
    """Return the options that go on with what is in a folder or file."""
    return " ".join([f"--{option} {path}", *chain(*own_names(experiment).values())])


def _check_own_code(stored: Experiment, given: Mapping[str, Any]) -> None:
    """Refuse to run a file only because a folder with results names it."""
    missing = chain(*[words for name, words in own_names(stored).items() if name not in given])
    refuse_own_code(list(missing))


def refuse_own_code(options: Sequence[str]) -> None:
    """Raise an error with the options to give again, if there are any."""
    if options:
        raise UserError(
            "No code is run because a run folder names it. If you trust these files, give "
            f"{' '.join(options)} again."
        )


def list_names(name: str) -> None:
    """Print the names of everything, or the arguments of one name."""
    from experiments.presets import PRESETS  # noqa: PLC0415 - presets are made of experiments

    if name in PRESETS:
        for field, value in dataclasses.asdict(PRESETS[name]).items():
            print(f"  {field}: {value}")
        return
    if name:
        kinds = [kind for kind, known in _KINDS.items() if name.replace("-", "_") in known]
        if not kinds and not is_own(name):
            everything = [n for known in _KINDS.values() for n in known]
            raise UserError(
                f"--list: there is no {name!r}.{near_misses(name, everything)} Try --list."
            )
        target = resolve(
            name, {n: f for known in _KINDS.values() for n, f in known.items()}, "name"
        )
        given = {"network": ("d_in", "d_out"), "optimizer": tuple(arguments(target))[:1]}
        print("\n".join(describe(short(name), target, given.get(kinds[0] if kinds else "", ()))))
        return
    for kind, known in _KINDS.items():
        print(f"\n--{kind}{'s' if kind == 'optimizer' else ''}")
        for n, target in known.items():
            print(f"  {n:30}{summary(target)}")
    print("\n--preset")
    for n, preset in PRESETS.items():
        print(f"  {n:30}{preset.problem}, {', '.join(preset.labels)}")


def set_up_device(experiment: Experiment) -> torch.device:
    """Set the number of threads, and return a device that works.

    Raises:
        UserError: If the device does not exist here.
    """
    torch.set_num_threads(experiment.threads or 1)
    try:
        device = torch.device(experiment.device)
        torch.empty(0, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        choices = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(
            f"--device {experiment.device} cannot be used here ({first_line(error)}). Use "
            f"{choices}."
        ) from error
    return device


def resumed(folder: Path) -> Experiment:
    """Return the experiment of a run folder."""
    return from_json(read_config(folder / CONFIG, "--resume"), str(folder / CONFIG))


# --- programs -------------------------------------------------------------------------------------


def run_program(main: Callable[[], ExitCode]) -> ExitCode:
    """Run a program; what the user got wrong is one line, and no stream that closes ends it."""
    with surviving_streams():
        try:
            return main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return ExitCode.USER_ERROR
        except KeyboardInterrupt:
            print("stopped at once", file=sys.stderr)
            return ExitCode.INTERRUPTED


class _Surviving:
    """A stream whose reader may go away: what is written then is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError):
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._let_go()

    def _let_go(self) -> None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def surviving_streams() -> Iterator[None]:
    """Let the program go on if the reader of its output goes away."""
    while (unused := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass  # a stream that was closed (>&-) shall not be the next file that is opened
    os.close(unused)
    before = (
        sys.stdout or os.fdopen(1, "w", closefd=False),
        sys.stderr or os.fdopen(_STDERR, "w", closefd=False),
    )
    sys.stdout, sys.stderr = _Surviving(before[0]), _Surviving(before[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def files_told() -> Iterator[None]:
    """Say of a file that cannot be read or written which one it is, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read or write {error.filename}: {error.strerror}.") from error


class Interruption:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Start to listen."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signals as they were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with suppress(OSError):  # not by print, which the signal may just have interrupted
            os.write(_STDERR, b"\nStopping after this step; once more stops at once.\n")


def main_of(module_main: Callable[[Sequence[str]], ExitCode]) -> None:
    """Run a script; what it warns of is a line for its user, not a place in its source."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.exit(run_program(lambda: module_main(sys.argv[1:])))
