"""The experiments of the paper, and ours, as data: ``--preset NAME``.

``published.json`` has the best run that was recorded for every optimizer in every experiment of
arXiv 2405.15603 with its settings, each the best of a sweep; names end with the number of
parameters, and with ``bayes`` where the sweep was Bayesian and drew the numbers of points, too.
Every one of them also has the methods that were published since, and ours, at the settings of
arXiv 2505.12149 or at their defaults. ``published.csv`` has the errors that were reported.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from experiments.ablations import ABLATIONS, experiment_of
from experiments.experiment import Experiment, from_json

_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())

# The optimizers of the paper, which has no run of some on some networks, and those after it.
_PAPERS = (
    *("kfac_star", "kfac", "engd", "engd_per_layer", "engd_diagonal", "hessian_free"),
    *("adam", "sgd", "lbfgs"),
)
_NEWER = (
    *("engd_w", "spring", "ekfac", "gauss_newton_cg", "levenberg_marquardt"),
    *("subspace_gauss_newton", "auto"),
)

# Damping, momentum and step size of SPRING that arXiv 2505.12149 found.
_SPRING = {
    "poisson5d_10065": ("6.8e-10", "0.827", "FixedStep(0.0635)"),
    "poisson10d_118145": ("1.7e-7", "0.905", "GridLineSearch()"),
    "poisson100d_1325057_bayes": ("3.0e-2", "0.984", "NormConstrained(0.092, 0.0316)"),
    "log_fokker_planck9d_118145": ("7.5e-2", "0.936", "GridLineSearch()"),
}


def _row(name: str) -> Experiment:
    """Return an experiment of the paper, with all optimizers."""
    paper = from_json(_PUBLISHED[name], f"published.json, {name}")
    missing = tuple(n for n in (*_PAPERS, *_NEWER) if n not in paper.optimizers)
    settings = dict(paper.settings)
    if name in _SPRING:
        values = zip(("damping", "momentum", "step_size"), _SPRING[name], strict=True)
        settings.update({f"spring.{argument}": text for argument, text in values})
    # the points of KFAC*, for as long, but for the two methods that were published with new ones
    points = {
        k: v
        for k, v in settings.items()
        if k.startswith(("kfac_star.problem.", "kfac_star.resample"))
    }
    for label in missing:
        own = {k.replace("kfac_star", label): text for k, text in points.items()}
        if paper.resample_every and label in ("engd_w", "spring"):
            own[f"{label}.resample_every"] = "1"
        settings.update(own)
    optimizers = (*paper.optimizers, *missing)
    return dataclasses.replace(paper, optimizers=optimizers, settings=settings)


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
    "ablations": experiment_of(*(a for a in ABLATIONS.values() if not a.problem)),
    **{f"ablation_{name}": experiment_of(ablation) for name, ablation in ABLATIONS.items()},
    **{name: _row(name) for name in _PUBLISHED},
}

# The experiments of the paper that have a table of their own, in its order.
ROWS = (
    *("poisson2d_257", "poisson2d_9873", "poisson2d_116097"),
    *("poisson5d_449", "poisson5d_10065", "poisson5d_116865"),
    *("poisson10d_118145", "poisson100d_1325057_bayes"),
    *("heat1d_257", "heat1d_9873", "heat1d_116097"),
    *("heat4d_449", "heat4d_10065", "heat4d_116865"),
    "log_fokker_planck9d_118145",
)
