"""The costs that the docstrings state, against counted multiplications.

What counts are matrix products; elementwise operations and LAPACK are not seen. A network without
bias makes the formulas exact.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    ChannelKronecker,
    DiagonalGaussNewton,
    GaussNewton,
    MatrixFreeGaussNewton,
    Nystroem,
    OptimalKronecker,
    PartialTraces,
    SubspaceGaussNewton,
    Woodbury,
    expand,
    reduce,
)
from pinncurv.linearization import linearize
from pinncurv.linops import Damped, FactorDamping
from tests.networks import points
from tests.terms import TERMS

N, S, V, R = 50, 4, 4, 200
DIMS = ((2, 24), (24, 16), (16, 8), (8, 2))
D = sum(d_in * d_out for d_in, d_out in DIMS)
RANK = 5
JACOBIAN = N * S * V * D


def over_layers(cost) -> float:
    return sum(cost(d_in, d_out) for d_in, d_out in DIMS)


def symmetric(d: int) -> int:
    """Entries of a symmetric matrix that are computed: four panels, or of at most 128 columns."""
    step = d if d < 128 else min(-(-d // 4), 128)
    return sum(min(step, d - start) * min(d, start + step) for start in range(0, d, step))


FACTORS = over_layers(lambda d_in, d_out: N * S * (d_in**2 + V * d_out**2))
CHANNELS = over_layers(lambda d_in, d_out: N * S**2 * (d_in + V * d_out))
KRONECKER = over_layers(lambda d_in, d_out: d_in * d_out * (d_in + d_out))


def _flops_in_place(total, left, right, **options) -> int:
    return mm_flop(left, right)


def multiplications(work) -> float:
    mapping = {torch.ops.aten.addmm_: _flops_in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops() / 2


@pytest.fixture(scope="module")
def linearizations():
    layers = [(nn.Linear(*dims, bias=False).double(), nn.Tanh()) for dims in DIMS]
    model = nn.Sequential(*itertools.chain(*layers))[:-1]
    made = linearize(TERMS["vector"], model, points(N))
    layer = made.blocks["0.weight"]
    assert (*layer.Z.shape[:2], layer.G.shape[0]) == (S, N, V)
    return [made]


BUILD = {
    "dense": (GaussNewton(), JACOBIAN + R * symmetric(D)),
    "blocks": (
        BlockDiagonalGaussNewton(),
        JACOBIAN + over_layers(lambda d_in, d_out: R * symmetric(d_in * d_out)),
    ),
    "diagonal": (DiagonalGaussNewton(), JACOBIAN),
    "expand": (KFAC(), FACTORS),
    "reduce": (KFAC(reduce), FACTORS / S),
    "channels": (ChannelKronecker(pairs=False), FACTORS),
    "channel-pairs": (ChannelKronecker(), FACTORS * (S + 1) / 2),
    "traces": (
        lambda made: PartialTraces().factors(made, expand, None),
        FACTORS + 2 * CHANNELS,
    ),
    "optimal": (
        OptimalKronecker(iterations=3, tolerance=0.0),
        FACTORS + 3 * 2 * (FACTORS + CHANNELS),
    ),
}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.filterwarnings("ignore::pinncurv.curvature.KroneckerNotConverged")
def test_build(name, linearizations):
    recipe, expected = BUILD[name]
    received = multiplications(lambda: recipe(linearizations))
    assert received == pytest.approx(expected, rel=1e-12)


EXACT = MatrixFreeGaussNewton()
PRODUCT = {
    "exact": (EXACT, None, 2 * JACOBIAN),
    "kfac": (KFAC(), None, KRONECKER),
    "channel-pairs": (ChannelKronecker(), None, S**2 * KRONECKER),
    "factor-damping": (KFAC(), FactorDamping(1e-3), 2 * KRONECKER),
    "damped": (KFAC(), Damped(1e-3), 2 * KRONECKER),
    "woodbury": (EXACT, Woodbury(1e-3), 4 * JACOBIAN),
    "woodbury-plain": (EXACT, Woodbury(1e-3, refine=False), 2 * JACOBIAN),
    "nystroem": (EXACT, Nystroem(1e-3, RANK), 2 * JACOBIAN + 2 * R * RANK),
}


@pytest.mark.parametrize("name", PRODUCT)
@pytest.mark.parametrize("columns", [1, 3])
def test_product(name, columns, linearizations):
    recipe, inverse, expected = PRODUCT[name]
    operator = recipe(linearizations)
    operator = operator if inverse is None else inverse(operator)
    X = torch.ones(D, columns, dtype=torch.float64)
    received = multiplications(lambda: operator @ X)
    assert received == pytest.approx(columns * expected, rel=1e-12)


def test_sketch(linearizations):
    received = multiplications(lambda: Nystroem(1e-3, RANK)(EXACT(linearizations)))
    sketching = 2 * R * RANK**2  # ΩᵀKΩ and ΩC⁻¹V
    assert received == pytest.approx(RANK * 2 * JACOBIAN + sketching, rel=1e-12)


def test_subspace(linearizations):
    operator = SubspaceGaussNewton(RANK)(linearizations)
    m, k = operator.basis.shape
    received = multiplications(lambda: operator @ torch.ones(D, dtype=torch.float64))
    assert received == 2 * m * S * D + 2 * m * k
