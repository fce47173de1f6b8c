"""Reads the command line, on top of the settings of an earlier comparison where one is named."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import tyro

from experiments.comparing.operators import OPERATORS
from experiments.comparing.settings import Settings
from experiments.training.command_line import as_arguments
from experiments.training.errors import UserError
from experiments.training.network import ACTIVATIONS
from experiments.training.optimizers import OptimizerName
from experiments.training.problems import PROBLEMS

_CHOICES: dict[str, Sequence[str]] = {
    "--operators": tuple(OPERATORS),
    "--problem": tuple(PROBLEMS),
    "--activation": tuple(ACTIVATIONS),
    "--optimizer": get_args(OptimizerName),
}


@dataclass(frozen=True)
class CommandLine:
    """Compare approximations of the exact Gauss-Newton matrix along training, for several dampings.

    Without arguments: nine of them on the Poisson equation in two dimensions, after 0, 10 and 50
    steps of KFAC* from three seeds, in about a minute. A run folder collects settings, table and
    figures.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    run_folder: Path | None = None
    """The folder to write, which must not exist or be empty; None for a new one in runs/."""
    config: Path | None = None
    """Start from the settings in this file, e.g. the config.json of another comparison."""


def parse(arguments: Sequence[str]) -> CommandLine:
    """Read the command line.

    Args:
        arguments: The arguments, without the program's name.

    Raises:
        UserError: If a file with settings cannot be read.
        SystemExit: If the command line is wrong (code 2, after a message), or asks for help.
    """
    given = _parse(arguments)
    if given.config is None:
        return given
    return _parse([*_stored_arguments(given.config), *arguments])


def _parse(arguments: Sequence[str]) -> CommandLine:
    try:
        return tyro.cli(
            CommandLine,
            args=arguments,
            prog="compare.py",
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as stop:
        if stop.code:
            for near in _near_misses(arguments):
                print(f"Perhaps you meant {near}.", file=sys.stderr)
        raise


def _near_misses(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the choices that the unknown ones among the arguments resemble."""
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
        else:
            value = argument
        choices = _CHOICES.get(flag, ())
        if value and value not in choices:
            near = difflib.get_close_matches(value.lower(), choices, n=3)
            if near:
                yield f"{flag} {' or '.join(near)}"


def _stored_arguments(path: Path) -> list[str]:
    """Return the settings in a file as arguments, so that they are checked in the same way."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--config: cannot read {path} ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"--config: {path} is no valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise UserError(f"--config: {path} must hold a JSON object of settings.")
    return as_arguments(tree)
