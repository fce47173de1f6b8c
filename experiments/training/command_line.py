"""Reads the command line, on top of the settings of an earlier run where one is named."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro

from experiments.training.errors import UserError
from experiments.training.optimizers import Presets
from experiments.training.run_folder import CONFIG
from experiments.training.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class CommandLine:
    """Train a network on a PDE, with one or several optimizers side by side for equal time.

    Without arguments: KFAC*, exact Gauss-Newton and Adam on the Poisson equation in two dimensions,
    in about a minute. A run folder collects settings, metrics, checkpoints and the figure.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    run_folder: Path | None = None
    """The folder to write, which must not exist or be empty; None for a new one in runs/."""
    resume: Path | None = None
    """Continue the run of this folder; budget, intervals, device, more optimizers may be given."""
    config: Path | None = None
    """Start from the settings in this file, e.g. the config.json of another run."""


def parse(arguments: Sequence[str]) -> CommandLine:
    """Read the command line.

    Args:
        arguments: The arguments, without the program's name.

    Returns:
        The command line, with the settings as given; see ``Settings.resolved``.

    Raises:
        UserError: If a file with settings cannot be read, or options exclude each other.
        SystemExit: If the command line is wrong (code 2, after a message), or asks for help.
    """
    given = read(CommandLine, arguments, "train.py")
    if given.resume is not None and (given.config is not None or given.run_folder is not None):
        raise UserError(
            "--resume continues in its own folder with its own settings; drop --config and "
            "--run-folder."
        )
    if given.resume is not None:
        stored = stored_arguments(given.resume / CONFIG, "--resume")
    elif given.config is not None:
        stored = stored_arguments(given.config, "--config")
    else:
        _check_effect(Settings(), given.settings)
        return given
    line = read(CommandLine, [*stored, *arguments], "train.py")
    _check_effect(read(CommandLine, stored, "train.py").settings, line.settings)
    return line


def _check_effect(before: Settings, after: Settings) -> None:
    """Refuse settings of optimizers that are not to be run: they would silently do nothing."""
    for preset in dataclasses.fields(Presets):
        name = preset.name.replace("_", "-")
        if name not in after.optimizers and before.preset(name) != after.preset(name):
            raise UserError(
                f"--{name}.* has no effect: {name} is not among --optimizers "
                f"{' '.join(after.optimizers)}. Add it there, or drop its settings."
            )


def read(line: type[T], arguments: Sequence[str], program: str) -> T:
    """Read a command line; unknown names are answered with those that they resemble.

    Args:
        line: The dataclass that describes it.
        arguments: The arguments, without the program's name.
        program: The program's name.
    """
    try:
        return tyro.cli(line, args=arguments, prog=program, config=(tyro.conf.FlagConversionOff,))
    except SystemExit as stop:
        if stop.code:
            for near in _near_misses(line, arguments):
                print(f"Perhaps you meant {near}.", file=sys.stderr)
        raise


def _near_misses(line: type, arguments: Sequence[str]) -> Iterator[str]:
    """Yield the choices that the unknown ones among the arguments resemble."""
    known, flag = dict(_choices(line)), ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.replace("_", "-").partition("=")
        else:
            value = argument
        choices = known.get(flag, ())
        if value and value not in choices:
            near = difflib.get_close_matches(value.lower(), choices, n=3)
            if near:
                yield f"{flag} {' or '.join(near)}"


def _choices(group: type, prefix: str = "--") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the flags that have choices, and these."""
    for name, hint in get_type_hints(group).items():
        # The settings themselves are no group on the command line.
        flag = "" if name == "settings" else name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _choices(cast(type, hint), f"{prefix}{flag}." if flag else prefix)
        else:
            for part in (hint, *get_args(hint)):
                if get_origin(part) is Literal:
                    yield prefix + flag, get_args(part)


def stored_arguments(path: Path, option: str) -> list[str]:
    """Return the settings in a file as arguments, so that they are checked in the same way.

    Args:
        path: The file.
        option: The option that names it, for error messages.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{option}: cannot read {path} ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{option}: {path} is no valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise UserError(f"{option}: {path} must hold a JSON object of settings.")
    return as_arguments(tree)


def as_arguments(tree: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """Return nested settings as arguments of the command line.

    Args:
        tree: Settings by name, in groups.
        prefix: What stands before the name.
    """
    arguments: list[str] = []
    for key, value in tree.items():
        flag = prefix + key.replace("_", "-")
        if isinstance(value, Mapping):
            arguments += as_arguments(value, flag + ".")
        elif isinstance(value, (list, tuple)):
            arguments += [flag, *map(str, value)]
        else:
            arguments += [flag, str(value)]
    return arguments
