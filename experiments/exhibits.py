"""The problems of the gallery as data: what is trained, and the best published figure."""

from __future__ import annotations

import math
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


def _tanh(
    problem: str,
    width: int,
    depth: int,
    periods: tuple[float | None, ...] = (),
    modes: int = 1,
    resample_every: int = 0,
    windows: tuple[float, ...] = (),
    candidates: int = 1,
    frequency: float | None = None,
    **of_problem: str,
) -> Experiment:
    """Return a problem with a tanh network, of sines and cosines if there are periods.

    With a frequency the network is one of sines.
    """
    settings = {"network.widths": str((width,) * depth)}
    if frequency:
        settings |= {"network.activation": "sin", "network.frequency": str(frequency)}
    if periods:
        settings |= {"network.periods": str(periods), "network.modes": str(modes)}
    settings |= {f"problem.{name}": text for name, text in of_problem.items()}
    network = "periodic_mlp" if periods else "mlp"
    return Experiment(
        problem,
        network,
        settings=settings,
        resample_every=resample_every,
        candidates=candidates,
        windows=windows,
    )


_KFAC, _SPRING, _VRBA, _DSGNAR = (
    f"arXiv {number}" for number in ("2405.15603", "2505.12149", "2509.14198", "2607.02194")
)
_GAUSS_NEWTON = "Revisiting Gauss-Newton natural gradient, 2026"
_MEAN = "The error is the mean of the relative errors of"
_PICTURE = "The pictures are of a."
_THIRD = "quoted by a third party"
_TURN = 2 * math.pi

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
        _tanh("kovasznay", 50, 4),
        error="mean_error",
        published=Published(1.37e-6, "2-50-50-50-50-3 (7,953)", "720 s, RTX 4090", _GAUSS_NEWTON),
        note=f"{_MEAN} u, v and p, the pressures without their means.",
    ),
    "beltrami": Exhibit(
        _tanh("beltrami", 50, 4),
        error="mean_error",
        published=Published(2.7e-5, "4-50-50-50-50-4 (8,104)", "720 s, RTX 4090", _GAUSS_NEWTON),
        note=f"{_MEAN} u, v, w and p. The published run prescribes all of them at the end, too.",
        axes=(1, 2),
    ),
    "cavity": Exhibit(
        _tanh("cavity", 50, 4),
        error="mean_error",
        published=Published(1.13e-4, "2-60-60-60-60-3, sine (9,219)", "403 s, H100", _DSGNAR),
        note=f"{_MEAN} u, v and p. The network here is of tanh, with 7,953 parameters.",
    ),
    "helmholtz": Exhibit(
        _tanh("helmholtz", 30, 4, (2.0, 2.0), 1, 1, n_interior="2000", n_boundary="0"),
        published=Published(2.0e-9, "4-30-30-30-30-1, periodic (2,971)", "540 s", _THIRD),
    ),
    "wave1d": Exhibit(
        _tanh("wave1d", 40, 3, resample_every=1, frequency=8.0, weight="1000"),
        published=Published(
            1.2e-15, "2-60-60-60-60-1, sine, two time windows", "635 s, H100", _DSGNAR
        ),
        note="Here one network for all times, of sines.",
    ),
    "poisson2d_multiscale": Exhibit(
        _tanh("poisson2d_multiscale", 60, 4, (2.0, 2.0), modes=4),
        published=Published(
            4.5e-14, "60-60-60-60, sine, Fourier features (11,825)", "281 s, H100", _DSGNAR
        ),
        note="Here sines and cosines of π to 4π are the first layer.",
    ),
    "burgers": Exhibit(
        _tanh(
            *("burgers", 30, 3, (None, 2.0), 1, 1),
            candidates=5,
            n_interior="1200",
            n_initial="100",
            n_boundary="50",
            initial_weight="100",
        ),
        published=Published(8.3e-9, "3-30-30-30-1, periodic (2,011)", "not stated", _VRBA),
        note="New points in every step, one of five by its residual: on 2,000 points that stay, "
        "loss and error part.",
    ),
    "allen_cahn": Exhibit(
        _tanh(
            *("allen_cahn", 30, 3, (None, 2.0), 1, 1),
            candidates=5,
            n_interior="1500",
            initial_weight="100",
        ),
        published=Published(1.9e-6, "3-30-30-30-1, periodic (2,011)", "not stated", _VRBA),
        note="New points in every step, one of five by its residual.",
    ),
    "kdv": Exhibit(
        _tanh(
            *("kdv", 30, 4, (None, 2.0), 10, 1),
            windows=(0.0, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0),
            initial_weight="1000",
        ),
        published=Published(
            8.2e-11, "60-60-60-60, sine, four time windows", "1210 s, H100", _DSGNAR
        ),
        note="Here six time windows, each with a network of 3,481 parameters.",
    ),
    "kdv_two_solitons": Exhibit(
        _tanh(
            *("kdv_two_solitons", 30, 3, (None, 40.0), 8, 1),
            windows=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
            n_interior="2000",
            n_initial="500",
            initial_weight="100",
        ),
        note="Five time windows, each with a network of 2,431 parameters, of sines and cosines on "
        "twice the interval.",
    ),
    "kuramoto_sivashinsky": Exhibit(
        _tanh(
            *("kuramoto_sivashinsky", 30, 4, (None, _TURN), 5, 1),
            candidates=5,
            n_interior="2000",
            initial_weight="1000",
        ),
        published=Published(
            5.1e-7, "70-70-70-70, eight time windows (15,265)", "5227 s, H100", _DSGNAR
        ),
        note="Here one network for all times.",
    ),
    "nls": Exhibit(
        _tanh(
            *("nls", 30, 3, (None, 30.0), 5, 1),
            windows=(0.0, 0.4, 0.8, 1.2, math.pi / 2),
            n_interior="2000",
            n_boundary="0",
            n_initial="1000",
            initial_weight="10",
        ),
        note="Four time windows, each with a network of 2,282 parameters. Less than 1000 points at "
        "their start miss the peak, which is narrow.",
    ),
    "convection": Exhibit(
        _tanh("convection", 30, 3, (None, _TURN), resample_every=1, n_boundary="0"),
        note="New points in every step: on 600 points that stay, loss and error part.",
    ),
    "reaction": Exhibit(_tanh("reaction", 30, 3)),
    "black_scholes": Exhibit(_tanh("black_scholes", 30, 3)),
    "biharmonic_plate": Exhibit(_tanh("biharmonic_plate", 30, 3)),
    "poisson_disk": Exhibit(_tanh("poisson_disk", 30, 3)),
    "poisson_disk_ritz": Exhibit(
        _tanh("poisson_disk_ritz", 20, 2),
        note="The problem of poisson_disk as the minimum of an energy, which ends where the "
        "energy's digits do. The network has 501 parameters for 1,152 nodes.",
    ),
    "poisson_l_shape": Exhibit(_tanh("poisson_l_shape", 30, 3)),
    "heat_coefficient": Exhibit(
        _tanh("heat_coefficient", 30, 3),
        error="mean_error",
        published=Published(5.26e-2, "PINNacle's", "not stated", _THIRD),
        note=f"{_MEAN} u and a; the published one is of a field that is not stated. {_PICTURE}",
        axes=(1, 2),
        component=1,
    ),
    "poisson_coefficient": Exhibit(
        _tanh("poisson_coefficient", 30, 3),
        error="mean_error",
        published=Published(2.45e-2, "PINNacle's", "not stated", _THIRD),
        note=f"{_MEAN} u and a; the published one is of a field that is not stated, and of a "
        f"source that does not fit. {_PICTURE}",
        component=1,
    ),
    "poisson_source": Exhibit(_tanh("poisson_source", 30, 3)),
}
