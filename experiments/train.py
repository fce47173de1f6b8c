"""Train a network on a PDE: ``python experiments/train.py --help``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `experiments` is not installed. In place of its own folder, the script sees the repository.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from experiments.training.main import main

    sys.exit(main(sys.argv[1:]))
