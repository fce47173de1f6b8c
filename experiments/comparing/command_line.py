"""Reads the command line, on top of the settings of an earlier comparison where one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.comparing.settings import Settings
from experiments.training.command_line import read, stored_arguments


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
    given = read(CommandLine, arguments, "compare.py")
    if given.config is None:
        return given
    stored = stored_arguments(given.config, "--config")
    return read(CommandLine, [*stored, *arguments], "compare.py")
