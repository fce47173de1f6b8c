"""Names stand for the optimizers that they say."""

from collections.abc import Callable

import pytest
from torch import nn
from torch.nn import Parameter

from experiments.training import memory
from experiments.training.errors import UserError
from experiments.training.optimizers import KFACSettings, Presets
from pinncurv import presets
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer, Intervals, from_zero

PARTS = ("curvature", "inverse", "step_size", "average", "momentum", "damping", "intervals")


def parameters() -> list[Parameter]:
    return list(nn.Linear(2, 1).parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kfac", presets.kfac(parameters())),
        ("kfac-star", presets.kfac_star(parameters(), damping=1.2e-10, decay=0.926)),
        ("gauss-newton", presets.gauss_newton(parameters())),
        ("engd", presets.engd(parameters())),
        ("engd-per-layer", presets.engd_per_layer(parameters())),
        ("engd-diagonal", presets.engd_diagonal(parameters())),
    ],
)
def test_the_names_stand_for_the_presets_of_the_library(
    name: str, expected: CurvatureOptimizer
) -> None:
    built = Presets().preset(name).build(parameters())
    for part in PARTS:
        assert getattr(built, part) == getattr(expected, part), part


def test_every_setting_reaches_the_optimizer() -> None:
    settings = KFACSettings(
        damping=0.25,
        decay=0.5,
        start="zero",
        step_size="fixed",
        momentum=0.75,
        curvature_every=2,
        inverse_every=3,
        max_halvings=4,
        lr=0.125,
        inverse="exact",
    )
    built = settings.build(parameters())
    assert isinstance(built, CurvatureOptimizer)
    assert built.inverse == Damped(0.25)
    assert built.average is not None
    assert (built.average.decay, built.average.start) == (0.5, from_zero)
    assert built.momentum is not None
    assert built.momentum.momentum == 0.75
    assert built.intervals == Intervals(2, 3)
    assert built.max_halvings == 4
    assert built.param_groups[0]["lr"] == 0.125


def test_a_matrix_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small: Callable[[object], int] = lambda device: 100  # noqa: E731
    monkeypatch.setattr(memory, "_memory", small)
    with pytest.raises(UserError, match="full Gauss-Newton matrix of 3 parameters"):
        Presets().gauss_newton.build(parameters())
    Presets().engd_per_layer.build(parameters())
