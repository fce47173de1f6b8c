"""The package as such: metadata, typing marker, and that its annotations are checked here."""

import importlib
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

import pinncurv

SHAPES = """
from jaxtyping import Float
from torch import Tensor

def trace(matrix: Float[Tensor, "d d"], scale: float = 1.0) -> Float[Tensor, ""]:
    return scale * matrix.trace()
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a module that, as far as the import system is concerned, is part of pinncurv."""
    (tmp_path / "shapes.py").write_text(SHAPES)
    monkeypatch.setattr(pinncurv, "__path__", [*pinncurv.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    module = importlib.import_module("pinncurv.shapes")
    monkeypatch.delitem(sys.modules, "pinncurv.shapes")
    monkeypatch.delattr(pinncurv, "shapes")
    return module


def test_version_is_that_of_the_distribution():
    assert pinncurv.__version__ == version("pinncurv")


def test_package_is_marked_as_typed():
    assert files("pinncurv").joinpath("py.typed").is_file()


def test_shape_annotations_are_checked(shapes):
    assert shapes.trace(torch.eye(2, dtype=torch.float64)) == 2
    with pytest.raises(TypeCheckError, match="trace"):
        shapes.trace(torch.zeros(2, 3, dtype=torch.float64))


def test_shape_annotations_are_checked_in_some_of_many_calls(shapes):
    for _ in range(100):
        shapes.trace(torch.eye(2, dtype=torch.float64))
    with pytest.raises(TypeCheckError, match="trace"):
        [shapes.trace(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(32)]


def test_an_int_is_a_float(shapes):
    assert shapes.trace(torch.eye(2, dtype=torch.float64), scale=3) == 6


def test_packages_and_names_are_listed_and_found():
    folders = Path(pinncurv.__file__).parent.glob("*/__init__.py")
    packages = {path.parent.name for path in folders}
    assert packages <= set(dir(pinncurv))
    for name in packages:
        assert pinncurv.__getattr__(name) is importlib.import_module(f"pinncurv.{name}")
    assert all(getattr(pinncurv, name) for name in dir(pinncurv))
