"""Leaves the number of threads, which a run sets, as it was; and runs without figures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import figures


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the second that every figure of a training takes."""

    def draw(path: Path, *_: object) -> Path:
        return path

    monkeypatch.setattr(figures, "draw_run", draw)
