"""The problems of the gallery as data: what is trained, and the best published figure."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.experiment import Experiment
from experiments.presets import PRESETS


@dataclass(frozen=True)
class Published:
    """The best figure that was published for a problem.

    Args:
        error: The error.
        network: The network, and its number of parameters.
        effort: Time and hardware, or steps.
        source: Where it is from.
    """

    error: float
    network: str
    effort: str
    source: str


@dataclass(frozen=True)
class Exhibit:
    """One problem of the gallery.

    Args:
        experiment: Problem and network; optimizers, budget and seeds are those of the gallery.
        error: The column of the metrics that the published figure is.
        published: The best published figure, if there is one of this problem.
        note: What a reader should know before comparing.
        axes: The two coordinates of the pictures; the others are at the middle of their range.
        component: The component of the unknown in the pictures.
    """

    experiment: Experiment
    error: str = "relative_error"
    published: Published | None = None
    note: str = ""
    axes: tuple[int, int] = (0, 1)
    component: int = 0


def _of_paper(name: str, published: Published, note: str = "") -> Exhibit:
    """Return a problem of arXiv 2405.15603, whose figures are not divided by the norm of u."""
    preset = PRESETS[name]
    shared = {k: v for k, v in preset.settings.items() if k.startswith(("problem.", "network."))}
    return Exhibit(
        Experiment(preset.problem, settings=shared),
        error="rmse",
        published=published,
        note=f"The error is not divided by the norm of u. {note}".strip(),
    )


_KFAC, _SPRING, _VRBA = "arXiv 2405.15603", "arXiv 2505.12149", "arXiv 2509.14198"

EXHIBITS: dict[str, Exhibit] = {
    "poisson2d": _of_paper(
        "poisson2d_9873",
        Published(7.9e-7, "2-64-64-48-48-1 (9,873)", "1000 s, RTX 6000, best of a sweep", _KFAC),
    ),
    "heat1d": _of_paper(
        "heat1d_257",
        Published(3.0e-8, "2-64-1 (257)", "1000 s, RTX 6000, best of a sweep", f"{_KFAC}, ENGD"),
    ),
    "poisson5d": _of_paper(
        "poisson5d_10065",
        Published(2.6e-7, "5-64-64-48-48-1 (10,065)", "7000 s, RTX 6000", f"{_SPRING}, SPRING"),
        "Published with new points in every step; here the points are fixed.",
    ),
    "heat4d": _of_paper(
        "heat4d_10065",
        Published(9.3e-6, "5-64-64-48-48-1 (10,065)", "3000 s, RTX 6000, best of a sweep", _KFAC),
        "Published with new points in every step; here the points are fixed.",
    ),
    "kovasznay": Exhibit(
        Experiment("kovasznay", settings={"network.widths": "(50, 50, 50, 50)"}),
        error="mean_error",
        published=Published(
            1.37e-6, "2-50-50-50-50-3 (7,953)", "720 s, RTX 4090", "Gauss-Newton with coarse CG"
        ),
        note="The mean of the relative errors of u, v and p, the pressures without their means.",
    ),
    "burgers": Exhibit(
        Experiment("burgers", settings={"network.widths": "(30, 30, 30)"}, resample_every=1),
        published=Published(8.3e-9, "3-30-30-30-1, periodic (2,011)", "not stated", _VRBA),
        note="Here the conditions at the ends of the interval are terms, and the network not "
        "periodic: 1,981 parameters.",
    ),
}
