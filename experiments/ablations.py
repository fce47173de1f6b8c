"""Ablations of KFAC* as data: the default, and what each variant changes of it.

``--preset ablation_NAME`` trains the default and the variants of one question, ``--preset
ablations`` those of all that are asked on the same network, beside a single default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.experiment import Experiment

DEFAULT = "default"

# KFAC* on the middle network, with the damping and decay that the paper found for it.
_PROBLEM = {
    "problem.n_interior": "900",
    "problem.n_boundary": "120",
    "network.widths": "(64, 64, 48, 48)",
}
_DAMPING, _DECAY = "2.989e-13", "0.6258"
_KFAC_STAR = {
    "curvature": "KFAC()",
    "inverse": f"FactorDamping({_DAMPING})",
    "average": f"ExponentialAverage({_DECAY}, from_identity)",
    "step_size": "QuadraticModel()",
}
_SECONDS = 30.0
_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Ablation:
    """One question about KFAC*, and the variants that answer it.

    Args:
        question: What is asked.
        variants: By label, the arguments of ``CurvatureOptimizer``, or fields of a run, that differ
            from the default.
        optimizers: By label, what is run in place of ``curvature_optimizer``.
        problem: Settings of problem and network of this question alone.
    """

    question: str
    variants: Mapping[str, Mapping[str, str]]
    optimizers: Mapping[str, str] = field(default_factory=dict)
    problem: Mapping[str, str] = field(default_factory=dict)


def experiment_of(*ablations: Ablation) -> Experiment:
    """Return the default and the variants of some ablations, side by side."""
    settings, optimizers = dict(_PROBLEM), {DEFAULT: "curvature_optimizer"}
    settings.update({f"{DEFAULT}.{argument}": text for argument, text in _KFAC_STAR.items()})
    for ablation in ablations:
        settings.update(ablation.problem)
        for label, changes in ablation.variants.items():
            optimizers[label] = ablation.optimizers.get(label, "curvature_optimizer")
            own = {} if label in ablation.optimizers else _KFAC_STAR
            settings.update({f"{label}.{k}": text for k, text in {**own, **changes}.items()})
    return Experiment(
        problem="poisson2d",
        optimizers=tuple(f"{label}={name}" for label, name in optimizers.items()),
        settings=settings,
        seconds=_SECONDS,
        seeds=_SEEDS,
    )


_ON_CHANNELS = {"damping": _DAMPING, "decay": _DECAY}

ABLATIONS: dict[str, Ablation] = {
    "sharing": Ablation(
        "How do the channels enter the factors?", {"reduce": {"curvature": "KFAC(reduce)"}}
    ),
    "fisher": Ablation(
        "Which output gradients make the factors B?",
        {
            "empirical": {"curvature": "KFAC(fisher=Empirical())"},
            "forward_only": {"curvature": "KFAC(fisher=ForwardOnly())"},
        },
    ),
    "damping": Ablation(
        "How does λ enter the inverse?",
        {
            "trace_norm": {"inverse": f"FactorDamping({_DAMPING}, trace_norm)"},
            # with one product for both terms there is a closed form, with two there is none
            "exact_merged": {
                "curvature": "KFAC(merge_terms=True)",
                "inverse": f"Damped({_DAMPING})",
            },
            "exact_merged_larger": {
                "curvature": "KFAC(merge_terms=True)",
                "inverse": "Damped(1e-6)",
            },
            "exact_iterative": {"inverse": "Damped(1e-6)"},
        },
    ),
    "average": Ablation(
        "What does the moving average of the factors bring, and what may it start from?",
        {
            "no_average": {"average": "None"},
            "longer": {"average": "ExponentialAverage(0.95, from_identity)"},
            "longest": {"average": "ExponentialAverage(0.99, from_identity)"},
            "from_zero": {"average": f"ExponentialAverage({_DECAY})"},
            "from_first": {"average": f"ExponentialAverage({_DECAY}, from_first)"},
        },
    ),
    "intervals": Ablation(
        "How often must factors and inverses be made anew?",
        {
            "inverse_10": {"intervals": "Intervals(1, 10)"},
            "both_10": {"intervals": "Intervals(10, 10)"},
            "both_100": {"intervals": "Intervals(100, 100)"},
        },
    ),
    "terms": Ablation(
        "Do the terms of the loss need factors of their own?",
        {"merged": {"curvature": "KFAC(merge_terms=True)"}},
    ),
    "resampling": Ablation(
        "How often should points be drawn anew?",
        {f"every_{k}": {"resample_every": str(k)} for k in (1, 10, 100)},
    ),
    "precision": Ablation(
        "Do the factors need double precision?", {"single": {"curvature": "KFAC(single=True)"}}
    ),
    "step": Ablation(
        "What chooses the length of the step?",
        {
            "line_search": {"step_size": "GridLineSearch()"},
            "no_momentum": {"step_size": "QuadraticModel(False)"},
            # as published: an update is taken even if it raises the loss
            "not_monotone": {"monotone": "False"},
            "levenberg_marquardt": {"damping_rule": "LevenbergMarquardt()"},
        },
    ),
    "pairs": Ablation(
        "What is lost by one Kronecker product for all channels?",
        {
            "channels": {"curvature": "ChannelKronecker(pairs=False)", "inverse": "Damped(1e-4)"},
            "channel_pairs": {"curvature": "ChannelKronecker()", "inverse": "Damped(1e-4)"},
            "one_product": {"inverse": "Damped(1e-4)"},
            "exact": {"curvature": "GaussNewton()", "inverse": "Damped(1e-4)"},
        },
        # a sum over channels has no closed inverse, and a network of 9,873 parameters few steps
        problem={"network.widths": "(64,)"},
    ),
    "channels": Ablation(
        "Do collapsed derivatives and merged directions matter?",
        {"uncollapsed": _ON_CHANNELS, "unmerged": _ON_CHANNELS},
        {
            "uncollapsed": "paper/channels.py:kfac_star_uncollapsed",
            "unmerged": "paper/channels.py:kfac_star_unmerged",
        },
    ),
}
