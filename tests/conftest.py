"""What every test may use: seeded randomness, and cores shared fairly with the other workers.

There is no global default dtype: a test names the dtype of its tensors, float64 unless float32 is
what it is about.
"""

import functools
import itertools
import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from tests import devices

_check = jaxtyping.jaxtyped


def _check_often(**options):
    """Check shapes in the first 20 calls of each function and in every 32nd thereafter.

    To check all takes three times as long, since iterations call a few functions thousands of
    times. The import hook of ``pyproject.toml`` decorates everything in the package with this.
    """

    def decorate(thing):
        if "<locals>" in thing.__qualname__:  # made in every call of another: 3 ms each time
            return thing
        checked = _check(**options)(thing)
        if isinstance(thing, type):
            return checked
        calls = itertools.count()

        @functools.wraps(thing)
        def wrapper(*args, **kwargs):
            call = next(calls)
            return (checked if call < 20 or call % 32 == 0 else thing)(*args, **kwargs)

        return wrapper

    return decorate


jaxtyping.jaxtyped = _check_often


def pytest_configure() -> None:
    """Divide the cores among pytest-xdist's workers, and offer the pretended device."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    devices.register()


@pytest.fixture
def generator() -> torch.Generator:
    """Return a generator of random numbers with a fixed seed, a new one for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """Run a test as users run the package: without checks of shape annotations, and faster."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
