"""Disks and polygons: points by area and by length, normals by geometry, refused shapes."""

import math

import pytest
import torch
from torch import Generator, Tensor

from pinncurv.problems import Disk, Drawn, Polygon

DISK = Disk((1.0, -2.0), 0.5)
L_SHAPE = Polygon.l_shape()
ARROW = Polygon([(0, 0), (3, 0), (1, 1), (0, 4)][::-1])  # not convex, clockwise
N = 20_000


def _draw(sampler: Drawn) -> Tensor:
    return sampler.sample(Generator().manual_seed(0), torch.float64, "cpu")


def _within_errors(samples: Tensor, expected: float) -> bool:
    error = samples.std() / math.sqrt(len(samples))
    return bool((samples.mean() - expected).abs() < 4 * error)


def test_disk_is_filled_uniformly() -> None:
    """The squared distance from the center is uniform, and so is the angle."""
    offset = (_draw(DISK.interior(N)) - torch.tensor(DISK.center).double()) / DISK.radius
    squared = offset.square().sum(1)
    assert squared.max() <= 1
    assert _within_errors(squared, 1 / 2)
    assert _within_errors(squared**2, 1 / 3)
    for part in (offset[:, 0], offset[:, 1], offset.prod(1), offset[:, 0] ** 2 - offset[:, 1] ** 2):
        assert _within_errors(part, 0)


def test_circle_and_its_normals() -> None:
    """Points at distance r in uniform directions, which are the normals."""
    x = _draw(DISK.boundary(N))
    normal = DISK.normal(x)
    torch.testing.assert_close(x, torch.tensor(DISK.center).double() + 0.5 * normal)
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(N).double())
    for k in (1, 2, 3):
        angle = k * torch.atan2(normal[:, 1], normal[:, 0])
        assert _within_errors(angle.cos(), 0)
        assert _within_errors(angle.sin(), 0)


def test_polygons_are_filled_uniformly() -> None:
    """No point in the missing quarter, equally many in the other three; moments of the arrow."""
    x = _draw(L_SHAPE.interior(N))
    assert x.abs().max() <= 1
    right, upper = x[:, 0] > 0, x[:, 1] > 0
    assert not (right & ~upper).any()
    for quarter in (right & upper, ~right & upper, ~right & ~upper):
        assert _within_errors(quarter.double(), 1 / 3)
    # two triangles with a corner at the origin, of areas 3/2 and 2
    x = _draw(ARROW.interior(N))
    assert _within_errors(x[:, 0], (1.5 * (0 + 3 + 1) / 3 + 2 * (0 + 1 + 0) / 3) / 3.5)
    assert _within_errors(x[:, 1], (1.5 * (0 + 0 + 1) / 3 + 2 * (0 + 1 + 4) / 3) / 3.5)


def test_edges_are_drawn_by_length() -> None:
    """Only those that are asked for."""
    x = _draw(L_SHAPE.boundary(N, edges=(1, 3)))  # from the corner to the right, and the top
    low = x[:, 1] == 0
    assert (low | (x[:, 1] == 1)).all()
    assert _within_errors(low.double(), 1 / 3)
    assert _within_errors(x[low, 0], 1 / 2)
    assert _within_errors(x[~low, 0], 0)
    assert L_SHAPE.boundary(3).n == 3


@pytest.mark.parametrize("polygon", [L_SHAPE, ARROW])
def test_normals_of_polygons_point_out_of_their_edges(polygon: Polygon) -> None:
    """A small step along the normal leaves the polygon, one back does not."""
    x = _draw(polygon.boundary(500))
    normal = polygon.normal(x)
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(500).double())
    assert not polygon.contains(x + 1e-6 * normal).any()
    assert polygon.contains(x - 1e-6 * normal).all()
    single = polygon.normal(x.float())
    torch.testing.assert_close(single, normal.float())


@pytest.mark.parametrize(
    ("vertices", "match"),
    [
        ([(0, 0), (1, 0)], r"three vertices of two finite numbers each, got \(\(0.0, 0.0\), "),
        ([(0, 0), (1, 0), (0, math.nan)], "two finite numbers each, got"),
        ([(0, 0), (1, 0), (0, 1, 2)], "two finite numbers each, got"),
        ([(0, 0), (1, 1), (1, 0), (0, 1)], r"got edge 0, .* and edge 2, .* Order the vertices"),
        ([(0, 0), (1, 0), (1, 0), (0, 1)], "got edge 0, .* Order the vertices"),
        ([(0, 0), (2, 0), (1, 0), (0, 1)], "got edge 0, .* and edge 1"),
        ([(0, 0), (1, 0), (2, 0)], r"got edge \d, .* and edge 2"),
        ([(0, 0), (2, 0), (2, 2), (1, 0), (0, 2)], "got edge 0, .* and edge 2"),
    ],
)
def test_bad_polygons(vertices: list[tuple[float, ...]], match: str) -> None:
    """Edges neither cross, nor touch, nor go back, nor have length zero."""
    with pytest.raises(ValueError, match=match):
        Polygon(vertices)


def test_bad_edges_and_disks() -> None:
    """What does not exist is refused."""
    with pytest.raises(ValueError, match=r"from 0 to 5, at least one, got \(6,\). Edge i"):
        L_SHAPE.boundary(3, edges=(6,))
    with pytest.raises(ValueError, match=r"at least one, got \(\)"):
        L_SHAPE.boundary(3, edges=())
    with pytest.raises(ValueError, match=r"must be two finite numbers, got \(0.0,\)"):
        Disk((0,))
    with pytest.raises(ValueError, match=r"positive, finite number, got -1"):
        Disk(radius=-1.0)
