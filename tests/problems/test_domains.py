"""Samplers of boxes: where the points are, how often, and from which randomness."""

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from pinncurv.problems import (
    Box,
    Disk,
    Fixed,
    Polygon,
    Product,
    Sampler,
    SpaceTimeBox,
    Union,
)

BOX = Box((0.0, -1.0, 2.0), (1.0, 3.0, 2.5))
TIME_BOX = SpaceTimeBox(Box((-1.0, 2.0), (1.0, 5.0)), start=0.5, end=2.0)
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "interior": BOX.interior,
    "faces": BOX.faces,
    "space-time interior": TIME_BOX.interior,
    "lateral": TIME_BOX.lateral,
    "initial": TIME_BOX.initial,
    "lateral and initial": TIME_BOX.lateral_and_initial,
    "disk": Disk((1.0, -2.0), 0.5).interior,
    "circle": Disk((1.0, -2.0), 0.5).boundary,
    "polygon": Polygon.l_shape().interior,
    "edges": Polygon.l_shape().boundary,
    "fixed": lambda n: Fixed(torch.linspace(0, 1, 2 * n).reshape(n, 2)),
}


def _draw(sampler: Sampler, seed: int = 0) -> Tensor:
    return sampler.sample(Generator().manual_seed(seed), torch.float64, "cpu")


def _within(x: Tensor, box: Box) -> bool:
    lower, upper = x.new_tensor(box.lower), x.new_tensor(box.upper)
    return bool(((x >= lower) & (x <= upper)).all())


@pytest.mark.parametrize("name", SAMPLERS)
def test_shape_and_seed(name: str) -> None:
    """A sampler declares n and dim; one seed gives the same points in every dtype."""
    sampler = SAMPLERS[name](7)
    assert isinstance(sampler, Sampler)
    x = _draw(sampler)
    assert x.shape == (sampler.n, sampler.dim) == (7, sampler.dim)
    assert torch.equal(x, _draw(sampler))
    assert torch.equal(x, _draw(pickle.loads(pickle.dumps(sampler))))
    single = sampler.sample(Generator().manual_seed(0), torch.float32, "cpu")
    assert torch.equal(single, x.float())
    if name != "fixed":
        assert not torch.equal(x, _draw(sampler, seed=1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_global_randomness(name: str) -> None:
    """Sampling neither uses nor advances the global generator."""
    before = torch.get_rng_state()
    _draw(SAMPLERS[name](7))
    assert torch.equal(torch.get_rng_state(), before)


def test_interior_is_uniform() -> None:
    """Mean and variance of every coordinate are those of the uniform distribution."""
    n = 20_000
    x = _draw(BOX.interior(n))
    assert _within(x, BOX)
    lower, upper = x.new_tensor(BOX.lower), x.new_tensor(BOX.upper)
    length = upper - lower
    error = (x.mean(0) - (lower + upper) / 2) / (length / math.sqrt(12 * n))
    assert (error.abs() < 4).all()
    # The variance of a squared deviation from the mean is length^4 / 180.
    error = (x.var(0) - length**2 / 12) / (length**2 / math.sqrt(180 * n))
    assert (error.abs() < 4).all()


def _face_counts(x: Tensor, box: Box) -> Tensor:
    lower, upper = x.new_tensor(box.lower), x.new_tensor(box.upper)
    on_face = torch.stack([x == lower, x == upper])
    assert (on_face.sum((0, 2)) == 1).all()
    return on_face.sum(1)


def test_faces_are_drawn_by_area() -> None:
    """Every point is on exactly one face, and a face's share is its share of the surface."""
    n = 20_000
    x = _draw(BOX.faces(n))
    assert _within(x, BOX)
    counts = _face_counts(x, BOX)
    areas = torch.tensor([4 * 0.5, 1 * 0.5, 1 * 4], dtype=torch.float64)
    share = areas / (2 * areas.sum())
    error = (counts - n * share) / (n * share * (1 - share)).sqrt()
    assert (error.abs() < 4).all()
    inner = x[x[:, 2] == BOX.upper[2]][:, :2]
    centre = inner.new_tensor([0.5, 1.0])
    length = inner.new_tensor([1.0, 4.0])
    assert ((inner.mean(0) - centre).abs() < 4 * length / math.sqrt(12 * len(inner))).all()


def test_faces_of_the_unit_cube_are_equally_likely() -> None:
    """All 2d faces of a cube have the same share; in one dimension they are its two ends."""
    n = 10_000
    for dim in (1, 5):
        counts = _face_counts(_draw(Box.unit(dim).faces(n)), Box.unit(dim)).double()
        share = 1 / (2 * dim)
        assert ((counts - n * share).abs() < 4 * math.sqrt(n * share * (1 - share))).all()


def test_space_time() -> None:
    """Time is the first coordinate; faces are spatial ones; the start is exact."""
    x = _draw(TIME_BOX.interior(500))
    assert _within(x, TIME_BOX.box)
    assert TIME_BOX.dim == TIME_BOX.box.dim == 3
    lateral = _draw(TIME_BOX.lateral(500))
    _face_counts(lateral[:, 1:], TIME_BOX.space)
    assert _within(lateral, TIME_BOX.box)
    assert lateral[:, 0].min() < 0.6
    assert lateral[:, 0].max() > 1.9
    initial = _draw(TIME_BOX.initial(500))
    assert (initial[:, 0] == 0.5).all()
    assert _within(initial[:, 1:], TIME_BOX.space)
    assert initial[:, 1].std() > 0.4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normals_of_boxes_point_out_of_their_faces(dtype: torch.dtype) -> None:
    """A small step along the normal leaves the box, one back does not; only one entry is not 0."""
    for domain, sampler in ((BOX, BOX.faces(200)), (TIME_BOX, TIME_BOX.lateral(200))):
        x = sampler.sample(Generator().manual_seed(0), dtype, "cpu")
        normal = domain.normal(x)
        assert normal.dtype == dtype
        assert torch.equal(normal.abs().sort(1).values[:, :-1], torch.zeros_like(x[:, 1:]))
        assert (normal.norm(dim=1) == 1).all()
        box = BOX if domain is BOX else TIME_BOX.box
        lower, upper = x.new_tensor(box.lower), x.new_tensor(box.upper)
        outside, inside = x + 1e-3 * normal, x - 1e-3 * normal
        assert ((outside < lower) | (outside > upper)).any(1).all()
        assert ((inside >= lower) & (inside <= upper)).all()
    assert (TIME_BOX.normal(x)[:, 0] == 0).all()


@pytest.mark.parametrize(("n", "n_lateral"), [(2, 1), (120, 60), (7, 3)])
def test_lateral_and_initial_share_the_points(n: int, n_lateral: int) -> None:
    """Half and half; an odd point is at the start."""
    sampler = TIME_BOX.lateral_and_initial(n)
    x = _draw(sampler)
    assert sampler.n == len(x) == n
    _face_counts(x[:n_lateral, 1:], TIME_BOX.space)
    assert (x[n_lateral:, 0] == 0.5).all()
    assert (x[:n_lateral, 0] != 0.5).all()


def test_defaults() -> None:
    """Unit boxes and cubes; bounds become tuples of floats; equal boxes are equal."""
    assert Box.unit(2) == Box([0, 0], [1, 1]) == Box.cube(2, 0, 1)
    assert hash(Box.unit(2)) == hash(Box([0, 0], [1, 1]))
    assert SpaceTimeBox.unit(2).box == Box.unit(3)
    assert Box.unit(2).interior(3) == Box.unit(2).interior(3)


def test_fixed_points_are_copied_on_sampling() -> None:
    """Writing to a sample leaves the user's points alone."""
    points = torch.arange(6.0).reshape(3, 2)
    sampler = Fixed(points)
    x = sampler.sample(Generator(), torch.float32, "cpu")
    assert torch.equal(x, points)
    x.zero_()
    assert points[2, 1] == 5


def test_composition() -> None:
    """Products join coordinates, unions join points, each in order."""
    first, second = Fixed(torch.tensor([[1.0], [2.0]])), Fixed(torch.tensor([[3.0], [4.0]]))
    assert _draw(Product((first, second))).tolist() == [[1, 3], [2, 4]]
    assert _draw(Union((first, second))).tolist() == [[1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("lower", "upper", "match"),
    [
        ((), (), "at least one dimension, got 0 lower and 0 upper"),
        ((0.0,), (1.0, 1.0), "got 1 lower and 2 upper bounds. Pass two"),
        ((0.0, 2.0), (1.0, 2.0), r"got lower\[1\]=2.0, upper\[1\]=2.0. Swap"),
        ((0.0,), (math.inf,), "must be finite, got"),
        ((math.nan,), (1.0,), "must be finite, got"),
    ],
)
def test_bad_bounds(lower: tuple[float, ...], upper: tuple[float, ...], match: str) -> None:
    """Bounds must be finite and ordered."""
    with pytest.raises(ValueError, match=match):
        Box(lower, upper)


@pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf)])
def test_bad_times(start: float, end: float) -> None:
    """Times must be finite and ordered."""
    with pytest.raises(ValueError, match=r"start before end, got start=.* Pass a finite"):
        SpaceTimeBox(Box.unit(1), start, end)


