"""The experiments of the paper, and ours, as data: ``--preset NAME``.

``published.json`` has the best run that was recorded for every optimizer in every experiment of
arXiv 2405.15603 with its settings, each the best of a sweep; names end with the number of
parameters, and with ``bayes`` where the sweep was Bayesian and drew the numbers of points, too.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.experiment import Experiment, from_json

_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())

PRESETS: dict[str, Experiment] = {
    # README's first command: three optimizers in about a minute
    "quick": Experiment(
        settings={"kfac_star.damping": "1.2e-10", "kfac_star.decay": "0.926", "adam.lr": "1.7e-3"},
        seconds=16.0,
    ),
    # the exact method with the damping that adapts, on nonlinear problems, from five seeds
    "adaptive": Experiment(
        problem="log_fokker_planck",
        optimizers=("levenberg_marquardt", "gauss_newton", "kfac_star"),
        settings={"problem.dim": "1", "network.widths": "(32, 32)"},
        seconds=60.0,
        seeds=(1, 2, 3, 4, 5),
    ),
    # weight sharing and damping of KFAC* side by side
    "kfac_ablation": Experiment(
        optimizers=("expand=kfac_star", "reduce=kfac_star", "trace_norm=kfac_star"),
        settings={
            **{f"{label}.damping": "1e-10" for label in ("expand", "reduce", "trace_norm")},
            "reduce.sharing": "reduce",
            "trace_norm.heuristic": "trace_norm",
        },
        seconds=60.0,
        seeds=(1, 2, 3),
    ),
    **{name: from_json(tree, f"published.json, {name}") for name, tree in _PUBLISHED.items()},
}
