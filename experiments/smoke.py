"""Run every preset for two steps on few points, to see that it runs: ``tox run -e experiments``."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.command import ExitCode, main_of
from experiments.presets import PRESETS
from experiments.train import main as train


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the presets that are named, or all."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments or PRESETS:
            start = time.monotonic()
            options = ["--preset", name, "--smoke", "--run-folder", str(Path(folder) / name)]
            code = train(options)
            if code == ExitCode.INTERRUPTED:
                return code
            if code != ExitCode.SUCCESS:
                failed.append(name)
            print(f"{name}: {time.monotonic() - start:.1f} s\n", flush=True)
    print(f"{len(arguments or PRESETS)} presets, failed: {', '.join(failed) or 'none'}")
    return ExitCode.FAILURE if failed else ExitCode.SUCCESS


if __name__ == "__main__":
    main_of(main)
