"""Polygons, uniform points in them and on their edges, and outward normals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from pinncurv.problems.samplers import Drawn

Point = Sequence[float]


@dataclass(frozen=True)
class Polygon:
    """A polygon in the plane, convex or not, without holes.

    Edge i is the segment from vertex i to the next one; the last edge ends at vertex 0.

    Args:
        vertices: Three or more vertices in their order along the boundary, either way round.

    Raises:
        ValueError: If there are fewer, one is no point of the plane, or edges meet elsewhere than
            in the vertex between them.
    """

    vertices: Sequence[Point]

    def __post_init__(self) -> None:
        """Store the vertices as tuples of floats and check them."""
        vertices = tuple(tuple(float(c) for c in vertex) for vertex in self.vertices)
        object.__setattr__(self, "vertices", vertices)
        finite = all(len(v) == 2 and all(map(math.isfinite, v)) for v in vertices)
        if len(vertices) < 3 or not finite:
            raise ValueError(
                "A polygon must have at least three vertices of two finite numbers each, got "
                f"{vertices}. Pass [(x, y), ...]."
            )
        edges = list(zip(vertices, (*vertices[1:], vertices[0]), strict=True))
        for (i, one), (j, other) in combinations(enumerate(edges), 2):
            if _meet(one, other):
                raise ValueError(
                    "Edges of a polygon must meet in the vertex between them only, got edge "
                    f"{i}, {one[0]} to {one[1]}, and edge {j}, {other[0]} to {other[1]}. Order the "
                    "vertices along the boundary, each once."
                )

    @classmethod
    def l_shape(cls) -> "Polygon":
        """Return [-1, 1]² without its lower right quarter.

        Edges 0 and 1 meet at the corner at the origin, whose inner angle is 3π/2.
        """
        return cls([(0, -1), (0, 0), (1, 0), (1, 1), (-1, 1), (-1, -1)])

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return 2

    def interior(self, n: int) -> Drawn:
        """Return a sampler of n points, uniform in the polygon."""
        return Drawn(self._inside, n, 2)

    def boundary(self, n: int, edges: Sequence[int] | None = None) -> Drawn:
        """Return a sampler of n points, uniform on some edges (all of them for None).

        Raises:
            ValueError: If an edge does not exist, or there is none.
        """
        count = len(self.vertices)
        chosen = tuple(range(count) if edges is None else edges)
        if not chosen or not set(chosen) <= set(range(count)):
            raise ValueError(
                f"Edges must be numbers from 0 to {count - 1}, at least one, got {chosen}. Edge i "
                "starts at vertex i."
            )
        return Drawn(partial(self._on_edges, chosen), n, 2)

    def contains(self, x: Float[Tensor, "N 2"]) -> Bool[Tensor, " N"]:
        """Return whether points are inside: a ray to the right crosses an odd number of edges."""
        a, b = self._ends(x)
        above = a[:, 1] > x[:, 1:], b[:, 1] > x[:, 1:]
        slope = (b[:, 0] - a[:, 0]) / (b[:, 1] - a[:, 1])  # of horizontal edges, which none crosses
        right = x[:, :1] < a[:, 0] + (x[:, 1:] - a[:, 1]) * slope
        return ((above[0] != above[1]) & right).sum(1) % 2 == 1

    def normal(self, x: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
        """Return the outward unit normals at points of the boundary: those of the nearest edge."""
        a, b = self._ends(x)
        along = b - a
        share = ((x[:, None] - a) * along).sum(2) / along.square().sum(1)
        nearest = a + share.clamp(0, 1).unsqueeze(2) * along
        edge = along[(x[:, None] - nearest).square().sum(2).argmin(1)]
        # to the right of the way along the boundary, if that is counterclockwise
        turned = torch.stack([edge[:, 1], -edge[:, 0]], 1) / edge.norm(dim=1, keepdim=True)
        return turned * torch.sign((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum())

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where edges start and end."""
        vertices = x.new_tensor(self.vertices)
        return vertices, vertices.roll(-1, 0)

    def _inside(self, n: int, generator: Generator) -> Tensor:
        vertices = torch.tensor(self.vertices, dtype=torch.float64, device=generator.device)
        low, high = vertices.amin(0), vertices.amax(0)
        found = vertices[:0]
        while len(found) < n:
            x = low + (high - low) * torch.rand(
                n, 2, generator=generator, dtype=torch.float64, device=generator.device
            )
            found = torch.cat([found, x[self.contains(x)]])
        return found[:n]

    def _on_edges(self, edges: tuple[int, ...], n: int, generator: Generator) -> Tensor:
        share = torch.rand(n, 1, generator=generator, dtype=torch.float64, device=generator.device)
        a, b = (ends[list(edges)] for ends in self._ends(share))
        lengths = (b - a).norm(dim=1)
        drawn = torch.multinomial(lengths, n, replacement=True, generator=generator)
        return a[drawn] + share * (b - a)[drawn]


def _meet(one: tuple[Point, Point], other: tuple[Point, Point]) -> bool:
    """Return whether two edges have a point in common that is no end which they share."""
    (a, b), (c, d) = one, other
    shared = {tuple(a), tuple(b)} & {tuple(c), tuple(d)}
    if a == b or c == d or len(shared) == 2:
        return True
    if shared:  # they may lie on each other
        (corner,) = shared
        (p,), (q,) = ({tuple(a), tuple(b)} - shared), ({tuple(c), tuple(d)} - shared)
        inner = sum((p[k] - corner[k]) * (q[k] - corner[k]) for k in (0, 1))
        return _turn(corner, p, q) == 0 and inner > 0
    crossed = _turn(a, b, c) * _turn(a, b, d) <= 0 and _turn(c, d, a) * _turn(c, d, b) <= 0
    boxes = all(
        max(min(a[k], b[k]), min(c[k], d[k])) <= min(max(a[k], b[k]), max(c[k], d[k]))
        for k in (0, 1)
    )
    return crossed and boxes


def _turn(a: Point, b: Point, c: Point) -> float:
    """Return twice the signed area of a triangle."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
