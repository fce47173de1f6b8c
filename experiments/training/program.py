"""The frame of every program: errors in one line, exit codes, and a run folder that is closed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Protocol, TypeVar

from experiments.training.errors import UserError
from experiments.training.run_folder import RunFolder


class ExitCode(IntEnum):
    """How a program ended."""

    SUCCESS = 0
    FAILURE = 1
    USER_ERROR = 2
    INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class Prepared(Protocol):
    """A request that was checked, and all that is needed to meet it."""

    @property
    def folder(self) -> RunFolder:
        """The run folder, which nobody else writes to until it is closed."""
        ...


JobT = TypeVar("JobT", bound=Prepared)


def run_program(
    prepare: Callable[[], JobT],
    run: Callable[[JobT], ExitCode],
    after_interruption: Callable[[Path], str],
) -> ExitCode:
    """Check a request, meet it, and close its folder whatever happens.

    Args:
        prepare: Reads and checks the request. ``UserError`` and ``ValueError`` are shown to the
            user as one line.
        run: Does the work.
        after_interruption: Says what is left in the run folder if Ctrl-C stops the work at once.

    Returns:
        What ``run`` returns, or how it did not come to that.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        job = prepare()
    except (UserError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return ExitCode.USER_ERROR
    try:
        return run(job)
    except KeyboardInterrupt:
        print(after_interruption(job.folder.path), file=sys.stderr)
        return ExitCode.INTERRUPTED
    finally:
        job.folder.close()
