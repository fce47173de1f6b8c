"""The experiments of the paper, and ours, as data."""

from __future__ import annotations

from experiments.experiment import Experiment

PRESETS: dict[str, Experiment] = {
    # README's first command: three optimizers in about a minute
    "quick": Experiment(
        settings={"kfac_star.damping": "1.2e-10", "kfac_star.decay": "0.926", "adam.lr": "1.7e-3"},
        seconds=16.0,
    ),
}