@pytest.mark.parametrize("n", [0, -3])
@pytest.mark.parametrize(
    "name", ["interior", "faces", "space-time interior", "lateral", "disk", "edges"]
)
def test_bad_counts(name: str, n: int) -> None:
    """There must be a point."""
    with pytest.raises(ValueError, match=f"an int of at least 1, got n={n}. Raise n"):
        SAMPLERS[name](n)


def test_lateral_and_initial_need_two_points() -> None:
    """One point cannot be of two kinds."""
    with pytest.raises(ValueError, match="must be at least 2, one of each kind, got n=1"):
        TIME_BOX.lateral_and_initial(1)


def test_bad_compositions() -> None:
    """Factors need equally many points, parts points of one dimension."""
    with pytest.raises(ValueError, match=r"same number of points .* got n=\[2, 3\]"):
        Product((BOX.interior(2), BOX.interior(3)))
    with pytest.raises(ValueError, match=r"same dimension .* got dim=\[3, 1\]"):
        Union((BOX.interior(2), Box.unit(1).interior(2)))
    with pytest.raises(ValueError, match=r"at least one, got n=\[\]"):
        Product(())


def test_bad_fixed_points() -> None:
    """Fixed points form a non-empty, finite matrix."""
    with pytest.raises(ValueError, match=r"non-empty matrix \[n, dim\], got shape \(3,\). Use"):
        Fixed(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got shape \(0, 2\)"):
        Fixed(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="Points must be finite, got NaN"):
        Fixed(torch.tensor([[math.nan]]))
