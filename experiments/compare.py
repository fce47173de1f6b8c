"""Compare curvature approximations with the exact one: ``python experiments/compare.py --help``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `experiments` is not installed. In place of its own folder, the script sees the repository.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from experiments.comparing.main import main

    sys.exit(main(sys.argv[1:]))
