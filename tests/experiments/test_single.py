"""The tables of what float32 costs and saves."""

import re

import pytest

from experiments import single


@pytest.fixture
def small(monkeypatch):
    size = single.Size((2, 18, 1), single.poisson2d, (30, 12))
    monkeypatch.setitem(single.SIZES, "s", size)


def test_angles_fall_with_the_damping(small, capsys):
    single.main(["accuracy", "--steps", "0", "2", "--dampings", "1e-6", "1e-1"])
    rows = re.findall(r"^\| 1e-0[16] \| (.+) \|$", capsys.readouterr().out, re.MULTILINE)
    angles = [[float(cell) for cell in row.split(" | ")] for row in rows]
    assert [len(row) for row in angles] == 4 * [len(single.DIRECTIONS)]
    for little, much in (angles[:2], angles[2:]):
        assert all(b < a and b < 1e-6 for a, b in zip(little, much, strict=True))


def test_times(small, capsys):
    single.main(["times", "--turns", "1"])
    rows = re.findall(r"^\| s \(73\) \| (\w+) \|(.+)\|$", capsys.readouterr().out, re.MULTILINE)
    assert [label for label, _ in rows] == ["KFAC", "matrix"]
    for _, numbers in rows:
        double, rounded, ratio = map(float, numbers.split("|"))
        assert min(double, rounded, ratio) > 0
